"""Shared helpers of the tests; nothing here imports the code under test."""
