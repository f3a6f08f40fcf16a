# SPDX-License-Identifier: Apache-2.0
"""Named points in the durable order, where crash tests stop the daemon.

TARDEV_TRACE_KILL="point[:n]" ends the process by SIGKILL when it comes by for the n-th time;
TARDEV_TRACE_PAUSE="point=path" makes it wait there until the path exists. TARDEV_TRACE_CONTROL is a
directory: every point is appended, a line each, to the file `passed` in it, and the file `kill` there
says "point:n" of those lines, while the process runs. All unset: a no-op.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Final

_KILL: Final = os.environ.get("TARDEV_TRACE_KILL", "")
_PAUSE: Final = os.environ.get("TARDEV_TRACE_PAUSE", "")
_CONTROL: Final = os.environ.get("TARDEV_TRACE_CONTROL", "")
_seen: Counter[str] = Counter()
_lock = threading.Lock()  # points are passed by several threads


def trace(point: str) -> None:
    if _KILL:
        name, _, count = _KILL.partition(":")
        if name == point:
            _seen[point] += 1
            if _seen[point] == int(count or 1):
                os.kill(os.getpid(), signal.SIGKILL)
    if _PAUSE:
        name, _, path = _PAUSE.partition("=")
        while name == point and not os.path.exists(path):
            time.sleep(0.01)
    if _CONTROL:
        _obey(point)


def _obey(point: str) -> None:
    with _lock, open(f"{_CONTROL}/passed", "a+") as passed:
        passed.write(f"{point}\n")
        passed.seek(0)
        lines = passed.read().splitlines()
        with suppress(FileNotFoundError), open(f"{_CONTROL}/kill") as kill:
            name, _, count = kill.read().strip().partition(":")
            if name == point and lines.count(point) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
