"""Tests against real mounts: ours, and kernel overlayfs as the oracle beside it."""
