# SPDX-License-Identifier: Apache-2.0
"""The ring of shared memory between the two processes of a build."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.errors import BuildFailed, CutShort
from blockdev.workers.ring import RingEnd, RingReader, RingWriter, make_ring

SLOT = 64


@pytest.fixture
def ends() -> Iterator[tuple[RingEnd, RingEnd]]:
    with ExitStack() as stack:
        writer, reader = make_ring(stack, slots=3, slot_bytes=SLOT)
        yield own(writer), own(reader)


def own(end: RingEnd) -> RingEnd:
    """As another process would have it: descriptors of its own."""
    memory, full, free = map(os.dup, end.descriptors())
    return RingEnd(memory, full, free, end.slots, end.slot_bytes)


def passed(pieces: list[bytes], reads: list[int]) -> bytes:
    """Through a ring, in reads of these sizes, in turn."""
    with ExitStack() as stack:
        ends = make_ring(stack, slots=3, slot_bytes=SLOT)
        writer, reader = RingWriter(own(ends[0])), RingReader(own(ends[1]))
        stack.close()

        def write() -> None:
            for piece in pieces:
                writer.write(piece)
            writer.close()

        thread = threading.Thread(target=write)
        thread.start()
        out = b""
        for number in range(1 << 30):
            size = reads[number % len(reads)]
            if number % 2:
                data = reader.read(size)
            else:
                view = memoryview(bytearray(size))
                data = bytes(view[: reader.read_into(view)])
            if not data:
                break
            out += data
        thread.join()
        reader.close()
        return out


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_what_goes_in_comes_out(pieces: list[bytes], reads: list[int]) -> None:
    assert passed(pieces, reads) == b"".join(pieces)


def test_much_more_than_the_ring_has_room_for() -> None:
    data = hashlib.shake_128(b"ring").digest(100_000)
    assert passed([data], [1000]) == data


def test_a_read_fills_its_view_unless_the_stream_ends(ends: tuple[RingEnd, RingEnd]) -> None:
    writer, reader = RingWriter(ends[0]), RingReader(ends[1])
    writer.write(b"a" * (SLOT + 10))
    writer._hand_over()  # a short one in the middle, as only a hostile writer would
    view = memoryview(bytearray(SLOT + 5))
    assert reader.read_into(view) == SLOT + 5


def test_a_writer_gets_to_know_that_the_reader_has_gone() -> None:
    with ExitStack() as stack:
        ends = make_ring(stack, slots=3, slot_bytes=SLOT)
        writer, reader = RingWriter(own(ends[0])), RingReader(own(ends[1]))
        stack.close()
        reader.close()
        with pytest.raises(BrokenPipeError):
            writer.write(bytes(10 * SLOT))


@pytest.mark.parametrize("size", [SLOT + 1, 0xFFFFFFFF])
def test_a_size_that_no_slot_has_is_refused(ends: tuple[RingEnd, RingEnd], size: int) -> None:
    os.write(ends[0].full_fd, struct.pack("<I", size))
    with pytest.raises(BuildFailed, match="protocol"):
        RingReader(ends[1]).read(10)


@pytest.mark.parametrize("last", [b"", b"\1\0"])
def test_a_writer_that_dies_has_not_ended_its_stream(last: bytes) -> None:
    with ExitStack() as stack:
        ends = make_ring(stack, slots=3, slot_bytes=SLOT)
        end = own(ends[1])
        os.write(ends[0].full_fd, struct.pack("<I", SLOT) + last)
        stack.close()
        reader = RingReader(end)
        assert reader.read(SLOT) == bytes(SLOT)
        with pytest.raises(CutShort, match="ended before its stream"):
            reader.read(10)


def test_a_piece_that_was_read_is_the_readers_own(ends: tuple[RingEnd, RingEnd]) -> None:
    writer, reader = RingWriter(ends[0]), RingReader(ends[1])
    writer.write(b"a" * SLOT)
    view = memoryview(bytearray(SLOT))
    reader.read_into(view)
    ends[0].map()[:SLOT] = b"b" * SLOT
    assert bytes(view) == b"a" * SLOT


def test_the_memory_keeps_its_size(ends: tuple[RingEnd, RingEnd]) -> None:
    for size in (0, 10 * SLOT):
        with pytest.raises(PermissionError):
            os.truncate(ends[0].memory_fd, size)
