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
_OPERATION_MASK: Final = (1 << _OPERATION_BITS) - 1
_ZEROS_LEFT_OUT: Final = re.compile(rb"(\0{8,})")
_SIZES_MAX: Final = {_LITERAL: RECORD_BYTES, _ZEROS: RECORD_BYTES, _TAIL: TAIL_BYTES_MAX}
_NUMBER_BITS_MAX: Final = 63
_INSTRUCTION_BYTES_MAX: Final = RECORD_BYTES + 10
_READ_BYTES: Final = 1 << 16
_NEAR_BYTES: Final = 1 << 14
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
        self._blocks_left = self._fill = self._tail_left = self._tails_bytes = 0
        self._record = b""  # of the rest, as far as it has come
        self._checksum = 0  # of all but the blocks, in the order of the tar
        self._tail_places = array("Q")  # in the layer file, by file; 0: none yet
        self._said: list[bytes] = []  # instructions that are not in their store yet

    def member(self, offset_bytes: int, size_bytes: int) -> None:
        if size_bytes:
            self._coming.append((offset_bytes, size_bytes))

    def feed(self, data: Buffer) -> Buffer:
        """What of it is written to the file next: blocks, of large files without a copy."""
        view, coming = memoryview(data), self._coming
        blocks, tails = list[Buffer](), list[Buffer]()
        offset, position, end = self._offset, 0, len(view)
        while position < end:
            if self._blocks_left:
                stop = min(end, position + self._blocks_left)
                blocks.append(view[position:stop])
                self._blocks_left -= stop - position
                if not self._blocks_left and self._fill:
                    blocks.append(bytes(self._fill))
            elif self._tail_left:
                stop = min(end, position + self._tail_left)
                self._tail_left -= stop - position
                tails.append(view[position:stop])
                self._checksum = zlib.crc32(view[position:stop], self._checksum)
            else:
                stop = min(end, coming[0][0] - offset) if coming else end
                self._keep(bytes(view[position:stop]), offset + position)
                if coming and offset + stop == coming[0][0]:
                    self._begin(*coming.popleft())
            position = stop
        self._offset += end
        self._tails.append(b"".join(tails))
        self._instructions.append(b"".join(self._said))
        self._said.clear()
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def _begin(self, start: int, size: int) -> None:
        tail = tail_bytes(size)
        blocks = size - tail
        self._starts.append(start)
        self._places.append(self._place)
        self._tail_starts.append(self._tails_bytes)
        self._blocks_left, self._tail_left = blocks, tail
        self._tails_bytes += tail
        if blocks:
            self._fill = -blocks % BLOCK_BYTES
            self._place += blocks + self._fill
            self._said.append(_instruction(_BLOCKS, blocks))
        if tail:
            self._said.append(_instruction(_TAIL, tail))

    def _keep(self, data: bytes, offset: int) -> None:
        """Some of the rest; `offset`: in the tar, at whose multiples of 512 it is cut."""
        self._checksum = zlib.crc32(data, self._checksum)
        stop = RECORD_BYTES - offset % RECORD_BYTES
        if self._record:
            data = self._record + data
            stop += len(self._record)
        start = 0
        while stop <= len(data):
            self._say(data[start:stop])
            start, stop = stop, stop + RECORD_BYTES
        self._record = data[start:]

    def _say(self, record: bytes) -> None:
        """Instructions for some of the rest, 512 bytes at the most."""
        said = self._said
        zeros = False
        for part in _ZEROS_LEFT_OUT.split(record):
            if zeros:
                said.append(_ZEROS_BY_SIZE[len(part)])
            elif part:
                said.append(_LITERALS_BY_SIZE[len(part)])
                said.append(part)
            zeros = not zeros

    def finish(self) -> None:
        """The end of the tar."""
        self._say(self._record)
        self._instructions.append(b"".join(self._said))
        self._tail_places = array("Q", bytes(8 * len(self._starts)))
        self._waiting = _Near(self._tails.read, len(self._tails))

    def _tail(self, file: int) -> bytes:
        end = self._tail_starts[file + 1] if file + 1 < len(self._starts) else self._tails_bytes
        return self._waiting.read(self._tail_starts[file], end)

    def tail_bytes(self, node: Inode) -> int:
        return tail_bytes(node.size_bytes)

    def take(self, node: Inode, tail_offset_bytes: int) -> tuple[int, bytes]:
        file, tail = bisect_left(self._starts, node.tar_offset_bytes), tail_bytes(node.size_bytes)
        block = self._places[file] // BLOCK_BYTES if node.size_bytes > tail else 0
        if not tail:
            return block, b""
        self._tail_places[file] = tail_offset_bytes
        return block, self._tail(file)

    def write(self, write: Callable[[Buffer], object], index_offset_bytes: int, offset_bytes: int) -> Split:
        """What stands behind the index, at `offset_bytes`, once that has all tails that it takes."""
        lost, table = 0, array("Q")
        for file, place in enumerate(self._tail_places):
            if not place:
                tail = self._tail(file)
                if not tail:
                    continue
                write(tail)
                place = offset_bytes + lost
                lost += len(tail)
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
        written = _Near(lambda start, end: read_at(start, end - start), split.end_bytes)
        for run in tar_runs(split, read_at):
            if isinstance(run, bytes):
                checksum = zlib.crc32(run, checksum)
            elif run.tail:
                checksum = zlib.crc32(written.read(run.offset_bytes, run.offset_bytes + run.size_bytes), checksum)
            else:
                place = run.offset_bytes + run.size_bytes
        if checksum != self._checksum or place + -place % BLOCK_BYTES != self._place:
            raise FormatError("the tar would not come back from this layer file")


class _Near:
    """Reads a few bytes here and there, mostly not far from the last ones."""

    def __init__(self, read: Callable[[int, int], bytes], end_bytes: int) -> None:
        self._read, self._end = read, end_bytes
        self._start, self._piece = 0, b""

    def read(self, start: int, end: int) -> bytes:
        at = start - self._start
        if at < 0 or end - self._start > len(self._piece):
            self._start, at = start, 0
            self._piece = self._read(start, min(max(end, start + _NEAR_BYTES), self._end))
        return self._piece[at : at + end - start]


def _instruction(operation: int, size: int) -> bytes:
    """Little-endian base 128 (LEB128) of the size and, in the lowest bits, the operation."""
    value, out = size << _OPERATION_BITS | operation, bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_LITERALS_BY_SIZE: Final = [_instruction(_LITERAL, size) for size in range(RECORD_BYTES + 1)]
_ZEROS_BY_SIZE: Final = [_instruction(_ZEROS, size) for size in range(RECORD_BYTES + 1)]


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the tar that are in the layer file as they are. `tail`: the end of a file, apart from its blocks."""

    offset_bytes: int
    size_bytes: int
    tail: bool = False


def tar_runs(split: Split, read_at: ReadAt) -> Iterator[Run | bytes]:
    """The pieces of the tar in their order: bytes, or where they are. Raises FormatError."""
    left, place = split.tar_size_bytes, split.data_offset_bytes
    places = _tail_places(split, read_at)
    offset, end = split.instructions_offset_bytes, split.end_bytes
    piece, at, kept = b"", 0, bytearray()
    while offset < end:
        size = min(_READ_BYTES, end - offset)
        piece, at = piece[at:] + exactly(read_at, offset, size), 0
        offset += size
        # What begins in front of `stop` is whole, or the last one.
        stop = len(piece) if offset == end else len(piece) - _INSTRUCTION_BYTES_MAX
        while at < stop:
            value = piece[at]
            at += 1
            if value >= 0x80:
                if at < len(piece) and 0 < piece[at] < 0x80:
                    value = value & 0x7F | piece[at] << 7
                    at += 1
                else:
                    value, at = _number(piece, at - 1)
            operation, size = value & _OPERATION_MASK, value >> _OPERATION_BITS
            if not 0 < size <= left or (operation != _BLOCKS and size > _SIZES_MAX[operation]):
                raise FormatError(f"the tar has no piece of {size} bytes")
            left -= size
            if operation == _LITERAL:
                kept += piece[at : at + size]
                at += size
                continue
            if operation == _ZEROS:
                kept += bytes(size)
                continue
            if kept:
                yield bytes(kept)
                kept.clear()
            if operation == _TAIL:
                tail = next(places, -1)
                if not split.index_offset_bytes <= tail <= split.tails_offset_bytes - size:
                    raise FormatError("the end of a file lies outside the index")
                yield Run(tail, size, tail=True)
            elif size > split.index_offset_bytes - place:
                raise FormatError("the tar has more file data than the layer file")
            else:
                yield Run(place, size)
                place += size + -size % BLOCK_BYTES
        if kept:
            yield bytes(kept)
            kept.clear()
    if at != len(piece):
        raise FormatError("the pieces of the tar are cut short")
    if left or next(places, None) is not None or place != split.index_offset_bytes:
        raise FormatError("the pieces of the tar are not all that the layer file has")


def _tail_places(split: Split, read_at: ReadAt) -> Iterator[int]:
    end = split.instructions_offset_bytes
    for offset in range(split.tails_offset_bytes, end, _READ_BYTES):
        places = array("Q", exactly(read_at, offset, min(_READ_BYTES, end - offset)))
        if sys.byteorder == "big":
            places.byteswap()
        yield from places


def _number(piece: bytes, at: int) -> tuple[int, int]:
    """And where it ends. Raises FormatError."""
    value = shift = 0
    while at < len(piece) and shift <= _NUMBER_BITS_MAX:
        byte = piece[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte:
                return value, at
            break
        shift += 7
    raise FormatError("a number that is cut short, too long, or has needless bytes")


def exactly(read_at: ReadAt, offset: int, size: int) -> bytes:
    data = read_at(offset, size)
    if len(data) != size:
        raise FormatError(f"layer file ends at byte {offset + len(data)}")
    return data
