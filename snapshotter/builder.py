# SPDX-License-Identifier: Apache-2.0
"""Blob → layer file: what is stored is answered at once, equal builds are one build, few run at a time."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from blockdev.errors import BlockdevError, BuildFailed
from blockdev.formats.compression import Compression, compression_of
from blockdev.formats.limits import Limits
from blockdev.workers.archive import Archive, ArchiveRecord, ArchiveRequest, archiving
from blockdev.workers.launch import BuildRecord, BuildRequest, LayerRecord, run_build
from blockdev.workers.parameters import Output
from policy.chain import ChainID, is_digest
from snapshotter import metrics
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import (
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    Unavailable,
    translate,
)
from snapshotter.layerstore import LayerStore, Staged
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

# A retry after the caller has gone away finds the build still running.
_LINGER_SECONDS: Final = 60.0
# Between its publication and the snapshot's row nothing in the metadata refers to a layer.
_RECENT_SECONDS: Final = 300.0
# A build process has several threads; of this many processors' time in `timeout` nothing honest comes near.
_PROCESSORS_OF_A_PROCESS: Final = 2
_CPU_SECONDS_MIN: Final = 60


# Of what is no blob and has no media type of its own.
_PLAIN_TAR: Final = "application/vnd.oci.image.layer.v1.tar"

_Key: TypeAlias = tuple[str, int, str, str]  # blob digest, its size as the caller has it, compression, format


class _GivenUp(Exception):
    """The build that was joined ended without a result."""


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[Layer]
    waiters: int = 0
    end: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Work:
    """A build that waits for its turn, or runs. `size_bytes`: of its blob, 0 where nobody knows."""

    what: str
    format: str
    size_bytes: int
    since: float
    is_waiting: bool = True
    blob_fd: int = -1


@dataclass(frozen=True, slots=True)
class Underway:
    """`read_bytes` of `size_bytes` are read, as far as that is known; `seconds` since it began, or began to wait."""

    what: str
    format: str
    seconds: float
    is_waiting: bool
    read_bytes: int
    size_bytes: int


class Builder:
    def __init__(
        self,
        metastore: Metastore,
        store: LayerStore,
        content: Content,
        *,
        workers: int,
        limits: Limits,
        timeout_seconds: float,
        per_namespace: bool,
        renew: Callable[[Layer], Awaitable[None]],
    ) -> None:
        """`renew`: told of a layer whose file was lost or spoilt, and is a new one now."""
        self._metastore, self._store, self._content, self._renew = metastore, store, content, renew
        self._slots = asyncio.Semaphore(workers)
        self._limits, self._timeout, self._per_namespace = limits, timeout_seconds, per_namespace
        self._cpu_seconds = max(_CPU_SECONDS_MIN, math.ceil(_PROCESSORS_OF_A_PROCESS * timeout_seconds))
        self._running: dict[_Key, _Running] = {}
        self._tasks: set[asyncio.Task[Layer]] = set()
        self._works: dict[int, _Work] = {}
        self._closed = False
        self._recent: dict[LayerID, float] = {}
        self._protections: dict[str, list[str]] = {}
        # Held while files and rows of layers are between two states; who deletes layers takes it too.
        self.publishing = asyncio.Lock()
        self._log = get_logger()

    async def build(self, blob: Blob, format: str, caller: Caller) -> Layer:
        """The READY layer of the blob. Raises SnapshotterError, its text naming the blob.

        Cancelling leaves the build to others who wait, and a minute longer to nobody.
        """
        try:
            compression = compression_of(blob.media_type).value
        except BlockdevError as error:
            raise translate(type(error)(f"layer {blob.digest}: {error}")) from None
        if not is_digest(blob.digest) or blob.size_bytes < 0:
            raise InvalidArgument(f"layer {blob.digest!r} of {blob.size_bytes} bytes: no sha256 digest or no size")
        if self._per_namespace and not (caller.namespace and await self._content.visible(blob, caller)):
            raise NotFound(f"blob {blob.digest} is not in namespace {caller.namespace!r}")
        key = (blob.digest, blob.size_bytes, compression, format)
        while not self._closed:
            stored = await self._stored(blob, compression, format)
            if stored is not None:
                metrics.BUILDS_CACHED.inc()
                return stored
            running = self._running.get(key)
            joined = running is not None
            if running is None:
                running = self._start(key, self._build(blob, compression, format, caller))
            else:
                metrics.BUILDS_JOINED.inc()
                self._log.debug("build joined", blob=blob.digest, format=format)
            try:
                return await self._join(key, running)
            except (NotFound, Unavailable):
                # Who began it may not see the blob, where this caller does.
                if not joined:
                    raise
            except _GivenUp:
                pass
        raise Unavailable("the daemon is stopping")

    async def stored(self, parent: ChainID | None, chain: ChainID, format: str) -> Layer | None:
        """The whole layer that completes the chain above `parent`, whoever brought it; None with sharing by namespace.
        It is kept for long enough to refer to it."""
        if self._per_namespace:
            return None
        async with self.publishing:
            layer = await self._metastore.layer_of_chain(parent, chain, format)
            if layer is None or not await self._is_whole(layer):
                return None
            self.touch(layer)
        return layer

    async def mapping(self, blob: Blob) -> str | None:
        """The diff ID that a build of the blob has found before."""
        try:
            compression = compression_of(blob.media_type).value
        except BlockdevError:
            return None
        known = await self._metastore.blob(blob.digest, compression)
        return known[0] if known is not None and known[1] == blob.size_bytes else None

    def _start(self, key: _Key, work: Coroutine[Any, Any, Layer]) -> _Running:
        running = _Running(asyncio.create_task(work))
        self._running[key] = running
        self._tasks.add(running.task)
        running.task.add_done_callback(lambda _: self._ended(key, running))
        return running

    async def _join(self, key: _Key, running: _Running) -> Layer:
        running.waiters += 1
        if running.end is not None:
            running.end.cancel()
            running.end = None
        try:
            return await asyncio.shield(running.task)
        except asyncio.CancelledError:
            if running.task.cancelled() and not cast(asyncio.Task[Any], asyncio.current_task()).cancelling():
                raise _GivenUp from None  # the build ended, not this caller
            raise
        finally:
            running.waiters -= 1
            if not running.waiters and not running.task.done():
                running.end = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._give_up, key, running)

    def _give_up(self, key: _Key, running: _Running) -> None:
        """Nobody came back for it. Who comes from now on starts another."""
        self._forget(key, running)
        running.task.cancel()

    def _ended(self, key: _Key, running: _Running) -> None:
        self._forget(key, running)
        self._tasks.discard(running.task)
        if running.end is not None:
            running.end.cancel()
        if not running.task.cancelled():
            running.task.exception()  # who waits has it; nobody may be waiting

    def _forget(self, key: _Key, running: _Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]

    async def _stored(self, blob: Blob, compression: str, format: str) -> Layer | None:
        known = await self._metastore.blob(blob.digest, compression)
        if known is None:
            return None
        diff_id, size_bytes = known
        if size_bytes != blob.size_bytes:
            raise DataLoss(f"layer {blob.digest}: blob has {size_bytes} bytes, not {blob.size_bytes}")
        # With the lock, or a sweep that has seen it unused could delete it behind our back.
        async with self.publishing:
            layer = await self._metastore.layer(diff_id, format)
            if layer is None or layer.state is not LayerState.READY or not await self._is_whole(layer):
                return None
            self.touch(layer)
        return layer

    async def _is_whole(self, layer: Layer) -> bool:
        why = await asyncio.to_thread(self._store.contradiction, layer)
        if not why and await asyncio.to_thread(self._store.lacks_table, layer):
            return False
        if why:
            self._log.error("layer file is broken, building it again", diff_id=layer.diff_id, reason=why)
            await self._metastore.mark_broken([layer.id])
        return not why

    async def build_changes(self, open_directory: Callable[[], int], snapshot_name: str, format: str) -> Layer:
        """A READY layer of what lies in a snapshot's upper directory, of which `open_directory` gives a descriptor.
        Cancelling ends it, and nothing is kept.

        Raises FailedPrecondition where the directory changes meanwhile, what opening it raises, and other
        SnapshotterErrors.
        """
        return await self._bounded(
            {"changes_of": snapshot_name},
            format,
            lambda _: self._build_changes_now(open_directory, snapshot_name, format),
        )

    @asynccontextmanager
    async def archive(
        self,
        source_fd: int,
        name: str,
        *,
        layer_size_bytes: int | None,
        compression: Compression,
        latest_mtime: int | None,
    ) -> AsyncIterator[Archive]:
        """A tar with its digests, for who stores it himself. It counts as a build and is bounded like one."""
        request = ArchiveRequest(
            source_fd=source_fd,
            name=name,
            layer_size_bytes=layer_size_bytes,
            compression=compression,
            digests=True,
            latest_mtime=latest_mtime,
            cpu_seconds=self._cpu_seconds,
            limits=self._limits,
        )
        async with self._slots, archiving(request) as archive:
            yield archive

    async def _build(self, blob: Blob, compression: str, format: str, caller: Caller) -> Layer:
        return await self._bounded(
            {"blob": blob.digest},
            format,
            lambda work: self._build_now(blob, compression, format, caller, work),
            blob.size_bytes,
        )

    def underway(self) -> tuple[Underway, ...]:
        """The oldest first."""
        now = time.monotonic()
        return tuple(
            Underway(work.what, work.format, now - work.since, work.is_waiting, _read_bytes(work), work.size_bytes)
            for work in self._works.values()
        )

    async def _bounded(
        self, of: dict[str, str], format: str, build: Callable[[_Work], Awaitable[Layer]], size_bytes: int = 0
    ) -> Layer:
        """`of`: for the log, what the layer is made of, and its kind."""
        [what] = of.values()
        work = _Work(what, format, size_bytes, time.monotonic())
        self._works[id(work)] = work
        try:
            return await self._in_turn(of, work, build)
        finally:
            del self._works[id(work)]

    async def _in_turn(self, of: dict[str, str], work: _Work, build: Callable[[_Work], Awaitable[Layer]]) -> Layer:
        what, format = work.what, work.format
        async with self._slots:
            started = work.since = time.monotonic()
            work.is_waiting = False
            self._log.debug("build begins", **of, format=format, size_bytes=work.size_bytes)
            metrics.BUILDS_RUNNING.inc()
            result = "failed"
            try:
                layer = await asyncio.wait_for(build(work), self._timeout)
                result = "ok"
            except TimeoutError:
                raise DeadlineExceeded(f"layer {what}: the build took over {self._timeout} s") from None
            except asyncio.CancelledError:
                result = "cancelled"
                raise
            except (BlockdevError, OSError) as error:
                self._log.warning("build failed", **of, format=format, error=str(error))
                raise translate(error) from error
            finally:
                metrics.BUILDS_RUNNING.dec()
                metrics.BUILDS.labels(format, result).inc()
                seconds = time.monotonic() - started
                metrics.BUILD_SECONDS.labels(format, result).observe(seconds)
            metrics.BUILD_BYTES.labels(format).inc(layer.tar_size_bytes)
            metrics.BUILD_FILE_BYTES.labels(format).inc(layer.file_size_bytes)
            self._log.info(
                "layer built", **of, diff_id=layer.diff_id, format=format, root_hash=layer.root_hash,
                seconds=round(seconds, 3), tar_bytes=layer.tar_size_bytes, warnings=layer.warnings,
            )  # fmt: skip
            return layer

    async def _build_now(self, blob: Blob, compression: str, format: str, caller: Caller, work: _Work) -> Layer:
        started = time.monotonic()
        async with self._store.staged() as staged:
            trace("build.staged")
            async with self._content.open(blob, caller) as blob_fd:
                work.blob_fd = blob_fd
                try:
                    record = await self._run(
                        staged, format, blob_fd=blob_fd, media_type=blob.media_type, layer_name=blob.digest,
                        expected_digest=blob.digest, expected_size_bytes=blob.size_bytes,
                    )  # fmt: skip
                finally:
                    work.blob_fd = -1
            return await self._finish(staged, record, compression, started)

    async def _build_changes_now(self, open_directory: Callable[[], int], snapshot_name: str, format: str) -> Layer:
        started = time.monotonic()
        async with self._store.staged() as staged:
            trace("build.staged")
            source_fd = await to_the_end(asyncio.to_thread(open_directory))
            try:
                record = await self._run_changes(staged, source_fd, snapshot_name, format)
            finally:
                os.close(source_fd)
            return await self._finish(staged, record, Compression.NONE.value, started)

    async def _run_changes(self, staged: Staged, source_fd: int, snapshot_name: str, format: str) -> BuildRecord:
        """One pass: the archiver's tar is the builder's blob."""
        name = f"changes of snapshot {snapshot_name!r}"
        request = ArchiveRequest(source_fd=source_fd, name=name, cpu_seconds=self._cpu_seconds, limits=self._limits)
        async with archiving(request) as archive:
            try:
                record = await self._run(
                    staged, format, blob_fd=archive.fd, media_type=_PLAIN_TAR, layer_name=f"of the {name}"
                )
            except BlockdevError:
                await archive.finish()  # raises, where that is why the tar was cut short
                raise
            # A tar may end anywhere between two members: only the archiver knows where this one did.
            written = await archive.finish()
        if written is None or written.tar_size_bytes != record.tar_size_bytes:
            raise BuildFailed(f"{name}: {record.tar_size_bytes} bytes came out of the archiver, which is not all")
        self._say_left_out(written, snapshot_name)
        return record

    def _say_left_out(self, written: ArchiveRecord, snapshot_name: str) -> None:
        if written.left_out:
            self._log.warning("changes that no layer holds", changes_of=snapshot_name, left_out=written.left_out)

    async def _run(self, staged: Staged, format: str, **fields: Any) -> BuildRecord:
        """`fields`: of BuildRequest, those that are the blob's."""
        [record] = await run_build(
            BuildRequest(
                outputs=(Output(format, staged.fd, staged.spool_fd, staged.table_fd),),
                limits=self._limits,
                cpu_seconds=self._cpu_seconds,
                **fields,
            )
        )
        self._say_protections(record)
        metrics.BUILD_BLOB_BYTES.labels(format).inc(record.blob_size_bytes)
        for process, used in record.usage.items():
            metrics.WORKER_CPU_SECONDS.labels(process).inc(used["cpu_seconds"])
            metrics.WORKER_PEAK_BYTES.labels(process).observe(used["peak_rss_bytes"])
        return record

    async def _finish(self, staged: Staged, record: BuildRecord, compression: str, started: float) -> Layer:
        trace("build.built")
        layer = await to_the_end(self._publish(staged, record, compression, time.monotonic() - started))
        trace("build.recorded")
        return layer

    def _say_protections(self, record: BuildRecord) -> None:
        """At the first build, and when it changes."""
        for process, active in record.sandbox.items():
            if self._protections.get(process) != active:
                self._protections[process] = active
                log = self._log.info if "seccomp" in active else self._log.warning
                log("build process without privilege", process=process, protections=active)

    async def _publish(self, staged: Staged, record: BuildRecord, compression: str, seconds: float) -> Layer:
        async with self.publishing:
            there = await self._metastore.layer(record.diff_id, record.format)
            # The same tar came in another compression: its file is there, only the mapping is new.
            is_whole = there is not None and there.state is LayerState.READY and await self._is_whole(there)

            async def recorded() -> Layer:
                trace("build.published")
                return await self._metastore.publish(record, compression, seconds)

            return await self.publish(None if is_whole else staged, record, there, recorded)

    async def publish(
        self, staged: Staged | None, record: LayerRecord, there: Layer | None, recorded: Callable[[], Awaitable[Layer]]
    ) -> Layer:
        """Under `publishing`: the file in its place, if there is a new one, and then the row by `recorded`. `there`:
        the layer as it was before. Raises OSError, and what `recorded` raises."""
        if staged is not None:
            await asyncio.to_thread(self._store.publish, staged, record.diff_id, record.format)
            if there is not None:
                # Before its row is READY again, so is what was made of the old file.
                await self._renew(there)
        try:
            layer = await recorded()
        except SnapshotterError:
            if there is None:
                await self._withdraw(record)
            raise
        self.touch(layer)
        return layer

    async def _withdraw(self, record: LayerRecord) -> None:
        """A file that is in its place, and whose row did not come: on a full disk above all nobody has use for it."""
        try:
            await asyncio.to_thread(self._store.delete, record.diff_id, record.format)
        except OSError as error:
            self._log.error("a file without a row is left for the next start", diff_id=record.diff_id, error=str(error))

    def touch(self, layer: Layer) -> None:
        """For a while now it is one of `recent`."""
        now = time.monotonic()
        self._recent = {key: at for key, at in self._recent.items() if now - at < _RECENT_SECONDS}
        self._recent[layer.id] = now

    def recent(self) -> set[LayerID]:
        """Layers handed out so lately that a snapshot may be about to refer to them."""
        now = time.monotonic()
        return {key for key, at in self._recent.items() if now - at < _RECENT_SECONDS}

    async def close(self) -> None:
        """End every build; nothing of them stays."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _read_bytes(work: _Work) -> int:
    """The workers have the very file description, and so the place in it; of a pipe there is none."""
    if work.blob_fd < 0:
        return 0
    with suppress(OSError):
        return os.lseek(work.blob_fd, 0, os.SEEK_CUR)
    return 0
