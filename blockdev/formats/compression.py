# SPDX-License-Identifier: Apache-2.0
"""Media types and streaming decompressors. Runs in the decompressor process: the bytes are hostile."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from isal import igzip_lib, isal_zlib
from zstandard import ZstdDecompressor, ZstdError

from blockdev.errors import CompressionError, UnsupportedError
from verity.buffers import Buffer

# The window that RFC 8878 asks every decoder to support is 8 MiB; the zstd tool's default bound is 128 MiB.
_ZSTD_WINDOW_BYTES: Final = 128 << 20
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


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


def _gunzip(read: Callable[[int], bytes], piece_bytes: int) -> Iterator[Buffer]:
    data = read(piece_bytes)
    if not data:
        raise CompressionError("empty where a gzip stream was promised")
    try:
        while data:
            inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            while True:
                out = inflater.decompress(data, piece_bytes)
                if out:
                    yield out
                if inflater.eof:
                    data = inflater.unused_data
                    break
                data = b""
                if inflater.needs_input:
                    data = read(piece_bytes)
                    if not data:
                        raise CompressionError("gzip stream is truncated")
            if not data:
                data = read(piece_bytes)
            if data and not data.startswith(b"\x1f"):
                _only_zeros(data, read, piece_bytes)
                return
            if len(data) == 1:
                data += read(piece_bytes)
            if data and not data.startswith(_GZIP_MAGIC):
                raise CompressionError("bytes after the last gzip member that are no zero padding")
    except (_IsalError, zlib.error) as error:
        raise CompressionError(f"gzip stream is corrupt: {error}") from None


def _only_zeros(data: bytes, read: Callable[[int], bytes], piece_bytes: int) -> None:
    while data:
        if data.count(0) != len(data):
            raise CompressionError("bytes after the last gzip member that are no zero padding")
        data = read(piece_bytes)


def _unzstd(read: Callable[[int], bytes], piece_bytes: int) -> Iterator[Buffer]:
    data = read(piece_bytes)
    if not data:
        raise CompressionError("empty where a zstd stream was promised")
    decoder = ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    source = _Tail(read, data)
    try:
        # One frame at a time: the library alone would take a frame cut short for a clean end.
        while source.peek(4):
            head = source.peek(4)
            if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:
                header = source.take(8)
                if len(header) < 8 or not source.skip(int.from_bytes(header[4:8], "little")):
                    raise CompressionError("zstd skippable frame is truncated")
                continue
            if head != _ZSTD_MAGIC:
                raise CompressionError("bytes between or after zstd frames that are no frame")
            frame = decoder.decompressobj(write_size=piece_bytes)
            while not frame.eof:
                data = source.take_some(piece_bytes)
                if not data:
                    raise CompressionError("zstd stream is truncated")
                out = frame.decompress(data)
                if out:
                    yield out
            source.push_back(frame.unused_data)
    except ZstdError as error:
        raise CompressionError(f"zstd stream is corrupt: {error}") from None


class _Tail:
    """A reader that can look ahead and take bytes back."""

    def __init__(self, read: Callable[[int], bytes], data: bytes) -> None:
        self._read, self._data = read, data

    def peek(self, size: int) -> bytes:
        while len(self._data) < size:
            more = self._read(1 << 16)
            if not more:
                break
            self._data += more
        return self._data[:size]

    def take(self, size: int) -> bytes:
        out = self.peek(size)
        self._data = self._data[len(out) :]
        return out

    def take_some(self, size: int) -> bytes:
        if self._data:
            out, self._data = self._data, b""
            return out
        return self._read(size)

    def skip(self, size: int) -> bool:
        while size:
            data = self.take_some(min(size, 1 << 16))
            if not data:
                return False
            if len(data) > size:
                self.push_back(data[size:])
                return True
            size -= len(data)
        return True

    def push_back(self, data: bytes) -> None:
        self._data = data + self._data
