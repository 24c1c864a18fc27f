"""A kernel that gives no process the tiles of AMX: apart from the tests, since it must come before the kernels load."""

from __future__ import annotations

import ctypes
import errno
import os
import struct


def refuse_tiles():
    """The kernel refuses this process AMX's tiles from now on, as a container's filter may."""
    load, equal, give = 0x20, 0x15, 0x06
    arch_prctl, request, denied, allowed = 158, 0x1023, 0x00050000 | errno.EPERM, 0x7FFF0000
    number, argument = 0, 16  # where they lie in seccomp_data
    code = (
        (load, 0, 0, number),
        (equal, 0, 3, arch_prctl),
        (load, 0, 0, argument),
        (equal, 0, 1, request),
        (give, 0, 0, denied),
        (give, 0, 0, allowed),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    about = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(seccomp, by_filter, about, 0, 0) == 0, os.strerror(ctypes.get_errno())
