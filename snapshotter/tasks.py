# SPDX-License-Identifier: Apache-2.0
"""Work that cancelling must not cut in two, and work that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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


class Background:
    """Not part of a reply: what does not get done here, the next start does."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    def later(self, what: str, work: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._log.error("left for the next start", what=what, error=f"{type(error).__name__}: {error}")

        task = asyncio.create_task(run())
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
