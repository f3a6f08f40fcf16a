# SPDX-License-Identifier: Apache-2.0
"""What of a file is in the host's page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def drop(paths: Iterable[Path]) -> None:
    """Only what nobody has mapped goes (man 2 posix_fadvise), and nothing that still has to be written."""
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def cached_bytes(path: Path) -> int:
    """Whole pages, so it may be a little more than the file has. Raises OSError."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    # Private and writable, since ctypes takes the address of nothing else; nothing is written.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), pages)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {path}")
    return sum(page & 1 for page in pages.raw) * mmap.PAGESIZE
