# SPDX-License-Identifier: Apache-2.0
"""The layer file: [data area][dm-verity hash tree][trailer]. Its formats, the records at both ends, and opening it.

docs/formats.md has the bytes. Nothing here is verified: see verity.verify for that.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from blockdev.errors import FormatError
from blockdev.formats import erofs, tarfs
from blockdev.formats.tar_split import Split
from verity import trailer as verity_trailer
from verity.buffers import ReadAt as ReadAt
from verity.params import PRESETS, Params
from verity.tree import Geometry

ALIGNMENT_BYTES: Final = 4096
TRAILER_BYTES: Final = 4096
HEAD_BYTES: Final = 4096  # of the formats with an EROFS index


def align(value: int, unit: int) -> int:
    return value + -value % unit


@dataclass(frozen=True, slots=True)
class Format:
    """A released byte layout; never changed, only joined by others.

    `file_system`: the kernel's name of what mounts it; `block_bytes`: of that; `head_bytes`: what stands in
    front is written last. `stored`: a node makes such files; the others are only computed, to compare root
    hashes with those of other tools. `split`: the tar does not follow the head in one piece, but is put together
    of file data and what `tar_split` keeps of the rest. `parents`: the format of what goes on top of a chain of
    such layers. `of_chain`: it is such a one, and no layer itself; a table of directories is in place of the tar.
    """

    name: str
    params: Params
    file_system: str
    block_bytes: int
    head_bytes: int
    stored: bool = True
    split: bool = False
    parents: str | None = None
    of_chain: bool = False

    def geometry(self, data_size_bytes: int) -> Geometry:
        """Of the hash tree over so many bytes of data, which are whole blocks."""
        return Geometry(data_size_bytes // self.params.data_block_bytes, self.params)


FORMATS: Final = {
    known.name: known
    for known in (
        Format("tar-index", PRESETS["tar-index"], "erofs", 512, HEAD_BYTES, parents="tar-index-parents"),
        Format("tar-index-parents", PRESETS["tar-index"], "erofs", 512, HEAD_BYTES, of_chain=True),
        Format("erofs-4k", PRESETS["erofs-4k"], "erofs", 4096, HEAD_BYTES, split=True, parents="erofs-4k-parents"),
        Format("erofs-4k-parents", PRESETS["erofs-4k"], "erofs", 4096, HEAD_BYTES, of_chain=True),
        Format("tarfs", PRESETS["tarfs"], "tar", 4096, 0),
        Format("tarfs-genpolicy", PRESETS["tarfs"], "tar", 4096, 0, stored=False),
        Format("tarfs-genpolicy-upstream", PRESETS["tarfs"], "tar", 4096, 0, stored=False),
    )
}
STORED_FORMATS: Final = tuple(name for name, known in FORMATS.items() if known.stored)
LAYER_FORMATS: Final = tuple(name for name in STORED_FORMATS if not FORMATS[name].of_chain)


def format_named(name: str) -> Format:
    """Raises FormatError for a format that this version does not write."""
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(f"format {name!r} is not known; this version writes: {', '.join(FORMATS)}") from None


def of_chain(name: str) -> bool:
    """Whether files of this format, in a chain of layers, are parents layers."""
    return name in FORMATS and FORMATS[name].of_chain


def layer_format_named(name: str) -> Format:
    """Raises FormatError, also for a format that no layer has by itself."""
    found = format_named(name)
    if found.of_chain:
        raise FormatError(f"format {name!r} is made of a chain of layers, not of one layer")
    return found


@dataclass(frozen=True, slots=True)
class Identity:
    """First 1024 bytes of a file with an EROFS index; covered by verity. Sizes and offsets in bytes.

    `data_offset_bytes`: of the tar, or of file data. Of a parents layer, `tar_size_bytes` is about its table, and
    `diff_id` is the sha256 of that. `split`: where the format has it.
    """

    data_offset_bytes: int
    tar_size_bytes: int
    metadata_offset_bytes: int
    diff_id: bytes
    format_name: str = "tar-index"
    split: Split | None = None

    MAGICS: ClassVar[dict[str, bytes]] = {
        "tar-index": b"TARINDEX",
        "tar-index-parents": b"TARPARNT",
        "erofs-4k": b"EROFS-4K",
        "erofs-4k-parents": b"EROFS4KP",
    }
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<8sIIQQQ32s")
    SPLIT: ClassVar[struct.Struct] = struct.Struct("<QQQQ")
    SIZE_BYTES: ClassVar[int] = erofs.SUPERBLOCK_OFFSET_BYTES

    def pack(self) -> bytes:
        record = self.LAYOUT.pack(
            self.MAGICS[self.format_name], 1, 0, self.data_offset_bytes, self.tar_size_bytes,
            self.metadata_offset_bytes, self.diff_id,
        )  # fmt: skip
        if self.split is not None:
            split = self.split
            record += self.SPLIT.pack(split.offset_bytes, split.lost_bytes, split.tails, split.instruction_bytes)
        return record.ljust(self.SIZE_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Raises FormatError."""
        if len(raw) < cls.SIZE_BYTES:
            raise FormatError("no identity record")
        magic, version, flags, offset, tar_size, metadata_offset, diff_id = cls.LAYOUT.unpack_from(raw)
        names = {known: name for name, known in cls.MAGICS.items()}
        if magic not in names or (version, flags, offset) != (1, 0, HEAD_BYTES):
            raise FormatError("no identity record of version 1")
        name, split = names[magic], None
        if FORMATS[name].split:
            fields = cls.SPLIT.unpack_from(raw, cls.LAYOUT.size)
            split = Split(tar_size, offset, metadata_offset, *fields)
            sound = offset <= metadata_offset < split.offset_bytes and not split.offset_bytes % ALIGNMENT_BYTES
        else:
            sound = metadata_offset == align(HEAD_BYTES + tar_size, ALIGNMENT_BYTES)
        identity = cls(offset, tar_size, metadata_offset, diff_id, name, split)
        if not sound or identity.pack() != raw[: cls.SIZE_BYTES]:
            raise FormatError("identity record contradicts itself")
        return identity


@dataclass(frozen=True, slots=True)
class Trailer:
    """Last 4096 bytes of a file with an EROFS index: for discovery and torn writes; not covered by verity, never
    trusted for a mount."""

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
        return file_size(self.data_size_bytes, self.tree_size_bytes)

    def pack(self) -> bytes:
        params = self.params
        head = self.LAYOUT.pack(
            self.MAGIC, 1, 1, params.data_block_bytes, params.hash_block_bytes, self.data_blocks,
            self.data_size_bytes, self.tree_size_bytes, self.levels, self.root_hash, self.diff_id,
        )  # fmt: skip
        return bare_trailer(params, self.data_blocks, head + hashlib.sha256(head).digest())

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
        params = _PARAMS.get((data_block, hash_block))
        if params is None:
            raise FormatError(f"trailer names block sizes {data_block}/{hash_block}, which no format has")
        trailer = cls(params, data_size, tree, levels, root, diff_id)
        if not blocks or trailer.pack() != raw or blocks * data_block != data_size:
            raise FormatError("trailer contradicts itself")
        return trailer


assert Trailer.LAYOUT.size == 120
_PARAMS: Final = {
    (known.params.data_block_bytes, known.params.hash_block_bytes): known.params
    for known in FORMATS.values()
    if known.file_system == "erofs"
}


def bare_trailer(params: Params, data_blocks: int, head: bytes = b"") -> bytes:
    """Last 4096 bytes: `head`, zeros, and the verity record in its place."""
    record = verity_trailer.pack(params.data_block_bytes, params.hash_block_bytes, data_blocks)
    return (head.ljust(TRAILER_BYTES - verity_trailer.FROM_END_BYTES, b"\0") + record).ljust(TRAILER_BYTES, b"\0")


def file_size(data_size_bytes: int, tree_size_bytes: int) -> int:
    return align(data_size_bytes + tree_size_bytes, ALIGNMENT_BYTES) + TRAILER_BYTES


@dataclass(frozen=True, slots=True)
class Region:
    name: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LayerFile:
    """What a layer file says of itself. `diff_id` and `root_hash` are its claims, None where the format has none."""

    format: Format
    geometry: Geometry
    tar_size_bytes: int
    index_offset_bytes: int
    entries: int  # inodes of the index, the root included
    diff_id: bytes | None
    root_hash: bytes | None
    split: Split | None = None

    @property
    def data_size_bytes(self) -> int:
        return self.geometry.data_size_bytes

    @property
    def file_size_bytes(self) -> int:
        return file_size(self.data_size_bytes, self.geometry.tree_size_bytes)

    def regions(self) -> Iterator[Region]:
        """The whole file, front to back, without gaps."""
        head, index, data_end = self.format.head_bytes, self.index_offset_bytes, self.data_size_bytes
        tree_end = data_end + self.geometry.tree_size_bytes
        split = self.split
        parts = [("head", head)]
        if split is None:
            parts += [("table" if self.format.of_chain else "tar", head + self.tar_size_bytes), ("padding", index)]
            parts += [("index", data_end)]
        else:
            parts += [("file data", index), ("index", split.offset_bytes), ("tar headers", split.end_bytes)]
            parts += [("padding", data_end)]
        parts += [("hash tree", tree_end), ("padding", self.file_size_bytes - TRAILER_BYTES)]
        start = 0
        for name, end in [*parts, ("trailer", self.file_size_bytes)]:
            if end > start:
                yield Region(name, start, end - start)
            start = end


def open_layer_file(read_at: ReadAt, size_bytes: int) -> LayerFile:
    """What head, superblock and trailer say, where they agree with each other and with the file's size.

    Raises FormatError. Nothing is verified.
    """
    if size_bytes < 2 * TRAILER_BYTES:
        raise FormatError(f"file of {size_bytes} bytes is no layer file")
    trailer = read_at(size_bytes - TRAILER_BYTES, TRAILER_BYTES)
    if trailer.startswith(Trailer.MAGIC):
        return _open_erofs(read_at, size_bytes, Trailer.unpack(trailer))
    params = FORMATS["tarfs"].params
    if len(trailer) == TRAILER_BYTES:
        record = trailer[-verity_trailer.FROM_END_BYTES :]
        data_block, hash_block, blocks = verity_trailer.unpack(record)
        if (data_block, hash_block) == (params.data_block_bytes, params.hash_block_bytes):
            if not blocks or trailer != bare_trailer(params, blocks):
                raise FormatError("trailer has bytes that no format puts there")
            return _open_tarfs(read_at, size_bytes, Geometry(blocks, params))
    raise FormatError("no valid trailer: the file is incomplete or no layer file")


def _open_erofs(read_at: ReadAt, size_bytes: int, trailer: Trailer) -> LayerFile:
    if size_bytes != trailer.file_size_bytes:
        raise FormatError(f"file has {size_bytes} bytes, its trailer says {trailer.file_size_bytes}")
    geometry = Geometry(trailer.data_blocks, trailer.params)
    if (geometry.tree_size_bytes, len(geometry.levels)) != (trailer.tree_size_bytes, trailer.levels):
        raise FormatError("trailer names a tree of another shape than its data has")
    head = read_at(0, HEAD_BYTES)
    identity = Identity.unpack(head)
    layer_format = FORMATS[identity.format_name]
    if trailer.params != layer_format.params:
        raise FormatError("trailer names the block sizes of another format")
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
    split = identity.split
    if split is not None and align(split.end_bytes, ALIGNMENT_BYTES) != trailer.data_size_bytes:
        raise FormatError("identity record and trailer name different sizes of the data")
    return LayerFile(
        layer_format, geometry, identity.tar_size_bytes, identity.metadata_offset_bytes, superblock.inodes,
        identity.diff_id, trailer.root_hash, split,
    )  # fmt: skip


def _open_tarfs(read_at: ReadAt, size_bytes: int, geometry: Geometry) -> LayerFile:
    """Its index starts where the tar ends, and nothing in the file names the layer or the root hash."""
    if size_bytes != file_size(geometry.data_size_bytes, geometry.tree_size_bytes):
        raise FormatError(f"file has {size_bytes} bytes, which its trailer's {geometry.data_blocks} blocks do not give")
    block = tarfs.BLOCK_BYTES
    superblock = tarfs.Superblock.unpack(read_at(geometry.data_size_bytes - block, block), geometry.data_size_bytes)
    return LayerFile(
        FORMATS["tarfs"], geometry, superblock.inode_table_bytes, superblock.inode_table_bytes, superblock.inodes,
        None, None,
    )  # fmt: skip


def layer_uuid(format_name: str, diff_id: bytes) -> bytes:
    """RFC 9562 version 8 from the diff ID and the format's name alone."""
    seed = b"tar-index:v1:" + format_name.encode("ascii") + b":" + diff_id
    uuid = bytearray(hashlib.sha256(seed).digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)
