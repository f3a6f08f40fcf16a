# SPDX-License-Identifier: Apache-2.0
"""Blobs into containerd's content store, by its API (containerd: api/services/content/v1, Write).

A writer holds the lock of its ref while its stream is open. What is not committed stays as an ingest of
that ref, so it is aborted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from blockdev.errors import BuildFailed
from blockdev.workers.archive import Archive, ArchiveRecord
from snapshotter.api.proto import content_pb2, content_pb2_grpc
from snapshotter.containerd import CALL_SECONDS, Leases, refused
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import AlreadyExists, SnapshotterError, Unavailable
from snapshotter.log import get_logger
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

# The diff ID of a blob, for who does not have its image's config (containerd: pkg/labels).
UNCOMPRESSED: Final = "containerd.io/uncompressed"
# A message may have 16 MiB (containerd: defaults).
_PIECE_BYTES: Final = 1 << 20
_LEASE_SECONDS: Final = 3600


async def ingest(
    content: Content, archive: Archive, ref: str, labels: Mapping[str, str], media_type: str, caller: Caller
) -> Blob:
    """All of `archive`, which takes digests, as a blob in the caller's namespace; one that is there is as good.

    `ref`: what the write is known by meanwhile, or "" for one of our own. The blob gets `labels` and
    UNCOMPRESSED. Raises SnapshotterError in containerd's words, and what the archive ended with.
    """
    stubs = _Stubs(content, caller)
    async with stubs.lease():
        return await _ingest(stubs, archive, ref or _own_name(), labels, media_type)


class _Stubs:
    """containerd's services, for one caller."""

    def __init__(self, content: Content, caller: Caller) -> None:
        self._caller = caller
        self.content = content_pb2_grpc.ContentStub(content.channel())  # type: ignore[no-untyped-call]
        self._leases = Leases(content.channel(), caller)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return self._caller.metadata()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[None]:
        """What is written meanwhile stays for a while after it, for the caller to refer to.

        containerd does not hand the lease of its own caller on to a proxy differ (seen with 2.1), and collects
        garbage as soon as that one gives back its views: a blob without a lease would be gone before it is read.
        """
        if self._caller.lease:
            yield
            return
        name = _own_name()
        await self._leases.create(name, _LEASE_SECONDS)
        self._caller = replace(self._caller, lease=name)
        try:
            yield
        except BaseException:
            await to_the_end(self._leases.delete(name))
            raise

    async def take(self, blob: Blob) -> None:
        """Into the lease, one that somebody else wrote. Raises SnapshotterError."""
        await self._leases.add_content(self._caller.lease, blob.digest)


def _own_name() -> str:
    return f"tardev-diff-{os.urandom(16).hex()}"


async def _ingest(stubs: _Stubs, archive: Archive, ref: str, labels: Mapping[str, str], media_type: str) -> Blob:
    call = stubs.content.Write(metadata=stubs.metadata())
    try:
        # Takes the ref's lock. What may lie there from before goes with the first write, which is at 0.
        await asyncio.wait_for(
            _exchange(call, content_pb2.WriteContentRequest(action=content_pb2.STAT, ref=ref)), CALL_SECONDS
        )
        try:
            record = await _write(call, archive)
            trace("ingest.written")
            blob = Blob(record.blob_digest, record.blob_size_bytes, media_type)
            try:
                await _commit(call, blob, {**labels, UNCOMPRESSED: record.diff_id})
            except AlreadyExists:
                await stubs.take(blob)
                await _label(stubs, blob, record.diff_id)
            trace("ingest.committed")
            return blob
        except BaseException:
            call.cancel()
            await to_the_end(_abort(stubs, ref))
            raise
    except TimeoutError:
        raise Unavailable(f"containerd's content store does not answer for a write as {ref!r}") from None
    finally:
        call.cancel()


async def _write(call: Any, archive: Archive) -> ArchiveRecord:
    size = 0
    async for piece in _pieces(archive.fd):
        request = content_pb2.WriteContentRequest(action=content_pb2.WRITE, offset=size, data=piece)
        reply = await _exchange(call, request)
        size += len(piece)
        if reply.offset != size:
            raise Unavailable(f"containerd's content store has {reply.offset} bytes of the {size} that it was given")
    record = await archive.finish()
    if record is None or record.blob_size_bytes != size:
        raise BuildFailed(f"{size} bytes came out of the archiver, which is not all")
    return record


async def _commit(call: Any, blob: Blob, labels: Mapping[str, str]) -> None:
    # With an offset of 0 all that was written would be thrown away.
    request = content_pb2.WriteContentRequest(
        action=content_pb2.COMMIT, total=blob.size_bytes, expected=blob.digest, offset=blob.size_bytes, labels=labels
    )
    reply = await _exchange(call, request)
    if reply.digest != blob.digest:
        raise Unavailable(f"containerd's content store has {reply.digest}, not {blob.digest}")


async def _label(stubs: _Stubs, blob: Blob, diff_id: str) -> None:
    """Of a blob that was there, perhaps from somebody who did not say what it unpacks to."""
    info = content_pb2.Info(digest=blob.digest, labels={UNCOMPRESSED: diff_id})
    request = content_pb2.UpdateRequest(info=info, update_mask=FieldMask(paths=[f"labels.{UNCOMPRESSED}"]))
    try:
        await stubs.content.Update(request, metadata=stubs.metadata(), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise _of(error.code(), error.details()) from None


async def _abort(stubs: _Stubs, ref: str) -> None:
    """What cannot be aborted, containerd collects itself, a day later."""
    try:
        await stubs.content.Abort(content_pb2.AbortRequest(ref=ref), metadata=stubs.metadata(), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            get_logger().warning("an ingest stays in containerd's content store", ref=ref, error=error.details())


async def _exchange(call: Any, request: content_pb2.WriteContentRequest) -> content_pb2.WriteContentResponse:
    try:
        await call.write(request)
        reply = await call.read()
    except asyncio.InvalidStateError:  # it has ended, which the call itself tells
        reply = grpc.aio.EOF
    except grpc.aio.AioRpcError as error:
        raise _of(error.code(), error.details()) from None
    if reply is grpc.aio.EOF:
        raise _of(await call.code(), await call.details() or "the stream ended")
    return reply  # type: ignore[no-any-return]


def _of(code: grpc.StatusCode, details: str | None) -> SnapshotterError:
    return refused("content store", code, details)


async def _pieces(fd: int) -> AsyncIterator[bytes]:
    """A pipe to its end, without a thread that could still read from its number when it is another's."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_PIECE_BYTES)
    pipe = os.fdopen(os.dup(fd), "rb", 0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        while piece := await reader.read(_PIECE_BYTES):
            yield piece
    finally:
        transport.close()
