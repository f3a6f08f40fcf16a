# SPDX-License-Identifier: Apache-2.0
"""Checks and collections of a node's store: asked of the daemon that serves, done here where none does."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.json_format import MessageToDict

from snapshotter.api.proto import maintenance_pb2, maintenance_pb2_grpc
from snapshotter.collector import Collected
from snapshotter.config import Config
from snapshotter.errors import NotFound, SnapshotterError, Unavailable
from snapshotter.fsck import Checked, Finding
from snapshotter.metastore import FILE_NAME
from snapshotter.node import Node, opened

_CALL_SECONDS: Final = 30.0


async def check(
    settings: Config, *, repair: bool, bytes_per_second: int, blocks_only: bool
) -> AsyncGenerator[Finding | Checked, None]:
    """Raises SnapshotterError, ConfigError, OSError, KernelError."""
    async with _channel(settings) as channel:
        if channel is None:
            async with (
                _offline(settings) as node,
                aclosing(
                    node.fsck.check(repair=repair, bytes_per_second=bytes_per_second, blocks_only=blocks_only)
                ) as events,
            ):
                async for event in events:
                    yield event
            return
        stub = maintenance_pb2_grpc.MaintenanceStub(channel)  # type: ignore[no-untyped-call]
        request = maintenance_pb2.CheckRequest(
            repair=repair, bytes_per_second=bytes_per_second, blocks_only=blocks_only
        )
        try:
            async for message in stub.Check(request):
                if message.HasField("progress"):
                    yield Checked(message.progress.done_bytes, message.progress.total_bytes)
                else:
                    found = message.finding
                    yield Finding(found.what, found.problem, found.outcome, found.advice)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None


async def collect(settings: Config, *, everything: bool) -> Collected:
    """Raises as `check`."""
    async with _channel(settings) as channel:
        if channel is None:
            async with _offline(settings) as node:
                return await node.collector.collect(everything=everything)
        stub = maintenance_pb2_grpc.MaintenanceStub(channel)  # type: ignore[no-untyped-call]
        try:
            done = await stub.Collect(maintenance_pb2.CollectRequest(everything=everything))
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        return Collected(done.layers, done.size_bytes)


async def status(settings: Config) -> dict[str, Any]:
    """Raises Unavailable, OSError."""
    async with _served(settings) as stub:
        reply = await stub.Status(maintenance_pb2.StatusRequest(), timeout=_CALL_SECONDS)
    found: dict[str, Any] = MessageToDict(reply.status)
    return found


async def set_log_level(settings: Config, level: str) -> str:
    """The one before. Raises Unavailable, OSError."""
    async with _served(settings) as stub:
        request = maintenance_pb2.SetLogLevelRequest(level=level)
        return str((await stub.SetLogLevel(request, timeout=_CALL_SECONDS)).previous)


@asynccontextmanager
async def _served(settings: Config) -> AsyncIterator[Any]:
    """What only a daemon can be asked."""
    async with _channel(settings) as channel:
        if channel is None:
            raise Unavailable(f"no daemon serves at {settings.address}")
        try:
            yield maintenance_pb2_grpc.MaintenanceStub(channel)  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None


@asynccontextmanager
async def _channel(settings: Config) -> AsyncIterator[grpc.aio.Channel | None]:
    """To the daemon; None where nobody listens."""
    if not _is_served(settings.address):
        yield None
        return
    async with grpc.aio.insecure_channel(f"unix:{settings.address}") as channel:
        yield channel


def _is_served(address: str) -> bool:
    """Raises OSError where it cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


@asynccontextmanager
async def _offline(settings: Config) -> AsyncIterator[Node]:
    """The store itself, locked meanwhile, with everything that was left behind."""
    if not (Path(settings.root) / FILE_NAME).exists():
        raise NotFound(f"{settings.root} holds no {FILE_NAME}, and no daemon serves at {settings.address}")
    async with opened(settings, recover=False) as node:
        yield node


def _failed(error: grpc.aio.AioRpcError) -> SnapshotterError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable("the daemon that serves is of another version: restart it")
    return Unavailable(f"tardev-snapshotter: {error.details()}")
