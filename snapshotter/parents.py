# SPDX-License-Identifier: Apache-2.0
"""The parents layer of a chain: found by its identity, made where it is not there yet, made again where it was lost.

What one carries is a function of the layers below it (`blockdev.formats.parents`). It is worked out from the parents
layer of the chain below and the new layer's own table, so that a chain of 128 layers costs no more than one of two.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from blockdev.errors import EXHAUSTED, BlockdevError, FormatError
from blockdev.formats import directory_table, parents
from blockdev.formats.directory_table import Record
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import FORMATS, HEAD_BYTES, of_chain
from blockdev.formats.parents import Carried, Cursor
from snapshotter.activation import BrokenLayer
from snapshotter.builder import Builder
from snapshotter.errors import Internal, translate
from snapshotter.layerstore import LayerStore
from snapshotter.log import get_logger
from snapshotter.made import Made, identity
from snapshotter.metastore import Layer, LayerID, LayerState, Metastore, Snapshot, SnapshotID
from verity.buffers import ReadAt
from verity.errors import VerityError
from verity.verify import VerifiedReader

_REMEMBERED: Final = 1000


class BrokenTable(BrokenLayer):
    """Its file is sound: the table of its made directories is missing or bad, and another Apply of it mends that."""

    def __init__(self, layer: Layer, why: str) -> None:
        super().__init__(layer, why)
        self.args = (f"layer {layer.diff_id}: its directory table: {why}; `tardevctl fsck --repair` makes it again",)


class Parents:
    def __init__(self, metastore: Metastore, store: LayerStore, builder: Builder, made: Made) -> None:
        self._metastore, self._store, self._builder, self._made = metastore, store, builder, made
        # Worked out at Apply, for the Commit that follows it: containerd holds its write transaction then.
        self._known: dict[tuple[SnapshotID, LayerID], LayerID | None] = {}
        self._log = get_logger()

    async def of(self, parent: Snapshot | None, layer: Layer) -> LayerID | None:
        """What goes on top of `layer` on the committed snapshot `parent`; None where their chain needs nothing.

        Raises BrokenLayer, ResourceExhausted (too much to carry, no space), InvalidArgument (xattrs that no
        directory can have together), Internal.
        """
        above = FORMATS[layer.format].parents
        if parent is None or above is None:
            return None
        if parent.parents_layer_id is None and not layer.has_table:
            return None
        key = (parent.id, layer.id)
        if key in self._known:
            known = self._known[key]
            found = await self._metastore.layer_by_id(known) if known is not None else None
            if known is None or (found is not None and found.state is LayerState.READY):
                if found is not None:
                    self._builder.touch(found)
                return known
        table = await self._table_with(parent, layer)
        made = await self._made.stored(table, above) if table else None
        while len(self._known) >= _REMEMBERED:
            self._known.pop(next(iter(self._known)))
        self._known[key] = made.id if made is not None else None
        return self._known[key]

    async def of_layers(self, layers: Sequence[Layer]) -> Layer | None:
        """What goes on top of a chain that has no snapshots, `layers` with the first one first. Raises as `of`."""
        formats = {layer.format for layer in layers}
        above = FORMATS[formats.pop()].parents if len(formats) == 1 else None
        if above is None:
            return None
        table = await self._run(lambda files: _packed(_carried_by(files, layers)))
        return await self._made.stored(table, above) if table else None

    async def again(self, snapshot: Snapshot) -> None:
        """Make the lost parents layer of a committed snapshot once more, from all of its layers.

        Raises as `of`; Internal where something else comes of it.
        """
        chain = await self._metastore.chain(snapshot.id)
        layers = [layer for layer in chain if not of_chain(layer.format)][::-1]
        lost = next((layer for layer in chain if of_chain(layer.format)), None)
        if lost is None:
            return
        table = await self._run(lambda files: _packed(_carried_by(files, layers)))
        if identity(table) != lost.diff_id:
            raise Internal(f"the layers of snapshot {snapshot.name!r} do not give the parents layer {lost.diff_id}")
        await self._made.stored(table, lost.format)

    async def check_table(self, layer: Layer) -> None:
        """Raises BrokenTable where the table of the directories that it made is missing or bad."""

        def read() -> None:
            with _Files(self._store) as files:
                for _ in files.made(layer):
                    pass

        await asyncio.to_thread(read)

    async def _table_with(self, parent: Snapshot, layer: Layer) -> bytes:
        """Empty where nothing is needed."""
        for last in (False, True):
            chain = await self._metastore.chain(parent.id)
            below = next((each for each in chain if of_chain(each.format)), None)
            lowers = [each for each in chain if each is not below]
            if any(each.format != layer.format for each in lowers):
                return b""  # no runtime stacks them
            try:
                return await self._run(partial(_table_above, below, lowers, layer))
            except BrokenLayer as error:
                if last or not of_chain(error.layer.format):
                    raise
                await self.again(parent)
        raise AssertionError("unreachable")

    async def _run(self, work: Callable[[_Files], bytes]) -> bytes:
        def call() -> bytes:
            with _Files(self._store) as files:
                return work(files)

        try:
            return await asyncio.to_thread(call)
        except BrokenTable as error:
            self._log.error("directory table is broken", diff_id=error.layer.diff_id, reason=str(error))
            await asyncio.to_thread(self._store.drop_table, error.layer)
            raise
        except BrokenLayer as error:
            self._log.error("layer file is broken", diff_id=error.layer.diff_id, reason=str(error))
            await self._metastore.mark_broken([error.layer.id])
            raise
        except BlockdevError as error:
            raise translate(error) from error


class _Files:
    """Layer files and tables while they are read: every byte of an index through the hash tree of its row."""

    def __init__(self, store: LayerStore) -> None:
        self._store, self._open = store, ExitStack()
        self._read: dict[LayerID, ReadAt] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _descriptor(self, path: Path) -> int:
        """Raises FileNotFoundError, OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.callback(os.close, fd)
        return fd

    def _data(self, layer: Layer) -> ReadAt:
        """Its data area. Geometry and root hash are the row's: with them, whatever the file says, it is verified."""
        if layer.id in self._read:
            return self._read[layer.id]
        try:
            fd = self._descriptor(self._store.path(layer.diff_id, layer.format))
        except FileNotFoundError as error:
            raise BrokenLayer(layer, error.strerror or str(error)) from None
        geometry = FORMATS[layer.format].geometry(layer.data_size_bytes)
        verified = VerifiedReader(
            lambda offset, size: os.pread(fd, size, offset), geometry, bytes.fromhex(layer.root_hash)
        )

        def read_at(offset: int, size: int) -> bytes:
            try:
                return verified(offset, size)
            except (VerityError, OSError) as error:
                if isinstance(error, OSError) and error.errno in EXHAUSTED:
                    raise  # which says nothing of the file
                raise BrokenLayer(layer, f"cannot be read: {error}") from None

        self._read[layer.id] = read_at
        return read_at

    def cursor(self, layer: Layer) -> Cursor:
        """Good for one merge: a reader bounds how much it reads in all."""
        return Cursor(Reader(self._data(layer), layer.data_size_bytes, verified=True))

    def made(self, layer: Layer) -> Iterator[Record]:
        """The table of the directories that the layer made."""
        if not layer.has_table:
            return
        raw = bytes.fromhex(layer.diff_id.removeprefix("sha256:"))
        try:
            fd = self._descriptor(self._store.table_path(layer.diff_id, layer.format))
            yield from directory_table.read_layer_table(
                lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size, raw
            )
        except (FileNotFoundError, FormatError) as error:
            raise BrokenTable(layer, str(error)) from None

    def carried(self, layer: Layer) -> Carried:
        """Of a parents layer."""
        read_at = self._data(layer)
        try:
            return parents.unpack(
                directory_table.read_parents_table(
                    lambda offset, size: read_at(HEAD_BYTES + offset, size), layer.tar_size_bytes
                )
            )
        except FormatError as error:
            raise BrokenLayer(layer, str(error)) from None


def _packed(carried: Carried | None) -> bytes:
    return parents.pack(carried) if carried is not None else b""


def _table_above(below: Layer | None, lowers: Sequence[Layer], layer: Layer, files: _Files) -> bytes:
    """`lowers`: topmost first."""
    carried = files.carried(below) if below is not None else None
    return _packed(parents.merged(carried, files.made(layer), files.cursor(layer), map(files.cursor, lowers)))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A layer of a chain, read from the store."""

    files: _Files
    layer: Layer

    @property
    def has_table(self) -> bool:
        return self.layer.has_table

    def made(self) -> Iterator[Record]:
        return self.files.made(self.layer)

    def cursor(self) -> Cursor:
        return self.files.cursor(self.layer)


def _carried_by(files: _Files, layers: Sequence[Layer]) -> Carried | None:
    """`layers`: the first one first."""
    return parents.carried_by([_Stored(files, layer) for layer in layers])
