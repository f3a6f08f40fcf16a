# SPDX-License-Identifier: Apache-2.0
"""EROFS on-disk records, as far as our formats use them (Linux: fs/erofs/erofs_fs.h).

All integers are little-endian. The byte tables are in docs/formats.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from blockdev.errors import FormatError
from verity.buffers import Buffer

SUPERBLOCK_OFFSET_BYTES: Final = 1024
MAGIC: Final = 0xE0F5E1E2
COMPAT_SB_CHKSUM: Final = 0x1
COMPAT_MTIME: Final = 0x2

LAYOUT_PLAIN: Final = 0
LAYOUT_INLINE: Final = 2
NID_UNIT_BYTES: Final = 32
INODE_BYTES: Final = 64
XATTR_HEADER_BYTES: Final = 12

FILE_TYPES: Final = {
    0o100000: 1,
    0o040000: 2,
    0o020000: 3,
    0o060000: 4,
    0o010000: 5,
    0o140000: 6,
    0o120000: 7,
}

DIRENT: Final = struct.Struct("<QHBx")
# i_format, i_xattr_icount, i_mode, reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
INODE: Final = struct.Struct("<HHH2xQIIIIqII16x")
XATTR_ENTRY: Final = struct.Struct("<BBH")
assert DIRENT.size == 12
assert INODE.size == INODE_BYTES

_XATTR_PREFIXES: Final = {b"user": 1, b"trusted": 4, b"security": 6}
_XATTR_WHOLE: Final = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_XATTR_NAMES: Final = {index: name + b"." for name, index in _XATTR_PREFIXES.items()} | {
    index: name for name, index in _XATTR_WHOLE.items()
}
XATTR_BODY_BYTES_MAX: Final = XATTR_HEADER_BYTES + 4 * (0xFFFF - 1)
XATTR_VALUE_BYTES_MAX: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Superblock:
    """The 128 bytes at 1024. Block counts and addresses are in blocks of 1 << block_bits bytes."""

    block_bits: int
    root_nid: int
    inodes: int
    blocks: int
    meta_block: int
    uuid: bytes
    checksum: int = 0

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            MAGIC, self.checksum, COMPAT_SB_CHKSUM | COMPAT_MTIME, self.block_bits, 0, self.root_nid, self.inodes,
            0, 0, self.blocks, self.meta_block, 0, self.uuid, b"", 0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Raises FormatError on anything but a superblock with exactly our features."""
        fields = cls.LAYOUT.unpack(raw[: cls.LAYOUT.size])
        magic, checksum, compat, bits, _, root_nid, inodes, _, _, blocks, meta, _, uuid, _, incompat = fields[:15]
        if magic != MAGIC:
            raise FormatError("no EROFS superblock")
        superblock = cls(bits, root_nid, inodes, blocks, meta, uuid, checksum)
        if superblock.pack() != raw[: cls.LAYOUT.size]:
            raise FormatError(f"EROFS superblock is not one of ours: compat {compat:#x}, incompat {incompat:#x}")
        return superblock


assert Superblock.LAYOUT.size == 128


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


def crc32c(data: Buffer) -> int:
    """CRC-32C as the kernel's crc32c(~0, …): no final inversion (fs/erofs/super.c)."""
    crc = 0xFFFFFFFF
    for byte in memoryview(data):
        crc = (crc >> 8) ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc


def checksummed_bytes(block_bytes: int) -> int:
    """How many, from the superblock on, its checksum covers: up to the end of a block (fs/erofs/super.c)."""
    return block_bytes - SUPERBLOCK_OFFSET_BYTES if block_bytes > SUPERBLOCK_OFFSET_BYTES else block_bytes


def encode_device(major: int, minor: int) -> int:
    """The kernel's new_encode_dev (include/linux/kdev_t.h)."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def split_xattr_name(name: bytes) -> tuple[int, bytes] | None:
    """(name index, rest of the name); None for one that has no index, or nothing behind its prefix."""
    if name in _XATTR_WHOLE:
        return _XATTR_WHOLE[name], b""
    prefix, _, rest = name.partition(b".")
    index = _XATTR_PREFIXES.get(prefix)
    return (index, rest) if index is not None and rest else None


def xattr_entry_bytes(rest: bytes, value: bytes) -> int:
    """Of one entry in the body, which has XATTR_HEADER_BYTES besides."""
    size = XATTR_ENTRY.size + len(rest) + len(value)
    return size + -size % 4


def xattr_body(xattrs: dict[bytes, bytes] | None) -> bytes:
    """Inline xattr area, entries ordered by (name index, name); empty without xattrs."""
    if not xattrs:
        return b""
    entries = []
    for name, value in xattrs.items():
        split = split_xattr_name(name)
        if split is None:
            raise FormatError(f"xattr {name[:80]!r} has no name index")
        entries.append((*split, value))
    out = bytearray(XATTR_HEADER_BYTES)
    for index, rest, value in sorted(entries):
        out += XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def parse_xattr_body(body: Buffer) -> dict[bytes, bytes]:
    """What `xattr_body` wrote, and other areas in whatever order. Raises FormatError."""
    area, found, position = bytes(body), dict[bytes, bytes](), XATTR_HEADER_BYTES
    while position + XATTR_ENTRY.size <= len(area):
        name_bytes, index, value_bytes = XATTR_ENTRY.unpack_from(area, position)
        position += XATTR_ENTRY.size
        end = position + name_bytes + value_bytes
        if end > len(area) or index not in _XATTR_NAMES:
            raise FormatError("xattrs in disorder")
        found[_XATTR_NAMES[index] + area[position : position + name_bytes]] = area[position + name_bytes : end]
        position = end + -end % 4
    return found
