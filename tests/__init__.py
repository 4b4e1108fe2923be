"""All tests of the union file system."""
