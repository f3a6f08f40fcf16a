# SPDX-License-Identifier: Apache-2.0
"""A rate for who reads in the background, in a thread of its own."""

from __future__ import annotations

import threading
import time
from typing import Final

# What was not read in time is not caught up with at once.
_BEHIND_SECONDS: Final = 1.0


class Stopped(Exception):
    """Nobody waits for the result any more."""


class Pace:
    def __init__(self, bytes_per_second: int) -> None:
        """0: as quick as it gets, as long as it is not stopped."""
        self._rate = bytes_per_second
        self._stop = threading.Event()
        self._next = time.monotonic()

    def __call__(self, size_bytes: int) -> None:
        """Before so many bytes are read. Raises Stopped."""
        now = time.monotonic()
        if self._rate:
            self._next = max(self._next, now - _BEHIND_SECONDS)
            self._stop.wait(max(0.0, self._next - now))
            self._next += size_bytes / self._rate
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        self._stop.set()
