# SPDX-License-Identifier: Apache-2.0
"""A very large layer as a small blob: one file of zeros, and a twentieth of the size that cannot be compressed.

argv: DIRECTORY SIZE; makes `blob`, zstd, and `done` with its digest and its diff ID."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import zstandard

_PIECE: Final = 8 << 20


def tar(size: int) -> Iterator[bytes]:
    """In pieces."""
    noise, zeros = size // 20, size - size // 20
    random = os.urandom(_PIECE)
    for name, length, piece in (("zeros", zeros, bytes(_PIECE)), ("noise", noise, random)):
        member = tarfile.TarInfo(name)
        member.size = length
        yield member.tobuf(tarfile.GNU_FORMAT)  # which has numbers for more than 8 GiB
        for at in range(0, length, _PIECE):
            # No two pieces are the same.
            varied = (
                piece
                if name == "zeros"
                else at.to_bytes(8, "big") + hashlib.shake_128(at.to_bytes(8, "big")).digest(_PIECE - 8)
            )
            yield varied[: min(_PIECE, length - at)]
        yield bytes(-length % 512)
    yield bytes(1024)


class _Hashing:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def main() -> None:
    directory, size = Path(sys.argv[1]), int(sys.argv[2])
    plain, out = hashlib.sha256(), _Hashing(directory / "blob")
    with zstandard.ZstdCompressor(level=1, threads=-1).stream_writer(out, closefd=False) as writer:  # type: ignore[arg-type]
        for piece in tar(size):
            plain.update(piece)
            writer.write(piece)
    out.close()
    (directory / "done").write_text(f"sha256:{out.sha256.hexdigest()} sha256:{plain.hexdigest()}")


if __name__ == "__main__":
    main()
