# SPDX-License-Identifier: Apache-2.0
"""Layers from any tar: equal to a plain model where the tar is sound, a clean refusal where it is not."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import struct
import tarfile
from dataclasses import dataclass, field
from typing import Final

from hypothesis import example, given
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from blockdev.errors import BlockdevError, CompressionError, FormatError, LimitExceeded
from blockdev.formats import erofs
from blockdev.formats.compression import Compression, decompress
from blockdev.formats.entry import Entry
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import FORMATS, Trailer
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.formats.limits import Limits
from tests.golden import make_tars
from verity.hasher import LeafStore

SMALL_TARS: Final[dict[str, bytes]] = {
    name: tar for name, tar in ((name, case()) for name, case in make_tars.CASES.items() if name != "big5m")
    if 0 < len(tar) <= 16_384
}  # fmt: skip


def build(*pieces: bytes) -> tuple[BuiltLayer, bytes]:
    out, heads, leaves = bytearray(), list[bytes](), LeafStore()
    try:
        writer = LayerWriter(
            FORMATS["tar-index"], write=out.extend, write_head=heads.append, leaves=leaves, limits=Limits()
        )
        for piece in pieces:
            writer.feed(piece)
        built = writer.finish(hashlib.sha256(b"".join(pieces)).digest())
    finally:
        leaves.close()
    return built, heads[0] + bytes(out)


def walked(file: bytes) -> list[Entry]:
    size = Trailer.unpack(file[-4096:]).data_size_bytes
    return list(Reader(lambda offset, length: file[offset : offset + length], size).walk())


# --- a layer is what its members say


@dataclass
class Action:
    """One member, as tarfile is told of it."""

    kind: bytes  # tarfile's type
    name: str
    link: str
    data: bytes
    mode: int
    uid: int
    gid: int
    mtime: float
    device: tuple[int, int]
    xattrs: dict[str, str]

    def info(self, *, pax: bool) -> tarfile.TarInfo:
        info = tarfile.TarInfo(self.name)
        info.type, info.linkname, info.mode, info.uid, info.gid = self.kind, self.link, self.mode, self.uid, self.gid
        info.mtime = self.mtime if pax else int(self.mtime)
        info.devmajor, info.devminor = self.device
        info.size = len(self.data)
        if pax:
            info.pax_headers = {f"SCHILY.xattr.{name}": value for name, value in self.xattrs.items()}
        return info


class Refused(Exception):
    pass


@dataclass
class Node:
    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: tuple[int, int] = (0, 0)
    data: bytes = b""
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


Place = tuple[bytes, ...]
FORMAT_BITS: Final = {
    tarfile.REGTYPE: 0o100000, tarfile.DIRTYPE: 0o040000, tarfile.SYMTYPE: 0o120000, tarfile.CHRTYPE: 0o020000,
    tarfile.BLKTYPE: 0o060000, tarfile.FIFOTYPE: 0o010000,
}  # fmt: skip


class Model:
    """A flat table of places."""

    def __init__(self) -> None:
        self.nodes: dict[Place, Node] = {(): Node(tarfile.DIRTYPE)}
        self.times: list[tuple[list[bytes], tuple[int, int]]] = []  # of directories, by their names

    def follow(self, parts: list[bytes], *, make: bool, last_of_any_type: bool = False) -> Place:
        here: Place = ()
        hops = 0
        while parts:
            name, parts = parts[0], parts[1:]
            if name in (b"", b"."):
                continue
            if name == b"..":
                here = here[:-1]
                continue
            node = self.nodes.get((*here, name))
            if node is None and make:
                node = self.nodes[(*here, name)] = Node(tarfile.DIRTYPE)
                if self.nodes[here].mode & 0o2000:
                    node.gid = self.nodes[here].gid
            if node is not None and node.kind == tarfile.SYMTYPE:
                hops += 1
                here = () if node.link.startswith(b"/") else here
                parts = node.link.split(b"/") + parts
            elif node is not None and (node.kind == tarfile.DIRTYPE or (last_of_any_type and not parts)):
                here = (*here, name)
            else:
                raise Refused
            if hops > 255:
                raise Refused
        return here

    def drop(self, place: Place) -> None:
        self.nodes = {key: node for key, node in self.nodes.items() if key[: len(place)] != place}

    def takes(self, action: Action, *, pax: bool) -> bool:
        """Whether it is sound; without a trace where it is not."""
        before = dict(self.nodes), list(self.times)
        try:
            self.add(action, pax=pax)
        except Refused:
            self.nodes, self.times = before
            return False
        return True

    def add(self, action: Action, *, pax: bool) -> None:
        parts = [part for part in action.name.encode().split(b"/") if part not in (b"", b".")]
        if not parts:
            return
        place = (*self.follow(parts[:-1], make=True), parts[-1])
        node = self.nodes.get(place)
        if action.kind == tarfile.LNKTYPE:
            self.drop(place)
            target = [part for part in action.link.encode().split(b"/") if part not in (b"", b".")]
            found = self.target(target, followed=action.link.endswith(("/", "/.")))
            if found is None or found.kind == tarfile.DIRTYPE:
                raise Refused
            node = self.nodes[place] = found
            node.xattrs.pop(b"security.capability", None)
        elif node is None or action.kind != tarfile.DIRTYPE or node.kind != tarfile.DIRTYPE:
            self.drop(place)
            node = self.nodes[place] = Node(action.kind)
            node.data, node.link = action.data, action.link.encode() if action.kind == tarfile.SYMTYPE else b""
            node.device = action.device if action.kind in (tarfile.CHRTYPE, tarfile.BLKTYPE) else (0, 0)
        node.mode = 0o777 if node.kind == tarfile.SYMTYPE else action.mode
        node.uid, node.gid = action.uid, action.gid
        quarters = int(action.mtime * 4) if pax else int(action.mtime) * 4
        node.mtime = (quarters // 4, quarters % 4 * 250_000_000) if 0 <= quarters <= 9223372036 * 4 + 3 else (0, 0)
        if action.kind == tarfile.DIRTYPE:
            self.times.append((parts, node.mtime))
        for name, value in action.xattrs.items() if pax else ():
            if not name.startswith("user.") or node.kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
                node.xattrs[name.encode()] = value.encode()

    def target(self, parts: list[bytes], *, followed: bool) -> Node | None:
        if followed:
            return self.nodes[self.follow(parts, make=False, last_of_any_type=True)]
        return self.nodes.get((*self.follow(parts[:-1], make=False), parts[-1])) if parts else None

    def finish(self) -> None:
        """Directories get their times at the end, by name. Raises Refused where one is gone."""
        for parts, mtime in self.times:
            place = self.follow(parts, make=False, last_of_any_type=True)
            if place:
                self.nodes[place].mtime = mtime

    def links(self, place: Place) -> int:
        node = self.nodes[place]
        if node.kind != tarfile.DIRTYPE:
            return sum(other is node for other in self.nodes.values())
        below = (n for p, n in self.nodes.items() if p and p[:-1] == place)
        return 2 + sum(n.kind == tarfile.DIRTYPE for n in below)


components = st.sampled_from([*"abcabc", "a" * 70, "é"])
names = st.builds(
    lambda start, parts, end: start + "/".join(parts) + end,
    st.sampled_from(["", "", "", "/", "./"]), st.lists(components, min_size=1, max_size=3),
    st.sampled_from(["", "", "/."]),
)  # fmt: skip
texts = st.builds(
    lambda start, parts: start + "/".join(parts),
    st.sampled_from(["", "", "/"]), st.lists(st.one_of(components, st.just("..")), min_size=1, max_size=3),
)  # fmt: skip
kinds = st.sampled_from(
    [tarfile.REGTYPE] * 3 + [tarfile.DIRTYPE] * 2 + [tarfile.SYMTYPE] * 2 + [tarfile.LNKTYPE] * 2
    + [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)  # fmt: skip
ids = st.one_of(st.integers(0, 1000), st.sampled_from([8**7 - 1, 8**7, 2**31, 2**32 - 2]))
times = st.one_of(
    st.integers(0, 8_000_000_000).map(lambda quarters: quarters / 4),
    st.sampled_from([-1.25, -1.0, 8.0**11 - 1, 8.0**11, 9223372036.75, 9223372037.0]),
)
contents = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"1" * 511, b"2" * 512, b"3" * 513, b"4" * 2000]))
xattrs = st.dictionaries(
    st.sampled_from(["user.a", "user.b", "user.long" + "n" * 100, "security.x", "security.capability"]),
    st.sampled_from(["", "1", "two\nlines", "=" * 30, "é" * 400]),
    max_size=3,
)


@st.composite
def actions(draw: st.DrawFn) -> list[Action]:
    made: list[Action] = []
    for kind in draw(st.lists(kinds, max_size=12)):
        link = ""
        if kind == tarfile.SYMTYPE:
            link = draw(texts)
        elif kind == tarfile.LNKTYPE:
            # Mostly to a name that there was, or few would find anything.
            earlier = [action.name for action in made if action.kind != tarfile.DIRTYPE]
            link = draw(st.one_of(st.sampled_from(earlier), names) if earlier else names)
        made.append(
            Action(
                kind, draw(names), link, draw(contents) if kind == tarfile.REGTYPE else b"",
                draw(st.integers(0, 0o7777)), draw(ids), draw(ids), draw(times),
                (draw(st.sampled_from([0, 1, 4095])), draw(st.sampled_from([0, 3, 255, 256, 2**20 - 1]))),
                draw(xattrs),
            )
        )  # fmt: skip
    return made


def tar_of(members: list[Action], *, pax: bool) -> bytes:
    out = io.BytesIO()
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8") as tar:
        for action in members:
            tar.addfile(action.info(pax=pax), io.BytesIO(action.data))
    return out.getvalue()


@given(members=actions(), pax=st.booleans())
def test_a_layer_is_what_its_members_say(members: list[Action], pax: bool) -> None:
    model, sound = Model(), list[Action]()
    for action in members:
        if model.takes(action, pax=pax):
            sound.append(action)
        else:
            assert outcome(tar_of([*sound, action], pax=pax)) is FormatError
    try:
        model.finish()
    except Refused:
        assert outcome(tar_of(sound, pax=pax)) is FormatError
        return
    built, file = build(tar_of(sound, pax=pax))
    entries = walked(file)
    found = {entry.path: entry for entry in entries}
    assert [entry.path.split(b"/") for entry in entries[1:]] == sorted(list(place) for place in model.nodes if place)
    assert built.entries == len({id(node) for node in model.nodes.values()})
    inodes: dict[int, Node] = {}
    for place, node in model.nodes.items():
        entry = found[b"/".join(place)]
        assert (entry.mode, entry.uid, entry.gid, entry.mtime) == (
            FORMAT_BITS[node.kind] | node.mode, node.uid, node.gid, node.mtime,
        )  # fmt: skip
        assert (entry.link, entry.rdev, entry.xattrs) == (node.link, node.device, node.xattrs)
        assert entry.nlink == model.links(place)
        assert inodes.setdefault(entry.inode, node) is node
        if node.kind == tarfile.REGTYPE:
            assert entry.size_bytes == len(node.data)
            assert file[entry.data_offset_bytes :][: entry.size_bytes] == node.data
    assert len(inodes) == built.entries


def outcome(*pieces: bytes) -> tuple[BuiltLayer, bytes] | type[BlockdevError]:
    try:
        return build(*pieces)
    except BlockdevError as error:
        return type(error)


# --- any bytes


@st.composite
def mutated(draw: st.DrawFn, base: bytes) -> bytes:
    """A few flips, overwritten stretches, insertions, deletions; perhaps a cut."""
    data = bytearray(base)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "put", "insert", "delete", "cut"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "put":
            piece = draw(st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"\0" * 8, b"\xff" * 8])))
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 600))]
        elif kind == "cut" and draw(st.booleans()):
            del data[at:]
    return bytes(data)


def headers(tar: bytes) -> list[int]:
    """Offsets of blocks with a checksum that fits."""
    return [at for at in range(0, len(tar) - 511, 512) if any(tar[at : at + 512]) and sealed(tar, [at]) == tar]


def sealed(tar: bytes, offsets: list[int]) -> bytes:
    out = bytearray(tar)
    for at in offsets:
        if len(out) >= at + 512:
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


HEADERS: Final = {name: headers(tar) for name, tar in SMALL_TARS.items()}
# Offset and size: name, mode, uid, gid, size, mtime, type, link, magic, device numbers, prefix, star's trailer.
FIELDS: Final = [(0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100), (257, 8),
                 (329, 8), (337, 8), (345, 155), (508, 4)]  # fmt: skip


@st.composite
def broken_tars(draw: st.DrawFn) -> bytes:
    """Real tars with odd bytes in them, their checksums put right so that the oddness is looked at."""
    name = draw(st.sampled_from(sorted(SMALL_TARS)))
    tar = SMALL_TARS[name]
    fields = draw(st.booleans())
    if HEADERS[name] and fields:
        out = bytearray(tar)
        for _ in range(draw(st.integers(1, 3))):
            at, (offset, size) = draw(st.sampled_from(HEADERS[name])), draw(st.sampled_from(FIELDS))
            value = draw(
                st.one_of(
                    st.binary(max_size=min(size, 12)), st.integers(0, 2**40).map(lambda n: b"%o" % n),
                    st.sampled_from(list(b"01234567xgLKSV\0")).map(lambda n: bytes([n])),
                    st.sampled_from([b"a", b"d", b"../a", b"/", b".wh.d", b"d/.wh..wh..opq", b"ustar\0" + b"00"]),
                )
            )[:size]  # fmt: skip
            out[at + offset : at + offset + size] = value.ljust(size, draw(st.sampled_from([b"\0", b" ", b"\xff"])))
        return sealed(bytes(out), HEADERS[name])
    seal = draw(st.sampled_from([True, True, True, False]))
    offsets = HEADERS[name] if seal else []
    return sealed(draw(mutated(tar)), offsets)


def check_any_tar(tar: bytes) -> None:
    with contextlib.suppress(BlockdevError):
        built, file = build(tar)
        # What the writer writes, the reader reads: here nothing may be refused any more.
        entries = None
        with contextlib.suppress(BlockdevError):
            entries = walked(file)
        assert entries is not None
        assert len({entry.inode for entry in entries}) == built.entries
        assert file[4096 : 4096 + len(tar)] == tar


@given(tar=broken_tars())
def test_a_broken_tar_is_a_layer_or_a_clean_refusal(tar: bytes) -> None:
    check_any_tar(tar)


@given(tar=st.binary(max_size=3000))
@example(tar=bytes(512))
@example(tar=b"\xff" * 512)
def test_arbitrary_bytes_are_a_layer_or_a_clean_refusal(tar: bytes) -> None:
    check_any_tar(tar)


@given(body=st.binary(max_size=200), typ=st.sampled_from([b"x", b"g", b"L", b"K"]), data=st.data())
def test_extended_headers_of_any_bytes(body: bytes, typ: bytes, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        key = data.draw(
            st.sampled_from([b"path", b"linkpath", b"size", b"uid", b"mtime", b"SCHILY.xattr.user.a", b"a"])
        )
        record = b" " + key + b"=" + body + b"\n"
        body = b"%d%s" % (len(record) + len(b"%d" % (len(record) + 2)), record)
    extended = make_tars.hdr(b"e", typ, len(body)) + make_tars.pad(body)
    for member in (make_tars.F(b"f", b"data"), make_tars.S(b"s", b"t"), make_tars.D(b"d")):
        check_any_tar(extended + member)


# --- a file that was tampered with


FILES: Final = [build(SMALL_TARS[name])[1] for name in ("devices", "xattrs", "ti-whiteout-types", "hardlinks", "deep")
                if name in SMALL_TARS] + [build(make_tars.CASES["ti-inline-limits"]())[1]]  # fmt: skip


@given(file=st.sampled_from(FILES), data=st.data())
def test_tampered_metadata_is_read_or_cleanly_refused(file: bytes, data: st.DataObject) -> None:
    size = Trailer.unpack(file[-4096:]).data_size_bytes
    start = erofs.Superblock.unpack(file[1024:1152]).meta_block * 512
    out = bytearray(file[:size])
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        inside = st.one_of(st.integers(1024, 1152 - width), st.integers(start, size - width))
        # Fields stand at multiples of their size, mostly.
        at = data.draw(inside) // width * width
        value = data.draw(st.one_of(st.integers(0, 700), st.integers(0, 2 ** (8 * width) - 1)))
        out[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    out[1028:1032] = bytes(4)
    struct.pack_into("<I", out, 1028, erofs.crc32c(out[1024:1536]))
    with contextlib.suppress(BlockdevError):
        reader = Reader(lambda offset, length: bytes(out[offset : offset + length]), size)
        for entry in reader.walk():
            assert entry.data_offset_bytes + (entry.size_bytes if entry.data_offset_bytes else 0) <= size


@given(file=st.sampled_from(FILES), data=st.data())
def test_a_metadata_area_of_swapped_pieces_is_read_or_cleanly_refused(file: bytes, data: st.DataObject) -> None:
    """Records in places of others: all sound in themselves, so that loops and double names come up."""
    size = Trailer.unpack(file[-4096:]).data_size_bytes
    start = erofs.Superblock.unpack(file[1024:1152]).meta_block * 512
    out = bytearray(file[:size])
    units = st.integers(0, (size - start) // 32 - 4)
    for _ in range(data.draw(st.integers(1, 6))):
        source, target, count = data.draw(units), data.draw(units), data.draw(st.integers(1, 4))
        piece = file[start + 32 * source : start + 32 * (source + count)]
        out[start + 32 * target : start + 32 * target + len(piece)] = piece
    with contextlib.suppress(BlockdevError):
        list(Reader(lambda offset, length: bytes(out[offset : offset + length]), size).walk())


@given(trailer=st.one_of(st.binary(max_size=200).map(lambda head: head.ljust(4096, b"\0")), mutated(FILES[0][-4096:])))
def test_a_trailer_of_any_bytes_is_the_same_or_cleanly_refused(trailer: bytes) -> None:
    with contextlib.suppress(BlockdevError):
        assert Trailer.unpack(trailer).pack() == trailer


# --- the pieces of a stream


@given(name=st.sampled_from(sorted(SMALL_TARS)), data=st.data())
def test_where_the_stream_is_cut_does_not_matter(name: str, data: st.DataObject) -> None:
    tar = SMALL_TARS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tar)), max_size=12)))
    pieces = [tar[a:b] for a, b in zip([0, *cuts], [*cuts, len(tar)], strict=True)]
    assert outcome(*pieces) == outcome(tar)


# --- compressed streams


STREAMS: Final = {
    "gzip": (Compression.GZIP, gzip.compress(SMALL_TARS["nested"], mtime=0)),
    "gzip members": (Compression.GZIP, b"".join(gzip.compress(b"%d" % n, mtime=0) for n in range(9)) + bytes(40)),
    "zstd": (Compression.ZSTD, ZstdCompressor(write_checksum=True).compress(SMALL_TARS["nested"])),
    "zstd frames": (
        Compression.ZSTD,
        b"\x53\x2a\x4d\x18\x04\0\0\0note" + b"".join(ZstdCompressor().compress(b"%d" % n) for n in range(9)),
    ),
}


def unpacked(kind: Compression, stream: bytes, piece_bytes: int) -> bytes | None:
    """None where the stream is refused."""
    out = b""
    try:
        for piece in decompress(kind, io.BytesIO(stream).read, piece_bytes):
            assert 0 < len(piece) <= piece_bytes
            out += piece
    except (CompressionError, LimitExceeded):
        return None
    return out


def check_any_stream(kind: Compression, stream: bytes, piece_bytes: int) -> None:
    out = unpacked(kind, stream, piece_bytes)
    if kind is Compression.ZSTD:
        assert out == unpacked(kind, stream, 1 << 16)


@given(name=st.sampled_from(sorted(STREAMS)), piece_bytes=st.sampled_from([1, 7, 64, 1 << 16]), data=st.data())
def test_a_broken_stream_gives_bytes_or_a_clean_refusal(name: str, piece_bytes: int, data: st.DataObject) -> None:
    kind, stream = STREAMS[name]
    check_any_stream(kind, data.draw(mutated(stream)), piece_bytes)


@given(
    kind=st.sampled_from([Compression.GZIP, Compression.ZSTD]),
    head=st.sampled_from([b"", b"\x1f\x8b\x08\x00", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]),
    rest=st.binary(max_size=200), piece_bytes=st.sampled_from([1, 7, 64, 1 << 16]),
)  # fmt: skip
def test_arbitrary_bytes_as_a_stream(kind: Compression, head: bytes, rest: bytes, piece_bytes: int) -> None:
    check_any_stream(kind, head + rest, piece_bytes)


@given(data=st.lists(st.binary(max_size=300), min_size=1, max_size=5), piece_bytes=st.integers(1, 700))
def test_what_was_compressed_comes_out(data: list[bytes], piece_bytes: int) -> None:
    members = b"".join(gzip.compress(each, mtime=0) for each in data)
    frames = b"".join(ZstdCompressor().compress(each) for each in data)
    assert unpacked(Compression.GZIP, members, piece_bytes) == b"".join(data)
    assert unpacked(Compression.ZSTD, frames, piece_bytes) == b"".join(data)
