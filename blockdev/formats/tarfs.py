# SPDX-License-Identifier: Apache-2.0
"""tarfs on-disk records, as the kernel module `tar` of Azure Linux reads them (src/tarfs/tarfs.c there).

All integers are little-endian. The byte tables are in docs/formats.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from blockdev.errors import FormatError

BLOCK_BYTES: Final = 4096
SUPERBLOCK_OFFSET_BYTES: Final = BLOCK_BYTES - 512  # in the last block of the device
PERMISSIONS: Final = 0o777  # the only mode bits beside the type
TIME_BITS: Final = 36
LINK_TEXT_BYTES_MAX: Final = 4095
NAME_BYTES_MAX: Final = 255
MINORS: Final = 1 << 20
MAJORS: Final = 1 << 12
FLAG_OPAQUE: Final = 1

# mode, flags, time bits 32-35, uid, gid, time bits 0-31, size, offset
INODE: Final = struct.Struct("<HBBIIIQQ")
# ino, absolute offset of the name, its length, type as in d_type
DIRENT: Final = struct.Struct("<QQQB7x")
assert INODE.size == DIRENT.size == 32


@dataclass(frozen=True, slots=True)
class Superblock:
    """16 bytes without magic or checksum; `inode_table_bytes`: where the table starts, which is where the tar ends."""

    inode_table_bytes: int
    inodes: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQ")

    def pack(self) -> bytes:
        """The whole last block."""
        record = self.LAYOUT.pack(self.inode_table_bytes, self.inodes)
        return (bytes(SUPERBLOCK_OFFSET_BYTES) + record).ljust(BLOCK_BYTES, b"\0")

    @classmethod
    def unpack(cls, block: bytes, data_size_bytes: int) -> Self:
        """Raises FormatError unless the block is one that `pack` writes, and its table lies before it."""
        if len(block) == BLOCK_BYTES:
            superblock = cls(*cls.LAYOUT.unpack_from(block, SUPERBLOCK_OFFSET_BYTES))
            end = superblock.inode_table_bytes + superblock.inodes * INODE.size
            if superblock.inodes and end <= data_size_bytes - BLOCK_BYTES and superblock.pack() == block:
                return superblock
        raise FormatError("no tarfs superblock in the last block of the data")
