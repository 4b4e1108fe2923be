"""A union file system in user space: overlayfs's semantics and on-disk format, served through FUSE."""

__version__ = "0.1.0"
