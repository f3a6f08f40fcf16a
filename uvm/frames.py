# SPDX-License-Identifier: Apache-2.0
"""What the guest says over its virtio-serial port: frames of one byte type, four bytes length (little-endian), payload.

The guest runs what an image brings, so its bytes are hostile to the host: a frame has a bound, a type is known, a
text is shown with its odd characters replaced.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from uvm.errors import MachineError

_HEAD: Final = struct.Struct("<BI")
PAYLOAD_BYTES_MAX: Final = 32 << 10


class Kind(enum.Enum):
    """uvm/init/report.h has the payloads."""

    PHASE = ord("P")
    LAYER = ord("L")
    STDOUT = ord("O")
    STDERR = ord("E")
    EXIT = ord("X")
    REFUSED = ord("R")
    KERNEL = ord("K")
    DONE = ord("D")


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    payload: bytes

    @property
    def text(self) -> str:
        shown = self.payload.decode("utf-8", "replace")
        return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown)


class Decoder:
    """Pieces of the stream in, whole frames out."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Raises MachineError for what is no frame."""
        self._pending += piece
        while len(self._pending) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._pending)
            if size > PAYLOAD_BYTES_MAX:
                raise MachineError(f"the guest sent a frame of {size} bytes")
            if len(self._pending) < _HEAD.size + size:
                return
            try:
                known = Kind(kind)
            except ValueError:
                raise MachineError(f"the guest sent a frame of the unknown type {kind}") from None
            payload = bytes(self._pending[_HEAD.size : _HEAD.size + size])
            del self._pending[: _HEAD.size + size]
            yield Frame(known, payload)
