# SPDX-License-Identifier: Apache-2.0
"""protobuf ↔ our types; decides nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter import VERSION
from snapshotter.api.proto import (
    diff_pb2,
    diff_pb2_grpc,
    maintenance_pb2,
    maintenance_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    types_pb2,
)
from snapshotter.content import Blob, Caller
from snapshotter.contracts import Mount
from snapshotter.errors import InvalidArgument, Unavailable, Unimplemented, one_line, translate
from snapshotter.figures import Figures
from snapshotter.fsck import Checked, Finding
from snapshotter.log import LEVELS, level, set_level
from snapshotter.metastore import Kind, Snapshot
from snapshotter.node import Node
from snapshotter.snapshots import Snapshots, applied_to
from snapshotter.status import status

_KINDS: Final = {
    Kind.VIEW: snapshots_pb2.VIEW,
    Kind.ACTIVE: snapshots_pb2.ACTIVE,
    Kind.COMMITTED: snapshots_pb2.COMMITTED,
    Kind.UNKNOWN: snapshots_pb2.UNKNOWN,
}
_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
# A message of the list stays far below gRPC's 4 MiB, labels (4 KiB each pair) included.
_LIST_MESSAGE_BYTES: Final = 256 << 10
_LIST_MESSAGE_INFOS: Final = 100  # as containerd's own server (contrib/snapshotservice)


def _caller(context: Any, key: str = "") -> Caller:
    metadata = {str(name): str(value) for name, value in context.invocation_metadata() or ()}
    return Caller.of(metadata, key)


def _mounts(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    return [types_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _from_mounts(mounts: Sequence[types_pb2.Mount]) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in mounts]


def _time(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def _info(snapshot: Snapshot) -> snapshots_pb2.Info:
    return snapshots_pb2.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        created_at=_time(snapshot.created_ns),
        updated_at=_time(snapshot.updated_ns),
        labels=snapshot.labels,
    )


class Waiting:
    """The node, which calls wait for while a start recovers what was before it. `root`: its directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._node: asyncio.Future[Node] = asyncio.get_running_loop().create_future()

    def over(self, node: Node) -> None:
        self._node.set_result(node)

    def failed(self, error: Exception) -> None:
        """Whoever waits is told that, too."""
        if not self._node.done():
            self._node.set_exception(Unavailable(f"the start failed: {error}"))
            self._node.exception()  # perhaps nobody waits

    async def node(self) -> Node:
        """Raises Unavailable."""
        return await asyncio.shield(self._node)

    async def figures(self) -> Figures:
        """Raises Unavailable, at once while the node is not there; OSError, KernelError, Internal."""
        if not self._node.done():
            raise Unavailable("the start is not over")
        return await self._node.result().figures()

    async def status(self) -> dict[str, Any]:
        """Raises OSError, KernelError, Internal."""
        about = {"version": VERSION, "pid": os.getpid(), "root": str(self.root), "log_level": level()}
        if not self._node.done():
            return {"state": "recovering", **about}
        node = self._node.result()
        return {"state": "serving", **about, **status(await node.figures(), node.settings)}

    async def snapshots(self) -> Snapshots:
        """Raises Unavailable."""
        return (await self.node()).snapshots


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    async def Prepare(self, request: Any, context: Any) -> snapshots_pb2.PrepareSnapshotResponse:
        snapshots = await self._waiting.snapshots()
        mounts = await snapshots.prepare(
            request.snapshotter, request.key, request.parent, dict(request.labels), _caller(context, request.key)
        )
        return snapshots_pb2.PrepareSnapshotResponse(mounts=_mounts(mounts))

    async def View(self, request: Any, context: Any) -> snapshots_pb2.ViewSnapshotResponse:
        snapshots = await self._waiting.snapshots()
        mounts = await snapshots.view(request.snapshotter, request.key, request.parent, dict(request.labels))
        return snapshots_pb2.ViewSnapshotResponse(mounts=_mounts(mounts))

    async def Mounts(self, request: Any, context: Any) -> snapshots_pb2.MountsResponse:
        snapshots = await self._waiting.snapshots()
        return snapshots_pb2.MountsResponse(mounts=_mounts(await snapshots.mounts(request.snapshotter, request.key)))

    async def Commit(self, request: Any, context: Any) -> Empty:
        snapshots = await self._waiting.snapshots()
        await snapshots.commit(
            request.snapshotter,
            request.name,
            request.key,
            request.parent,
            dict(request.labels),
            _caller(context, request.key),
        )
        return Empty()

    async def Remove(self, request: Any, context: Any) -> Empty:
        snapshots = await self._waiting.snapshots()
        await snapshots.remove(request.snapshotter, request.key)
        return Empty()

    async def Stat(self, request: Any, context: Any) -> snapshots_pb2.StatSnapshotResponse:
        snapshots = await self._waiting.snapshots()
        return snapshots_pb2.StatSnapshotResponse(info=_info(await snapshots.stat(request.snapshotter, request.key)))

    async def Update(self, request: Any, context: Any) -> snapshots_pb2.UpdateSnapshotResponse:
        snapshots = await self._waiting.snapshots()
        snapshot = await snapshots.update(
            request.snapshotter, request.info.name, dict(request.info.labels), list(request.update_mask.paths)
        )
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(snapshot))

    async def List(self, request: Any, context: Any) -> AsyncGenerator[snapshots_pb2.ListSnapshotsResponse, None]:
        message, size = snapshots_pb2.ListSnapshotsResponse(), 0
        snapshots = await self._waiting.snapshots()
        async with aclosing(snapshots.walk(request.snapshotter, list(request.filters))) as found:
            async for snapshot in found:
                info = _info(snapshot)
                message.info.append(info)
                size += info.ByteSize()
                if size > _LIST_MESSAGE_BYTES or len(message.info) == _LIST_MESSAGE_INFOS:
                    yield message
                    message, size = snapshots_pb2.ListSnapshotsResponse(), 0
        if message.info:
            yield message

    async def Usage(self, request: Any, context: Any) -> snapshots_pb2.UsageResponse:
        snapshots = await self._waiting.snapshots()
        use = await snapshots.usage(request.snapshotter, request.key)
        return snapshots_pb2.UsageResponse(size=use.size_bytes, inodes=use.inodes)

    async def Cleanup(self, request: Any, context: Any) -> Empty:
        snapshots = await self._waiting.snapshots()
        await snapshots.cleanup(request.snapshotter)
        return Empty()


class DiffService(diff_pb2_grpc.DiffServicer):
    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    async def Apply(self, request: Any, context: Any) -> diff_pb2.ApplyResponse:
        blob = Blob(request.diff.digest, request.diff.size, request.diff.media_type)
        mounts = _from_mounts(request.mounts)
        if applied_to(mounts, self._waiting.root) is None:
            # At once, before any recovery: as long as we do not answer, no snapshotter of the node can unpack.
            raise Unimplemented("these mounts are not of this snapshotter")
        snapshots = await self._waiting.snapshots()
        layer = await snapshots.apply(blob, mounts, _caller(context))
        return diff_pb2.ApplyResponse(
            applied=types_pb2.Descriptor(media_type=_TAR, digest=layer.diff_id, size=layer.tar_size_bytes)
        )

    async def Diff(self, request: Any, context: Any) -> diff_pb2.DiffResponse:
        snapshots = await self._waiting.snapshots()
        blob = await snapshots.diff(
            _from_mounts(request.left),
            _from_mounts(request.right),
            request.media_type,
            request.ref,
            dict(request.labels),
            request.source_date_epoch.seconds if request.HasField("source_date_epoch") else None,
            _caller(context),
        )
        return diff_pb2.DiffResponse(
            diff=types_pb2.Descriptor(media_type=blob.media_type, digest=blob.digest, size=blob.size_bytes)
        )


class MaintenanceService(maintenance_pb2_grpc.MaintenanceServicer):
    """For tardevctl: as long as it takes, whatever bounds containerd's calls have."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    async def Check(self, request: Any, context: Any) -> None:
        async with _told(context):
            node = await self._waiting.node()
            check = node.fsck.check(
                repair=request.repair, bytes_per_second=request.bytes_per_second, blocks_only=request.blocks_only
            )
            async with aclosing(check) as events:
                async for event in events:
                    await context.write(_event(event))

    async def Collect(self, request: Any, context: Any) -> maintenance_pb2.CollectResponse:
        async with _told(context):
            node = await self._waiting.node()
            done = await node.collector.collect(everything=request.everything)
            return maintenance_pb2.CollectResponse(layers=done.layers, size_bytes=done.size_bytes)
        raise AssertionError("unreachable")

    async def Status(self, request: Any, context: Any) -> maintenance_pb2.StatusResponse:
        async with _told(context):
            document = Struct()
            document.update(await self._waiting.status())
            return maintenance_pb2.StatusResponse(status=document)
        raise AssertionError("unreachable")

    async def SetLogLevel(self, request: Any, context: Any) -> maintenance_pb2.SetLogLevelResponse:
        async with _told(context):
            if request.level not in LEVELS:
                raise InvalidArgument(f"no log level is called {request.level[:20]!r}; there are {', '.join(LEVELS)}")
            return maintenance_pb2.SetLogLevelResponse(previous=set_level(request.level))
        raise AssertionError("unreachable")


@asynccontextmanager
async def _told(context: Any) -> AsyncIterator[None]:
    """The caller, of what goes wrong."""
    try:
        yield
    except Exception as error:
        failure = translate(error)
        await context.abort(failure.code, one_line(str(failure)))


def _event(event: Finding | Checked) -> maintenance_pb2.CheckEvent:
    if isinstance(event, Checked):
        progress = maintenance_pb2.Progress(done_bytes=event.done_bytes, total_bytes=event.total_bytes)
        return maintenance_pb2.CheckEvent(progress=progress)
    finding = maintenance_pb2.Finding(
        what=one_line(event.what), problem=one_line(event.problem), outcome=event.outcome, advice=one_line(event.advice)
    )
    return maintenance_pb2.CheckEvent(finding=finding)
