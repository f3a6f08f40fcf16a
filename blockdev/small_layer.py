# SPDX-License-Identifier: Apache-2.0
"""Layer files of what is small and known here, an empty tar or a chain's table: without processes of their own."""

from __future__ import annotations

import hashlib
import os

from blockdev.formats.layer_file import Format
from blockdev.formats.layer_writer import BuiltLayer, LayerWriter
from blockdev.formats.limits import Limits
from verity.buffers import Buffer
from verity.hasher import LeafStore


def write_layer(fd: int, content: bytes, layer_format: Format) -> BuiltLayer:
    """A small layer file, of a tar or of a chain's table, into an empty file. Raises OSError, BlockdevError."""
    offset = layer_format.head_bytes

    def write(data: Buffer) -> None:
        nonlocal offset
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            offset += written
            view = view[written:]

    def write_head(data: bytes) -> None:
        if os.pwrite(fd, data, 0) != len(data):
            raise OSError("short write of the head")

    writer = LayerWriter(
        layer_format, write=write, write_head=write_head, leaves=LeafStore(), limits=Limits(),
        read_back=lambda at, size: os.pread(fd, size, at),
    )  # fmt: skip
    writer.feed(content)
    return writer.finish(hashlib.sha256(content).digest())
