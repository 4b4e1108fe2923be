"""Telling a service manager how a foreground daemon is: sd_notify(3) without its library.

systemd gives a service of `Type=notify` the name of a datagram socket in NOTIFY_SOCKET; a leading `@` stands for the
NUL byte of an abstract name. Whoever has no such variable has nobody to tell.
"""

from __future__ import annotations

import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"


def tell(state: str) -> None:
    """Send one line to the service manager, if there is one; that nobody reads it is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    name = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else os.fsencode(address)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode("ascii"), name)
    except OSError:
        return
