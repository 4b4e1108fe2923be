"""Fuzzing of every parser of bytes from layers, archives and users, and of the command line."""
