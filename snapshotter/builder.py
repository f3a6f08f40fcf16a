# SPDX-License-Identifier: Apache-2.0
"""Blob → layer file: what is stored is answered at once, equal builds are one build, few run at a time."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from blockdev.errors import BlockdevError
from blockdev.formats.compression import compression_of
from blockdev.formats.limits import Limits
from blockdev.workers.launch import BuildRequest, run_build
from snapshotter import metrics
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import DataLoss, InvalidArgument, NotFound, translate
from snapshotter.layerstore import LayerStore
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore
from snapshotter.names import is_digest
from snapshotter.trace import trace

# A retry after the caller has gone away finds the build still running.
_LINGER_SECONDS: Final = 60.0
# Between its publication and the snapshot's row nothing in the metadata refers to a layer.
_RECENT_SECONDS: Final = 300.0


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[Layer]
    waiters: int = 0
    end: asyncio.TimerHandle | None = None


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
    ) -> None:
        self._metastore, self._store, self._content = metastore, store, content
        self._slots = asyncio.Semaphore(workers)
        self._limits, self._timeout, self._per_namespace = limits, timeout_seconds, per_namespace
        self._running: dict[tuple[str, str, str], _Running] = {}
        self._recent: dict[LayerID, float] = {}
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
        if self._per_namespace and not await self._content.visible(blob, caller):
            raise NotFound(f"blob {blob.digest} is not in namespace {caller.namespace}")
        stored = await self._stored(blob, compression, format)
        if stored is not None:
            metrics.BUILDS_CACHED.inc()
            self._touch(stored)
            return stored
        key = (blob.digest, compression, format)
        running = self._running.get(key)
        if running is None:
            running = _Running(asyncio.create_task(self._build(blob, compression, format, caller)))
            self._running[key] = running
            running.task.add_done_callback(lambda task: self._done(key, task))
        else:
            metrics.BUILDS_JOINED.inc()
        return await self._join(running)

    async def _join(self, running: _Running) -> Layer:
        running.waiters += 1
        if running.end is not None:
            running.end.cancel()
            running.end = None
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if not running.waiters and not running.task.done():
                running.end = asyncio.get_running_loop().call_later(_LINGER_SECONDS, running.task.cancel)

    def _done(self, key: tuple[str, str, str], task: asyncio.Task[Layer]) -> None:
        running = self._running.pop(key)
        if running.end is not None:
            running.end.cancel()
        if not task.cancelled():
            task.exception()  # who waits has it; nobody may be waiting

    async def _stored(self, blob: Blob, compression: str, format: str) -> Layer | None:
        known = await self._metastore.blob(blob.digest, compression)
        if known is None:
            return None
        diff_id, size_bytes = known
        if size_bytes != blob.size_bytes:
            raise DataLoss(f"layer {blob.digest}: blob has {size_bytes} bytes, not {blob.size_bytes}")
        layer = await self._metastore.layer(diff_id, format)
        if layer is None or layer.state is not LayerState.READY:
            return None
        why = await asyncio.to_thread(self._contradiction, layer)
        if why:
            self._log.error("layer file is broken, building it again", diff_id=diff_id, reason=why)
            await self._metastore.mark_broken([layer.id])
            return None
        return layer

    def _contradiction(self, layer: Layer) -> str:
        return self._store.contradiction(layer.diff_id, layer.format, layer.root_hash, layer.file_size_bytes)

    async def _build(self, blob: Blob, compression: str, format: str, caller: Caller) -> Layer:
        async with self._slots:
            started = time.monotonic()
            metrics.BUILDS_RUNNING.inc()
            result = "failed"
            try:
                layer = await asyncio.wait_for(self._build_now(blob, compression, format, caller), self._timeout)
                result = "ok"
            except TimeoutError:
                raise translate(BlockdevError(f"layer {blob.digest}: build took over {self._timeout} s")) from None
            except asyncio.CancelledError:
                result = "cancelled"
                raise
            except (BlockdevError, OSError) as error:
                self._log.warning("build failed", blob=blob.digest, format=format, error=str(error))
                raise translate(error) from error
            finally:
                metrics.BUILDS_RUNNING.dec()
                metrics.BUILDS.labels(format, result).inc()
            seconds = time.monotonic() - started
            metrics.BUILD_SECONDS.labels(format).observe(seconds)
            metrics.BUILD_BYTES.labels(format).inc(layer.tar_size_bytes)
            self._log.info(
                "layer built", blob=blob.digest, diff_id=layer.diff_id, format=format, root_hash=layer.root_hash,
                seconds=round(seconds, 3), tar_bytes=layer.tar_size_bytes, warnings=layer.warnings,
            )  # fmt: skip
            return layer

    async def _build_now(self, blob: Blob, compression: str, format: str, caller: Caller) -> Layer:
        started = time.monotonic()
        with self._store.staged() as staged:
            trace("build.staged")
            async with self._content.open(blob, caller) as blob_fd:
                record = await run_build(
                    BuildRequest(
                        blob_fd=blob_fd,
                        staged_fd=staged.fd,
                        spool_fd=staged.spool_fd,
                        format=format,
                        media_type=blob.media_type,
                        layer_name=blob.digest,
                        expected_digest=blob.digest,
                        expected_size_bytes=blob.size_bytes,
                        limits=self._limits,
                    )
                )
            trace("build.built")
            async with self.publishing:
                there = await self._metastore.layer(record.diff_id, format)
                # The same tar came in another compression: its file is there, only the mapping is new.
                if there is None or there.state is not LayerState.READY:
                    await asyncio.to_thread(self._store.publish, staged, record.diff_id, format)
                trace("build.published")
                layer = await self._metastore.publish(record, compression, time.monotonic() - started)
                self._touch(layer)
            trace("build.recorded")
            return layer

    def _touch(self, layer: Layer) -> None:
        now = time.monotonic()
        self._recent = {key: at for key, at in self._recent.items() if now - at < _RECENT_SECONDS}
        self._recent[layer.id] = now

    def recent(self) -> set[LayerID]:
        """Layers handed out so lately that a snapshot may be about to refer to them."""
        now = time.monotonic()
        return {key for key, at in self._recent.items() if now - at < _RECENT_SECONDS}

    async def close(self) -> None:
        """End every build; nothing of them stays."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
