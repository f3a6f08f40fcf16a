# SPDX-License-Identifier: Apache-2.0
"""Media types, streaming decompressors and compressors. Runs in processes of its own: the bytes are hostile."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final, Protocol, cast

from isal import igzip_lib, isal_zlib
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError

from blockdev.errors import CompressionError, LimitExceeded, UnsupportedError
from verity.buffers import Buffer

# The window that RFC 8878 asks every decoder to support is 8 MiB; the zstd tool's default bound is 128 MiB.
_ZSTD_WINDOW_BYTES: Final = 128 << 20
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_READ_BYTES: Final = 256 << 10
_FIRST_INPUT_BYTES: Final = 16 << 10
_NO_MEMBER: Final = "bytes before or after the last gzip member that are no zero padding"
# RFC 1952, 2.3.1
_FHCRC: Final = 2
_FEXTRA: Final = 4
_FNAME: Final = 8
_FCOMMENT: Final = 16


# The library's stubs declare an instance where the class is.
_IsalError: Final[type[Exception]] = isal_zlib.error  # type: ignore[assignment]


class Compression(enum.StrEnum):
    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_LAYER_TYPES: Final = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_SUFFIXES: Final = {
    "": Compression.NONE,
    "+gzip": Compression.GZIP,
    ".gzip": Compression.GZIP,
    "+zstd": Compression.ZSTD,
    ".zstd": Compression.ZSTD,
}
MEDIA_TYPES: Final = {base + suffix: kind for base in _LAYER_TYPES for suffix, kind in _SUFFIXES.items()}


def compression_of(media_type: str) -> Compression:
    """Raises UnsupportedError for anything but a tar layer, plain, gzip or zstd."""
    try:
        return MEDIA_TYPES[media_type]
    except KeyError:
        raise UnsupportedError(f"media type {media_type[:200]!r} is no tar layer, plain, gzip or zstd") from None


class Compressor(Protocol):
    def compress(self, data: Buffer, /) -> bytes: ...
    def flush(self) -> bytes:
        """The rest; called once."""


# The default levels of both tools.
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3


def compressor(kind: Compression) -> Compressor | None:
    """None for no compression. Equal bytes in give equal bytes out, by one version of zlib or libzstd.

    Not ISA-L, which chooses its matches by the processor that it runs on.
    """
    if kind is Compression.GZIP:
        # One member, without name and time (RFC 1952: MTIME 0).
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    if kind is Compression.ZSTD:
        return ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    return None


def detect(head: bytes) -> Compression:
    """By magic, for files that come without a media type."""
    if head.startswith(_GZIP_MAGIC):
        return Compression.GZIP
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == b"\x2a\x4d\x18" and head[:1] in b"PQRSTUVWXYZ[\\]^_"):
        return Compression.ZSTD
    return Compression.NONE


def decompress(kind: Compression, read: Callable[[int], bytes], piece_bytes: int) -> Iterator[Buffer]:
    """Pieces of the uncompressed stream. Raises CompressionError.

    gzip: any number of members, zero padding after the last (RFC 1952; tar pads to its record).
    zstd: any number of frames, skippable ones among them (RFC 8878).
    """
    if kind is Compression.GZIP:
        return _gunzip(read, piece_bytes)
    if kind is Compression.ZSTD:
        return _unzstd(read, piece_bytes)
    return iter(lambda: read(piece_bytes), b"")


class _Source:
    """Bytes of a stream in pieces of the caller's choice. Raises CompressionError at its end."""

    def __init__(self, read: Callable[[int], bytes], kind: Compression) -> None:
        self._read, self._kind = read, kind
        self._data, self._at = b"", 0

    def ended(self) -> bool:
        if self._at == len(self._data):
            self._data, self._at = self._read(_READ_BYTES), 0
        return not self._data

    def some(self, size: int) -> bytes:
        """1 to `size` bytes."""
        if self.ended():
            raise CompressionError(f"{self._kind} stream is truncated")
        out = self._data[self._at : self._at + size]
        self._at += len(out)
        return out

    def take(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            out += self.some(size - len(out))
        return out

    def give_back(self, size: int) -> None:
        """The last `size` bytes of what `some` returned last."""
        self._at -= size


def _gunzip(read: Callable[[int], bytes], piece_bytes: int) -> Iterator[Buffer]:
    source = _Source(read, Compression.GZIP)
    if source.ended():
        raise CompressionError("empty where a gzip stream was promised")
    first = source.take(1)
    try:
        while True:
            _gzip_header(first, source)
            inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR_VER)
            # A member may be tiny, and what is behind it is copied each time: more and more at once.
            size = _FIRST_INPUT_BYTES
            while not inflater.eof:
                data = b""
                if inflater.needs_input:
                    data = source.some(size)
                    size = min(4 * size, _READ_BYTES)
                if out := inflater.decompress(data, piece_bytes):
                    yield out
            source.give_back(len(inflater.unused_data))
            if source.ended():
                return
            first = source.take(1)
            if first == b"\0":
                _only_zeros(source)
                return
            if source.ended():
                raise CompressionError(_NO_MEMBER)
    except (_IsalError, zlib.error) as error:
        raise CompressionError(f"gzip stream is corrupt: {error}") from None


def _gzip_header(first: bytes, source: _Source) -> None:
    """RFC 1952, 2.3; `first`: its first byte. The library would want all of it in one buffer."""
    fixed = first + source.take(1)
    if fixed != _GZIP_MAGIC:
        raise CompressionError(_NO_MEMBER)
    fixed += source.take(8)
    method, flags = fixed[2], fixed[3]
    if method != 8:
        raise CompressionError(f"gzip member of compression method {method}, which is not deflate")
    crc = zlib.crc32(fixed)

    def text(crc: int) -> int:
        while True:
            data = source.some(_FIRST_INPUT_BYTES)
            end = data.find(b"\0") + 1
            if end:
                source.give_back(len(data) - end)
                return zlib.crc32(data[:end], crc)
            crc = zlib.crc32(data, crc)

    if flags & _FEXTRA:
        size = source.take(2)
        crc = zlib.crc32(source.take(int.from_bytes(size, "little")), zlib.crc32(size, crc))
    if flags & _FNAME:
        crc = text(crc)
    if flags & _FCOMMENT:
        crc = text(crc)
    if flags & _FHCRC and int.from_bytes(source.take(2), "little") != crc & 0xFFFF:
        raise CompressionError("gzip stream is corrupt: a member's header has a wrong checksum")


def _only_zeros(source: _Source) -> None:
    while not source.ended():
        data = source.some(_READ_BYTES)
        if data.count(0) != len(data):
            raise CompressionError(_NO_MEMBER)


def _unzstd(read: Callable[[int], bytes], piece_bytes: int) -> Iterator[Buffer]:
    source = _Source(read, Compression.ZSTD)
    if source.ended():
        raise CompressionError("empty where a zstd stream was promised")
    frames = _ZstdFrames(source)
    decoder = ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    try:
        while frames.next():
            # Pulled, not pushed: four compressed bytes may stand for 128 KiB, and only a pull bounds what comes.
            file = cast(IO[bytes], frames)  # of which only `read` is used
            size = 0
            with decoder.stream_reader(file, read_size=piece_bytes, closefd=False) as frame:
                while out := frame.read(piece_bytes):
                    size += len(out)
                    yield out
            if frames.content_bytes not in (None, size):
                raise CompressionError(f"zstd stream is corrupt: a frame of {frames.content_bytes} bytes has {size}")
            if not frames.ended:
                raise CompressionError("zstd stream is corrupt: a frame goes on behind its content")
    except ZstdError as error:
        if "too much memory" in str(error):
            raise LimitExceeded(f"zstd frame with a window over {_ZSTD_WINDOW_BYTES} bytes") from None
        raise CompressionError(f"zstd stream is corrupt: {error}") from None


class _ZstdFrames:
    """The stream cut into its frames (RFC 8878, 3.1), skippable ones left out; `read` ends with each of them.

    The library takes a frame cut short for a clean end, and does not say where one ends: so their
    headers and those of their blocks, three bytes each, are followed here. What is in them is the
    library's to judge.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._head = b""  # a frame's header, on its way to the reader
        self._left = 0  # bytes until the next block header, or until the frame's end
        self._last = self._checksum = False
        self.content_bytes: int | None = None  # as the frame's header has it; not all do

    @property
    def ended(self) -> bool:
        return self._last and not self._left and not self._head

    def next(self) -> bool:
        """Go to the next frame; False at the end of the stream."""
        source = self._source
        while True:
            if source.ended():
                return False
            magic = source.take(4)
            if magic[1:] != b"\x2a\x4d\x18" or magic[0] >> 4 != 5:
                break
            size = int.from_bytes(source.take(4), "little")
            while size:
                size -= len(source.some(size))
        if magic != _ZSTD_MAGIC:
            raise CompressionError("bytes before, between or after zstd frames that are no frame")
        (descriptor,) = source.take(1)
        single = descriptor >> 5 & 1
        before = (1 - single) + (0, 1, 2, 4)[descriptor & 3]
        field_bytes = (single, 2, 4, 8)[descriptor >> 6]
        header = source.take(before + field_bytes)
        # A field of two bytes counts from 256 (RFC 8878, 3.1.1.1.4).
        value = int.from_bytes(header[before:], "little") + (256 if field_bytes == 2 else 0)
        self.content_bytes = value if field_bytes else None
        self._checksum = bool(descriptor & 4)
        self._head = magic + bytes((descriptor,)) + header
        self._left, self._last = 0, False
        return True

    def read(self, size: int) -> bytes:
        """At most `size` bytes of the frame; b"" at its end. Raises CompressionError where the stream ends first."""
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        if self.ended:
            return b""
        if not self._left:
            header = self._source.take(3)
            value = int.from_bytes(header, "little")
            kind, content = value >> 1 & 3, value >> 3
            self._last = bool(value & 1)
            # A run of one byte is stored as that byte.
            self._left = (1 if kind == 1 else content) + (4 if self._last and self._checksum else 0)
            return header
        out = self._source.some(min(size, self._left))
        self._left -= len(out)
        return out
