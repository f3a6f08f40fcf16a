# SPDX-License-Identifier: Apache-2.0
"""One wrong bit, or a cut, anywhere: of a blob it is an error or another diff ID, of a layer file it is found."""

from __future__ import annotations

import gzip
import hashlib
import io
from functools import cache
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from blockdev.errors import BlockdevError, FormatError
from blockdev.formats.compression import Compression, decompress
from blockdev.formats.layer_file import FORMATS, open_layer_file
from blockdev.formats.layer_writer import BuiltLayer
from tests.fuzz import build
from tests.golden.make_tars import EOA, PX, D, F, S, prng
from verity.errors import VerityError
from verity.tree import Geometry
from verity.verify import verify_all

TAR: Final = bytes(
    D(b"d") + PX((b"SCHILY.xattr.user.a", b"1")) + F(b"d/f", b"data") + S(b"l", b"d/f") + F(b"d/.wh.x") + EOA
)
BLOBS: Final = {
    "plain": (Compression.NONE, TAR),
    "gzip": (Compression.GZIP, gzip.compress(TAR, mtime=0)),
    "gzip members": (
        Compression.GZIP,
        gzip.compress(TAR[:700], mtime=0) + gzip.compress(TAR[700:], mtime=0) + bytes(9),
    ),
    "zstd": (Compression.ZSTD, ZstdCompressor(write_checksum=True).compress(TAR)),
    "zstd frames": (
        Compression.ZSTD,
        ZstdCompressor().compress(TAR[:700]) + b"\x50\x2a\x4d\x18\4\0\0\0note" + ZstdCompressor().compress(TAR[700:]),
    ),
}


def layer(kind: Compression, blob: bytes) -> tuple[BuiltLayer, bytes] | None:
    """None where it is refused."""
    try:
        return build(b"".join(bytes(piece) for piece in decompress(kind, io.BytesIO(blob).read, 1 << 16)), [])
    except BlockdevError:
        return None


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@cache
def sound(name: str) -> tuple[BuiltLayer, bytes]:
    found = layer(*BLOBS[name])
    assert found is not None
    return found


def assert_no_other_layer_of_its_name(name: str, found: tuple[BuiltLayer, bytes] | None) -> None:
    """The diff ID is what a layer goes by: under one there is one layer file."""
    if found is not None and found[0].diff_id == sound(name)[0].diff_id:
        assert found == sound(name)


@pytest.mark.parametrize("name", BLOBS)
def test_a_bit_of_a_blob(name: str) -> None:
    """Each byte, with a bit that goes around. Some of gzip mean nothing, as those of its time: the layer is equal."""
    kind, blob = BLOBS[name]
    for at in range(len(blob)):
        found = layer(kind, flipped(blob, at, at * 5 % 8))
        assert_no_other_layer_of_its_name(name, found)
        if kind is Compression.NONE:
            assert found is None or found[0].diff_id != sound(name)[0].diff_id


@given(name=st.sampled_from(sorted(BLOBS)), data=st.data())
def test_some_bits_of_a_blob(name: str, data: st.DataObject) -> None:
    kind, blob = BLOBS[name]
    for _ in range(data.draw(st.integers(1, 3))):
        blob = flipped(blob, data.draw(st.integers(0, len(blob) - 1)), data.draw(st.integers(0, 7)))
    assert_no_other_layer_of_its_name(name, layer(kind, blob))


@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_that_is_cut(name: str) -> None:
    kind, blob = BLOBS[name]
    for size in range(len(blob)):
        found = layer(kind, blob[:size])
        if name == "gzip members" and size >= len(blob) - 9:
            assert found == sound(name)  # only of the zeros at its end
        else:
            assert found is None or found[0].diff_id != sound(name)[0].diff_id


# --- layer files

# One hash block; and two levels, the lower one of two blocks, which has spare bytes in both levels.
FILES: Final[dict[str, tuple[str, bytes]]] = {
    "small": ("tar-index", TAR),
    "two levels": ("tar-index", F(b"f", prng(70_000)) + EOA),
    "small, 4 KiB": ("erofs-4k", TAR),
    "two levels, 4 KiB": ("erofs-4k", F(b"f", prng(530_000)) + EOA),
}


@cache
def file_of(name: str) -> tuple[BuiltLayer, bytes]:
    layer_format, tar = FILES[name]
    return build(tar, [], layer_format)


def assert_found(built: BuiltLayer, file: bytes) -> None:
    """As a verifier does it that trusts a root hash and a geometry from elsewhere."""

    def read_at(offset: int, size: int) -> bytes:
        return file[offset : offset + size]

    params = FORMATS[built.format].params
    geometry = Geometry(built.data_size_bytes // params.data_block_bytes, params)
    try:
        layer = open_layer_file(read_at, len(file))
        if (layer.data_size_bytes, layer.root_hash) != (built.data_size_bytes, built.root_hash):
            return
        if layer.diff_id != built.diff_id:
            return
        verify_all(read_at, geometry, built.root_hash)
    except (FormatError, VerityError):
        return
    pytest.fail("nobody notices")


@pytest.mark.parametrize("name", ["small", "small, 4 KiB"])
def test_a_bit_of_a_layer_file(name: str) -> None:
    """Each byte: head, data, padding, index, tree with its spare bytes, trailer with its zeros."""
    built, file = file_of(name)
    for at in range(len(file)):
        assert_found(built, flipped(file, at, at * 5 % 8))


@pytest.mark.parametrize("name", ["two levels", "two levels, 4 KiB"])
def test_a_bit_of_each_block_of_a_layer_file_with_two_levels(name: str) -> None:
    built, file = file_of(name)
    assert built.tree_size_bytes == 3 * 4096
    tree = range(built.data_size_bytes, built.data_size_bytes + built.tree_size_bytes)
    for at in {*range(0, len(file), len(file) // 300), *tree[::31], *range(len(file) - 4096, len(file), 7)}:
        assert_found(built, flipped(file, at, at % 8))


@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_some_bytes_of_a_layer_file(name: str, data: st.DataObject) -> None:
    built, file = file_of(name)
    out = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        at, piece = data.draw(st.integers(0, len(file) - 1)), data.draw(st.binary(min_size=1, max_size=40))
        out[at : at + len(piece)] = piece
    if bytes(out[: len(file)]) != file:
        assert_found(built, bytes(out[: len(file)]))


@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_blocks_of_a_layer_file_in_another_order(name: str, data: st.DataObject) -> None:
    built, file = file_of(name)
    size = data.draw(st.sampled_from([512, 4096]))
    places = st.integers(0, len(file) // size - 1)
    a, b = (data.draw(places) * size for _ in range(2))
    out = bytearray(file)
    out[a : a + size], out[b : b + size] = file[b : b + size], file[a : a + size]
    if bytes(out) != file:
        assert_found(built, bytes(out))


@given(data=st.data())
def test_a_trailer_whose_checksum_was_put_right(data: st.DataObject) -> None:
    built, file = file_of("small")
    trailer = bytearray(file[-4096:])
    at = data.draw(st.integers(0, 119))
    trailer[at] ^= data.draw(st.integers(1, 255))
    trailer[120:152] = hashlib.sha256(trailer[:120]).digest()
    assert_found(built, file[:-4096] + bytes(trailer))


@pytest.mark.parametrize("name", FILES)
def test_a_layer_file_that_is_cut_or_goes_on(name: str) -> None:
    built, file = file_of(name)
    for size in range(0, len(file), 1 if name == "small" else len(file) // 300):
        assert_found(built, file[:size])
    for more in (b"\0", b"x", bytes(512), bytes(4096), file[-4096:], file):
        assert_found(built, file + more)
    for piece in (512, 4096):
        assert_found(built, file[piece:])
        assert_found(built, file[:4096] + file[4096 + piece :])
        assert_found(built, file[: -4096 - piece] + file[-4096:])
