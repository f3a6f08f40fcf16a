# SPDX-License-Identifier: Apache-2.0
"""The decompressor program: from one ring into another, its one-line report on stderr. argv: PARAMETERS (JSON)."""

from __future__ import annotations

import sys
from typing import Any, Final

from blockdev.formats.compression import Compression, decompress
from blockdev.workers import protocol
from blockdev.workers.ring import RingReader, RingWriter

# Windows of zstd frames are bounded at 128 MiB; the rest is the interpreter and its buffers.
_ADDRESS_SPACE_BYTES: Final = 1 << 30


def _work(kind: Compression, compressed: RingReader, tar: RingWriter) -> dict[str, Any]:
    total = 0
    try:
        for piece in decompress(kind, compressed.read, protocol.PIECE_BYTES):
            tar.write(piece)
            total += len(memoryview(piece))
        tar.close()
    except BrokenPipeError:
        # The builder has given up and says why.
        return {"abandoned": True, **protocol.usage()}
    return {"size_bytes": total, **protocol.usage()}


def main() -> None:
    parameters = protocol.DecompressorParameters.decode(sys.argv[1])
    protocol.settle(
        parameters.parent_pid,
        address_space_bytes=_ADDRESS_SPACE_BYTES,
        file_size_bytes=protocol.MESSAGE_BYTES_MAX,
    )
    kind, compressed, tar = Compression(parameters.compression), parameters.compressed, parameters.tar
    protocol.answer(2, lambda: _work(kind, RingReader(compressed), RingWriter(tar)))


if __name__ == "__main__":
    main()
