# SPDX-License-Identifier: Apache-2.0
"""Several files as the partitions of one disk: the table, read by util-linux, and the descriptor that QEMU reads."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.errors import UnfitDisk
from blockdev.vmm import gpt, vmdk
from blockdev.vmm.hotplug import SECTOR_BYTES
from blockdev.vmm.vmdk import EXTENT_SECTORS_MAX, Extent

MIB_SECTORS = 2048


def files(directory: Path, *sectors: int) -> list[Path]:
    """In directories that are called like snapshots."""
    paths = []
    for number, count in enumerate(sectors):
        path = directory / str(30 + number) / "layer.erofs"
        path.parent.mkdir(parents=True)
        path.write_bytes(hashlib.sha256(b"%d" % number).digest() * (count * SECTOR_BYTES // 32))
        paths.append(path)
    return paths


def disk(layout: gpt.Layout) -> bytes:
    """What a guest would see."""
    whole = bytearray()
    for extent in layout.extents():
        source = extent.source if isinstance(extent.source, bytes) else extent.source.read_bytes()
        start = extent.offset_sectors * SECTOR_BYTES
        whole += source[start : start + extent.sectors * SECTOR_BYTES]
    return bytes(whole)


def test_where_the_partitions_are(tmp_path: Path) -> None:
    layout = gpt.layout(files(tmp_path, 8, 2048, 2049, 1))
    assert [(part.name, part.first_lba, part.last_lba) for part in layout.partitions] == [
        ("erofs-0-s30", 2048, 2055),
        ("erofs-1-s31", 4096, 6143),
        ("erofs-2-s32", 6144, 8192),
        ("erofs-3-s33", 10240, 10240),
    ]
    assert layout.sectors == 10241
    assert [(type(extent.source) is bytes, extent.sectors) for extent in layout.extents()] == [
        (True, 2048), (False, 8), (True, 2040), (False, 2048), (False, 2049), (True, 2047), (False, 1),
    ]  # fmt: skip
    assert len(disk(layout)) == layout.sectors * SECTOR_BYTES


def test_the_table_to_the_byte(tmp_path: Path) -> None:
    """UEFI 2.10, tables 5.5 and 5.6, and the protective MBR of table 5.4."""
    layout = gpt.layout(files(tmp_path, 8, 9))
    head = layout.head()
    assert len(head) == 1 << 20
    assert (
        head[446:512] == bytes.fromhex("00 000200 ee ffffff 01000000") + struct.pack("<I", 4104) + bytes(48) + b"U\xaa"
    )
    signature, revision, size, crc, zero, own, other, first, last = struct.unpack_from("<8sIIIIQQQQ", head, 512)
    assert (signature, revision, size, zero, own) == (b"EFI PART", 0x10000, 92, 0, 1)
    # The other copy is behind the end: as runtime-rs says that there is none.
    assert (other, first, last, layout.sectors) == (4105, 34, 4104, 4105)
    assert struct.unpack_from("<QIII", head, 512 + 72) == (2, 128, 128, zlib.crc32(head[1024 : 1024 + 128 * 128]))
    assert crc == zlib.crc32(head[512:528] + bytes(4) + head[532:604])
    entry = head[1024 : 1024 + 128]
    assert entry[:16] == bytes.fromhex("af3dc60f838472478e793d69d8477de4")  # a Linux file system
    assert struct.unpack_from("<QQQ", entry, 32) == (2048, 2055, 0)
    assert entry[56:].decode("utf-16-le").rstrip("\0") == "erofs-0-s30"
    assert not any(head[1024 + 2 * 128 :])
    identities = {entry[16:32], head[1024 + 144 : 1024 + 160], head[512 + 56 : 512 + 72]}
    assert len(identities) == 3
    assert head == gpt.layout([part.path for part in layout.partitions]).head()


def test_a_name_is_cut(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 40) / "layer"
    path.parent.mkdir()
    path.write_bytes(bytes(512))
    (part,) = gpt.layout([path]).partitions
    assert part.name == "erofs-0-s" + "ä" * 27
    assert gpt.layout([path]).head()[1024 + 56 : 1024 + 128] == part.name.encode("utf-16-le")


def partitions_read_by_util_linux(path: Path) -> list[tuple[int, ...]]:
    command = ["partx", "--raw", "--noheadings", "--output", "NR,START,END,SECTORS", str(path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [tuple(map(int, line.split())) for line in out.splitlines()]


@settings(max_examples=10)
@given(sectors=st.lists(st.integers(1, 3000), min_size=1, max_size=9))
def test_util_linux_finds_the_files_in_their_partitions(
    tmp_path_factory: pytest.TempPathFactory, sectors: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("disk")
    paths = files(directory, *sectors)
    whole = disk(gpt.layout(paths))
    (directory / "disk").write_bytes(whole)
    found = partitions_read_by_util_linux(directory / "disk")
    assert [number for number, *_ in found] == list(range(1, len(paths) + 1))
    for (_, start, end, count), path in zip(found, paths, strict=True):
        assert start % MIB_SECTORS == 0
        assert (count, end) == (path.stat().st_size // SECTOR_BYTES, start + count - 1)
        assert whole[start * SECTOR_BYTES : (end + 1) * SECTOR_BYTES] == path.read_bytes()


def test_as_many_partitions_as_there_may_be(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 8)
    (tmp_path / "disk").write_bytes(disk(gpt.layout([path] * gpt.PARTITIONS_MAX)))
    assert len(partitions_read_by_util_linux(tmp_path / "disk")) == gpt.PARTITIONS_MAX == 128
    for count in (0, gpt.PARTITIONS_MAX + 1):
        with pytest.raises(UnfitDisk, match=f"{count} layers on one disk: from 1 to 128"):
            gpt.layout([path] * count)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(0, "has 0 bytes"), (511, "not whole sectors"), (-1, "No such file"), (None, "no.*regular file")],
)
def test_what_cannot_be_a_partition(tmp_path: Path, size: int | None, reason: str) -> None:
    path = tmp_path / "layer"
    if size is None:
        path.mkdir()
    elif size >= 0:
        path.write_bytes(bytes(size))
    with pytest.raises(UnfitDisk, match=reason):
        gpt.layout([path])


def test_the_descriptor_to_the_byte() -> None:
    extents = [Extent(b"", 2048), Extent(Path("/x"), 8, 16)]
    assert (
        vmdk.descriptor(["/dev/fdset/1", "/a b/ä"], extents)
        == (
            '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="twoGbMaxExtentFlat"\n'
            '# Extent description\nRW 2048 FLAT "/dev/fdset/1" 0\nRW 8 FLAT "/a b/ä" 16\n'
            '# The Disk Data Base\nddb.virtualHWVersion = "4"\n'
        ).encode()
    )


@pytest.mark.parametrize("name", ["", "x", "nbd:/x", "json:{}", '/a"b', "/a\nRW 1 FLAT", "/a\0", "/" + "x" * 511])
def test_a_descriptor_names_no_more_than_a_path(name: str) -> None:
    with pytest.raises(UnfitDisk, match="cannot name"):
        vmdk.descriptor([name], [Extent(b"", 1)])


def test_a_long_file_has_several_extents() -> None:
    path = Path("/x")
    assert list(vmdk.file_extents(path, 2 * EXTENT_SECTORS_MAX + 1)) == [
        Extent(path, EXTENT_SECTORS_MAX),
        Extent(path, EXTENT_SECTORS_MAX, EXTENT_SECTORS_MAX),
        Extent(path, 1, 2 * EXTENT_SECTORS_MAX),
    ]
    assert EXTENT_SECTORS_MAX * SECTOR_BYTES == 2 << 30


def test_an_extent_is_not_longer_than_its_source(tmp_path: Path) -> None:
    (path,) = files(tmp_path, 8)
    vmdk.check_extents([Extent(path, 8), Extent(path, 1, 7), Extent(bytes(512), 1)])
    for extent in (Extent(path, 9), Extent(path, 8, 1), Extent(bytes(512), 2), Extent(path, 0), Extent(path, 1, -1)):
        with pytest.raises(UnfitDisk):
            vmdk.check_extents([extent])
    with pytest.raises(UnfitDisk, match="without extents"):
        vmdk.check_extents([])
