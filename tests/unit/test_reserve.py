"""The reserve of memory, in a process of its own whose address space is limited."""

from __future__ import annotations

import subprocess
import sys

from tests.support.mounts import environment

SCRIPT = """
import errno, mmap, resource, time
from unionfs.core.reserve import Reserve

def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY if more is None else used + more, resource.RLIM_INFINITY))

def error(call, times=1):
    try:
        for _ in range(times):
            call()
    except OSError as exc:
        return exc.errno
    return 0

spent = []
reserve = Reserve()
reserve.on_spent = lambda: spent.append(1)
assert error(reserve.check, 1000) == 0
limit(3 << 20)
assert error(reserve.check, 1000) == error(reserve.before_change) == 0, "there is room"
limit(1 << 20)
assert error(reserve.before_change) == 0, "as long as it is kept it is enough to try now and then"
assert error(reserve.check, 256) == errno.ENOMEM and spent == [1], "known before anything fails"
assert error(reserve.before_change) == 0, "what was kept is there now"
assert error(reserve.check) == errno.ENOMEM
filled = mmap.mmap(-1, 12 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
assert error(reserve.before_change) == errno.ENOMEM, "that has come to an end, too"
filled.close()
assert error(reserve.before_change) == 0
limit(None)
time.sleep(0.15)
assert error(reserve.check, 1000) == 0 and spent == [1], "it is back"
reserve.spend()
reserve.spend()
assert spent == [1, 1]
"""


def test_it_is_given_up_before_an_allocation_fails() -> None:
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
