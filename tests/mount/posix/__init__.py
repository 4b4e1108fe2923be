"""The table of POSIX behaviours: each is said once and must hold on a plain directory, on kernel overlayfs and on ours."""

from tests.mount.posix import directories, files, links, metadata, names, people, renames
from tests.mount.posix.table import BEHAVIOURS, Behaviour

__all__ = ["BEHAVIOURS", "Behaviour", "directories", "files", "links", "metadata", "names", "people", "renames"]
