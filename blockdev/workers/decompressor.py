# SPDX-License-Identifier: Apache-2.0
"""The decompressor program: from one ring into another, its one-line report on standard error.

argv: KIND, the reader's end of the compressed bytes, the writer's of the tar, CPU_SECONDS, PARENT_PID.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from blockdev.formats.compression import Compression, decompress
from blockdev.workers import protocol, sandbox
from blockdev.workers.ring import RingEnd, RingReader, RingWriter

# Windows of zstd frames are bounded at 128 MiB; the rest is the interpreter and its buffers.
_ADDRESS_SPACE_BYTES: Final = 1 << 30


def _work(kind: Compression, compressed: RingReader, tar: RingWriter, status_fd: int) -> dict[str, Any]:
    total = 0
    try:
        for piece in decompress(kind, compressed.read, protocol.PIECE_BYTES):
            tar.write(piece)
            total += len(memoryview(piece))
        tar.close()
    except BrokenPipeError:
        # The builder has given up and says why.
        return {"abandoned": True, **protocol.usage(status_fd)}
    return {"size_bytes": total, **protocol.usage(status_fd)}


def main() -> None:
    kind, compressed_text, tar_text, cpu_seconds, parent_pid = sys.argv[1:]
    compressed_end, tar_end = RingEnd.decode(compressed_text), RingEnd.decode(tar_text)
    status_fd = sandbox.open_status()
    profile = sandbox.decompressor(
        status_fd,
        compressed=compressed_end,
        tar=tar_end,
        address_space_bytes=_ADDRESS_SPACE_BYTES,
        cpu_seconds=int(cpu_seconds),
        report_bytes=protocol.MESSAGE_BYTES_MAX,
    )
    compressed, tar = RingReader(compressed_end), RingWriter(tar_end)  # mapped while that can be done
    protocol.answer(2, profile, int(parent_pid), lambda: _work(Compression(kind), compressed, tar, status_fd))


if __name__ == "__main__":
    main()
