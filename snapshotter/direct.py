# SPDX-License-Identifier: Apache-2.0
"""Reading past the page cache (man 2 open, O_DIRECT), where the file system can."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_ALIGNED_BYTES: Final = 4096  # no device of today wants more
_BUFFER_BYTES: Final = 1 << 20


@contextmanager
def opened_direct(path: Path) -> Iterator[Callable[[int, int], bytes]]:
    """(offset, size) -> bytes, less at the end of the file; for one thread. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    buffer = mmap.mmap(-1, _BUFFER_BYTES)
    view = memoryview(buffer)

    def read(offset: int, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            at = offset + len(found)
            first = at - at % _ALIGNED_BYTES
            wanted = min(_BUFFER_BYTES, -(-(offset + size - first) // _ALIGNED_BYTES) * _ALIGNED_BYTES)
            count = os.preadv(fd, [view[:wanted]], first)
            before = len(found)
            found += view[at - first : min(count, offset + size - first)]
            if len(found) == before:
                break
        return bytes(found)

    try:
        yield read
    finally:
        view.release()
        buffer.close()
        os.close(fd)
