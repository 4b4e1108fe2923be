"""Trees out of and into tar archives, and from one directory into another, with all that a file has."""
