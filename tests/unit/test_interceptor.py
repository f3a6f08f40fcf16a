# SPDX-License-Identifier: Apache-2.0
"""A real gRPC server with the interceptor, and behaviours that go wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from snapshotter import interceptor as module
from snapshotter.api.proto import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.interceptor import Interceptor
from snapshotter.tasks import to_the_end

STAT = snapshots_pb2.StatSnapshotRequest(snapshotter="s", key="k")


class Behaviour(snapshots_pb2_grpc.SnapshotsServicer):
    """Stat hangs in a thread, as a mount(2) may, until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.undone = 0
        self.closed = 0

    async def Stat(self, request: Any, context: Any) -> snapshots_pb2.StatSnapshotResponse:
        try:
            await to_the_end(asyncio.to_thread(self.go.wait))
        except asyncio.CancelledError:
            self.undone += 1
            raise
        return snapshots_pb2.StatSnapshotResponse()

    async def List(self, request: Any, context: Any) -> AsyncGenerator[snapshots_pb2.ListSnapshotsResponse, None]:
        try:
            while True:
                yield snapshots_pb2.ListSnapshotsResponse(info=[snapshots_pb2.Info(name="n" * 100_000)])
        finally:
            self.closed += 1


class Served:
    def __init__(self, behaviour: Behaviour, calls: Interceptor, stub: snapshots_pb2_grpc.SnapshotsStub) -> None:
        self.behaviour, self.calls, self.stub = behaviour, calls, stub


@pytest_asyncio.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(module, "_SECONDS", 0.3)
    behaviour, calls = Behaviour(), Interceptor(1.0)
    server = grpc.aio.server(interceptors=[calls])
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(behaviour, server)
    server.add_insecure_port(f"unix:{tmp_path}/s.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        yield Served(behaviour, calls, snapshots_pb2_grpc.SnapshotsStub(channel))
    behaviour.go.set()
    await server.stop(0)


async def until(check: Any) -> None:
    for _ in range(10_000):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


async def test_a_call_is_answered_at_its_deadline_whatever_hangs(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Stat(STAT, timeout=30)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "Stat" in caught.value.details()
    # What it was in goes on, and is undone when it comes back.
    assert served.behaviour.undone == 0
    served.behaviour.go.set()
    await until(lambda: served.behaviour.undone == 1)
    assert await served.stub.Stat(STAT, timeout=30) == snapshots_pb2.StatSnapshotResponse()


async def test_a_caller_that_goes_away_leaves_the_step_to_end(served: Served) -> None:
    call = served.stub.Stat(STAT, timeout=30)
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.sleep(0.1)
    assert served.behaviour.undone == 0
    served.behaviour.go.set()
    await until(lambda: served.behaviour.undone == 1)


async def test_a_stop_waits_for_what_outlives_its_call_but_not_for_ever(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await served.stub.Stat(STAT, timeout=30)
    started = time.monotonic()
    await served.calls.drain()
    assert time.monotonic() - started < 60
    assert served.behaviour.undone == 0
    asyncio.get_running_loop().call_later(0.05, served.behaviour.go.set)
    await served.calls.drain()
    assert served.behaviour.undone == 1


async def test_a_listing_is_closed_when_its_reader_goes_and_when_its_time_is_up(served: Served) -> None:
    call = served.stub.List(snapshots_pb2.ListSnapshotsRequest(), timeout=30)
    await call.read()
    call.cancel()
    await until(lambda: served.behaviour.closed == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.List(snapshots_pb2.ListSnapshotsRequest(), timeout=30):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: served.behaviour.closed == 2)
    # One that reads no further, but stays.
    call = served.stub.List(snapshots_pb2.ListSnapshotsRequest(), timeout=30)
    await call.read()
    await until(lambda: served.behaviour.closed == 3)
    call.cancel()
