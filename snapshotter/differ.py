# SPDX-License-Identifier: Apache-2.0
"""Diff of Diff v1, where the answer is at hand: what was written above a snapshot's parent, or a layer's own tar.

Mounts are all that a Diff is told. They are ours where they are, to the option, what Snapshots answers
for some snapshot; for others containerd's next differ compares the mounted trees.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, TypeAlias

from blockdev.errors import BlockdevError
from blockdev.formats.compression import Compression, compression_of
from blockdev.workers.archive import Archive
from snapshotter.activation import Activation
from snapshotter.builder import Builder
from snapshotter.content import Blob, Caller, Content
from snapshotter.contracts import Mount
from snapshotter.contracts.mount import directories_of, lowers_of
from snapshotter.directories import Directories
from snapshotter.errors import DataLoss, Unimplemented
from snapshotter.idmap import IDMapping
from snapshotter.ingest import ingest
from snapshotter.layerstore import LayerStore
from snapshotter.metastore import Kind, Layer, Metastore, Snapshot
from snapshotter.tasks import to_the_end

# What containerd's own differ makes of a request without one.
_MEDIA_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
# A layer, and one above it that only mends its directories.
_TOPMOST: Final = 2

MountsOf: TypeAlias = Callable[[Snapshot], Awaitable[list[Mount]]]
MappingOf: TypeAlias = Callable[[Snapshot], IDMapping | None]


class Differ:
    """`mounts_of`: what Snapshots answers for a snapshot; `mapping_of`: IDs of its container, where it has others."""

    def __init__(
        self,
        metastore: Metastore,
        store: LayerStore,
        directories: Directories,
        activation: Activation,
        builder: Builder,
        content: Content,
        mounts_of: MountsOf,
        mapping_of: MappingOf,
    ) -> None:
        self._metastore, self._store, self._directories = metastore, store, directories
        self._activation, self._builder, self._content = activation, builder, content
        self._mounts_of, self._mapping_of = mounts_of, mapping_of

    async def diff(
        self,
        left: Sequence[Mount],
        right: Sequence[Mount],
        media_type: str,
        ref: str,
        labels: Mapping[str, str],
        latest_mtime: int | None,
        caller: Caller,
    ) -> Blob:
        """The blob, in containerd's content store. Raises Unimplemented for what is not at hand, and what reading
        and `ingest` raise."""
        media_type = media_type or _MEDIA_TYPE
        try:
            compression = compression_of(media_type)
        except BlockdevError as error:
            raise Unimplemented(str(error)) from None
        source = await self._source(left, right, latest_mtime)
        if source is None:
            raise Unimplemented("no snapshot of this snapshotter has the right mounts above the left ones")
        async with self._archive(source, compression, latest_mtime) as archive:
            return await ingest(self._content, archive, ref, labels, media_type, caller)

    async def _source(
        self, left: Sequence[Mount], right: Sequence[Mount], latest_mtime: int | None
    ) -> Snapshot | Layer | None:
        """An active snapshot, whose directory it is; or a layer, whose tar it is."""
        for owner in filter(None, map(self._directories.owner, directories_of(right))):
            snapshot = await self._metastore.by_id(owner)
            if snapshot is None or snapshot.extraction or snapshot.layer_id is not None:
                return None
            if not _same(right, await self._mounts_of(snapshot)) or not await self._is_parent(left, snapshot):
                return None
            return snapshot
        if latest_mtime is not None:
            return None  # no layer's own times
        return await self._committed(left, right)

    async def _is_parent(self, mounts: Sequence[Mount], snapshot: Snapshot) -> bool:
        """Whether they are those of a view of the snapshot's parent."""
        if snapshot.parent_id:
            return _same(mounts, await self._mounts_of(replace(snapshot, kind=Kind.VIEW, labels={})))
        if not mounts:
            return True
        for owner in filter(None, map(self._directories.owner, directories_of(mounts))):
            view = await self._metastore.by_id(owner)
            return view is not None and view.kind is Kind.VIEW and _same(mounts, await self._mounts_of(view))
        return False

    async def _committed(self, left: Sequence[Mount], right: Sequence[Mount]) -> Layer | None:
        """Of the committed snapshot that `right` views above `left`, its own layer."""
        tops = {self._activation.layer_at(path) for path in lowers_of(right)[:_TOPMOST]} - {None}
        if not tops:
            return None
        try:
            for snapshot in await self._metastore.snapshots():
                if snapshot.kind is not Kind.COMMITTED or snapshot.layer_id is None or snapshot.layer_id not in tops:
                    continue
                view = replace(snapshot, kind=Kind.VIEW, labels={}, parent=snapshot.name, parent_id=snapshot.id)
                if _same(right, await self._mounts_of(view)) and await self._is_parent(left, snapshot):
                    return await self._metastore.layer_by_id(snapshot.layer_id)
        finally:
            # Asking for mounts has made them.
            await self._activation.release_unused(self._metastore.layers_in_use)
        return None

    @asynccontextmanager
    async def _archive(
        self, source: Snapshot | Layer, compression: Compression, latest_mtime: int | None
    ) -> AsyncIterator[Archive]:
        if isinstance(source, Layer):
            why = self._store.contradiction(source)
            if why:
                raise DataLoss(f"layer {source.diff_id}: its file {why}")
            name, layer_size = f"layer {source.diff_id}", source.file_size_bytes
            fd = os.open(self._store.path(source.diff_id, source.format), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            name, layer_size = f"changes of snapshot {source.name!r}", None
            opening = asyncio.to_thread(self._directories.open_filled, source.id, self._mapping_of(source))
            fd = await to_the_end(opening)
        try:
            async with self._builder.archive(
                fd, name, layer_size_bytes=layer_size, compression=compression, latest_mtime=latest_mtime
            ) as archive:
                yield archive
        finally:
            os.close(fd)


def _same(left: Sequence[Mount], right: Sequence[Mount]) -> bool:
    return list(map(_identity, left)) == list(map(_identity, right))


def _identity(mount: Mount) -> tuple[str, str, frozenset[str]]:
    # containerd appends context= where SELinux is on.
    return mount.type, mount.source, frozenset(option for option in mount.options if not option.startswith("context="))
