"""Power cuts: `make powercut`; `tests/power/__main__.py` tells what it does."""
