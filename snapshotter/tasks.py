# SPDX-License-Identifier: Apache-2.0
"""Work that cancelling must not cut in two, and work that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from snapshotter.log import get_logger

_T = TypeVar("_T")


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """A caller that is cancelled meanwhile waits, too: what it holds, locks and descriptors, is still in use."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # nobody is left to be told
        raise cancelled
    return task.result()


_DRAIN_SECONDS: Final = 60.0
_FAILED_MAX: Final = 10_000  # what is more waits for the next start


class Background:
    """Not part of a reply: what fails here is done `again`, or by the next start."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: list[tuple[str, Callable[[], Coroutine[Any, Any, object]]]] = []
        self._log = get_logger()

    async def again(self) -> None:
        """All that has failed, once more."""
        failed, self._failed = self._failed, []
        for what, work in failed:
            await to_the_end(self.now(what, work))

    async def now(self, what: str, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """As `later`, and waited for."""
        try:
            await work()
        except Exception as error:
            if len(self._failed) < _FAILED_MAX:
                self._failed.append((what, work))
            self._log.error("left for the next Cleanup", what=what, error=f"{type(error).__name__}: {error}")

    def later(self, what: str, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """`work` may be called more than once."""
        task = asyncio.create_task(self.now(what, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """What is under way may start more. An unmount that hangs is not waited for."""
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            self._log.error("left for the next start", tasks=len(self._tasks))
