# SPDX-License-Identifier: Apache-2.0
"""The index of a layer file, read again: what went in comes out, and what was tampered with is refused."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import struct
import tracemalloc
from stat import S_IFREG
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.entry import Entry
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.erofs_writer import ContentsInTar, MetadataWriter
from blockdev.formats.file_tree import Directory, Inode
from blockdev.formats.layer_file import Trailer
from tests.golden import make_tars
from tests.golden.make_tars import EOA, T0
from tests.golden.test_tar_index import build

PLAIN, INLINE = 0, 2
# Fields of an inode (docs/formats.md): byte offset and struct code.
FORMAT, XATTRS, MODE, SIZE, ADDRESS = (0, "H"), (2, "H"), (4, "H"), (8, "Q"), (16, "I")


def file(name: bytes, data: bytes = b"", **fields: Any) -> bytes:
    return bytes(make_tars.F(name, data, **fields))


def directory(name: bytes, **fields: Any) -> bytes:
    return bytes(make_tars.D(name, **fields))


def other(name: bytes, typ: bytes, **fields: Any) -> bytes:
    return bytes(make_tars.hdr(name, typ, **fields))


def pax(*records: tuple[bytes, bytes]) -> bytes:
    return bytes(make_tars.PX(*records))


def symlink(name: bytes, text: bytes) -> bytes:
    return pax((b"linkpath", text)) + other(name, b"2")


class Layer:
    """A built file that can be tampered with."""

    def __init__(self, *members: bytes) -> None:
        self.file = bytearray(build(b"".join(members) + bytes(EOA))[1])
        self.size = Trailer.unpack(bytes(self.file[-4096:])).data_size_bytes

    def reader(self) -> Reader:
        return Reader(lambda offset, size: bytes(self.file[offset : offset + size]), self.size)

    def entries(self) -> dict[bytes, Entry]:
        return {entry.path: entry for entry in self.reader().walk()}

    def inode(self, path: bytes) -> int:
        """Where its record is."""
        return self.reader().superblock.meta_block * 512 + self.entries()[path].inode * 32

    def get(self, path: bytes, field: tuple[int, str]) -> int:
        value = struct.unpack_from("<" + field[1], self.file, self.inode(path) + field[0])[0]
        return int(value)

    def edit(self, path: bytes, **fields: int) -> None:
        """`format`, `xattrs`, `mode`, `size` or `address` of an inode."""
        where = {"format": FORMAT, "xattrs": XATTRS, "mode": MODE, "size": SIZE, "address": ADDRESS}
        at = self.inode(path)
        for name, value in fields.items():
            offset, code = where[name]
            struct.pack_into("<" + code, self.file, at + offset, value)

    def directory(self, path: bytes) -> int:
        """Where the bytes of a small directory are: behind its record."""
        assert self.get(path, FORMAT) == 1 | INLINE << 1
        assert self.get(path, XATTRS) == 0
        return self.inode(path) + 64

    def superblock(self, offset: int, code: str, value: int, *, seal: bool = True) -> None:
        struct.pack_into("<" + code, self.file, 1024 + offset, value)
        if seal:
            self.file[1028:1032] = bytes(4)
            struct.pack_into("<I", self.file, 1028, erofs.crc32c(self.file[1024:1536]))

    def refused(self, match: str, error: type[BlockdevError] = FormatError) -> None:
        with pytest.raises(error, match=match) as caught:
            list(self.reader().walk())
        assert type(caught.value) is error


# --- what goes in comes out


def test_every_kind_of_file_comes_out_as_it_went_in() -> None:
    layer = Layer(
        directory(b"d", mode=0o1711, uid=1, gid=2, mtime=3),
        file(b"d/f", b"x" * 1300, mode=0o4755, uid=2_000_000, gid=7, mtime=T0),
        file(b"empty", mode=0),
        other(b"link", b"2", link=b"d/f", uid=5),
        other(b"char", b"3", dev=(1, 3), mode=0o666),
        other(b"block", b"4", dev=(4095, 0xFFFFF), mode=0o660),
        other(b"fifo", b"6", mode=0o600),
        file(b".wh.gone"),
        pax((b"mtime", b"1700000000.123456789"), (b"uid", b"4294967294")) + file(b"fine"),
    )
    found = layer.entries()
    assert list(found) == [b"", b"block", b"char", b"d", b"d/f", b"empty", b"fifo", b"fine", b"gone", b"link"]
    assert all(path == entry.path for path, entry in found.items())

    def attributes(path: bytes) -> tuple[int, int, int, tuple[int, int], int]:
        entry = found[path]
        return entry.mode, entry.uid, entry.gid, entry.mtime, entry.nlink

    assert attributes(b"") == (0o040755, 0, 0, (0, 0), 3)
    assert attributes(b"d") == (0o041711, 1, 2, (3, 0), 2)
    assert attributes(b"d/f") == (0o104755, 2_000_000, 7, (T0, 0), 1)
    assert attributes(b"empty") == (0o100000, 0, 0, (T0, 0), 1)
    assert attributes(b"link") == (0o120777, 5, 0, (T0, 0), 1)
    assert attributes(b"char")[0] == 0o020666
    assert attributes(b"block")[0] == 0o060660
    assert attributes(b"fifo")[0] == 0o010600
    assert attributes(b"gone") == (0o020000, 0, 0, (0, 0), 1)
    assert (found[b"fine"].uid, found[b"fine"].mtime) == (4294967294, (1700000000, 123_456_789))
    assert (found[b"char"].rdev, found[b"block"].rdev, found[b"gone"].rdev) == ((1, 3), (4095, 0xFFFFF), (0, 0))
    assert found[b"link"].link == b"d/f"
    assert (found[b"d/f"].size_bytes, found[b"empty"].size_bytes) == (1300, 0)
    at = found[b"d/f"].data_offset_bytes
    assert layer.file[at : at + 1300] == b"x" * 1300


def test_the_reader_knows_the_superblock() -> None:
    layer = Layer(file(b"f"))
    superblock = layer.reader().superblock
    assert (superblock.block_bits, superblock.root_nid, superblock.inodes) == (9, 2, 2)
    assert layer.reader().block_bytes == 512


def test_names_of_one_file_share_its_inode() -> None:
    layer = Layer(file(b"a", b"data"), other(b"b", b"1", link=b"a"), directory(b"d"), other(b"d/c", b"1", link=b"b"))
    found = layer.entries()
    assert found[b"a"].inode == found[b"b"].inode == found[b"d/c"].inode
    assert found[b"a"].nlink == 3
    assert layer.reader().superblock.inodes == 3


def test_parents_come_before_children_and_names_in_their_order() -> None:
    names = [b"b/x", b"a/z", b"a/y", b"c", b"a/d/deep", b"B", b"a!", b"-", b"\xff", b"~"]
    paths = [entry.path for entry in Layer(*(file(name) for name in names)).reader().walk()]
    assert paths == [
        b"",
        b"-",
        b"B",
        b"a",
        b"a/d",
        b"a/d/deep",
        b"a/y",
        b"a/z",
        b"a!",
        b"b",
        b"b/x",
        b"c",
        b"~",
        b"\xff",
    ]


@pytest.mark.parametrize("length", [1, 447, 448, 449, 511, 512, 513, 1024, 4094, 4095])
def test_symlinks_of_all_lengths(length: int) -> None:
    text = hashlib.shake_128(b"%d" % length).hexdigest(length)[:length].encode()
    layer = Layer(symlink(b"l", text), symlink(b"m", text[::-1]))
    found = layer.entries()
    assert (found[b"l"].link, found[b"m"].link) == (text, text[::-1])
    assert (found[b"l"].size_bytes, found[b"l"].data_offset_bytes) == (length, 0)
    # Beside the inode, as long as that stays within one block.
    assert layer.get(b"l", FORMAT) == 1 | (INLINE if length <= 448 else PLAIN) << 1


@pytest.mark.parametrize("count", [0, 1, 18, 19, 20, 21, 22, 23, 40, 41, 42, 43, 44, 45, 500])
def test_directories_of_all_sizes(count: int) -> None:
    names = [b"%010d" % number for number in range(count)]
    layer = Layer(directory(b"d"), *(file(b"d/" + name) for name in reversed(names)), file(b"e"))
    assert list(layer.entries()) == [b"", b"d", *(b"d/" + name for name in names), b"e"]
    # 22 bytes a name, 27 for the two dots.
    inlined = layer.get(b"d", FORMAT) == 1 | INLINE << 1
    size = layer.get(b"d", SIZE)
    if count <= 22:
        assert size == 27 + 22 * count
        assert inlined == (count <= 19)
    else:
        assert size > 512


def test_names_of_all_lengths_fill_blocks() -> None:
    names = [hashlib.shake_128(b"%d" % length).hexdigest(128)[:length].encode() for length in range(1, 256)]
    assert set(Layer(*(pax((b"path", name)) + file(b"f") for name in names)).entries()) == {b"", *names}


def test_a_deep_tree() -> None:
    path = b"/".join([b"d"] * 700)
    found = Layer(pax((b"path", path)) + file(b"f", b"deep")).entries()
    assert len(found) == 701
    assert found[path].size_bytes == 4


def test_xattrs_come_out_as_they_went_in() -> None:
    xattrs = {
        b"user.a": b"", b"user." + b"n" * 250: b"v" * 1000, b"security.selinux": b"ctx\0", b"user.b": b"\0\xff\n=",
        b"system.posix_acl_access": b"\2\0\0\0an entry", b"system.posix_acl_default": b"\2\0\0\0an entry",
        b"user.c": b"123",
    }  # fmt: skip
    records = [(b"SCHILY.xattr." + name, value) for name, value in xattrs.items()]
    some = [record for record in records if b"user" not in record[0]]
    layer = Layer(
        pax(*records) + file(b"f", b"data"), pax(*records) + directory(b"d"), file(b"d/x"),
        pax(*some) + other(b"p", b"6"), pax(*some, (b"linkpath", b"t" * 300)) + other(b"l", b"2"),
    )  # fmt: skip
    found = layer.entries()
    assert found[b"f"].xattrs == found[b"d"].xattrs == xattrs
    assert found[b"p"].xattrs == found[b"l"].xattrs == {n: v for n, v in xattrs.items() if not n.startswith(b"user")}
    assert (found[b"d/x"].xattrs, found[b""].xattrs) == ({}, {})
    assert found[b"l"].link == b"t" * 300


def test_an_opaque_directory_shows_its_mark() -> None:
    found = Layer(file(b"d/.wh..wh..opq"), file(b"d/x")).entries()
    assert found[b"d"].xattrs == {b"trusted.overlay.opaque": b"y"}


@pytest.mark.parametrize("size", [0, 100, 300, 440, 448, 449, 500, 2000])
def test_tails_and_xattrs_share_a_block_or_do_not(size: int) -> None:
    attribute = pax((b"SCHILY.xattr.security.a", b"v" * size))
    layer = Layer(
        attribute + directory(b"d"), file(b"d/x"), attribute + other(b"l", b"2", link=b"t" * 60),
        attribute + file(b"f", b"data"),
    )  # fmt: skip
    found = layer.entries()
    assert [found[path].xattrs for path in (b"d", b"l", b"f")] == [{b"security.a": b"v" * size}] * 3
    assert (b"d/x" in found, found[b"l"].link) == (True, b"t" * 60)


def test_the_reader_asks_for_nothing_outside_the_data_area() -> None:
    layer = Layer(
        file(b"f", b"x" * 5000), *(file(b"d/%d" % number) for number in range(100)), symlink(b"l", b"t" * 999)
    )
    asked: list[tuple[int, int]] = []

    def read_at(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return bytes(layer.file[offset : offset + size])

    assert len(list(Reader(read_at, layer.size).walk())) == 104
    assert all(0 <= offset <= offset + size <= layer.size for offset, size in asked)
    data = layer.entries()[b"f"].data_offset_bytes
    assert not any(offset < data + 5000 and offset + size > data for offset, size in asked)


# --- what was tampered with is refused: the superblock


SUPERBLOCK: list[tuple[int, str, int, str]] = [
    (0, "I", 0xE0F5E1E3, "no EROFS superblock"),
    (0, "I", 0, "no EROFS superblock"),
    (8, "I", 0x1, "not one of ours"),
    (8, "I", 0x7, "not one of ours"),
    (12, "B", 0, "blocks of 2"),
    (12, "B", 8, "blocks of 2"),
    (12, "B", 13, "blocks of 2"),
    (12, "B", 255, "blocks of 2"),
    (13, "B", 1, "not one of ours"),
    (36, "I", 0xFFFFFFFF, "claims more blocks"),
    (40, "I", 0xFFFFFFFF, "index points at bytes"),
    (14, "H", 0xFFFF, "index points at bytes"),
    (44, "I", 1, "not one of ours"),
    (80, "I", 0x4, "not one of ours"),
    (80, "I", 0x8, "not one of ours"),
]


@pytest.mark.parametrize(("offset", "code", "value", "words"), SUPERBLOCK)
def test_a_superblock_that_is_not_ours_is_refused(offset: int, code: str, value: int, words: str) -> None:
    layer = Layer(file(b"f"))
    layer.superblock(offset, code, value)
    layer.refused(words)


def test_every_flipped_byte_of_the_superblocks_block_is_found() -> None:
    layer = Layer(file(b"f"))
    for at in range(1024, 1536):
        layer.file[at] ^= 0x40
        with pytest.raises(FormatError):
            layer.reader()
        layer.file[at] ^= 0x40
    layer.reader()


def test_a_wrong_checksum_is_named() -> None:
    layer = Layer(file(b"f"))
    layer.superblock(48, "B", 0x77, seal=False)
    layer.refused("wrong checksum")


@pytest.mark.parametrize("size", [0, 1, 1024, 1151, 1152, 1535])
def test_a_data_area_without_room_for_a_superblock_is_refused(size: int) -> None:
    layer = Layer(file(b"f"))
    layer.size = size
    layer.refused("index points at bytes|claims more blocks")


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_a_data_area_shorter_than_its_file_system_is_refused(blocks: int) -> None:
    layer = Layer(file(b"f"))
    layer.size -= 512 * blocks
    layer.refused("claims more blocks")


def test_a_file_that_is_cut_short_is_refused() -> None:
    layer = Layer(file(b"f"))
    end = layer.inode(b"f") + 10
    whole = bytes(layer.file)
    for size in (0, 1024, 1100, 1300, end):
        layer.file = bytearray(whole[:size])
        layer.refused("layer file ends at byte")


def test_the_root_must_be_a_directory() -> None:
    """The kernel refuses to mount any other."""
    layer = Layer(file(b"f"))
    layer.superblock(14, "H", layer.entries()[b"f"].inode)
    layer.refused("root")


# --- inodes


@pytest.mark.parametrize("value", [0, 4, 1 | 1 << 1, 1 | 3 << 1, 1 | 4 << 1, 1 | 1 << 4, 0xFFFF])
def test_an_inode_of_another_layout_is_refused(value: int) -> None:
    for path in (b"", b"f", b"l"):
        layer = Layer(file(b"f", b"data"), symlink(b"l", b"t"))
        layer.edit(path, format=value)
        layer.refused("which is not ours")


@pytest.mark.parametrize("mode", [0, 0o644, 0o030644, 0o150644, 0o170644])
def test_an_inode_of_no_type_is_refused(mode: int) -> None:
    layer = Layer(file(b"f", b"data"))
    layer.edit(b"f", mode=mode)
    layer.refused("has mode")


@pytest.mark.parametrize(
    "fields",
    [
        {"address": 0xFFFFFFFF},
        {"size": 1 << 63},
        {"size": (1 << 64) - 1},
        {"size": 1 << 20},
    ],
)
def test_data_outside_the_data_area_is_refused(fields: dict[str, int]) -> None:
    layer = Layer(file(b"f", b"data"))
    layer.edit(b"f", **fields)
    layer.refused("data of b'f' lies outside the data area")


def test_the_data_of_a_file_may_end_where_the_data_area_ends() -> None:
    layer = Layer(file(b"f", b"data"))
    layer.edit(b"f", address=layer.size // 512 - 1, size=512)
    assert layer.entries()[b"f"].data_offset_bytes == layer.size - 512
    layer.edit(b"f", size=513)
    layer.refused("lies outside")


@pytest.mark.parametrize("size", [4096, 1 << 31, (1 << 64) - 1])
def test_a_symlink_that_is_too_long_is_refused(size: int) -> None:
    for length in (5, 600):
        layer = Layer(symlink(b"l", b"t" * length))
        layer.edit(b"l", size=size)
        layer.refused(f"symlink b'l' of {size} bytes")


def test_a_symlink_text_outside_the_data_area_is_refused() -> None:
    layer = Layer(symlink(b"l", b"t" * 600))
    layer.edit(b"l", address=0xFFFFFFFF)
    layer.refused("index points at bytes")


def test_an_inlined_text_that_crosses_a_block_is_refused() -> None:
    layer = Layer(symlink(b"l", b"t" * 440))
    layer.edit(b"l", size=500)
    layer.refused("inlined data crosses a block")


def test_an_inlined_directory_that_crosses_a_block_is_refused() -> None:
    layer = Layer(*(file(b"d/%010d" % number) for number in range(19)))
    layer.edit(b"d", size=511)
    layer.refused("inlined data crosses a block")


@pytest.mark.parametrize("path", [b"", b"d", b"big"])
def test_a_directory_over_a_gibibyte_is_refused_before_it_is_read(path: bytes) -> None:
    for layout in (PLAIN, INLINE):
        for size in ((1 << 30) + 1, 1 << 40, (1 << 64) - 1):
            layer = Layer(directory(b"d"), *(file(b"big/%060d" % number) for number in range(20)))
            layer.edit(path, size=size, format=1 | layout << 1)
            layer.refused(f"directory of {size} bytes", LimitExceeded)


def test_a_directory_outside_the_data_area_is_refused() -> None:
    layer = Layer(*(file(b"big/%060d" % number) for number in range(20)))
    layer.edit(b"big", address=0xFFFFFFFF)
    layer.refused("index points at bytes")
    layer = Layer(*(file(b"big/%060d" % number) for number in range(20)))
    layer.edit(b"big", size=1 << 29)
    layer.refused("index points at bytes")


# --- directories


def dirent(layer: Layer, path: bytes, index: int, **fields: int) -> None:
    at = layer.directory(path) + 12 * index
    nid, offset, kind = erofs.DIRENT.unpack_from(layer.file, at)
    values = {"nid": nid, "offset": offset, "kind": kind, **fields}
    erofs.DIRENT.pack_into(layer.file, at, values["nid"], values["offset"], values["kind"])


def two_files() -> Layer:
    # ".", "..", "aaa", "bbb": names from byte 48 on.
    return Layer(directory(b"d"), file(b"d/aaa"), file(b"d/bbb"))


@pytest.mark.parametrize("nid", [1 << 20, 1 << 32, (1 << 59) - 1, 1 << 59, (1 << 64) - 1])
def test_a_name_for_an_inode_outside_the_data_area_is_refused(nid: int) -> None:
    layer = two_files()
    dirent(layer, b"d", 2, nid=nid)
    layer.refused("index points at bytes")


def test_an_inode_in_the_last_bytes_of_the_data_area_is_read_and_not_beyond() -> None:
    layer = two_files()
    last = (layer.size - layer.reader().superblock.meta_block * 512) // 32 - 1
    dirent(layer, b"d", 2, nid=last)
    layer.refused("index points at bytes")


def test_directory_loops_are_refused() -> None:
    for target in (b"", b"d", b"d/e"):
        layer = Layer(directory(b"d"), directory(b"d/e"), file(b"d/e/f"))
        dirent(layer, b"d/e", 2, nid=layer.entries()[target].inode)
        layer.refused("directory [0-9]+ has two names")


def test_a_directory_with_two_names_is_refused() -> None:
    layer = Layer(directory(b"d"), directory(b"d/e"), directory(b"d/f"))
    dirent(layer, b"d", 3, nid=layer.entries()[b"d/e"].inode)
    layer.refused("has two names")


def test_the_dots_are_not_followed() -> None:
    layer = two_files()
    dirent(layer, b"d", 0, nid=(1 << 64) - 1)
    dirent(layer, b"d", 1, nid=layer.entries()[b"d/aaa"].inode)
    assert list(layer.entries()) == [b"", b"d", b"d/aaa", b"d/bbb"]


@pytest.mark.parametrize("offset", [0, 1, 11, 13, 47, 49, 60, 512, 516, 0xFFFF])
def test_a_first_name_that_is_not_behind_the_entries_is_refused(offset: int) -> None:
    layer = two_files()
    dirent(layer, b"d", 0, offset=offset)
    layer.refused("directory (block|entry) in disorder|directory entry with the name")


@pytest.mark.parametrize("offset", [0, 47, 48, 49, 54, 57, 200, 0xFFFF])
def test_a_name_that_is_not_between_its_neighbours_is_refused(offset: int) -> None:
    layer = two_files()
    dirent(layer, b"d", 2, offset=offset)
    layer.refused("directory entry")


@pytest.mark.parametrize("name", [b"a/a", b"/aa", b"a\0a", b"\0aa", b"\0\0\0", b"..\0", b"bbb", b"bbc"])
def test_a_name_that_is_none_or_out_of_order_is_refused(name: bytes) -> None:
    layer = two_files()
    at = layer.directory(b"d") + 48 + 3
    layer.file[at : at + 3] = name
    layer.refused("directory entry with the name")


def test_a_name_over_255_bytes_is_refused() -> None:
    layer = Layer(directory(b"d"), pax((b"path", b"d/" + b"n" * 255)) + file(b"f"))
    layer.edit(b"d", size=layer.get(b"d", SIZE) + 1)
    at = layer.inode(b"") + 64
    assert layer.file[at:].startswith(erofs.DIRENT.pack(2, 36, 2))
    end = layer.directory(b"d") + layer.get(b"d", SIZE)
    layer.file[end - 1] = 0x6E
    layer.refused("directory entry with the name")


@pytest.mark.parametrize("size", [0, 1, 11])
def test_an_empty_directory_has_its_dots_and_one_without_is_harmless_or_refused(size: int) -> None:
    layer = two_files()
    layer.edit(b"d", size=size)
    if size:
        layer.refused("directory block without entries")
    else:
        assert list(layer.entries()) == [b"", b"d"]


@pytest.mark.parametrize("size", [12, 47, 48, 51, 54])
def test_a_directory_that_is_cut_short_is_refused(size: int) -> None:
    layer = two_files()
    layer.edit(b"d", size=size)
    layer.refused("director")


def test_names_must_be_in_order_over_blocks_too() -> None:
    layer = Layer(*(file(b"big/%060d" % number) for number in range(20)))
    at = layer.get(b"big", ADDRESS) * 512
    first, second = layer.file[at : at + 512], layer.file[at + 512 : at + 1024]
    layer.file[at : at + 1024] = second + first
    layer.refused("directory entry with the name")


def test_a_directory_that_repeats_its_blocks_is_refused() -> None:
    layer = Layer(*(file(b"big/%060d" % number) for number in range(20)))
    at = layer.get(b"big", ADDRESS) * 512
    layer.file[at + 512 : at + 1024] = layer.file[at : at + 512]
    layer.refused("directory entry with the name")


def test_more_names_than_there_is_room_for_are_refused() -> None:
    """Many directories may claim the same blocks of names."""
    layer = Layer(*(directory(b"d%03d" % number) for number in range(200)), *(file(b"x/%04d" % n) for n in range(200)))
    shared, size = layer.get(b"x", ADDRESS), layer.get(b"x", SIZE) // 512 * 512
    start = layer.reader().superblock.meta_block * 512
    for at in [start + entry.inode * 32 for path, entry in layer.entries().items() if path.startswith(b"d")]:
        struct.pack_into("<H", layer.file, at, 1 | PLAIN << 1)
        struct.pack_into("<QI", layer.file, at + 8, size, shared)
    layer.refused("more names than the data area has room for", LimitExceeded)


def test_a_long_path_is_not_kept_once_for_each_name_below_it() -> None:
    """Symlinks bring a short name to the end of a long path: half a megabyte of index must not become gigabytes."""
    path = b"/".join([b"n" * 255] * 250)
    links = [symlink(b"l0", path[: 256 * 10])]
    links += [symlink(b"l%d" % n, b"l%d/" % (n - 1) + path[: 256 * 10 - 1]) for n in range(1, 25)]
    layer = Layer(pax((b"path", path)) + directory(b"d"), *links, *(file(b"l24/%d" % n) for n in range(1000)))
    reader = layer.reader()
    tracemalloc.start()
    try:
        assert sum(1 for _ in reader.walk()) == 1 + 250 + 25 + 1000
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# --- xattrs


def with_xattr() -> Layer:
    return Layer(pax((b"SCHILY.xattr.user.aa", b"value")) + file(b"f", b"data"))


@pytest.mark.parametrize("index", [0, 5, 7, 0x80, 0xFF])
def test_an_xattr_of_an_unknown_namespace_is_refused(index: int) -> None:
    layer = with_xattr()
    layer.file[layer.inode(b"f") + 64 + 12 + 1] = index
    layer.refused("xattrs in disorder")


@pytest.mark.parametrize(("offset", "code", "value"), [(0, "B", 4), (0, "B", 255), (2, "H", 7), (2, "H", 0xFFFF)])
def test_an_xattr_beyond_its_area_is_refused(offset: int, code: str, value: int) -> None:
    layer = with_xattr()
    struct.pack_into("<" + code, layer.file, layer.inode(b"f") + 64 + 12 + offset, value)
    layer.refused("xattrs in disorder")


def test_an_xattr_area_beyond_the_data_area_is_refused() -> None:
    layer = with_xattr()
    layer.edit(b"f", xattrs=0xFFFF)
    layer.refused("index points at bytes")


@pytest.mark.parametrize(
    ("size", "fits"), [(65519, True), (65523, True), (65524, False), (65528, False), (65531, False), (65532, False)]
)
def test_the_writer_refuses_what_the_count_of_xattr_bytes_cannot_say(size: int, fits: bool) -> None:
    """262148 bytes are 65535 units: the first twelve bytes count as one, then every four."""
    root, node = Directory(0), Inode(S_IFREG | 0o644)
    root.children[b"f"] = node
    root.number, node.number = 0, 1
    node.xattrs = {b"user.%c" % letter: b"v" * 65531 for letter in b"abc"} | {b"user.d": b"v" * size}
    assert (len(erofs.xattr_body(node.xattrs)) <= 262_148) == fits

    def written() -> int:
        writer, out = MetadataWriter([root, node], 512, ContentsInTar(4096, 512)), bytearray()
        area = writer.layout()
        writer.emit(out.extend, 4096)
        assert len(out) == area.size_bytes
        return len(out)

    if fits:
        assert written() > 262_000
    else:
        with pytest.raises(FormatError, match="262148 bytes"):
            written()


def test_the_writer_refuses_an_xattr_without_a_name_index() -> None:
    with pytest.raises(FormatError, match="has no name index"):
        erofs.xattr_body({b"nonsense.a": b"1"})


# --- all at once


@pytest.mark.parametrize("value", [0x00, 0xFF])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_overwritten_metadata_is_read_or_refused_and_no_more(value: int, width: int) -> None:
    layer = Layer(
        pax((b"SCHILY.xattr.user.aa", b"value")) + file(b"f", b"data"), directory(b"d"), file(b"d/x"),
        symlink(b"d/l", b"t" * 30), symlink(b"m", b"t" * 600), other(b"c", b"3", dev=(1, 3)),
        *(file(b"big/%060d" % number) for number in range(10)),
    )  # fmt: skip
    start = layer.reader().superblock.meta_block * 512
    whole = bytes(layer.file)
    for at in range(start, layer.size - width, 1 if width == 1 else 2):
        layer.file[at : at + width] = bytes([value]) * width
        with contextlib.suppress(BlockdevError):
            list(layer.reader().walk())
        layer.file[at : at + width] = whole[at : at + width]


def test_modes_are_those_of_the_system() -> None:
    found = Layer(file(b"f"), directory(b"d"), symlink(b"l", b"t"), other(b"p", b"6")).entries()
    tests = {b"f": stat.S_ISREG, b"d": stat.S_ISDIR, b"l": stat.S_ISLNK, b"p": stat.S_ISFIFO}
    assert all(test(found[path].mode) for path, test in tests.items())


def test_names_that_wait_do_not_hold_their_paths() -> None:
    """In each of many nested directories one name comes after the next directory, and so waits."""
    path, members = b"", []
    for _ in range(200):
        members.append(pax((b"path", path + b"z")) + file(b"x"))
        path += b"d" * 250 + b"/"
    layer = Layer(*members)
    tracemalloc.start()
    try:
        assert sum(1 for _ in layer.reader().walk()) == 400
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # all those paths together are five times that
    finally:
        tracemalloc.stop()
