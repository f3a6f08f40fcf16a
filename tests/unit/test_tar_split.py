# SPDX-License-Identifier: Apache-2.0
"""A tar in pieces: what is written is checked, and hostile pieces are refused before they cost anything."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from blockdev.errors import FormatError
from blockdev.formats.layer_file import FORMATS, HEAD_BYTES, Identity, open_layer_file
from blockdev.formats.layer_reader import tar_runs as runs_of_layer
from blockdev.formats.layer_writer import LayerWriter
from blockdev.formats.limits import Limits
from blockdev.formats.tar_split import Run, Split, tail_bytes, tar_runs
from tests.chains import make
from tests.golden.make_tars import EOA, D, F, prng
from verity.hasher import LeafStore, StreamHash
from verity.spool import Spool, SpooledBytes

TAR: Final = D(b"d/") + F(b"d/a", prng(5000)) + F(b"d/b", prng(4090)) + F(b"d/a", b"again") + EOA


def number(operation: int, size: int) -> bytes:
    value, out = size << 2 | operation, bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


LITERAL, ZEROS, BLOCKS, TAIL = range(4)
INDEX, KEPT = 8192, 12288  # one block of file data, and one of the index


def runs(instructions: bytes, size: int, *, lost: bytes = b"", places: tuple[int, ...] = ()) -> list[Run | bytes]:
    """Of a file with nothing but what is kept of a tar of `size` bytes."""
    split = Split(size, HEAD_BYTES, INDEX, KEPT, len(lost), len(places), len(instructions))
    file = bytes(KEPT) + lost + b"".join(struct.pack("<Q", place) for place in places) + instructions
    return list(tar_runs(split, lambda at, length: file[at : at + length]))


def test_the_pieces_of_a_sound_one() -> None:
    instructions = number(LITERAL, 3) + b"abc" + number(BLOCKS, 4000) + number(TAIL, 5) + number(ZEROS, 512)
    assert runs(instructions, 4520, lost=b"12345", places=(KEPT,)) == [
        b"abc", Run(HEAD_BYTES, 4000), Run(KEPT, 5, tail=True), bytes(512),
    ]  # fmt: skip


BODY: Final = number(BLOCKS, 4096)


@pytest.mark.parametrize(
    ("instructions", "size", "places"),
    [
        pytest.param(b"", 1, (), id="none"),
        pytest.param(b"", 0, (), id="a body that is not used"),
        pytest.param(BODY, 4095, (), id="more than the tar"),
        pytest.param(BODY, 4097, (), id="less than the tar"),
        pytest.param(number(BLOCKS, 4097), 4097, (), id="a body that goes on in the index"),
        pytest.param(BODY + number(BLOCKS, 1), 4097, (), id="a body in the index"),
        pytest.param(BODY + number(LITERAL, 0), 4096, (), id="nothing of a literal"),
        pytest.param(BODY + number(ZEROS, 0), 4096, (), id="no zeros"),
        pytest.param(BODY + number(ZEROS, 513), 4609, (), id="too many zeros"),
        pytest.param(BODY + number(LITERAL, 513) + bytes(513), 4609, (), id="a literal that is too long"),
        pytest.param(BODY + number(LITERAL, 5) + b"1234", 4101, (), id="a literal cut short"),
        pytest.param(BODY + number(ZEROS, 1 << 61), 1 << 62, (), id="very many zeros"),
        pytest.param(BODY + number(TAIL, 5), 4101, (), id="a tail without a place"),
        pytest.param(BODY + number(TAIL, 5), 4101, (INDEX, INDEX), id="a place too many"),
        pytest.param(BODY + number(TAIL, 5), 4101, (INDEX - 1,), id="a tail in file data"),
        pytest.param(BODY + number(TAIL, 5), 4101, (KEPT - 4,), id="a tail that goes on in what is kept"),
        pytest.param(BODY + number(TAIL, 5), 4101, ((1 << 64) - 1,), id="a tail nowhere"),
        pytest.param(BODY + number(TAIL, 4033), 8129, (INDEX,), id="a tail that is too long"),
        pytest.param(BODY + b"\x80", 4097, (), id="a number cut short"),
        pytest.param(BODY + b"\x84\x00x", 4097, (), id="a number with needless bytes"),
        pytest.param(BODY + b"\x84\x80\x00x", 4097, (), id="a number with more needless bytes"),
        pytest.param(BODY + b"\xff" * 400, 1 << 62, (), id="a number without an end"),
    ],
)
def test_pieces_that_are_not_a_tar(instructions: bytes, size: int, places: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        runs(instructions, size, places=places)


def test_what_is_kept_is_read_a_piece_at_a_time() -> None:
    """However many instructions there are, and wherever a piece ends within one."""
    for shift in (0, 1, 200, 511):
        instructions = number(BLOCKS, 4096) + (number(LITERAL, shift) + b"s" * shift if shift else b"")
        instructions += (number(LITERAL, 512) + b"x" * 512) * 600
        found = runs(instructions, 4096 + shift + 600 * 512)
        assert b"".join(run for run in found if isinstance(run, bytes)) == b"s" * shift + b"x" * 512 * 600
        assert len(found) > 3


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: replace(identity, tar_size_bytes=identity.tar_size_bytes + 1),
        lambda identity: replace(identity, metadata_offset_bytes=identity.metadata_offset_bytes + 4096),
        *(
            lambda identity, field=field, more=more: replace(
                identity, split=replace(identity.split, **{field: getattr(identity.split, field) + more})
            )
            for field, more in (
                ("offset_bytes", 1), ("offset_bytes", 4096), ("offset_bytes", -4096), ("lost_bytes", 4096),
                ("tails", 512), ("instruction_bytes", 4096),
            )
        ),
    ],
)  # fmt: skip
def test_an_identity_record_that_does_not_fit_is_refused(change: Callable[[Identity], Identity]) -> None:
    """When the file is opened, or when the tar is asked for."""
    file = make(TAR, "erofs-4k").file
    identity = Identity.unpack(file)
    wrong = change(identity).pack() + file[1024:]

    def read_at(offset: int, size: int) -> bytes:
        return wrong[offset : offset + size]

    with pytest.raises(FormatError):
        list(runs_of_layer(open_layer_file(read_at, len(file)), read_at))


@pytest.mark.parametrize("where", ["a tail", "a place", "an instruction"])
def test_a_layer_that_is_not_what_came_in_is_refused_when_it_is_built(where: str) -> None:
    """A disk that gives back other bytes than it was given."""
    file = make(TAR, "erofs-4k").file
    split = Identity.unpack(file).split
    assert split is not None
    found = tar_runs(split, lambda at, size: file[at : at + size])
    wrong_at = {
        "a tail": next(run.offset_bytes for run in found if isinstance(run, Run) and run.tail),
        "a place": split.tails_offset_bytes,
        "an instruction": split.instructions_offset_bytes + 3,
    }[where]
    out = bytearray(HEAD_BYTES)

    def read_back(offset: int, size: int) -> bytes:
        piece = bytearray(out[offset : offset + size])
        if offset <= wrong_at < offset + size:
            piece[wrong_at - offset] ^= 1
        return bytes(piece)

    writer = LayerWriter(
        FORMATS["erofs-4k"], write=out.extend, write_head=lambda head: None, leaves=LeafStore(), limits=Limits(),
        read_back=read_back,
    )  # fmt: skip
    writer.feed(TAR)
    with pytest.raises(FormatError):
        writer.finish(hashlib.sha256(TAR).digest())


def test_a_format_that_splits_is_not_written_blindly() -> None:
    with pytest.raises(ValueError, match="blindly"):
        LayerWriter(
            FORMATS["erofs-4k"], write=lambda data: None, write_head=lambda head: None, leaves=LeafStore(),
            limits=Limits(),
        )  # fmt: skip


def test_sinks_on_threads_of_their_own_end_when_the_tar_is_refused() -> None:
    """The one that reads it fails; the others see all pieces all the same, and the digest is whole."""
    out, stream = bytearray(HEAD_BYTES), StreamHash()
    writer = LayerWriter(
        FORMATS["erofs-4k"], write=out.extend, write_head=lambda head: None, leaves=LeafStore(), limits=Limits(),
        read_back=lambda at, size: bytes(out[at : at + size]),
    )  # fmt: skip
    reads, stores, hashes = writer.sinks(stream)
    pieces = [TAR[:512], b"no header" * 200, TAR]

    def store() -> None:
        for piece in pieces:
            stores(piece)

    def hash_all() -> None:
        for piece in pieces:
            hashes(piece)

    threads = [threading.Thread(target=work, daemon=True) for work in (store, hash_all)]
    for thread in threads:
        thread.start()
    reads(pieces[0])
    with pytest.raises(FormatError):
        reads(pieces[1])
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert stream.digest() == hashlib.sha256(b"".join(pieces)).digest()


@pytest.mark.parametrize(
    ("size", "tail"), [(0, 0), (1, 1), (4032, 4032), (4033, 0), (4095, 0), (4096, 0), (4097, 1), (8128, 4032)]
)
def test_how_much_of_a_file_is_its_tail(size: int, tail: int) -> None:
    assert tail_bytes(size) == tail


def test_stores_that_share_a_spool_do_not_mix() -> None:
    spool = Spool()
    one = SpooledBytes(spool, threshold_bytes=10)
    two = one.beside()
    for value in range(200):
        one.append(bytes([value]) * 3)
        two.append(bytes([255 - value]) * 7)
    expected = b"".join(bytes([value]) * 3 for value in range(200))
    assert one.read(0, len(one)) == b"".join(one.chunks(17)) == expected
    assert two.read(70, 91) == bytes([245] * 7 + [244] * 7 + [243] * 7)
    assert spool.size_bytes == one.bytes_spooled + two.bytes_spooled > 1900
    one.replace(5, b"twelve bytes")
    assert one.read(0, 20) == expected[:5] + b"twelve bytes" + expected[17:20]
    spool.close()
