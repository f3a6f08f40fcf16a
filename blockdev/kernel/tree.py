# SPDX-License-Identifier: Apache-2.0
"""Mounts by descriptor (man 2 open_tree, move_mount; Linux: include/uapi/linux/mount.h), which the C library of
Debian 12 has no functions for."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

# The numbers of every architecture (Linux: include/uapi/asm-generic/unistd.h).
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_OPEN_TREE_CLONE: Final = 0x1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_AT_FDCWD: Final = -100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def clone(source: str | Path) -> int:
    """A descriptor (O_PATH) of what is mounted at `source`, once more and mounted nowhere: it goes with its last
    descriptor. Raises OSError."""
    return call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def move(tree: int, target: Path) -> None:
    """Mount it at `target`. Raises OSError."""
    call(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def call(number: int, *arguments: int | bytes) -> int:
    """syscall(2). Raises OSError."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
