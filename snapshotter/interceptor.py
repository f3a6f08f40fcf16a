# SPDX-License-Identifier: Apache-2.0
"""Around every call: a deadline of its own (containerd sets none), one log line, metrics, the error's status.

A call is answered at its deadline whatever it is in. A step that cancelling must not cut in two
(`tasks.to_the_end`), a mount(2) that hangs for one, then goes on alone, with the locks it holds; the
call undoes or forgets it once that is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final

import grpc

from snapshotter import metrics
from snapshotter.errors import DeadlineExceeded, SnapshotterError, Unavailable, one_line, translate
from snapshotter.log import get_logger

_SECONDS: Final = 60.0
# Those that may wait for a build, which has a bound of its own below this; a Diff takes as long as one.
_BUILDING: Final = frozenset({"Apply", "Commit", "Diff"})
_BUILDING_SLACK_SECONDS: Final = 60.0


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, build_seconds: float) -> None:
        self._build_seconds = build_seconds
        self._left: set[asyncio.Task[Any]] = set()
        self._log = get_logger()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        service, _, method = details.method.rpartition("/")
        if handler is None or not service.startswith("/containerd."):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _bound(self, method: str) -> float:
        return self._build_seconds + _BUILDING_SLACK_SECONDS if method in _BUILDING else _SECONDS

    def _unary(
        self, method: str, behaviour: Callable[[Any, Any], Coroutine[Any, Any, Any]]
    ) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> Any:
            with _Call(self._log, method, request) as done:
                try:
                    return await self._within(self._bound(method), behaviour(request, context))
                except asyncio.CancelledError as error:
                    failure = _of_another(error)
                    done.failed(failure)
                except Exception as error:
                    failure = self._failure(error, method)
                    done.failed(failure)
            await context.abort(failure.code, one_line(str(failure)))

        return call

    def _streaming(
        self, method: str, behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], Any]:
        # A coroutine that writes, where a generator would not be told that its time is up while its reader rests.
        async def call(request: Any, context: Any) -> None:
            with _Call(self._log, method, request) as done:
                try:
                    async with asyncio.timeout(self._bound(method)), aclosing(behaviour(request, context)) as messages:
                        async for message in messages:
                            await context.write(message)
                        return
                except asyncio.CancelledError as error:
                    failure = _of_another(error)
                    done.failed(failure)
                except Exception as error:
                    failure = self._failure(error, method)
                    done.failed(failure)
            await context.abort(failure.code, one_line(str(failure)))

        return call

    async def _within(self, seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
        """Raises TimeoutError, and what the work raises. It may outlive this."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task], timeout=seconds)
            if task.done():
                return task.result()
            raise TimeoutError
        finally:
            if not task.done():
                task.cancel()
                self._left.add(task)
                metrics.RPC_LEFT.inc()
                task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        metrics.RPC_LEFT.dec()
        if not task.cancelled():
            task.exception()  # nobody is left to be told

    async def drain(self) -> None:
        """Wait for what has outlived its call, but no longer than for a call."""
        if self._left:
            await asyncio.wait(self._left, timeout=_SECONDS)

    def _failure(self, error: Exception, method: str) -> SnapshotterError:
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"{method} took over {self._bound(method)} s")
        known = translate(error)
        if known.code is grpc.StatusCode.INTERNAL:
            self._log.error("internal error", method=method, exc_info=error)
        return known


def _of_another(error: asyncio.CancelledError) -> SnapshotterError:
    """The status where something else than this call was cancelled: gRPC would send none, and containerd would
    wait for ever. Raises the error where the caller has gone away."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    return Unavailable("what this call waited for was given up; try again")


class _Call:
    """One call's place in log and metrics, however it ends."""

    def __init__(self, log: Any, method: str, request: Any) -> None:
        self._log, self._method = log, method
        # The few fields that say what a call was about; labels and annotations are the clients' own.
        self._about = {
            field: one_line(str(value))
            for field in ("snapshotter", "key", "parent", "name")
            if (value := getattr(request, field, ""))
        }
        if method == "Apply":
            self._about["blob"] = one_line(request.diff.digest)
        self._code = grpc.StatusCode.OK
        self._error = ""

    def failed(self, failure: SnapshotterError) -> None:
        self._code, self._error = failure.code, one_line(str(failure))

    def __enter__(self) -> _Call:
        self._started = time.monotonic()
        self._log.debug("rpc begins", method=self._method, **self._about)
        metrics.RPC_RUNNING.labels(self._method).inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if error is not None:
            self._code = grpc.StatusCode.CANCELLED
        seconds = time.monotonic() - self._started
        metrics.RPC_RUNNING.labels(self._method).dec()
        metrics.RPC_SECONDS.labels(self._method, self._code.name).observe(seconds)
        if self._error:
            self._about["error"] = self._error
        self._log.info("rpc", method=self._method, code=self._code.name, seconds=round(seconds, 4), **self._about)
