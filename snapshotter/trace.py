# SPDX-License-Identifier: Apache-2.0
"""Named points in the durable order, where crash tests stop the daemon.

TARDEV_TRACE_KILL="point[:n]" ends the process by SIGKILL when it comes by for the n-th time;
TARDEV_TRACE_PAUSE="point=path" makes it wait there until the path exists. TARDEV_TRACE_CONTROL is a
directory: every point is appended, a line each, to the file `passed` in it, and the file `kill` there
says "point:n" of those lines, or nothing, while the process runs.
All unset: a no-op. A test that has the parts in its own process sets `hook`, which is told of every point.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

_KILL: Final = os.environ.get("TARDEV_TRACE_KILL", "")
_PAUSE: Final = os.environ.get("TARDEV_TRACE_PAUSE", "")
_CONTROL: Final = os.environ.get("TARDEV_TRACE_CONTROL", "")
_seen: Counter[str] = Counter()
_lock = threading.Lock()  # points are passed by several threads
if _CONTROL:
    # Opened once: where descriptors are short, passing a point is no error.
    _passed = os.open(f"{_CONTROL}/passed", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _kill = os.open(f"{_CONTROL}/kill", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
hook: Callable[[str], None] | None = None


def trace(point: str) -> None:
    if hook is not None:
        hook(point)
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
    with _lock:
        os.write(_passed, f"{point}\n".encode())
        passed = os.pread(_passed, os.fstat(_passed).st_size, 0).decode().splitlines()
        name, _, count = os.pread(_kill, 100, 0).decode().partition(":")
        if name == point and passed.count(point) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
