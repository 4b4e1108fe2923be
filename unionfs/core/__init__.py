"""The union itself: which file an operation means, and what a change of it takes.

`union` is its face, `sysio` its ground. Synchronous; knows neither pyfuse3 nor trio, raises plain OSError, and works on
two directories without any mount.
"""
