"""Small programs that workloads run where no common one does it. Each prints the seconds that its work itself took.

probe.py stat PATH N       N times stat: with caches off a lookup and a getattr request each
probe.py fstat PATH N      N times fstat of an open file: a getattr request each
probe.py sqlite PATH N     N commits of one row to a new database
probe.py append TREE       one byte appended to each file
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time


def stat(path: str, count: str) -> float:
    """Seconds of one stat(2) of `path`."""
    call = os.stat
    call(path)
    start = time.perf_counter()
    for _ in range(int(count)):
        call(path)
    return (time.perf_counter() - start) / int(count)


def fstat(path: str, count: str) -> float:
    """Seconds of one fstat(2) of `path`, opened before."""
    descriptor, call = os.open(path, os.O_RDONLY), os.fstat
    call(descriptor)
    start = time.perf_counter()
    for _ in range(int(count)):
        call(descriptor)
    return (time.perf_counter() - start) / int(count)


def sqlite(path: str, count: str) -> float:
    """Seconds of `count` transactions of one inserted row, SQLite's default journal and synchronous settings."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("create table entry (number integer primary key, text text)")
    start = time.perf_counter()
    for number in range(int(count)):
        database.execute("insert into entry values (?, ?)", (number, "x" * 200))
    return time.perf_counter() - start


def append(tree: str) -> float:
    """Seconds of appending a byte to each file below `tree`."""
    files = [os.path.join(directory, name) for directory, _, names in os.walk(tree) for name in names]
    start = time.perf_counter()
    for file in files:
        if not os.path.islink(file):
            with open(file, "ab", buffering=0) as opened:
                opened.write(b"x")
    return time.perf_counter() - start


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    print({"stat": stat, "fstat": fstat, "sqlite": sqlite, "append": append}[program](*arguments))
