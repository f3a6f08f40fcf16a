# SPDX-License-Identifier: Apache-2.0
"""A tar taken apart into file data, which goes to whole blocks, and all the rest, from which it is put together again.

docs/formats.md, "The format `erofs-4k`", has the bytes. `TarSplitter` is the writer's half; `tar_runs` is the
reader's, which takes every byte for hostile.
"""

from __future__ import annotations

import re
import sys
import zlib
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from blockdev.errors import FormatError
from blockdev.formats.file_tree import Inode
from blockdev.formats.tar import RECORD_BYTES
from verity.buffers import Buffer, ReadAt
from verity.spool import SpooledBytes

BLOCK_BYTES: Final = 4096
# A longer end of a file has a block of its own: behind an inode at a multiple of 64 there is always room for this.
TAIL_BYTES_MAX: Final = BLOCK_BYTES - 64
TAIL_ENTRY_BYTES: Final = 8

_LITERAL, _ZEROS, _BLOCKS, _TAIL = range(4)
_OPERATION_BITS: Final = 2
_ZEROS_LEFT_OUT: Final = re.compile(rb"\0{8,}")
_SIZES_MAX: Final = {_LITERAL: RECORD_BYTES, _ZEROS: RECORD_BYTES, _TAIL: TAIL_BYTES_MAX}
_NUMBER_BITS_MAX: Final = 63
_READ_BYTES: Final = 1 << 16
_CHUNK_BYTES: Final = 1 << 20


def tail_bytes(size_bytes: int) -> int:
    """How much of a file's end is not in its blocks."""
    tail = size_bytes % BLOCK_BYTES
    return tail if tail <= TAIL_BYTES_MAX else 0


@dataclass(frozen=True, slots=True)
class Split:
    """Where the pieces of the tar are: file data up to `index_offset_bytes`, then from `offset_bytes` on the tails
    that no file has, the places of all tails, and the instructions. Sizes and offsets in bytes, in the layer file."""

    tar_size_bytes: int
    data_offset_bytes: int
    index_offset_bytes: int
    offset_bytes: int
    lost_bytes: int
    tails: int
    instruction_bytes: int

    @property
    def tails_offset_bytes(self) -> int:
        return self.offset_bytes + self.lost_bytes

    @property
    def instructions_offset_bytes(self) -> int:
        return self.tails_offset_bytes + TAIL_ENTRY_BYTES * self.tails

    @property
    def end_bytes(self) -> int:
        return self.instructions_offset_bytes + self.instruction_bytes


class TarSplitter:
    """`feed` it the tar, and by `member` where there is file data in it, before that is fed; then `finish`.

    Then it is the `Contents` of a metadata writer, and writes the rest. What waits for the end, tails and
    instructions, is in stores; in memory are 32 bytes for each file.
    """

    def __init__(self, data_offset_bytes: int, tails: SpooledBytes, instructions: SpooledBytes) -> None:
        self._tails, self._instructions = tails, instructions
        self._data_offset = self._place = data_offset_bytes
        self._offset = 0  # of the next byte to be fed, in the tar
        self._coming: deque[tuple[int, int]] = deque()  # data that is still to come: offset in the tar, size
        # Of each file's data: where it begins in the tar, where its blocks are, and its tail among the tails.
        self._starts, self._places, self._tail_starts = array("Q"), array("Q"), array("Q")
        self._blocks_left = self._fill = self._tail_left = 0
        self._record = bytearray()  # of the rest, as far as it has come
        self._checksum = 0  # of all but the blocks, in the order of the tar
        self._tail_places = array("Q")  # in the layer file, by file; 0: none yet

    def member(self, offset_bytes: int, size_bytes: int) -> None:
        if size_bytes:
            self._coming.append((offset_bytes, size_bytes))

    def feed(self, data: Buffer) -> Buffer:
        """What of it is written to the file next: blocks, of large files without a copy."""
        view = memoryview(data)
        out: list[Buffer] = []
        position, end = 0, len(view)
        while position < end:
            if self._blocks_left:
                stop = min(end, position + self._blocks_left)
                out.append(view[position:stop])
                self._blocks_left -= stop - position
                if not self._blocks_left and self._fill:
                    out.append(bytes(self._fill))
            elif self._tail_left:
                stop = min(end, position + self._tail_left)
                self._tail_left -= stop - position
                self._tails.append(view[position:stop])
                self._checksum = zlib.crc32(view[position:stop], self._checksum)
            else:
                stop = min(end, self._coming[0][0] - self._offset) if self._coming else end
                self._keep(view[position:stop], self._offset + position)
                if self._coming and self._offset + stop == self._coming[0][0]:
                    self._begin(*self._coming.popleft())
            position = stop
        self._offset += end
        return out[0] if len(out) == 1 else b"".join(out)

    def _begin(self, start: int, size: int) -> None:
        tail = tail_bytes(size)
        blocks = size - tail
        self._starts.append(start)
        self._places.append(self._place)
        self._tail_starts.append(len(self._tails))
        self._blocks_left, self._tail_left, self._fill = blocks, tail, -blocks % BLOCK_BYTES
        self._place += blocks + self._fill
        self._instructions.append(
            (_instruction(_BLOCKS, blocks) if blocks else b"") + (_instruction(_TAIL, tail) if tail else b"")
        )

    def _keep(self, data: memoryview, offset: int) -> None:
        """Some of the rest; `offset`: in the tar, at whose multiples of 512 it is cut."""
        self._checksum = zlib.crc32(data, self._checksum)
        position, end = 0, len(data)
        while position < end:
            stop = min(end, position + RECORD_BYTES - (offset + position) % RECORD_BYTES)
            self._record += data[position:stop]
            if not (offset + stop) % RECORD_BYTES:
                self._flush()
            position = stop

    def _flush(self) -> None:
        record, out, at = bytes(self._record), bytearray(), 0
        self._record.clear()
        for zeros in _ZEROS_LEFT_OUT.finditer(record):
            if zeros.start() > at:
                out += _instruction(_LITERAL, zeros.start() - at) + record[at : zeros.start()]
            at = zeros.end()
            out += _instruction(_ZEROS, at - zeros.start())
        if at < len(record):
            out += _instruction(_LITERAL, len(record) - at) + record[at:]
        self._instructions.append(out)

    def finish(self) -> None:
        """The end of the tar."""
        self._flush()
        self._tail_places = array("Q", bytes(8 * len(self._starts)))

    def _file(self, node: Inode) -> int:
        return bisect_left(self._starts, node.tar_offset_bytes)

    def _tail(self, file: int) -> bytes:
        end = self._tail_starts[file + 1] if file + 1 < len(self._starts) else len(self._tails)
        return self._tails.read(self._tail_starts[file], end)

    def tail_bytes(self, node: Inode) -> int:
        return tail_bytes(node.size_bytes)

    def block(self, node: Inode) -> int:
        return self._places[self._file(node)] // BLOCK_BYTES if node.size_bytes > self.tail_bytes(node) else 0

    def tail(self, node: Inode, offset_bytes: int) -> bytes:
        file = self._file(node)
        self._tail_places[file] = offset_bytes
        return self._tail(file)

    def write(self, write: Callable[[Buffer], object], index_offset_bytes: int, offset_bytes: int) -> Split:
        """What stands behind the index, at `offset_bytes`, once that has all tails that it takes."""
        lost, table = 0, array("Q")
        for file, place in enumerate(self._tail_places):
            tail = b"" if place else self._tail(file)
            if tail:
                write(tail)
                place = offset_bytes + lost
                lost += len(tail)
            if place:
                table.append(place)
        if sys.byteorder == "big":
            table.byteswap()
        write(table.tobytes())
        for piece in self._instructions.chunks(_CHUNK_BYTES):
            write(piece)
        return Split(
            self._offset, self._data_offset, index_offset_bytes, offset_bytes, lost, len(table), len(self._instructions)
        )  # fmt: skip

    def check(self, split: Split, read_at: ReadAt) -> None:
        """Whether the tar comes back from what was written. Raises FormatError.

        Blocks were written as they came; here their number and places are checked, and all else by its bytes.
        """
        checksum, place = 0, self._data_offset
        for run in tar_runs(split, read_at):
            if isinstance(run, bytes):
                checksum = zlib.crc32(run, checksum)
            elif run.tail:
                checksum = zlib.crc32(exactly(read_at, run.offset_bytes, run.size_bytes), checksum)
            else:
                place = run.offset_bytes + run.size_bytes
        if checksum != self._checksum or place + -place % BLOCK_BYTES != self._place:
            raise FormatError("the tar would not come back from this layer file")


def _instruction(operation: int, size: int) -> bytes:
    """Little-endian base 128 (LEB128) of the size and, in the lowest bits, the operation."""
    value = size << _OPERATION_BITS | operation
    if value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_BYTES: Final = [bytes((value,)) for value in range(0x80)]


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the tar that are in the layer file as they are. `tail`: the end of a file, apart from its blocks."""

    offset_bytes: int
    size_bytes: int
    tail: bool = False


def tar_runs(split: Split, read_at: ReadAt) -> Iterator[Run | bytes]:
    """The pieces of the tar in their order: bytes, or where they are. Raises FormatError."""
    instructions = _Source(read_at, split.instructions_offset_bytes, split.instruction_bytes)
    table = _Source(read_at, split.tails_offset_bytes, TAIL_ENTRY_BYTES * split.tails)
    left, place = split.tar_size_bytes, split.data_offset_bytes
    while not instructions.ended:
        value = instructions.number()
        operation, size = value & (1 << _OPERATION_BITS) - 1, value >> _OPERATION_BITS
        if not 0 < size <= left or size > _SIZES_MAX.get(operation, size):
            raise FormatError(f"the tar has no piece of {size} bytes")
        left -= size
        if operation == _LITERAL:
            yield instructions.take(size)
        elif operation == _ZEROS:
            yield bytes(size)
        elif operation == _BLOCKS:
            if size > split.index_offset_bytes - place:
                raise FormatError("the tar has more file data than the layer file")
            yield Run(place, size)
            place += size + -size % BLOCK_BYTES
        else:
            offset = int.from_bytes(table.take(TAIL_ENTRY_BYTES), "little")
            if not split.index_offset_bytes <= offset <= split.tails_offset_bytes - size:
                raise FormatError("the end of a file lies outside the index")
            yield Run(offset, size, tail=True)
    if left or not table.ended or place != split.index_offset_bytes:
        raise FormatError("the pieces of the tar are not all that the layer file has")


class _Source:
    """Bytes of the layer file, front to back. Raises FormatError at the end."""

    def __init__(self, read_at: ReadAt, offset_bytes: int, size_bytes: int) -> None:
        self._read_at, self._offset, self._end = read_at, offset_bytes, offset_bytes + size_bytes
        self._piece, self._at = b"", 0

    @property
    def ended(self) -> bool:
        return self._offset == self._end and self._at == len(self._piece)

    def take(self, size: int) -> bytes:
        if size > len(self._piece) - self._at:
            wanted = min(_READ_BYTES, self._end - self._offset)
            self._piece = self._piece[self._at :] + exactly(self._read_at, self._offset, wanted)
            self._at = 0
            self._offset += wanted
            if size > len(self._piece):
                raise FormatError("the pieces of the tar are cut short")
        self._at += size
        return self._piece[self._at - size : self._at]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if not byte and shift:
                    raise FormatError("a number with needless bytes")
                return value
            shift += 7
            if shift > _NUMBER_BITS_MAX:
                raise FormatError("a number of more than 64 bits")


def exactly(read_at: ReadAt, offset: int, size: int) -> bytes:
    data = read_at(offset, size)
    if len(data) != size:
        raise FormatError(f"layer file ends at byte {offset + len(data)}")
    return data
