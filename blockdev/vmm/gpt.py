# SPDX-License-Identifier: Apache-2.0
"""Layer files as the partitions of one disk, as Kata's runtime-rs lays them out (kata-containers/kata-containers:
src/libs/kata-types/src/gpt_disk.rs, src/runtime-rs/crates/resource/src/rootfs/erofs_rootfs.rs): a GUID partition table
(UEFI specification 2.10, 5.3) in front, whose second copy at the end is left out, and the files behind it as they are.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.errors import UnfitDisk
from blockdev.vmm.hotplug import SECTOR_BYTES, size_bytes
from blockdev.vmm.vmdk import Extent, file_extents

PARTITIONS_MAX: Final = 128
ALIGNMENT_SECTORS: Final = (1 << 20) // SECTOR_BYTES
HEAD_SECTORS: Final = ALIGNMENT_SECTORS  # the first partition comes at once behind
_NAME_CHARS_MAX: Final = 36
_ENTRIES_LBA: Final = 2
_FIRST_USABLE_LBA: Final = 34
_LINUX_FILE_SYSTEM: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_MBR_ENTRY: Final = struct.Struct("<B3sB3sII")
_MBR_ENTRY_AT: Final = 446


@dataclass(frozen=True, slots=True)
class Partition:
    """Its number is its position, from 1 on."""

    path: Path
    name: str
    first_lba: int
    sectors: int

    @property
    def last_lba(self) -> int:
        return self.first_lba + self.sectors - 1


@dataclass(frozen=True, slots=True)
class Layout:
    partitions: tuple[Partition, ...]

    @property
    def sectors(self) -> int:
        """The disk ends with its last partition."""
        return self.partitions[-1].last_lba + 1

    def head(self) -> bytes:
        """What is in front of the first partition. A function of names and sizes: the identities are no random ones."""
        entries = b"".join(
            _ENTRY.pack(
                _LINUX_FILE_SYSTEM.bytes_le, self._identity(number), each.first_lba, each.last_lba, 0,
                each.name.encode("utf-16-le"),
            )
            for number, each in enumerate(self.partitions, 1)
        ).ljust(PARTITIONS_MAX * _ENTRY.size, b"\0")  # fmt: skip
        header = self._header(0, zlib.crc32(entries))
        header = self._header(zlib.crc32(header), zlib.crc32(entries))
        mbr = bytearray(SECTOR_BYTES)
        all_sectors = min(self.sectors - 1, 0xFFFFFFFF)
        _MBR_ENTRY.pack_into(mbr, _MBR_ENTRY_AT, 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, all_sectors)
        mbr[-2:] = b"\x55\xaa"
        head = bytes(mbr) + header.ljust(SECTOR_BYTES, b"\0") + entries
        return head.ljust(HEAD_SECTORS * SECTOR_BYTES, b"\0")

    def _header(self, own_crc: int, entries_crc: int) -> bytes:
        # The other copy would be behind the end of the disk: whoever looks for it finds that there is none.
        return _HEADER.pack(
            b"EFI PART", 0x10000, _HEADER.size, own_crc, 0, 1, self.sectors, _FIRST_USABLE_LBA, self.sectors - 1,
            self._identity(0), _ENTRIES_LBA, PARTITIONS_MAX, _ENTRY.size, entries_crc,
        )  # fmt: skip

    def _identity(self, number: int) -> bytes:
        seed = "\0".join(f"{each.name}:{each.first_lba}:{each.sectors}" for each in self.partitions)
        digest = hashlib.sha256(f"{number}\0{seed}".encode()).digest()[:16]
        return uuid.UUID(bytes=digest, version=4).bytes_le

    def extents(self) -> Iterator[Extent]:
        """The disk from front to back: table, files, and zeros up to where the next one begins."""
        yield Extent(self.head(), HEAD_SECTORS)
        at = HEAD_SECTORS
        zeros = bytes(ALIGNMENT_SECTORS * SECTOR_BYTES)
        for each in self.partitions:
            if each.first_lba > at:
                yield Extent(zeros, each.first_lba - at)
            yield from file_extents(each.path, each.sectors)
            at = each.last_lba + 1


assert (_ENTRY.size, _HEADER.size) == (128, 92)


def layout(paths: Sequence[Path]) -> Layout:
    """A partition for each file, in this order. Raises UnfitDisk: none, too many, one that cannot be a partition."""
    if not 1 <= len(paths) <= PARTITIONS_MAX:
        raise UnfitDisk(f"{len(paths)} layers on one disk: from 1 to {PARTITIONS_MAX} are possible")
    partitions, at = [], HEAD_SECTORS
    for number, path in enumerate(paths):
        sectors = size_bytes(path) // SECTOR_BYTES
        name = f"erofs-{number}-s{path.parent.name}"[:_NAME_CHARS_MAX]
        partitions.append(Partition(path, name, at, sectors))
        at += sectors + -sectors % ALIGNMENT_SECTORS
    return Layout(tuple(partitions))
