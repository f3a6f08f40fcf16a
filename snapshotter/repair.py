# SPDX-License-Identifier: Apache-2.0
"""A broken layer made good in its place: the same bytes again, under the same root hash, for all who refer to it.

From its blob, where containerd still has one; a parents layer from the layers below it; the empty layer from nothing.
containerd knows nothing of it: it answers a second pull from its own database, so that alone would repair nothing.
Who has the old file open, a VM or a container, keeps that.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final

from blockdev.formats.compression import MEDIA_TYPES, Compression
from blockdev.formats.layer_file import of_chain
from snapshotter import images, metrics
from snapshotter.activation import BrokenLayer
from snapshotter.builder import Builder
from snapshotter.content import Blob, Caller, Content
from snapshotter.errors import DataLoss, NotFound, SnapshotterError, Unavailable
from snapshotter.layerstore import LayerStore
from snapshotter.log import get_logger
from snapshotter.made import EMPTY_TAR, Made, identity
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore, Snapshot
from snapshotter.names import namespace_of
from snapshotter.parents import BrokenTable, Parents

_MEDIA_TYPE: Final = {kind: media_type for media_type, kind in reversed(MEDIA_TYPES.items())}
_NAMES_SECONDS: Final = 10.0


class Repair:
    def __init__(self, metastore: Metastore, store: LayerStore, content: Content, builder: Builder) -> None:
        self._metastore, self._store, self._content, self._builder = metastore, store, content, builder
        self.made = Made(metastore, store, builder)
        self.parents = Parents(metastore, store, builder, self.made)
        self._locks: dict[LayerID, asyncio.Lock] = {}
        self._done: dict[LayerID, float] = {}
        self._log = get_logger()

    async def layer(self, error: BrokenLayer) -> Layer:
        """The layer, READY. Raises BrokenLayer, naming images and the command that helps, where nothing is left to
        make it from, and what keeps a build from its end."""
        layer, asked = error.layer, time.monotonic()
        async with self._locks.setdefault(layer.id, asyncio.Lock()):
            now = await self._metastore.layer_by_id(layer.id)
            if now is None:
                raise NotFound(f"layer {layer.diff_id} was deleted")
            if self._done.get(layer.id, 0.0) >= asked:
                return now  # by whoever held the lock
            self._log.error("layer is broken", diff_id=layer.diff_id, format=layer.format, reason=error.why)
            if not isinstance(error, BrokenTable):
                await self._metastore.mark_broken([layer.id])
                now = replace(now, state=LayerState.BROKEN)
            repaired = await self._again(now, error)
            self._done[layer.id] = time.monotonic()
        metrics.LAYERS_REPAIRED.inc()
        self._log.info("layer repaired", diff_id=layer.diff_id, format=layer.format, root_hash=layer.root_hash)
        return repaired

    async def all_broken(self) -> None:
        """Those that were found broken and are referred to. What cannot be repaired is logged: who needs it meets it
        once more."""
        broken = [layer for layer in await self._metastore.layers() if layer.state is LayerState.BROKEN]
        # A parents layer is made from others.
        for layer in sorted(broken, key=lambda each: of_chain(each.format)):
            if layer.shared_by:
                try:
                    await self.layer(BrokenLayer(layer, "was found broken"))
                except Exception as error:
                    what = f"{type(error).__name__}: {error}"
                    self._log.error("a layer cannot be repaired", diff_id=layer.diff_id, error=what)

    async def _again(self, layer: Layer, error: BrokenLayer) -> Layer:
        if of_chain(layer.format):
            return await self._parents_layer(layer, error)
        if layer.diff_id == identity(EMPTY_TAR):
            return await self.made.stored(EMPTY_TAR, layer.format)
        users = await self._metastore.users(layer.id)
        namespaces = list(dict.fromkeys(namespace_of(user.name) for user in users)) or [""]
        failures: list[SnapshotterError] = []
        for blob in await self._blobs(layer, users):
            for namespace in namespaces:
                try:
                    built = await self._builder.build(blob, layer.format, Caller.of({}, f"{namespace}/"))
                except SnapshotterError as refused:
                    failures.append(refused)
                    continue
                if built.id == layer.id:
                    return built
        for failure in failures:
            if not isinstance(failure, NotFound | Unavailable | DataLoss):
                raise failure  # it may pass
        rotten = next((str(failure) for failure in failures if isinstance(failure, DataLoss)), "")
        raise BrokenLayer(layer, error.why, await self._advice(layer, users, rotten))

    async def _blobs(self, layer: Layer, users: list[Snapshot]) -> list[Blob]:
        """That a build has found to be the layer, and that images claim to be."""
        known = [
            Blob(digest, size_bytes, _MEDIA_TYPE[Compression(compression)])
            for digest, compression, size_bytes in await self._metastore.blobs_of(layer.diff_id)
        ]
        for chain in dict.fromkeys(user.chain_id for user in users if user.chain_id):
            _, claimed = await self._content.candidates(chain)
            known += [blob for blob in claimed if blob.media_type in MEDIA_TYPES]
        return list({blob.digest: blob for blob in reversed(known)}.values())[::-1]

    async def _parents_layer(self, layer: Layer, error: BrokenLayer) -> Layer:
        repaired: set[LayerID] = set()
        for user in await self._metastore.users(layer.id):
            while True:
                try:
                    await self.parents.again(user)
                except BrokenLayer as below:
                    if below.layer.id in repaired or below.layer.id == layer.id:
                        raise
                    repaired.add(below.layer.id)
                    await self.layer(below)
                    continue
                break
            made = await self._metastore.layer_by_id(layer.id)
            if made is not None and made.state is LayerState.READY:
                return made
        raise BrokenLayer(layer, error.why, "no snapshot refers to it")

    async def _advice(self, layer: Layer, users: list[Snapshot], rotten: str) -> str:
        """What there is to be done, and the command for it."""
        why = rotten or "its blob is not in containerd's content store"
        commands: list[str] = []
        for namespace in dict.fromkeys(namespace_of(user.name) for user in users):
            for name in await self._image_names(layer, namespace):
                remove = f"ctr -n {namespace} content rm {rotten.split()[1].rstrip(':')}; " if rotten else ""
                commands.append(f"{remove}ctr -n {namespace} content fetch {name} && tardevctl fsck --repair")
        if commands:
            return f"{why}; run: {commands[0]}"
        names = ", ".join(repr(user.name) for user in users[:3]) or "no snapshot"
        return (
            f"{why}, and no image in containerd has the layer; {names} refers to it: fetch its image again with"
            " `ctr content fetch` and run `tardevctl fsck --repair`, or remove it"
        )

    async def _image_names(self, layer: Layer, namespace: str) -> list[str]:
        try:
            async with asyncio.timeout(_NAMES_SECONDS):
                return await images.with_layer(self._content, layer.diff_id, Caller.of({}, f"{namespace}/"))
        except (SnapshotterError, TimeoutError) as error:
            self._log.warning("images with a layer are not known", diff_id=layer.diff_id, error=str(error))
            return []
