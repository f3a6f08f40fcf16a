# SPDX-License-Identifier: Apache-2.0
"""What lies at an offset of a layer file, in words for a person who has a bad block. Nothing of it is verified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from stat import S_IFREG
from typing import Final

from blockdev.errors import BlockdevError
from blockdev.formats import erofs
from blockdev.formats.entry import FORMAT_MASK
from blockdev.formats.layer_file import Identity, LayerFile, ReadAt, Region
from blockdev.formats.layer_reader import index_reader

_PATHS_MAX: Final = 8
# By region: what is there where a file of the layer has it, and what where none has.
_IN_FILES: Final = {
    "tar": ("file data", "tar headers, or data that no file of the layer has any more"),
    "file data": ("file data", "data that no file of the layer has any more"),
    "index": ("inodes and names, and the ends of files", "inodes and names"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """`region`: as LayerFile.regions names it, with the offset in it. `paths`: files whose data it is, a few of them.

    `detail`: of what kind the bytes are, or why that cannot be told.
    """

    region: str
    offset_bytes: int
    detail: str
    paths: tuple[bytes, ...] = ()


def place(layer: LayerFile, read_at: ReadAt, offset: int, size: int) -> Place:
    """Of the `size` bytes at `offset`; the region is that of the first of them. Never raises."""
    region = next(
        (found for found in layer.regions() if found.offset_bytes <= offset < found.offset_bytes + found.size_bytes),
        Region("behind the file", layer.file_size_bytes, 0),
    )
    inside = offset - region.offset_bytes
    if region.name in ("tar", "file data") or (region.name == "index" and layer.split is not None):
        found = _in_files(layer, read_at, offset, size, region.name, inside)
    else:
        found = Place(region.name, inside, _detail(region.name, inside))
    reached = [other.name for other in layer.regions() if offset < other.offset_bytes < offset + size]
    return replace(found, detail=f"{found.detail}; also of the {', '.join(reached)}") if reached else found


def _detail(region: str, inside: int) -> str:
    if region == "head":
        if inside < Identity.LAYOUT.size:
            return "identity record"
        return "EROFS superblock" if inside < erofs.SUPERBLOCK_OFFSET_BYTES + 512 else "zeros behind the superblock"
    return "inodes and names" if region == "index" else region


def _in_files(layer: LayerFile, read_at: ReadAt, offset: int, size: int, region: str, inside: int) -> Place:
    paths: dict[int, bytes] = {}
    try:
        for entry in index_reader(layer, read_at).walk():
            if entry.mode & FORMAT_MASK == S_IFREG and any(
                start < offset + size and offset < start + length for start, length in entry.extents()
            ):
                paths.setdefault(entry.inode, entry.path)
                if len(paths) == _PATHS_MAX:
                    break
    except BlockdevError as error:
        return Place(region, inside, f"whose file cannot be told: {error}")
    found, none = _IN_FILES[region]
    return Place(region, inside, found if paths else none, tuple(paths.values()))
