# SPDX-License-Identifier: Apache-2.0
"""One disk out of pieces of several files: a VMDK descriptor of flat extents (VMware: Virtual Disk Format 5.0; QEMU:
block/vmdk.c), which QEMU reads piece by piece, each as raw bytes.

A VM never gets another descriptor than one that was made here, a moment before: bytes of a layer are not tried for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.errors import UnfitDisk
from blockdev.vmm.hotplug import SECTOR_BYTES, size_bytes

# runtime-rs cuts what is longer (src/runtime-rs/crates/hypervisor/src/device/driver/virtio_blk.rs).
EXTENT_SECTORS_MAX: Final = (2 << 30) // SECTOR_BYTES
_PATH_BYTES_MAX: Final = 511  # QEMU: block/vmdk.c


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a disk: so many sectors of a file, or of bytes that are in no file, from `offset_sectors` on."""

    source: Path | bytes
    sectors: int
    offset_sectors: int = 0


@dataclass(frozen=True, slots=True)
class FlatDisk:
    """One read-only disk of all extents, in their order. `id` and `serial` as in `hotplug.Disk`."""

    id: str
    extents: tuple[Extent, ...]
    serial: str | None = None

    @property
    def sectors(self) -> int:
        return sum(extent.sectors for extent in self.extents)


def file_extents(path: Path, sectors: int) -> Iterator[Extent]:
    """The first sectors of a file, in as many extents as it takes."""
    for offset in range(0, sectors, EXTENT_SECTORS_MAX):
        yield Extent(path, min(EXTENT_SECTORS_MAX, sectors - offset), offset)


def check_extents(extents: Sequence[Extent]) -> None:
    """Raises UnfitDisk for a disk without extents, and for an extent beyond its source, which QEMU refuses."""
    if not extents:
        raise UnfitDisk("a disk without extents")
    for extent in extents:
        source = extent.source
        size = size_bytes(source) if isinstance(source, Path) else len(source)
        if not 1 <= extent.sectors <= EXTENT_SECTORS_MAX or extent.offset_sectors < 0:
            raise UnfitDisk(f"an extent of {extent.sectors} sectors from {extent.offset_sectors} on")
        if (extent.offset_sectors + extent.sectors) * SECTOR_BYTES > size:
            what = repr(str(source)) if isinstance(source, Path) else "an extent in memory"
            raise UnfitDisk(f"{what} has {size} bytes, less than {extent.sectors} sectors from {extent.offset_sectors}")


def descriptor(names: Sequence[str], extents: Sequence[Extent]) -> bytes:
    """The descriptor's text. `names`: under which QEMU opens the source of each extent. Raises UnfitDisk."""
    lines = []
    for name, extent in zip(names, extents, strict=True):
        # A name that is no path would be a URL or options to QEMU.
        if (
            not name.startswith("/")
            or any(char in name for char in '"\r\n\0')
            or len(os.fsencode(name)) > _PATH_BYTES_MAX
        ):
            raise UnfitDisk(f"a descriptor cannot name {name!r}")
        lines.append(f'RW {extent.sectors} FLAT "{name}" {extent.offset_sectors}')
    head = (
        "# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff",
        'createType="twoGbMaxExtentFlat"',
        # An empty line right before the first extent would have QEMU count that twice.
        "# Extent description",
    )  # fmt: skip
    return "\n".join((*head, *lines, "# The Disk Data Base", 'ddb.virtualHWVersion = "4"', "")).encode()
