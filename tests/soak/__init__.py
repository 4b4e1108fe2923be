"""The long run: `make soak`; `tests/soak/__main__.py` tells what it does."""
