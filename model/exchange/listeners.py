"""Sockets of this process that listen: which they are, and how to make them deaf once everybody is in."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress


def listening() -> set[int]:
    """Return the descriptors of the sockets that accept connections."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since they were listed
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as same:
                    if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found.add(int(name))
    return found


def deafen(descriptors: Iterable[int]) -> None:
    """Have the kernel drop whatever comes to these TCP sockets from now on: nobody connects any more.

    Connections that there are go on, and whoever owns a socket does not notice. A Unix socket stays as it is, and all
    do where the kernel has no such filters.
    """
    attach_filter = 26  # SO_ATTACH_FILTER of socket(7), which Python does not name
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF_RET of no bytes
    program = struct.pack("HL", 1, ctypes.addressof(drop))
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as same, suppress(OSError):
            same.setsockopt(socket.SOL_SOCKET, attach_filter, program)
