# SPDX-License-Identifier: Apache-2.0
"""Named points in the durable order, where crash tests stop the daemon.

TARDEV_TRACE_KILL="point[:n]" ends the process by SIGKILL when it comes by for the n-th time;
TARDEV_TRACE_PAUSE="point=path" makes it wait there until the path exists. Both unset: a no-op.
A test that has the parts in its own process sets `hook`, which is told of every point.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

_KILL: Final = os.environ.get("TARDEV_TRACE_KILL", "")
_PAUSE: Final = os.environ.get("TARDEV_TRACE_PAUSE", "")
_seen: Counter[str] = Counter()
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
