# SPDX-License-Identifier: Apache-2.0
"""Room that is kept for the transactions that give room back: on a full disk a removal needs some, too."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

# SQLite's log and the pages of a checkpoint, of one small transaction after the other.
RESERVE_BYTES: Final = 8 << 20


class Reserve:
    def __init__(self, path: Path, size_bytes: int = RESERVE_BYTES) -> None:
        self._path, self._size_bytes = path, size_bytes

    def keep(self) -> bool:
        """Whether it is there, after an attempt to have it."""
        with suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._size_bytes)
                return True
            except OSError:
                # Half of it is as good as none, and somebody else may need that half.
                self.give_up()
            finally:
                os.close(fd)
        return False

    def is_kept(self) -> bool:
        return self._path.exists()

    def give_up(self) -> bool:
        """False where there was none."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
