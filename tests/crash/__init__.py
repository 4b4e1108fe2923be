"""The crash harness: `make crash`; `tests/crash/__main__.py` tells what it does."""
