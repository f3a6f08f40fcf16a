# SPDX-License-Identifier: Apache-2.0
"""The layer file: [data area][dm-verity hash tree][trailer], written front to back and hashed on the way.

`LayerWriter` is the single pass: it hands out sinks that each must see every byte of the tar in order
(a caller with threads may run them side by side), and `finish` adds the index, the tree and the
trailer. docs/formats.md has the bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.erofs_writer import MetadataWriter
from blockdev.formats.file_tree import FileTree
from blockdev.formats.limits import Limits
from blockdev.formats.tar import TarScanner
from verity import trailer as verity_trailer
from verity.buffers import Buffer
from verity.hasher import LeafStore, leaf_digests
from verity.params import PRESETS, Params
from verity.tree import Geometry, write_tree

ALIGNMENT_BYTES: Final = 4096
TRAILER_BYTES: Final = 4096
HEAD_BYTES: Final = 4096
# Block addresses are 32 bits and the last two are kept free (Linux: EROFS_NULL_ADDR).
_BLOCKS_MAX: Final = (1 << 32) - 2


def align(value: int, unit: int) -> int:
    return value + -value % unit


@dataclass(frozen=True, slots=True)
class Format:
    """A released byte layout; never changed, only joined by others."""

    name: str
    params: Params
    block_bytes: int


FORMATS: Final = {"tar-index": Format("tar-index", PRESETS["tar-index"], 512)}


def format_named(name: str) -> Format:
    """Raises FormatError for a format that this version does not write."""
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(f"format {name!r} is not known; this version writes: {', '.join(FORMATS)}") from None


@dataclass(frozen=True, slots=True)
class Identity:
    """First 1024 bytes of a tar-index file; covered by verity. Sizes and offsets in bytes."""

    tar_offset_bytes: int
    tar_size_bytes: int
    metadata_offset_bytes: int
    diff_id: bytes

    MAGIC: ClassVar[bytes] = b"TARINDEX"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<8sIIQQQ32s952x")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.MAGIC, 1, 0, self.tar_offset_bytes, self.tar_size_bytes, self.metadata_offset_bytes, self.diff_id
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Raises FormatError."""
        if len(raw) < cls.LAYOUT.size or any(raw[72:1024]):
            raise FormatError("no tar-index identity record")
        fields = cls.LAYOUT.unpack(raw[: cls.LAYOUT.size])
        magic, version, flags, tar_offset, tar_size, metadata_offset, diff_id = fields
        if (magic, version, flags, tar_offset) != (cls.MAGIC, 1, 0, HEAD_BYTES):
            raise FormatError("no tar-index identity record of version 1")
        if metadata_offset != align(HEAD_BYTES + tar_size, ALIGNMENT_BYTES):
            raise FormatError("identity record contradicts itself")
        return cls(tar_offset, tar_size, metadata_offset, diff_id)


@dataclass(frozen=True, slots=True)
class Trailer:
    """Last 4096 bytes: for discovery and torn writes; not covered by verity, never trusted for a mount."""

    params: Params
    data_size_bytes: int
    tree_size_bytes: int
    levels: int
    root_hash: bytes
    diff_id: bytes

    MAGIC: ClassVar[bytes] = b"TARIDXTR"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<8sIIIIQQQQ32s32s")

    @property
    def data_blocks(self) -> int:
        return self.data_size_bytes // self.params.data_block_bytes

    @property
    def file_size_bytes(self) -> int:
        return align(self.data_size_bytes + self.tree_size_bytes, ALIGNMENT_BYTES) + TRAILER_BYTES

    def pack(self) -> bytes:
        params = self.params
        head = self.LAYOUT.pack(
            self.MAGIC, 1, 1, params.data_block_bytes, params.hash_block_bytes, self.data_blocks,
            self.data_size_bytes, self.tree_size_bytes, self.levels, self.root_hash, self.diff_id,
        )  # fmt: skip
        record = verity_trailer.pack(params.data_block_bytes, params.hash_block_bytes, self.data_blocks)
        out = head + hashlib.sha256(head).digest()
        return (out.ljust(TRAILER_BYTES - 512, b"\0") + record).ljust(TRAILER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Raises FormatError unless every byte is as `pack` would write it."""
        size = cls.LAYOUT.size
        whole = len(raw) == TRAILER_BYTES and raw.startswith(cls.MAGIC)
        if not whole or hashlib.sha256(raw[:size]).digest() != raw[size : size + 32]:
            raise FormatError("no valid trailer: the file is incomplete or no layer file")
        _, version, algorithm, data_block, hash_block, blocks, data_size, tree, levels, root, diff_id = (
            cls.LAYOUT.unpack(raw[:size])
        )
        if (version, algorithm) != (1, 1):
            raise FormatError(f"trailer of version {version}, algorithm {algorithm} is not known")
        known = {(known.params.data_block_bytes, known.params.hash_block_bytes) for known in FORMATS.values()}
        if (data_block, hash_block) not in known:
            raise FormatError(f"trailer names block sizes {data_block}/{hash_block}, which no format has")
        trailer = cls(Params(data_block, hash_block), data_size, tree, levels, root, diff_id)
        if not blocks or trailer.pack() != raw or blocks * data_block != data_size:
            raise FormatError("trailer contradicts itself")
        return trailer


assert Trailer.LAYOUT.size == 120


def open_layer_file(read_at: Callable[[int, int], bytes], size_bytes: int) -> tuple[Format, Identity, Trailer]:
    """What head and trailer say, where they agree with each other and with the file's size. Nothing is verified.

    `read_at`: (offset, size) in bytes → at most size bytes. Raises FormatError.
    """
    if size_bytes < HEAD_BYTES + TRAILER_BYTES:
        raise FormatError(f"file of {size_bytes} bytes is no layer file")
    trailer = Trailer.unpack(read_at(size_bytes - TRAILER_BYTES, TRAILER_BYTES))
    if size_bytes != trailer.file_size_bytes:
        raise FormatError(f"file has {size_bytes} bytes, its trailer says {trailer.file_size_bytes}")
    geometry = Geometry(trailer.data_blocks, trailer.params)
    if (geometry.tree_size_bytes, len(geometry.levels)) != (trailer.tree_size_bytes, trailer.levels):
        raise FormatError("trailer names a tree of another shape than its data has")
    layer_format = next(known for known in FORMATS.values() if known.params == trailer.params)
    head = read_at(0, HEAD_BYTES)
    identity = Identity.unpack(head)
    if identity.diff_id != trailer.diff_id:
        raise FormatError("identity record and trailer name different diff IDs")
    superblock = erofs.Superblock.unpack(head[erofs.SUPERBLOCK_OFFSET_BYTES :])
    block = layer_format.block_bytes
    if (
        1 << superblock.block_bits != block
        or superblock.blocks * block != trailer.data_size_bytes
        or superblock.meta_block * block != identity.metadata_offset_bytes
        or superblock.uuid != layer_uuid(layer_format.name, identity.diff_id)
    ):
        raise FormatError("superblock is another layer's")
    return layer_format, identity, trailer


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
    """A sequential sink: what passes is written once and hashed into leaf digests.

    `hash` and `store` are the two halves of `write`, for a caller that runs them on two threads; each
    must see the same bytes in the same order.
    """

    def __init__(self, write: Callable[[Buffer], object], leaves: LeafStore, params: Params) -> None:
        self._write, self._leaves, self._params = write, leaves, params
        self._partial = bytearray()
        self.size_bytes = 0

    def hash(self, data: Buffer) -> None:
        view = memoryview(data)
        block = self._params.data_block_bytes
        if self._partial:
            take = min(block - len(self._partial), len(view))
            self._partial += view[:take]
            view = view[take:]
            if len(self._partial) < block:
                return
            self._leaves.append(leaf_digests(self._partial, self._params))
            self._partial = bytearray()
        whole = len(view) - len(view) % block
        if whole:
            self._leaves.append(leaf_digests(view[:whole], self._params))
        self._partial += view[whole:]

    def store(self, data: Buffer) -> None:
        self._write(data)
        self.size_bytes += len(memoryview(data))

    def write(self, data: Buffer) -> None:
        self.hash(data)
        self.store(data)

    def pad(self, unit: int) -> None:
        self.write(bytes(-self.size_bytes % unit))


class LayerWriter:
    """One layer in the `tar-index` format.

    `write` appends to the layer file behind its head, `write_head` puts the 4096 bytes of the head in
    front (called once, last). So each byte is written once. `leaves` holds the leaf digests. Sinks
    and `finish` raise FormatError, UnsupportedError and LimitExceeded, and what `write` and `leaves` raise.
    """

    def __init__(
        self,
        layer_format: Format,
        *,
        write: Callable[[Buffer], object],
        write_head: Callable[[bytes], object],
        leaves: LeafStore,
        limits: Limits,
    ) -> None:
        self.format = layer_format
        self._write_raw, self._write_head, self._leaves, self._limits = write, write_head, leaves, limits
        self.tar_digest = hashlib.sha256()  # its hash is the diff ID
        self._tree = FileTree(limits)
        self._scanner = TarScanner(self._tree.add, limits)
        self._writer = VerifiedWriter(write, leaves, layer_format.params)
        # The head's place is taken now; its bytes, and their digests, follow last.
        self._writer.hash(bytes(HEAD_BYTES))
        self._writer.size_bytes = HEAD_BYTES

    def sinks(self) -> tuple[Callable[[Buffer], None], ...]:
        """Independent of each other; each sees every piece of the tar once, in order."""
        return (self.tar_digest.update, self._writer.hash, self._store, self._scanner.feed)

    def feed(self, data: Buffer) -> None:
        for sink in self.sinks():
            sink(data)

    def _store(self, data: Buffer) -> None:
        self._writer.store(data)
        if self._writer.size_bytes - HEAD_BYTES > self._limits.tar_bytes:
            raise LimitExceeded(f"layer is over the limit of {self._limits.tar_bytes} bytes")

    def finish(self) -> BuiltLayer:
        self._scanner.close()
        params = self.format.params
        writer = self._writer
        tar_size = writer.size_bytes - HEAD_BYTES
        diff_id = self.tar_digest.digest()
        order = self._tree.finish()
        metadata = MetadataWriter(order, self.format.block_bytes)
        area = metadata.layout()
        writer.pad(ALIGNMENT_BYTES)
        metadata_offset = writer.size_bytes
        data_size = align(metadata_offset + area.size_bytes, ALIGNMENT_BYTES)
        if data_size // self.format.block_bytes > _BLOCKS_MAX:
            raise LimitExceeded("layer is over the 2 TiB that 32-bit block addresses reach")
        metadata.emit(writer.write, metadata_offset, HEAD_BYTES)
        writer.pad(ALIGNMENT_BYTES)
        assert writer.size_bytes == data_size, "the layout pass and the emission pass disagree"

        identity = Identity(HEAD_BYTES, tar_size, metadata_offset, diff_id)
        head = self._head(identity, area.root_nid, area.inodes, data_size)
        self._leaves.replace(0, leaf_digests(head, params))
        geometry = Geometry(data_size // params.data_block_bytes, params)
        root_hash = write_tree(self._leaves, params, self._write_raw)
        trailer = Trailer(params, data_size, geometry.tree_size_bytes, len(geometry.levels), root_hash, diff_id)
        self._write_raw(bytes(-(data_size + geometry.tree_size_bytes) % ALIGNMENT_BYTES) + trailer.pack())
        self._write_head(head)
        warnings = {
            "dropped_xattrs": self._tree.dropped_xattrs,
            "invented_directories": self._tree.invented_directories,
            "nonzero_padding": self._scanner.dirty_padding,
        }
        return BuiltLayer(
            self.format.name, diff_id, root_hash, tar_size, data_size, geometry.tree_size_bytes,
            trailer.file_size_bytes, area.inodes, {name: count for name, count in warnings.items() if count},
        )  # fmt: skip

    def _head(self, identity: Identity, root_nid: int, inodes: int, data_size_bytes: int) -> bytes:
        block = self.format.block_bytes
        superblock = erofs.Superblock(
            block_bits=block.bit_length() - 1,
            root_nid=root_nid,
            inodes=inodes,
            blocks=data_size_bytes // block,
            meta_block=identity.metadata_offset_bytes // block,
            uuid=layer_uuid(self.format.name, identity.diff_id),
        ).pack()
        covered = bytearray(superblock.ljust(block, b"\0"))
        struct.pack_into("<I", covered, 4, erofs.crc32c(covered))
        return (identity.pack() + bytes(covered)).ljust(HEAD_BYTES, b"\0")


def layer_uuid(format_name: str, diff_id: bytes) -> bytes:
    """RFC 9562 version 8 from the diff ID and the format's name alone."""
    seed = b"tar-index:v1:" + format_name.encode("ascii") + b":" + diff_id
    uuid = bytearray(hashlib.sha256(seed).digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)
