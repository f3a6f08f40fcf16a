# SPDX-License-Identifier: Apache-2.0
"""Media types, magic numbers, and what is the end of a compressed stream and what is not."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable

import pytest
from zstandard import ZstdCompressor

from blockdev.errors import CompressionError, LimitExceeded, UnsupportedError
from blockdev.formats.compression import MEDIA_TYPES, Compression, compression_of, decompress, detect

OCI = "application/vnd.oci.image.layer.v1.tar"
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

# Half of it compresses.
DATA = hashlib.shake_128(b"data").digest(300) + b"text " * 60
PIECES = [1, 2, 3, 7, 64, 1 << 16]


def gz(data: bytes = DATA) -> bytes:
    return gzip.compress(data, mtime=0)


def zst(data: bytes = DATA) -> bytes:
    return ZstdCompressor(write_checksum=True).compress(data)


def skippable(body: bytes, nibble: int = 0) -> bytes:
    return bytes([0x50 | nibble]) + b"\x2a\x4d\x18" + len(body).to_bytes(4, "little") + body


def raw_frame(body: bytes, window_descriptor: int = 0x00) -> bytes:
    """A zstd frame of one raw block, with a window and without a size or checksum (RFC 8878, 3.1.1)."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window_descriptor]) + (len(body) << 3 | 1).to_bytes(3, "little") + body


def unpacked(kind: Compression, stream: bytes, piece_bytes: int = 1 << 16) -> bytes:
    return b"".join(bytes(piece) for piece in decompress(kind, io.BytesIO(stream).read, piece_bytes))


def gunzipped(stream: bytes, piece_bytes: int = 1 << 16) -> bytes:
    return unpacked(Compression.GZIP, stream, piece_bytes)


def unzstded(stream: bytes, piece_bytes: int = 1 << 16) -> bytes:
    return unpacked(Compression.ZSTD, stream, piece_bytes)


def unharmed(kind: Compression, stream: bytes, piece_bytes: int) -> bytes | None:
    """None where the stream is refused."""
    try:
        return unpacked(kind, stream, piece_bytes)
    except CompressionError:
        return None


def refused(kind: Compression, stream: bytes, match: str) -> None:
    for piece_bytes in (1, 5, 1 << 16):
        with pytest.raises(CompressionError, match=match):
            unpacked(kind, stream, piece_bytes)


# --- media types and magic numbers


@pytest.mark.parametrize("base", [OCI, FOREIGN, DOCKER, DOCKER_FOREIGN])
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("", Compression.NONE),
        ("+gzip", Compression.GZIP),
        (".gzip", Compression.GZIP),
        ("+zstd", Compression.ZSTD),
        (".zstd", Compression.ZSTD),
    ],
)
def test_media_types(base: str, suffix: str, kind: Compression) -> None:
    assert compression_of(base + suffix) is kind
    assert len(MEDIA_TYPES) == 20


@pytest.mark.parametrize(
    "media_type",
    ["", "application/octet-stream", OCI.upper(), OCI + "+bzip2", OCI + "+gzip+encrypted", OCI + "+encrypted",
     OCI + " ", OCI + "+gzip;x=y", "application/vnd.oci.image.config.v1+json", "application/vnd.in-toto+json", "gzip"],
)  # fmt: skip
def test_other_media_types_are_refused_by_name(media_type: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        compression_of(media_type)
    assert repr(media_type) in str(caught.value)


def test_a_long_media_type_is_cut_in_the_message() -> None:
    with pytest.raises(UnsupportedError) as caught:
        compression_of("x" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", Compression.NONE),
        (b"\x1f", Compression.NONE),
        (b"\x1f\x8b", Compression.GZIP),
        (b"\x1f\x8c", Compression.NONE),
        (gz(), Compression.GZIP),
        (zst(), Compression.ZSTD),
        (b"\x28\xb5\x2f", Compression.NONE),
        (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
        (b"\x4f\x2a\x4d\x18", Compression.NONE),
        (b"\x60\x2a\x4d\x18", Compression.NONE),
        (b"\x50\x2a\x4d", Compression.NONE),
        (bytes(512), Compression.NONE),
        (b"PK\x03\x04", Compression.NONE),
        (b"BZh9", Compression.NONE),
        (b"\xfd7zXZ\x00", Compression.NONE),
    ],
)
def test_detection_goes_by_magic(head: bytes, kind: Compression) -> None:
    assert detect(head) is kind


@pytest.mark.parametrize("nibble", range(16))
def test_a_stream_that_starts_with_a_skippable_frame_is_zstd(nibble: int) -> None:
    assert detect(skippable(b"note", nibble)) is Compression.ZSTD
    assert unzstded(skippable(b"note", nibble) + zst()) == DATA


@pytest.mark.parametrize("piece_bytes", PIECES)
def test_a_plain_stream_passes_through(piece_bytes: int) -> None:
    assert unpacked(Compression.NONE, DATA, piece_bytes) == DATA
    assert unpacked(Compression.NONE, b"", piece_bytes) == b""


@pytest.mark.parametrize(("kind", "pack"), [(Compression.GZIP, gz), (Compression.ZSTD, zst)])
def test_reads_may_be_shorter_than_asked_for(kind: Compression, pack: Callable[[bytes], bytes]) -> None:
    source = io.BytesIO(pack(DATA) * 3)
    assert b"".join(bytes(p) for p in decompress(kind, lambda size: source.read(min(size, 13)), 1 << 16)) == DATA * 3


# --- gzip


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(200_000)], ids=["empty", "one byte", "data", "zeros"])
def test_gzip(data: bytes, piece_bytes: int) -> None:
    assert gunzipped(gz(data), piece_bytes if len(data) < 1000 else 1 << 12) == data


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("members", [2, 3, 20])
def test_gzip_members_follow_each_other(members: int, piece_bytes: int) -> None:
    stream = b"".join(gz(b"%d" % number) for number in range(members))
    assert gunzipped(stream, piece_bytes) == b"".join(b"%d" % number for number in range(members))


def test_empty_gzip_members_count_for_nothing() -> None:
    assert gunzipped(gz(b"") * 5 + gz() + gz(b"")) == DATA


def gz_with(flags: int) -> bytes:
    """One member with the optional header fields that the flags name (RFC 1952, 2.3.1)."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\x01\x02\x03\x04\x00\xff"
    head += b"\x05\x00extra" * (flags >> 2 & 1) + b"layer.tar\0" * (flags >> 3 & 1) + b"words\0" * (flags >> 4 & 1)
    head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little") * (flags >> 1 & 1)
    return head + gz()[10:]


@pytest.mark.parametrize("flags", range(32))
def test_gzip_headers_have_optional_fields(flags: int) -> None:
    assert gunzipped(gz_with(flags)) == DATA
    assert gunzipped(gz_with(flags) * 2) == DATA * 2


@pytest.mark.parametrize("flags", range(32))
def test_gzip_headers_with_optional_fields_may_come_in_pieces(flags: int) -> None:
    """As they do where a read ends in the header of a later member."""
    assert [size for size in range(1, 40) if unharmed(Compression.GZIP, gz_with(flags), size) != DATA] == []


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("zeros", [1, 2, 63, 512, 5000])
def test_gzip_may_be_padded_with_zeros(zeros: int, piece_bytes: int) -> None:
    assert gunzipped(gz() + bytes(zeros), piece_bytes) == DATA
    assert gunzipped(gz() * 2 + bytes(zeros), piece_bytes) == DATA * 2


@pytest.mark.parametrize(
    "junk",
    [b"j", b"junk", b"\x1f", b"\x1fj", b"\x1f\0", b"\x8b\x1f", b"\0j", bytes(5000) + b"j", b"\0" + gz(), b"\0\x1f",
     bytes(512) + gz(), zst()],
)  # fmt: skip
def test_junk_behind_gzip_is_refused(junk: bytes) -> None:
    refused(Compression.GZIP, gz() + junk, "after the last gzip member")


def test_gzip_that_ends_anywhere_but_behind_a_member_is_truncated() -> None:
    stream = gz(b"truncate me")
    for end in range(1, len(stream)):
        refused(Compression.GZIP, stream[:end], "gzip stream is truncated")
    for end in range(2, len(stream)):
        refused(Compression.GZIP, stream + stream[:end], "gzip stream is truncated")


def test_a_gzip_stream_is_not_empty() -> None:
    refused(Compression.GZIP, b"", "empty where a gzip stream was promised")


@pytest.mark.parametrize("stream", [b"\0", bytes(100), b"junk that is no gzip", DATA, zst(), b"\x1f\x8c" + gz()[2:],
                                    b"\x1f\x8b\x07" + gz()[3:]])  # fmt: skip
def test_what_is_no_gzip_is_corrupt(stream: bytes) -> None:
    refused(Compression.GZIP, stream, "gzip")


def flipped(stream: bytes, at: int) -> bytes:
    return stream[:at] + bytes([stream[at] ^ 0x55]) + stream[at + 1 :]


@pytest.mark.parametrize("piece_bytes", [9, 1 << 16])
def test_every_damaged_byte_of_gzip_is_found_or_does_not_matter(piece_bytes: int) -> None:
    stream = gz()
    found = {at: unharmed(Compression.GZIP, flipped(stream, at), piece_bytes) for at in range(len(stream))}
    assert set(found.values()) <= {None, DATA}
    # Time, compression level and system say nothing about the data.
    assert {at for at, data in found.items() if data} == {4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize("at", [-8, -5, -4, -1])
def test_checksum_and_length_at_the_end_of_gzip_are_compared(at: int) -> None:
    stream = bytearray(gz())
    stream[at] ^= 1
    refused(Compression.GZIP, bytes(stream), "gzip stream is corrupt")
    refused(Compression.GZIP, bytes(stream) + gz(), "gzip stream is corrupt")


# --- zstd


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(200_000)], ids=["empty", "one byte", "data", "zeros"])
def test_zstd(data: bytes, piece_bytes: int) -> None:
    assert unzstded(zst(data), piece_bytes) == data


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("frames", [2, 3, 20])
def test_zstd_frames_follow_each_other(frames: int, piece_bytes: int) -> None:
    stream = b"".join(zst(b"%d" % number) for number in range(frames))
    assert unzstded(stream, piece_bytes) == b"".join(b"%d" % number for number in range(frames))


@pytest.mark.parametrize("piece_bytes", PIECES)
def test_skippable_frames_are_skipped_wherever_they_are(piece_bytes: int) -> None:
    note, empty, long = skippable(b"note", 3), skippable(b""), skippable(bytes(range(256)) * 300, 15)
    assert unzstded(note + zst(b"a") + empty + note + zst(b"b") + long, piece_bytes) == b"ab"
    assert unzstded(empty + zst(b"a") + empty, piece_bytes) == b"a"
    # Its bytes may look like a frame.
    assert unzstded(skippable(zst(b"hidden")) + zst(b"a"), piece_bytes) == b"a"


def test_a_zstd_stream_of_skippable_frames_alone_holds_nothing() -> None:
    """It is none of the empty streams that are refused: its frames are whole."""
    assert unzstded(skippable(b"note")) == b""
    assert unzstded(skippable(b"") * 3, 1) == b""


def test_zstd_frames_need_no_size_and_no_checksum() -> None:
    assert unzstded(raw_frame(b"a") + raw_frame(b"") + raw_frame(b"b" * 1000)) == b"a" + b"b" * 1000
    writer = ZstdCompressor(write_content_size=False).compressobj()
    assert unzstded(writer.compress(DATA) + writer.flush()) == DATA


@pytest.mark.parametrize("piece_bytes", PIECES)
def test_zstd_blocks_may_be_empty_or_runs_of_one_byte(piece_bytes: int) -> None:
    def block(kind: int, size: int, body: bytes, last: int = 0) -> bytes:
        return (size << 3 | kind << 1 | last).to_bytes(3, "little") + body

    head = b"\x28\xb5\x2f\xfd\x00\x38"  # a window of 128 KiB
    empty, data, run = block(0, 0, b""), block(0, 3, b"abc"), block(1, 1000, b"r")
    stream = head + empty * 2 + data + empty + run + empty + data + block(0, 0, b"", last=1)
    assert unzstded(stream, piece_bytes) == b"abc" + b"r" * 1000 + b"abc"
    assert unzstded(stream * 2 + zst(), piece_bytes) == (b"abc" + b"r" * 1000 + b"abc") * 2 + DATA
    assert unzstded(head + data + block(1, 5, b"r", last=1), piece_bytes) == b"abcrrrrr"
    refused(Compression.ZSTD, head + data + block(3, 3, b"abc", last=1), "zstd stream is corrupt")


def test_zstd_that_ends_anywhere_but_behind_a_frame_is_truncated() -> None:
    stream = zst(b"truncate me")
    for end in range(1, len(stream)):
        refused(Compression.ZSTD, stream[:end], "zstd stream is truncated")
        refused(Compression.ZSTD, stream * 2 + stream[:end], "zstd stream is truncated")
        refused(Compression.ZSTD, skippable(b"n") + stream[:end], "zstd stream is truncated")


def test_zstd_of_many_blocks_is_truncated_at_their_borders_too() -> None:
    data = hashlib.shake_128(b"blocks").digest(300_000)
    stream = ZstdCompressor(write_checksum=False, write_content_size=False).compress(data)
    for end in (128 * 1024 + 6, 128 * 1024 + 9, len(stream) - 1):
        with pytest.raises(CompressionError, match="truncated"):
            unzstded(stream[:end], 4096)
    assert unzstded(stream, 4096) == data


def test_a_skippable_frame_that_is_cut_short_is_refused() -> None:
    stream = skippable(b"0123456789")
    for end in range(4, len(stream)):
        refused(Compression.ZSTD, stream[:end], "truncated")
        refused(Compression.ZSTD, zst() + stream[:end], "truncated")
    refused(Compression.ZSTD, b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + bytes(1000), "truncated")


@pytest.mark.parametrize("junk", [b"j", b"junk", b"\0", bytes(512), b"\x28\xb5\x2f", b"\x27\xb5\x2f\xfd", gz(),
                                  b"\x60\x2a\x4d\x18\0\0\0\0"])  # fmt: skip
def test_junk_between_or_behind_zstd_frames_is_refused(junk: bytes) -> None:
    # What is shorter than a magic number might have become one.
    words = "no frame" if len(junk) >= 4 else "truncated"
    refused(Compression.ZSTD, zst() + junk, words)
    refused(Compression.ZSTD, skippable(b"n") + junk, words)
    if len(junk) >= 4:
        refused(Compression.ZSTD, junk + zst(), "no frame")


def test_a_zstd_stream_is_not_empty() -> None:
    refused(Compression.ZSTD, b"", "empty where a zstd stream was promised")


@pytest.mark.parametrize("piece_bytes", [9, 1 << 16])
def test_every_damaged_byte_of_zstd_is_found_or_does_not_matter(piece_bytes: int) -> None:
    stream = zst()
    for at in range(len(stream)):
        assert unharmed(Compression.ZSTD, flipped(stream, at), piece_bytes) in (None, DATA)


@pytest.mark.parametrize("at", [-4, -3, -2, -1])
def test_the_checksum_at_the_end_of_zstd_is_compared(at: int) -> None:
    stream = bytearray(zst())
    stream[at] ^= 1
    refused(Compression.ZSTD, bytes(stream), "zstd stream is corrupt")


def test_a_frame_that_asks_for_a_dictionary_is_refused() -> None:
    refused(Compression.ZSTD, b"\x28\xb5\x2f\xfd\x01\x00\x07\x09\x00\x00x", "zstd stream is corrupt")


def test_windows_over_128_mebibytes_are_refused() -> None:
    # Exponent in the high five bits: 2^(10 + n); eighths of it in the low three.
    assert unzstded(raw_frame(b"a", 17 << 3)) == b"a"
    for descriptor in (17 << 3 | 1, 18 << 3, 21 << 3, 0xFF):
        with pytest.raises((CompressionError, LimitExceeded), match=r"memory|window|parameter"):
            unzstded(raw_frame(b"a", descriptor))


# --- memory


@pytest.mark.parametrize(("kind", "pack"), [(Compression.GZIP, gz), (Compression.ZSTD, zst)])
def test_no_piece_is_larger_than_asked_for(kind: Compression, pack: Callable[[bytes], bytes]) -> None:
    """However little of the stream it takes: a few bytes of it may stand for gigabytes."""
    size, piece_bytes = 16 << 20, 1 << 16
    sizes = [len(piece) for piece in decompress(kind, io.BytesIO(pack(bytes(size))).read, piece_bytes)]
    assert sum(sizes) == size
    assert max(sizes) <= piece_bytes
