# SPDX-License-Identifier: Apache-2.0
"""Deletes layers that no snapshot refers to: what is over the size of the cache, the longest unused first, and what
nobody has used for longer than it may stay.

A row goes in one transaction, which looks for references itself; its files go to the trash. What a build has just
handed out is left alone: a snapshot may be about to refer to it. Of a layer that a container or a VM has open the
kernel keeps the bytes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from snapshotter import metrics
from snapshotter.builder import Builder
from snapshotter.layerstore import LayerStore
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, Metastore
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace


@dataclass(frozen=True, slots=True)
class Collected:
    layers: int = 0
    size_bytes: int = 0


class Collector:
    def __init__(
        self,
        metastore: Metastore,
        store: LayerStore,
        builder: Builder,
        *,
        cache_bytes: int,
        unused_seconds: float,
    ) -> None:
        self._metastore, self._store, self._builder = metastore, store, builder
        self._cache_bytes, self._unused_seconds = cache_bytes, unused_seconds
        self._log = get_logger()

    async def collect(self, *, everything: bool = False) -> Collected:
        """`everything`: as if nothing were to be kept for the next pull."""
        unused = [layer for layer in await self._metastore.layers() if not layer.shared_by]
        unused.sort(key=lambda layer: (layer.used_ns, layer.id))
        spare = sum(layer.file_size_bytes for layer in unused) - (0 if everything else self._cache_bytes)
        too_old_ns = time.time_ns() - int(self._unused_seconds * 1e9)
        layers = size_bytes = 0
        for layer in unused:
            if spare <= 0 and layer.used_ns > too_old_ns:
                break
            if await to_the_end(self._delete(layer)):
                layers += 1
                size_bytes += layer.file_size_bytes
                spare -= layer.file_size_bytes
        return Collected(layers, size_bytes)

    async def _delete(self, layer: Layer) -> bool:
        async with self._builder.publishing:
            if layer.id in self._builder.recent() or not await self._metastore.delete_layer(layer.id):
                return False
            trace("sweep.deleted")
            await asyncio.to_thread(self._store.delete, layer.diff_id, layer.format)
        metrics.LAYERS_DELETED.inc()
        metrics.LAYERS_DELETED_BYTES.inc(layer.file_size_bytes)
        self._log.info("layer deleted", diff_id=layer.diff_id, format=layer.format)
        return True
