"""The life of one mount: the process that serves it, how it ends, and what it tells of itself."""
