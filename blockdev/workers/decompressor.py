# SPDX-License-Identifier: Apache-2.0
"""The decompressor program: stdin → stdout, its one-line report on stderr. argv: KIND PARENT_PID."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from blockdev.formats.compression import Compression, decompress
from blockdev.workers import protocol

# Windows of zstd frames are bounded at 128 MiB; the rest is the interpreter and its buffers.
_ADDRESS_SPACE_BYTES: Final = 1 << 30


def _work(kind: Compression) -> dict[str, Any]:
    total = 0
    for piece in decompress(kind, lambda size: os.read(0, size), protocol.PIECE_BYTES):
        view = memoryview(piece)
        total += len(view)
        while view:
            try:
                view = view[os.write(1, view) :]
            except BrokenPipeError:
                # The builder has given up and says why.
                return {"abandoned": True, **protocol.usage()}
    return {"size_bytes": total, **protocol.usage()}


def main() -> None:
    kind, parent_pid = sys.argv[1:]
    protocol.settle(
        int(parent_pid), address_space_bytes=_ADDRESS_SPACE_BYTES, file_size_bytes=protocol.MESSAGE_BYTES_MAX
    )
    protocol.answer(2, lambda: _work(Compression(kind)))


if __name__ == "__main__":
    main()
