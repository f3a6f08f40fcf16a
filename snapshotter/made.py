# SPDX-License-Identifier: Apache-2.0
"""Layers that no blob leads to, because what they are made of is known here: of a chain, or of nothing."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Final

from blockdev.formats.layer_file import FORMATS
from blockdev.small_layer import write_layer
from blockdev.workers.launch import LayerRecord
from snapshotter.builder import Builder
from snapshotter.layerstore import LayerStore, Staged
from snapshotter.log import get_logger
from snapshotter.metastore import Layer, LayerState, Metastore
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

EMPTY_TAR: Final = bytes(1024)


def identity(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


class Made:
    def __init__(self, metastore: Metastore, store: LayerStore, builder: Builder) -> None:
        self._metastore, self._store, self._builder = metastore, store, builder
        self._log = get_logger()

    async def stored(self, content: bytes, format: str) -> Layer:
        """The READY layer of a tar, or of a chain's table; kept for long enough to refer to it.

        Raises ResourceExhausted, OSError, BlockdevError.
        """
        started = time.monotonic()
        async with self._builder.publishing:
            found = await self._metastore.layer(identity(content), format)
            if found is not None and found.state is LayerState.READY and not await self._contradiction(found):
                self._builder.touch(found)
                return found
            async with self._store.staged() as staged:
                trace("made.staged")
                built = await asyncio.to_thread(_build, staged, content, format)
                trace("made.built")
                return await to_the_end(self._publish(staged, built, started))

    async def _contradiction(self, layer: Layer) -> str:
        return await asyncio.to_thread(self._store.contradiction, layer)

    async def _publish(self, staged: Staged, built: LayerRecord, started: float) -> Layer:
        there = await self._metastore.layer(built.diff_id, built.format)

        async def recorded() -> Layer:
            trace("made.published")
            return await self._metastore.publish_layer(built, time.monotonic() - started)

        layer = await self._builder.publish(staged, built, there, recorded)
        self._log.info(
            "layer made", diff_id=layer.diff_id, format=layer.format, root_hash=layer.root_hash, entries=layer.entries
        )
        return layer


def _build(staged: Staged, content: bytes, format: str) -> LayerRecord:
    """The layer file, into the staged one. Raises OSError."""
    built = write_layer(staged.fd, content, FORMATS[format])
    return LayerRecord(
        built.format, "sha256:" + built.diff_id.hex(), built.root_hash.hex(), built.tar_size_bytes,
        built.data_size_bytes, built.tree_size_bytes, built.file_size_bytes, built.entries, built.warnings,
    )  # fmt: skip
