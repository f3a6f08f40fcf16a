# SPDX-License-Identifier: Apache-2.0
"""Records at both ends of a layer file, the writer that hashes what passes, the bounds of one build."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
import uuid
from dataclasses import replace
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, LimitExceeded
from blockdev.formats import erofs, layer_writer
from blockdev.formats.layer_file import (
    FORMATS,
    HEAD_BYTES,
    TRAILER_BYTES,
    Identity,
    Trailer,
    align,
    format_named,
    layer_uuid,
)
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter, VerifiedWriter
from blockdev.formats.limits import Limits
from tests.golden import make_tars
from tests.golden.make_tars import EOA
from verity.hasher import LeafStore, leaf_digests
from verity.params import Params
from verity.tree import Geometry, HashTree
from verity.verify import verify_all

DIFF_ID = bytes(range(32))
ROOT = bytes(range(100, 132))
IDENTITY = Identity(4096, 5000, 12288, DIFF_ID)
TRAILER = Trailer(Params(512, 4096), 16384, 8192, 1, ROOT, DIFF_ID)


def tar_of(*contents: bytes) -> bytes:
    members = [make_tars.F(b"f%d" % number, data) for number, data in enumerate(contents)]
    return b"".join(members) + bytes(EOA)


def built(tar: bytes, limits: Limits | None = None, pieces: int = 1 << 20) -> tuple[BuiltLayer, bytes]:
    out, heads = bytearray(HEAD_BYTES), list[bytes]()
    leaves = LeafStore()
    writer = LayerWriter(
        FORMATS["tar-index"], write=out.extend, write_head=heads.append, leaves=leaves, limits=limits or Limits()
    )
    try:
        for at in range(0, len(tar), pieces):
            writer.feed(tar[at : at + pieces])
        assert heads == []
        result = writer.finish(hashlib.sha256(tar).digest())
    finally:
        leaves.close()
    (head,) = heads
    assert len(head) == HEAD_BYTES
    return result, head + bytes(out[HEAD_BYTES:])


def put(raw: bytes, offset: int, data: bytes) -> bytes:
    return raw[:offset] + data + raw[offset + len(data) :]


# --- names and numbers


def test_the_format_that_is_written_has_a_name() -> None:
    assert format_named("tar-index").params == Params(512, 4096)
    assert format_named("tar-index").block_bytes == 512


@pytest.mark.parametrize("name", ["", "aligned", "tar-index ", "TAR-INDEX", "tar-index:v1"])
def test_another_format_is_refused_with_the_names_of_the_known(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        format_named(name)
    assert repr(name) in str(caught.value)
    assert "this version writes: tar-index" in str(caught.value)


def test_align_rounds_up() -> None:
    assert [align(value, 512) for value in (0, 1, 511, 512, 513)] == [0, 512, 512, 512, 1024]


def test_the_uuid_is_of_version_8_and_the_rfcs_variant() -> None:
    for number in range(300):
        raw = layer_uuid("tar-index", hashlib.sha256(b"%d" % number).digest())
        assert len(raw) == 16
        assert raw[6] >> 4 == 8
        assert raw[8] >> 6 == 0b10
        assert uuid.UUID(bytes=raw).version == 8
        assert uuid.UUID(bytes=raw).variant == uuid.RFC_4122


def test_the_uuid_is_the_hash_of_format_and_diff_id_but_for_six_bits() -> None:
    whole = int.from_bytes(hashlib.sha256(b"tar-index:v1:tar-index:" + DIFF_ID).digest()[:16], "big")
    mask = (1 << 128) - 1 ^ 0xF << 76 ^ 0x3 << 62
    assert int.from_bytes(layer_uuid("tar-index", DIFF_ID), "big") & mask == whole & mask
    others = {layer_uuid("tar-index", DIFF_ID), layer_uuid("tar-index", ROOT), layer_uuid("other", DIFF_ID)}
    assert len(others) == 3


# --- identity


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 5000, 1 << 40])
def test_an_identity_record_survives_the_round_trip(size: int) -> None:
    identity = Identity(4096, size, align(4096 + size, 4096), DIFF_ID)
    raw = identity.pack()
    assert len(raw) == 1024
    assert Identity.unpack(raw) == identity
    assert Identity.unpack(raw + bytes(3072)) == identity


def test_the_bytes_of_an_identity_record() -> None:
    expected = b"TARINDEX" + struct.pack("<IIQQQ", 1, 0, 4096, 5000, 12288) + DIFF_ID
    assert IDENTITY.pack() == expected.ljust(1024, b"\0")


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"TARINDEy"),
        (0, bytes(8)),
        (8, b"\x02"),
        (8, b"\x00"),
        (12, b"\x01"),
        (15, b"\x80"),
        (16, b"\x00\x20"),
        (16, bytes(8)),
        (24, struct.pack("<Q", 1)),
        (24, struct.pack("<Q", 8193)),
        (24, b"\xff" * 8),
        (32, bytes(8)),
        (32, struct.pack("<Q", 12289)),
        (32, struct.pack("<Q", 16384)),
        (32, b"\xff" * 8),
        (72, b"\x01"),
        (1023, b"\x01"),
    ],
)
def test_a_wrong_identity_record_is_refused(offset: int, data: bytes) -> None:
    with pytest.raises(FormatError, match="identity record"):
        Identity.unpack(put(IDENTITY.pack(), offset, data))


@pytest.mark.parametrize("size", [0, 1, 71, 72, 1023])
def test_a_short_identity_record_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match="no identity record"):
        Identity.unpack(IDENTITY.pack()[:size])


# --- trailer


@pytest.mark.parametrize("blocks", [8, 32, 1 << 20, (1 << 32) - 2])
def test_a_trailer_survives_the_round_trip(blocks: int) -> None:
    trailer = replace(TRAILER, data_size_bytes=blocks * 512, tree_size_bytes=4096 * 3, levels=2)
    raw = trailer.pack()
    assert len(raw) == TRAILER_BYTES
    assert Trailer.unpack(raw) == trailer
    assert trailer.data_blocks == blocks


def test_the_bytes_of_a_trailer() -> None:
    head = b"TARIDXTR" + struct.pack("<IIIIQQQQ", 1, 1, 512, 4096, 32, 16384, 8192, 1) + ROOT + DIFF_ID
    raw = TRAILER.pack()
    assert raw[:152] == head + hashlib.sha256(head).digest()
    assert raw[152:3584] == bytes(3432)
    assert raw[3584:3600] == struct.pack("<IIQ", 512, 4096, 32)
    assert raw[3600:] == bytes(496)


def test_the_size_of_the_file_follows_from_the_trailer() -> None:
    assert TRAILER.file_size_bytes == 16384 + 8192 + 4096
    assert replace(TRAILER, data_size_bytes=512, tree_size_bytes=0).file_size_bytes == 4096 + 4096


def test_every_flipped_byte_of_a_trailer_is_refused() -> None:
    raw = TRAILER.pack()
    for offset in range(TRAILER_BYTES):
        for bits in (0x01, 0x80, 0xFF):
            with pytest.raises(FormatError, match="trailer"):
                Trailer.unpack(put(raw, offset, bytes([raw[offset] ^ bits])))


@pytest.mark.parametrize("size", [0, 1, 151, 152, 512, 4095])
def test_a_trailer_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match="incomplete or no layer file"):
        Trailer.unpack(TRAILER.pack()[:size])
    with pytest.raises(FormatError, match="incomplete or no layer file"):
        Trailer.unpack(TRAILER.pack() + b"\0")


def forged(**fields: int) -> bytes:
    """A trailer with other numbers and a digest that fits them."""
    values = {"version": 1, "algorithm": 1, "data_block": 512, "hash_block": 4096, "blocks": 32, "data_size": 16384,
              "tree": 8192, "levels": 1, **fields}  # fmt: skip
    head = Trailer.LAYOUT.pack(Trailer.MAGIC, *values.values(), ROOT, DIFF_ID)
    raw = (head + hashlib.sha256(head).digest()).ljust(3584, b"\0")
    record = struct.pack("<IIQ", values["data_block"], values["hash_block"], values["blocks"])
    return (raw + record).ljust(TRAILER_BYTES, b"\0")


def test_a_trailer_with_the_right_numbers_is_taken() -> None:
    assert forged() == TRAILER.pack()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 2}, "version 2, algorithm 1 is not known"),
        ({"version": 0}, "version 0"),
        ({"algorithm": 2}, "algorithm 2 is not known"),
        ({"data_block": 1024}, "block sizes 1024/4096"),
        ({"data_block": 4096}, "contradicts itself"),
        ({"hash_block": 512}, "block sizes 512/512"),
        ({"data_block": 0}, "block sizes 0/4096"),
        ({"data_block": 513}, "block sizes 513/4096"),
        ({"hash_block": 1 << 31}, "block sizes"),
        ({"blocks": 31}, "contradicts itself"),
        ({"blocks": 0}, "contradicts itself"),
        ({"blocks": (1 << 64) - 1}, "contradicts itself"),
        ({"data_size": 16385}, "contradicts itself"),
        ({"data_size": 16895}, "contradicts itself"),
        ({"data_size": 0}, "contradicts itself"),
        ({"data_size": (1 << 64) - 1}, "contradicts itself"),
    ],
)
def test_a_trailer_with_a_good_digest_over_bad_numbers_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        Trailer.unpack(forged(**fields))
    assert words in str(caught.value)


# --- the writer that hashes


def verified(pieces: list[bytes], params: Params) -> tuple[bytes, bytes, int]:
    out, leaves = bytearray(), LeafStore()
    writer = VerifiedWriter(out.extend, HashTree(leaves, params), params)
    for piece in pieces:
        writer.write(piece)
    writer.pad(4096)
    digests = b"".join(leaves.chunks(1 << 20))
    leaves.close()
    return bytes(out), digests, writer.size_bytes


@pytest.mark.parametrize("params", [Params(512, 4096), Params(4096, 4096), Params(1024, 512, b"salt")])
def test_odd_pieces_are_written_and_hashed_like_the_whole(params: Params) -> None:
    data = hashlib.shake_128(b"pieces").digest(20_001)
    expected = verified([data], params)
    assert expected[0] == data + bytes(-len(data) % 4096)
    assert expected[1] == leaf_digests(expected[0], params)
    assert expected[2] == len(expected[0])
    block = params.data_block_bytes
    for size in (1, 2, 3, 100, 511, 512, 513, block - 1, block, block + 1, 2 * block + 1, 5000):
        assert verified([data[at : at + size] for at in range(0, len(data), size)], params) == expected
    cuts = [0, 1, 1, 513, 514, 1024, 9000, 9000, 9001, 20_000, 20_001]
    assert verified([data[a:b] for a, b in itertools.pairwise(cuts)], params) == expected


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_pieces_are_not_kept(kind: Any) -> None:
    params, data = Params(512, 4096), hashlib.shake_128(b"reuse").digest(4096)
    out, leaves, buffer = bytearray(), LeafStore(), bytearray(300)
    writer = VerifiedWriter(lambda piece: out.extend(bytes(piece)), HashTree(leaves, params), params)
    for at in range(0, len(data), 300):
        piece = data[at : at + 300]
        buffer[: len(piece)] = piece
        writer.write(memoryview(buffer)[: len(piece)] if kind is memoryview else kind(piece))
        buffer[:] = bytes(300)
    assert (bytes(out), b"".join(leaves.chunks(4096))) == (data, leaf_digests(data, params))


def test_the_two_halves_of_a_write_may_run_apart() -> None:
    params, data = Params(512, 4096), hashlib.shake_128(b"halves").digest(5000)
    out, leaves = bytearray(), LeafStore()
    writer = VerifiedWriter(out.extend, HashTree(leaves, params), params)
    for at in range(0, len(data), 77):
        writer.store(data[at : at + 77])
    for at in range(0, len(data), 1001):
        writer.hash(data[at : at + 1001])
    writer.pad(512)
    assert b"".join(leaves.chunks(4096)) == leaf_digests(bytes(out), params)


def test_padding_to_a_border_writes_nothing_when_there() -> None:
    out, leaves = bytearray(), LeafStore()
    writer = VerifiedWriter(out.extend, HashTree(leaves, Params(512, 4096)), Params(512, 4096))
    for size, padded in ((0, 0), (1, 4096), (0, 4096), (4096, 8192), (4095, 12288)):
        writer.write(bytes(size))
        writer.pad(4096)
        assert writer.size_bytes == len(out) == padded


# --- a whole layer


def test_the_parts_of_a_layer_file_are_where_its_records_say() -> None:
    tar = tar_of(b"x" * 700, b"", b"y" * 9000)
    result, file = built(tar)
    identity = Identity.unpack(file[:HEAD_BYTES])
    trailer = Trailer.unpack(file[-TRAILER_BYTES:])
    superblock = erofs.Superblock.unpack(file[1024:1152])
    assert file[4096 : 4096 + len(tar)] == tar
    assert identity == Identity(4096, len(tar), align(4096 + len(tar), 4096), hashlib.sha256(tar).digest())
    assert not any(file[4096 + len(tar) : identity.metadata_offset_bytes])
    assert not any(file[1536:4096])
    assert (superblock.blocks, superblock.meta_block) == (
        trailer.data_size_bytes // 512, identity.metadata_offset_bytes // 512,
    )  # fmt: skip
    assert (superblock.block_bits, superblock.root_nid, superblock.inodes) == (9, 2, 4)
    assert superblock.uuid == layer_uuid("tar-index", identity.diff_id)
    assert (result.diff_id, result.entries, result.tar_size_bytes) == (identity.diff_id, 4, len(tar))
    assert (result.data_size_bytes, result.tree_size_bytes) == (trailer.data_size_bytes, trailer.tree_size_bytes)
    assert result.file_size_bytes == trailer.file_size_bytes == len(file)
    assert (result.root_hash, trailer.diff_id) == (trailer.root_hash, identity.diff_id)
    assert trailer.data_size_bytes % 4096 == 0
    geometry = Geometry(trailer.data_blocks, trailer.params)
    assert (geometry.tree_size_bytes, len(geometry.levels)) == (trailer.tree_size_bytes, trailer.levels)
    verify_all(lambda offset, size: file[offset : offset + size], geometry, result.root_hash)


def test_the_superblocks_checksum_covers_its_block() -> None:
    _, file = built(tar_of(b"x"))
    covered = file[1024:1028] + bytes(4) + file[1032:1536]
    assert erofs.Superblock.unpack(file[1024:1152]).checksum == erofs.crc32c(covered)


def test_crc32c_has_the_polynomial_of_castagnoli_and_no_final_inversion() -> None:
    # Check value of CRC-32C: E3069283, inverted at the end.
    assert erofs.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert erofs.crc32c(b"") == 0xFFFFFFFF


def test_an_empty_stream_is_a_layer_too() -> None:
    result, file = built(b"")
    assert (result.entries, result.tar_size_bytes, result.warnings) == (1, 0, {})
    assert Identity.unpack(file[:HEAD_BYTES]).metadata_offset_bytes == 4096
    assert len(file) == result.file_size_bytes


def test_what_was_odd_is_counted_and_what_was_not_is_not_mentioned() -> None:
    assert built(tar_of(b"x"))[0].warnings == {}
    dirty = make_tars.hdr(b"made/f", b"0", 1) + b"1".ljust(512, b"j")
    xattr = make_tars.PX((b"SCHILY.xattr.trusted.a", b"1"))
    assert built(xattr + dirty)[0].warnings == {
        "dropped_xattrs": 1, "invented_directories": 1, "nonzero_padding": 1,
    }  # fmt: skip


def test_a_tar_that_is_cut_short_is_no_layer() -> None:
    with pytest.raises(FormatError, match="inside a member's data"):
        built(tar_of(b"x" * 700)[:900])


# --- bounds


def test_the_bytes_of_the_tar_are_limited() -> None:
    tar = tar_of(b"x" * 700)
    assert built(tar, Limits(tar_bytes=len(tar)))[0].tar_size_bytes == len(tar)
    # The end of the archive counts, and so does what follows it.
    for limit in (len(tar) - 1, 512 + 700):
        with pytest.raises(LimitExceeded, match=f"layer is over the limit of {limit} bytes"):
            built(tar, Limits(tar_bytes=limit))
    with pytest.raises(LimitExceeded, match="layer is over the limit"):
        built(tar + b"junk", Limits(tar_bytes=len(tar)), pieces=100)


def test_a_member_that_could_not_fit_is_refused_before_its_data() -> None:
    with pytest.raises(LimitExceeded, match="b'f0' of 700 bytes is over the layer limit of 1211 bytes"):
        built(tar_of(b"x" * 700)[:512], Limits(tar_bytes=1211))


def test_the_number_of_entries_is_limited() -> None:
    tar = tar_of(b"", b"", b"")
    assert built(tar, Limits(entries=3))[0].entries == 4
    with pytest.raises(LimitExceeded, match="more than 2 entries"):
        built(tar, Limits(entries=2))


def test_names_and_attributes_are_limited_in_bytes() -> None:
    with pytest.raises(LimitExceeded, match="exceed 100 bytes"):
        built(tar_of(b"", b""), Limits(metadata_bytes=100))


def test_xattrs_are_limited_in_bytes() -> None:
    tar = make_tars.PX((b"SCHILY.xattr.user.a", b"v" * 200)) + tar_of(b"")
    assert built(tar)[0].entries == 2
    with pytest.raises(LimitExceeded, match="xattrs of one file exceed 100 bytes"):
        built(tar, Limits(xattr_bytes=100))


@pytest.mark.parametrize("values", [(65531, 65531, 65531, 65490), (65531, 65531, 65531, 65523), (65535,) * 5])
def test_an_opaque_directory_full_of_xattrs_is_written_or_refused(values: tuple[int, ...]) -> None:
    """The mark comes after all checks and takes 20 bytes that the format may not have."""
    records = [(b"SCHILY.xattr.user.%c" % (97 + number), b"v" * size) for number, size in enumerate(values)]
    tar = make_tars.PX(*records) + make_tars.D(b"d") + make_tars.F(b"d/.wh..wh..opq")
    with contextlib.suppress(BlockdevError):
        built(tar)


def test_a_layer_over_what_block_addresses_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = built(tar_of(b"x"))
    blocks = erofs.Superblock.unpack(file[1024:1152]).blocks
    monkeypatch.setattr(layer_writer, "_BLOCKS_MAX", blocks)
    built(tar_of(b"x"))
    monkeypatch.setattr(layer_writer, "_BLOCKS_MAX", blocks - 1)
    with pytest.raises(LimitExceeded, match="2 TiB"):
        built(tar_of(b"x"))
