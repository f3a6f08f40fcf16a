# SPDX-License-Identifier: Apache-2.0
"""An event loop whose blocking work runs when, and in the order in which, a test says.

What the program hands to a thread becomes a job. While a callback is ready the loop runs it, as ever; once it would
wait it asks for a turn: one job is begun or goes on, a timer goes off, a client starts. Time passes only by timers. A
job runs in place, or on a thread of its own that rests at its beginning, at each trace point and at its end; one thread
at a time runs, so a run is a function of its choices.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final


class Crash(BaseException):
    """The process is gone: nothing that runs from now on has an effect."""


class Stuck(AssertionError):
    """Nothing can go on, and something is not over; or it goes on for ever."""


@dataclass(slots=True, eq=False)
class Job:
    executor: Executor | None
    work: Callable[[], Any]
    future: asyncio.Future[Any]
    owner: int
    thread: _Resting | None = None


class _Resting:
    """A job on a thread, which runs only within `go_on`."""

    current: _Resting | None = None

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        self.over = True
        self._rests.release()

    def go_on(self) -> None:
        """To its next rest, or its end."""
        _Resting.current = self
        self._go.release()
        self._rests.acquire()
        _Resting.current = None
        if self.over:
            self._thread.join()

    def rest(self) -> None:
        """On its thread."""
        self._rests.release()
        self._go.acquire()

    @property
    def is_here(self) -> bool:
        return threading.current_thread() is self._thread


class _Selector(selectors.SelectSelector):
    """Of a loop that has no input but its turns."""

    turn: Callable[[bool], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.turn(timeout is not None)
        return []


_STEPS_MAX: Final = 20_000
_TIMER: Final = 240  # of a choice: a timer goes off while there is work to do,
_SOON_SECONDS: Final = 2.0  # if it does soon: work does not take minutes


# On whose behalf something runs.
owner: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("owner", default=0)

_PRIORITIES: Final = 8
_CHANGES: Final = 4
_CHANGED_WITHIN: Final = 64
_UNIFORM: Final = 100  # of the 256 values of the first choice


class Choices:
    """From bytes, what goes on of what could: of all one each time, or mostly the same owner's.

    Uniform choices never let one thing wait while another takes thirty steps. So in the other way each owner has a
    priority, and at a few steps the one that is about to go on gets the lowest (Burckhardt et al., "A randomized
    scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010). Without bytes the first goes on.
    """

    def __init__(self, data: bytes) -> None:
        self._uniform = not data or data[0] < _UNIFORM
        self._data = data[1:]
        self._at = 0
        self._priorities = [*self._data[:_PRIORITIES], *bytes(_PRIORITIES - len(self._data[:_PRIORITIES]))]
        self._threads = [priority % 2 == 1 for priority in self._priorities]
        self._changes = {byte % _CHANGED_WITHIN for byte in self._data[_PRIORITIES : _PRIORITIES + _CHANGES]}

    def next(self, owners: list[int]) -> tuple[int, bool, bool]:
        """(which of them, whether on a thread, whether a timer comes first)."""
        self._at += 1
        if self._uniform:
            byte = self._data[self._at - 1] if self._at <= len(self._data) else 0
            return byte % len(owners), byte // len(owners) % 2 == 1, byte >= _TIMER
        picked = self._highest(owners)
        if self._at in self._changes:
            self._priorities[owners[picked] % _PRIORITIES] = -self._at
            picked = self._highest(owners)
        return picked, self._threads[owners[picked] % _PRIORITIES], False

    def _highest(self, owners: list[int]) -> int:
        return max(range(len(owners)), key=lambda index: (self._priorities[owners[index] % _PRIORITIES], -index))


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        selector.turn = self._turn
        self.set_exception_handler(lambda *_: None)
        self.now = 1000.0
        self.jobs: list[Job] = []
        self.ticks = 0
        self.crash_at = 0
        self.crashed = False
        # Clients that have not begun, with their number as owner; each call begins one.
        self.waiting: list[tuple[int, Callable[[], None]]] = []
        self.busy: Callable[[], bool] = lambda: False
        self.on_crash: Callable[[], None] = lambda: None
        self.on_turn: Callable[[], None] = lambda: None
        self._choices = Choices(b"")
        self._begun = 0

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future: asyncio.Future[Any] = self.create_future()
        if self.crashed:
            future.set_exception(Crash())
        else:
            self.jobs.append(Job(executor, lambda: func(*args), future, owner.get()))
        return future

    # The test's side

    def settle(self, choices: bytes) -> None:
        """Run until nothing is left to do but to wait for timers. Raises Crash, Stuck."""
        self._choices, self._begun = Choices(choices), self.ticks
        self.run_forever()
        if self.crashed:
            raise Crash

    def tick(self, where: str) -> None:
        """One more place at which the process may have died. Raises Crash."""
        self.ticks += 1
        if self.crashed:
            raise Crash(where)
        if self.crash_at and self.ticks >= self.crash_at:
            self.crashed = True
            self.on_crash()
            raise Crash(where)

    def at_trace_point(self, point: str) -> None:
        """The hook of `snapshotter.trace`."""
        resting = _Resting.current
        if resting is not None and resting.is_here:
            resting.rest()
        self.tick(point)

    def abandon(self) -> None:
        """After a crash: end all tasks and threads, which change nothing any more."""
        for job in self.jobs:
            if job.thread is not None:
                while not job.thread.over:
                    job.thread.go_on()
            if not job.future.done():
                job.future.set_exception(Crash())
        self.jobs.clear()
        self.waiting.clear()
        for _ in range(100):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        self.close()

    # One turn

    def _turn(self, has_timer: bool) -> None:
        if self.crashed:
            self.stop()
            return
        try:
            self._take_turn(has_timer)
        except Crash:
            self.stop()

    def _take_turn(self, has_timer: bool) -> None:
        self.on_turn()
        self.tick("turn")
        if self._ready:  # type: ignore[attr-defined]
            return
        if self.ticks - self._begun > _STEPS_MAX:
            raise Stuck("it goes on for ever")
        self.jobs = [job for job in self.jobs if job.thread is not None or not job.future.cancelled()]
        runnable = self._runnable()
        count = len(runnable) + len(self.waiting)
        if not count:
            if not self.busy():
                self.stop()
            elif not has_timer:
                raise Stuck("nothing can go on")
            else:
                self.now = max(self.now, self._next_timer())
            return
        owners = [job.owner for job in runnable] + [number for number, _ in self.waiting]
        number, on_thread, timer = self._choices.next(owners)
        if timer and has_timer and self._next_timer() <= self.now + _SOON_SECONDS:
            self.now = max(self.now, self._next_timer())
        elif number >= len(runnable):
            self.waiting.pop(number - len(runnable))[1]()
        else:
            self._go_on(runnable[number], on_thread=on_thread)

    def _runnable(self) -> list[Job]:
        """An executor with one thread does one thing after the other."""
        found, taken = [], set()
        for job in self.jobs:
            if getattr(job.executor, "_max_workers", 0) == 1:
                if id(job.executor) in taken:
                    continue
                taken.add(id(job.executor))
            found.append(job)
        return found

    def _next_timer(self) -> float:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return min(timer.when() for timer in timers if not timer.cancelled())

    def _go_on(self, job: Job, *, on_thread: bool) -> None:
        if job.thread is None and not on_thread:
            self.jobs.remove(job)
            try:
                result = contextvars.Context().run(job.work)
            except Exception as error:
                self._finish(job.future, None, error)
            else:
                self._finish(job.future, result, None)
            return
        if job.thread is None:
            job.thread = _Resting(job.work)
            return  # begun: no cancelling takes it back
        job.thread.go_on()
        if self.crashed:
            raise Crash
        if job.thread.over:
            self.jobs.remove(job)
            self._finish(job.future, job.thread.result, job.thread.error)

    @staticmethod
    def _finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
