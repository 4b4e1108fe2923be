"""The facade on temporary directories, without a mount."""
