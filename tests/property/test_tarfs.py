# SPDX-License-Identifier: Apache-2.0
"""The engine for `tarfs` and a slow model of it, written from the specification alone, make the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.errors import BlockdevError, FormatError, LimitExceeded
from blockdev.formats.entry import Entry
from blockdev.formats.layer_file import FORMATS
from blockdev.formats.layer_writer import LayerWriter
from blockdev.formats.limits import Limits
from blockdev.formats.tarfs_reader import Reader
from tests import tarfs_model
from tests.golden import make_tars
from tests.golden.make_tars import EOA, GNU, LL, PX, USTAR, V7, b256, hdr, octal, pad
from tests.property.test_layer import SMALL_TARS, broken_tars
from tests.tarfs_model import Refused
from verity.hasher import LeafStore


def engine(variant: str, *pieces: bytes) -> bytes | None:
    """None for a refusal."""
    out, leaves = bytearray(), LeafStore()
    try:
        writer = LayerWriter(
            FORMATS[variant], write=out.extend, write_head=lambda _: None, leaves=leaves, limits=Limits(),
            read_back=lambda offset, size: bytes(out[offset : offset + size]),
        )  # fmt: skip
        for piece in pieces:
            writer.feed(piece)
        writer.finish(hashlib.sha256(b"".join(pieces)).digest())
    except BlockdevError:
        return None
    finally:
        leaves.close()
    return bytes(out)


def model(variant: str, tar: bytes) -> tarfs_model.Layer | None:
    try:
        return tarfs_model.build(tar, variant)
    except Refused:
        return None


def walked(file: bytes, data_size: int) -> list[Entry]:
    return list(Reader(lambda offset, size: file[offset : min(offset + size, data_size)], data_size).walk())


def check(tar: bytes, variant: str) -> None:
    layer = model(variant, tar)
    file = engine(variant, tar)
    assert file == (layer.file if layer is not None else None)
    if layer is None:
        return
    if layer.shown is None:
        with pytest.raises((FormatError, LimitExceeded)):
            walked(layer.file, layer.data_size)
        return
    assert walked(layer.file, layer.data_size) == [
        Entry(
            each.path, each.inode, each.mode, each.uid, each.gid, each.size, (each.mtime, 0), 1, each.device, each.link,
            each.data_offset, {b"trusted.overlay.opaque": b"y"} if each.opaque else {},
        )
        for each in layer.shown
    ]  # fmt: skip


@pytest.mark.parametrize("variant", tarfs_model.VARIANTS)
@pytest.mark.parametrize("name", make_tars.CASES)
def test_engine_and_model_agree_about(name: str, variant: str) -> None:
    check(make_tars.CASES[name](), variant)


# --- tars that no tool would write


NAMES: Final = [b"a", b"b", b"d", b"d/a", b"d/e", b"d/e/f", b"a/b", b"f", b"f/g", b"d/", b"z/y/x"]
ODD_NAMES: Final = [b"./", b"/", b"", b"..", b"d/..", b"../a", b"d/../a", b"//d//./a", b".wh.a", b".wh.d", b"d/.wh.e",
                    b"d/.wh.a", b".wh.", b".wh..", b".wh...", b".wh..wh..opq", b"d/.wh..wh..opq", b"z/.wh..wh..opq",
                    b".wh..wh.plnk", b".wh.d/a", b"n" * 100, b"\xff\xfe", b".wh..wh..opq/x"]  # fmt: skip
names = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(ODD_NAMES))
types = st.sampled_from(
    [b"0", b"0", b"0", b"5", b"5", b"1", b"1", b"1", b"2", b"2", b"3", b"4", b"6", b"\0", b"7", b"g"]
)
magics = st.sampled_from([USTAR, USTAR, GNU, GNU, V7, (b"ustar\0", b"  ")])
odd_numbers = st.sampled_from(
    [b"", b" 7 \0", b"\0007", b"+17", b"-1", b"9", b"\xc2\xa01", b"\x1c1", b"1 1", b"+", b"7777777"]
)


def field(size: int) -> st.SearchStrategy[bytes]:
    return st.one_of(
        odd_numbers.map(lambda text: text.ljust(size, b"\0")),
        st.integers(0, 2**36).map(lambda value: octal(value % 8 ** (size - 1), size)),
        st.integers(-(2**40), 2**40).map(lambda value: b256(value, size)),
    )


@st.composite
def pax_bodies(draw: st.DrawFn) -> bytes:
    keys = st.sampled_from(
        [b"path", b"linkpath", b"size", b"uid", b"gid", b"comment", b"mtime", b"SCHILY.xattr.user.a"]
    )
    values = st.one_of(
        names,
        st.sampled_from([b"5", b"+5", b"0", b"512", b"1.5", b"two\nlines", b"blank\n\nline", b"2" * 21, b"t" * 120]),
        st.integers(0, 2**64).map(lambda value: b"%d" % value),
    )  # fmt: skip
    out = b""
    for _ in range(draw(st.integers(0, 3))):
        header_and_body = PX((draw(keys), draw(values)))
        record = header_and_body[512 : 512 + int(header_and_body[124:135], 8)]
        out += draw(st.sampled_from([record] * 8 + [b"+" + record, record[:-1], b"junk\n", b"\n", record[1:]]))
    return out


@st.composite
def weird_tars(draw: st.DrawFn) -> bytes:
    out = b""
    for _ in range(draw(st.integers(1, 9))):
        raw = {
            name: draw(field(size))
            for name, size in (("mode", 8), ("uid", 8), ("gid", 8), ("mtime", 12), ("dmaj", 8), ("dmin", 8))
            if draw(st.integers(0, 14)) == 0
        }
        for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
            kind = draw(st.sampled_from(["x", "x", "L", "K"]))
            if kind == "x":
                body = draw(pax_bodies())
                out += hdr(b"x", b"x", len(body)) + pad(body)
            else:
                text = draw(st.one_of(names, st.sampled_from([b"", b"t" * 130, b"a\0b", b"u" * 300])))
                out += LL(text, kind.encode())
        typeflag = draw(types)
        size = (
            draw(st.sampled_from([0, 0, 3, 700])) if typeflag in (b"0", b"\0") else draw(st.sampled_from([0] * 9 + [5]))
        )
        link = draw(names) if typeflag == b"1" else draw(st.sampled_from([b"a", b"t" * 100, b"", b"../x"]))
        prefix = draw(st.sampled_from([b""] * 6 + [b"d", b"z/y"]))
        device = draw(st.sampled_from([(0, 0), (1, 3), (0o7777777, 0o7777777)]))
        header = hdr(draw(names), typeflag, size, link=link, magic=draw(magics), prefix=prefix, dev=device, raw=raw)
        out += header + pad(b"#" * size)
    end = draw(st.sampled_from([EOA, EOA, EOA, b"", bytes(512), bytes(512) + b"x" * 512, EOA + b"junk"]))
    return out + end


@given(tar=weird_tars(), variant=st.sampled_from(tarfs_model.VARIANTS))
def test_engine_and_model_agree_about_weird_tars(tar: bytes, variant: str) -> None:
    check(tar, variant)


@given(tar=broken_tars(), variant=st.sampled_from(tarfs_model.VARIANTS))
def test_engine_and_model_agree_about_broken_tars(tar: bytes, variant: str) -> None:
    check(tar, variant)


@given(tar=st.one_of(weird_tars(), st.sampled_from(sorted(SMALL_TARS.values()))), data=st.data())
def test_where_the_stream_is_cut_does_not_matter(tar: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tar)), max_size=12)))
    pieces = [tar[a:b] for a, b in zip([0, *cuts], [*cuts, len(tar)], strict=True)]
    assert engine("tarfs", *pieces) == engine("tarfs", tar)


# --- an index that was tampered with


FILES: Final = [
    tarfs_model.build(make_tars.CASES[name](), "tarfs")
    for name in ("devices", "nested", "hardlinks", "wh-shapes", "symlinks", "special-links-out-of-order", "opaque")
]


@given(layer=st.sampled_from(FILES), data=st.data())
def test_a_tampered_index_is_read_or_cleanly_refused(layer: tarfs_model.Layer, data: st.DataObject) -> None:
    size = layer.data_size
    start = int.from_bytes(layer.file[size - 512 : size - 504], "little")
    out = bytearray(layer.file[:size])
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        # Mostly where records are, and at multiples of the field's size from their start.
        if data.draw(st.integers(0, 5)):
            at = start + width * data.draw(st.integers(0, (size - 4096 - start - 8) // width))
        else:
            at = data.draw(st.integers(size - 512, size - 504))
        value = data.draw(st.one_of(st.integers(0, 700), st.integers(0, size), st.integers(0, 2 ** (8 * width) - 1)))
        out[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    with contextlib.suppress(FormatError, LimitExceeded):
        for entry in walked(bytes(out), size):
            assert entry.data_offset_bytes + (entry.size_bytes if entry.data_offset_bytes else 0) <= size
            assert not {b"", b".", b".."} & set(entry.path.split(b"/")) or not entry.path


@given(layer=st.sampled_from(FILES), data=st.data())
def test_an_index_of_swapped_records_is_read_or_cleanly_refused(layer: tarfs_model.Layer, data: st.DataObject) -> None:
    """All sound in themselves, so that loops and double names come up."""
    size = layer.data_size
    start = int.from_bytes(layer.file[size - 512 : size - 504], "little")
    out = bytearray(layer.file[:size])
    places = st.integers(0, 2 * layer.inodes).map(lambda number: start + 32 * number)
    for _ in range(data.draw(st.integers(1, 6))):
        source, target, length = data.draw(places), data.draw(places), data.draw(st.sampled_from([8, 32, 64]))
        out[target : target + length] = layer.file[source : source + length]
    with contextlib.suppress(FormatError, LimitExceeded):
        walked(bytes(out[:size]), size)
