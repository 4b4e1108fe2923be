"""Change a file in its middle while it is open and mapped otherwise; everyone must see the same. A program of its own.

bigfile.py FILE
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys


def change(path: str) -> str:
    """Write, truncate and append through several descriptors; a digest of what the file is then."""
    reader = os.open(path, os.O_RDONLY)
    size = os.fstat(reader).st_size
    kept = os.pread(reader, 4096, size // 2)
    with open(path, "r+b", buffering=0) as writer:
        os.pwrite(writer.fileno(), b"changed" * 1000, size // 2 + 10)
        os.pwrite(writer.fileno(), b"end", size)
    with open(path, "rb") as fresh, mmap.mmap(fresh.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[size // 2 : size // 2 + 10] == kept[:10]
        assert mapped[size // 2 + 10 : size // 2 + 17] == b"changed"
        assert mapped[size:] == b"end"
        with open(path, "r+b", buffering=0) as again, mmap.mmap(again.fileno(), 0) as shared:
            shared[5:10] = b"mmap!"
            shared.flush()
        assert mapped[5:10] == b"mmap!", "a shared mapping shows what another one wrote"
    assert os.pread(reader, 5, 5) == b"mmap!", "the descriptor from before the copy-up sees the change"
    os.truncate(path, size - 100)
    assert os.fstat(reader).st_size == size - 100
    os.close(reader)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(change(sys.argv[1]))
