# SPDX-License-Identifier: Apache-2.0
"""Write a layer file front to back, hashed on the way.

`LayerWriter` is the single pass: it hands out sinks that each must see every byte of the tar in order
(a caller with threads may run them side by side), and `finish` adds the index, the tree and the
trailer. docs/formats.md has the bytes.
"""

from __future__ import annotations

import queue
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import directory_table, erofs, parents
from blockdev.formats.erofs_writer import Contents, ContentsInTar, MetadataWriter
from blockdev.formats.file_tree import FileTree, Inode, canonical_order
from blockdev.formats.layer_file import (
    ALIGNMENT_BYTES,
    HEAD_BYTES,
    Format,
    Identity,
    ReadAt,
    Trailer,
    align,
    bare_trailer,
    file_size,
    layer_uuid,
)
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, TarScanner
from blockdev.formats.tar_split import Split, TarSplitter
from blockdev.formats.tarfs_tar import Dialect
from blockdev.formats.tarfs_writer import FAULTS, TarfsWriter
from verity.buffers import Buffer
from verity.hasher import LeafHasher, LeafStore, StreamHash, leaf_digests
from verity.params import Params
from verity.spool import SpooledBytes
from verity.tree import Geometry, HashTree

# Block addresses are 32 bits and the last two are kept free (Linux: EROFS_NULL_ADDR).
_BLOCKS_MAX: Final = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """What a build found out; sizes in bytes, hashes raw."""

    format: str
    diff_id: bytes
    root_hash: bytes
    tar_size_bytes: int
    data_size_bytes: int
    tree_size_bytes: int
    file_size_bytes: int
    entries: int  # inodes of the index, the root included
    warnings: dict[str, int] = field(default_factory=dict)


class VerifiedWriter:
    """A sequential sink: what passes is written once and hashed into the leaves of `tree`.

    `hash` and `store` are the two halves of `write`, for a caller that runs them on two threads; each
    must see the same bytes in the same order.
    """

    def __init__(self, write: Callable[[Buffer], object], tree: HashTree, params: Params) -> None:
        self._write, self._tree = write, tree
        self._leaves = LeafHasher(params)
        self.size_bytes = 0

    def hash(self, data: Buffer, stream: StreamHash | None = None, streamed: Buffer | None = None) -> None:
        """With `stream`, that goes on in the same pass, by the same bytes or by `streamed`."""
        self._tree.append(self._leaves.update(data, stream, streamed))

    def store(self, data: Buffer) -> None:
        self._write(data)
        self.size_bytes += len(memoryview(data))

    def write(self, data: Buffer) -> None:
        self.hash(data)
        self.store(data)

    def pad(self, unit: int) -> None:
        self.write(bytes(-self.size_bytes % unit))


@dataclass(frozen=True, slots=True)
class Index:
    """What an index writer has put behind the tar. `head`: what goes in front of it, last."""

    entries: int
    warnings: dict[str, int]
    head: bytes = b""


class IndexWriter(Protocol):
    """Sees the tar through `feed`, then writes the index of what it has seen. Both raise BlockdevError.

    What `feed` returns is what stands in the file of a format that splits the tar, and nothing in others.
    """

    def feed(self, data: Buffer) -> Buffer | None: ...

    def write(self, writer: VerifiedWriter, tar_size_bytes: int, diff_id: bytes) -> Index:
        """Up to the end of the data area; called once."""

    def directory_table(self, diff_id: bytes) -> Iterator[bytes]:
        """After `write`, in pieces: the directories that the layer made for want of an entry, and has still.

        Nothing where it never made one.
        """


@dataclass(frozen=True, slots=True)
class _Area:
    """Metadata of EROFS that is written."""

    offset_bytes: int
    root_nid: int
    inodes: int


class _ErofsIndexWriter:
    def __init__(self, layer_format: Format) -> None:
        self._format = layer_format

    def _area(self, writer: VerifiedWriter, order: Sequence[Inode], contents: Contents) -> _Area:
        """Written, up to its end."""
        metadata = MetadataWriter(order, self._format.block_bytes, contents)
        area = metadata.layout()
        writer.pad(ALIGNMENT_BYTES)
        offset = writer.size_bytes
        self._check_size(offset + area.size_bytes)
        metadata.emit(writer.write, offset)
        assert writer.size_bytes == offset + area.size_bytes, "the layout pass and the emission pass disagree"
        return _Area(offset, area.root_nid, area.inodes)

    def _index(
        self,
        writer: VerifiedWriter,
        area: _Area,
        tar_size_bytes: int,
        diff_id: bytes,
        warnings: dict[str, int],
        split: Split | None = None,
    ) -> Index:
        """The end of the data area."""
        writer.pad(ALIGNMENT_BYTES)
        self._check_size(writer.size_bytes)
        identity = Identity(HEAD_BYTES, tar_size_bytes, area.offset_bytes, diff_id, self._format.name, split)
        return Index(area.inodes, warnings, self._head(identity, area, writer.size_bytes))

    def _check_size(self, size_bytes: int) -> None:
        block = self._format.block_bytes
        if align(size_bytes, ALIGNMENT_BYTES) // block > _BLOCKS_MAX:
            raise LimitExceeded(f"layer is over the {(block << 32) >> 40} TiB that 32-bit block addresses reach")

    def _head(self, identity: Identity, area: _Area, data_size_bytes: int) -> bytes:
        block = self._format.block_bytes
        superblock = erofs.Superblock(
            block_bits=block.bit_length() - 1,
            root_nid=area.root_nid,
            inodes=area.inodes,
            blocks=data_size_bytes // block,
            meta_block=identity.metadata_offset_bytes // block,
            uuid=layer_uuid(self._format.name, identity.diff_id),
        ).pack()
        covered = bytearray(superblock.ljust(erofs.checksummed_bytes(block), b"\0"))
        struct.pack_into("<I", covered, 4, erofs.crc32c(covered))
        return (identity.pack() + bytes(covered)).ljust(HEAD_BYTES, b"\0")


class _TreeIndexWriter(_ErofsIndexWriter):
    """Of the tree that the members of a tar make."""

    def __init__(self, layer_format: Format, limits: Limits) -> None:
        super().__init__(layer_format)
        self._tree = FileTree(limits)
        self._scanner = TarScanner(self._add, limits)

    def _add(self, member: Member) -> None:
        self._tree.add(member)

    def _finish(self) -> list[Inode]:
        self._scanner.close()
        return self._tree.finish()

    def _warnings(self) -> dict[str, int]:
        return {
            "dropped_xattrs": self._tree.dropped_xattrs,
            "invented_directories": self._tree.invented_directories,
            "nonzero_padding": self._scanner.dirty_padding,
        }

    def directory_table(self, diff_id: bytes) -> Iterator[bytes]:
        if not self._tree.invented_directories:
            return iter(())
        return directory_table.layer_table(self._tree.root, self._tree.made, diff_id)


class TarIndexWriter(_TreeIndexWriter):
    def feed(self, data: Buffer) -> None:
        self._scanner.feed(data)

    def write(self, writer: VerifiedWriter, tar_size_bytes: int, diff_id: bytes) -> Index:
        order = self._finish()
        area = self._area(writer, order, ContentsInTar(HEAD_BYTES, self._format.block_bytes))
        return self._index(writer, area, tar_size_bytes, diff_id, self._warnings())


class SplitIndexWriter(_TreeIndexWriter):
    """`waiting` gives places for what waits for the end; `read_back` reads what was written."""

    def __init__(
        self, layer_format: Format, limits: Limits, waiting: Callable[[], SpooledBytes], read_back: ReadAt
    ) -> None:
        super().__init__(layer_format, limits)
        self._splitter = TarSplitter(HEAD_BYTES, waiting(), waiting())
        self._read_back = read_back

    def _add(self, member: Member) -> None:
        super()._add(member)
        self._splitter.member(member.data_offset_bytes, member.size_bytes)

    def feed(self, data: Buffer) -> Buffer:
        self._scanner.feed(data)
        return self._splitter.feed(data)

    def write(self, writer: VerifiedWriter, tar_size_bytes: int, diff_id: bytes) -> Index:
        order = self._finish()
        self._splitter.finish()
        area = self._area(writer, order, self._splitter)
        split = self._splitter.write(writer.write, area.offset_bytes, writer.size_bytes)
        self._splitter.check(split, self._read_back)
        return self._index(writer, area, tar_size_bytes, diff_id, self._warnings(), split)


class _ParentsIndexWriter(_ErofsIndexWriter):
    """Its "tar" is a table of `parents`, made here: it is small."""

    def __init__(self, layer_format: Format) -> None:
        super().__init__(layer_format)
        self._table = bytearray()

    def feed(self, data: Buffer) -> None:
        self._table += data

    def write(self, writer: VerifiedWriter, tar_size_bytes: int, diff_id: bytes) -> Index:
        table = bytes(self._table)
        records = directory_table.read_parents_table(lambda at, size: table[at : at + size], len(table))
        order = canonical_order(parents.directories(records))
        area = self._area(writer, order, ContentsInTar(HEAD_BYTES, self._format.block_bytes))
        return self._index(writer, area, tar_size_bytes, diff_id, {})

    def directory_table(self, diff_id: bytes) -> Iterator[bytes]:
        return iter(())


_DIALECTS: Final = {
    "tarfs": Dialect.SNAPSHOTTER,
    "tarfs-genpolicy": Dialect.GENPOLICY,
    "tarfs-genpolicy-upstream": Dialect.GENPOLICY_UPSTREAM,
}


class _TarfsIndexWriter:
    def __init__(self, layer_format: Format, limits: Limits, read_back: ReadAt | None) -> None:
        self._writer = TarfsWriter(_DIALECTS[layer_format.name], limits, read_back)
        self.feed = self._writer.feed

    def write(self, writer: VerifiedWriter, tar_size_bytes: int, diff_id: bytes) -> Index:
        entries = self._writer.write(writer.write, tar_size_bytes)
        return Index(entries, self._writer.warnings())

    def directory_table(self, diff_id: bytes) -> Iterator[bytes]:
        return iter(())


def index_writer(layer_format: Format, limits: Limits, leaves: LeafStore, read_back: ReadAt | None) -> IndexWriter:
    """Raises ValueError for a format that needs `read_back` without it."""
    if layer_format.name in _DIALECTS:
        return _TarfsIndexWriter(layer_format, limits, read_back)
    if layer_format.of_chain:
        return _ParentsIndexWriter(layer_format)
    if not layer_format.split:
        return TarIndexWriter(layer_format, limits)
    if read_back is None:
        raise ValueError(f"format {layer_format.name} is not written blindly")
    return SplitIndexWriter(layer_format, limits, leaves.beside, read_back)


class _HandedOver:
    """What comes of each piece of a tar, for two sinks that may have threads of their own."""

    def __init__(self) -> None:
        self._lanes: tuple[queue.SimpleQueue[Buffer | None], ...] = (queue.SimpleQueue(), queue.SimpleQueue())
        self._ended = [False, False]

    def put(self, data: Buffer | None) -> None:
        """None: nothing comes of this piece or of any other, for making it has failed."""
        for lane in self._lanes:
            lane.put(data)

    def take(self, lane: int) -> Buffer:
        """Of the next piece, once it has been put."""
        if not self._ended[lane]:
            data = self._lanes[lane].get()
            if data is not None:
                return data
            self._ended[lane] = True
        return b""


def _to_nowhere(data: Buffer) -> None:
    pass


class LayerWriter:
    """One layer in one format.

    `write` appends to the layer file behind its head, `write_head` puts that in front (called once,
    last, where the format has one). So each byte is written once. `leaves` holds the leaf digests.
    `read_back` reads what `write` has written: a format that splits the tar needs it, in others some warnings
    are surer with it. `strict`: a layer that would come out wrong in the guest is refused. `skip` takes the place of
    `write` for the tar and gets sizes; hash tree and trailer are not written then.

    Sinks and `finish` raise FormatError, UnsupportedError and LimitExceeded, and what `write` and
    `leaves` raise.
    """

    def __init__(
        self,
        layer_format: Format,
        *,
        write: Callable[[Buffer], object],
        write_head: Callable[[bytes], object],
        leaves: LeafStore,
        limits: Limits,
        read_back: ReadAt | None = None,
        strict: bool = False,
        skip: Callable[[int], object] | None = None,
    ) -> None:
        self.format = layer_format
        self._write_raw, self._write_head, self._limits, self._strict = write, write_head, limits, strict
        self._skip = skip
        self._index = index_writer(layer_format, limits, leaves, read_back)
        self._tree = HashTree(leaves, layer_format.params)
        self._writer = VerifiedWriter(write, self._tree, layer_format.params)
        # The head's place is taken now; its bytes, and their digests, follow last.
        self._writer.hash(bytes(layer_format.head_bytes))
        self._writer.size_bytes = layer_format.head_bytes
        self._tar_size_bytes = 0
        self._handed_over = _HandedOver()

    def sinks(self, stream: StreamHash | None = None) -> tuple[Callable[[Buffer], object], ...]:
        """Each sees every piece of the tar once, in order: on threads of their own, or one after the other in this
        order. The last one hashes.

        With `stream`, the sha256 of the tar is computed along with the leaves: two lanes of one kernel.
        """
        if self.format.split:
            return (
                self._split,
                lambda data: self._store(self._handed_over.take(0)),
                lambda data: self._writer.hash(self._handed_over.take(1), stream, data),
            )
        return (self._read, self._store, lambda data: self._writer.hash(data, stream))

    def feed(self, data: Buffer) -> None:
        for sink in self.sinks():
            sink(data)

    def _store(self, data: Buffer) -> None:
        if self._skip is None:
            self._writer.store(data)
        else:
            size = memoryview(data).nbytes
            self._skip(size)
            self._writer.size_bytes += size

    def _read(self, data: Buffer) -> Buffer | None:
        self._tar_size_bytes += memoryview(data).nbytes
        if self._tar_size_bytes > self._limits.tar_bytes:
            raise LimitExceeded(f"layer is over the limit of {self._limits.tar_bytes} bytes")
        return self._index.feed(data)

    def _split(self, data: Buffer) -> None:
        placed = None
        try:
            placed = self._read(data)
        finally:
            self._handed_over.put(placed)

    def finish(self, diff_id: bytes) -> BuiltLayer:
        """`diff_id`: the sha256 of the tar, raw; the caller's to compute, since several formats share it."""
        params, writer = self.format.params, self._writer
        tar_size = self._tar_size_bytes
        index = self._index.write(writer, tar_size, diff_id)
        warnings = {name: count for name, count in index.warnings.items() if count}
        if self._strict and not FAULTS.isdisjoint(warnings):
            faults = ", ".join(f"{name} {count}" for name, count in warnings.items() if name in FAULTS)
            raise FormatError(f"this layer would come out wrong from format {self.format.name}: {faults}")
        if index.head:
            self._tree.replace(0, leaf_digests(index.head, params))
        data_size = writer.size_bytes
        geometry = Geometry(data_size // params.data_block_bytes, params)
        write = self._write_raw if self._skip is None else _to_nowhere
        root_hash = self._tree.write(write)
        if index.head:
            trailer = Trailer(
                params, data_size, geometry.tree_size_bytes, len(geometry.levels), root_hash, diff_id
            ).pack()
        else:
            trailer = bare_trailer(params, geometry.data_blocks)
        write(bytes(-(data_size + geometry.tree_size_bytes) % ALIGNMENT_BYTES) + trailer)
        if index.head:
            self._write_head(index.head)
        return BuiltLayer(
            self.format.name, diff_id, root_hash, tar_size, data_size, geometry.tree_size_bytes,
            file_size(data_size, geometry.tree_size_bytes), index.entries, warnings,
        )  # fmt: skip

    def directory_table(self, diff_id: bytes) -> Iterator[bytes]:
        """After `finish`, in pieces: what goes beside the file for the parents layers of chains; often nothing."""
        return self._index.directory_table(diff_id)
