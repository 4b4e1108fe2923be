"""A handler of the daemon that fails where it can't: put into a daemon from outside.

`command` starts a program in which Python runs, at its start, what stands in `_SITE`: that replaces the handlers of both
adapters (`unionfs.fuse.ops` and `unionfs.fuse.direct`) by ones that raise, once, when the flag file has their name.
"""

from __future__ import annotations

from pathlib import Path

from tests.support import patched

ERROR = "InjectedFault"
_SITE = f"""
import os
FLAG = os.environ["UFST_FLAG"]

class {ERROR}(Exception):
    pass

def check(name):
    try:
        with open(FLAG) as flag:
            wanted = flag.read()
    except FileNotFoundError:
        return
    if wanted == name:
        os.unlink(FLAG)
        raise {ERROR}(name)

def patch_ops(module):
    for name, wrapper in vars(module.UnionOperations).items():
        inner = getattr(wrapper, "__wrapped__", None)
        for cell in getattr(wrapper, "__closure__", None) or () if inner else ():
            if cell.cell_contents is inner:
                async def raising(*args, _inner=inner, _name=name, **kwargs):
                    check(_name)
                    return await _inner(*args, **kwargs)
                raising.__name__ = name
                cell.cell_contents = raising
    flags_now = module.UnionOperations._flags_now
    def raising(*args):
        check("ioctl")
        return flags_now(*args)
    module.UnionOperations._flags_now = raising

def patch_direct(module):
    for name, method in list(vars(module.Direct).items()):
        if callable(method) and not name.startswith("_"):
            def raising(*args, _inner=method, _name=name):
                check(_name)
                return _inner(*args)
            setattr(module.Direct, name, raising)

PATCHES = {{"unionfs.fuse.ops": patch_ops, "unionfs.fuse.direct": patch_direct}}
"""


def command(directory: Path) -> list[str]:
    """The words before a daemon's command; *directory* takes the code, and the file `flag` with a handler's name."""
    return patched.command(directory, _SITE, UFST_FLAG=directory / "flag")
