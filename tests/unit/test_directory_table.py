# SPDX-License-Identifier: Apache-2.0
"""Tables of directories that nobody of ours wrote."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats import directory_table, parents
from blockdev.formats.directory_table import DIFFERS, ENTRY, MADE, Attributes, Record
from tests.chains import Made, carried, make
from tests.golden.make_tars import EOA, PX, D, F

PLAIN = Attributes(0o755, 0, 0, (0, 0), {})
ROOT = Record(0, 0, b"", PLAIN)
DIFF_ID = bytes(range(32))


def read(table: bytes) -> list[Record]:
    return list(directory_table.read_parents_table(lambda at, size: table[at : at + size], len(table)))


def read_layer(table: bytes) -> list[Record]:
    return list(directory_table.read_layer_table(lambda at, size: table[at : at + size], len(table), DIFF_ID))


def a(depth: int, name: bytes, flags: int = DIFFERS, **attributes: object) -> Record:
    return Record(depth, flags, name, replace(PLAIN, **attributes))  # type: ignore[arg-type]


GOOD = [
    ROOT, a(1, b"a", 0), a(2, b"x", xattrs={b"user.a": b"1", b"security.selinux": b""}), a(2, b"y", uid=2**32 - 2),
    a(1, b"b", mtime=(-1, 999_999_999)),
]  # fmt: skip


def test_a_table_is_read_as_it_was_written() -> None:
    assert read(directory_table.parents_table(GOOD)) == GOOD


BAD: dict[str, list[Record]] = {
    "empty": [],
    "only the root": [ROOT],
    "no root": [a(1, b"a")],
    "two roots": [ROOT, a(1, b"a"), ROOT],
    "a root with a name": [replace(ROOT, name=b"r"), a(1, b"a")],
    "a level left out": [ROOT, a(2, b"a")],
    "out of order": [ROOT, a(1, b"b"), a(1, b"a")],
    "a name twice": [ROOT, a(1, b"a"), a(1, b"a")],
    "a name twice, with others below it": [ROOT, a(1, b"a"), a(2, b"z"), a(1, b"a")],
    "not needed": [ROOT, a(1, b"a", 0), a(1, b"b")],
    "the last not needed": [ROOT, a(1, b"a"), a(1, b"b", 0)],
    "no name": [ROOT, a(1, b"")],
    "a dot": [ROOT, a(1, b".")],
    "two dots": [ROOT, a(1, b"..")],
    "a slash": [ROOT, a(1, b"a/b")],
    "a NUL": [ROOT, a(1, b"a\0")],
    "a long name": [ROOT, a(1, b"a" * 256)],
    "another flag": [ROOT, a(1, b"a", DIFFERS | MADE)],
    "a file's mode": [ROOT, a(1, b"a", mode=0o100755)],
    "a second of more nanoseconds": [ROOT, a(1, b"a", mtime=(0, 10**9))],
    "an overlay's own xattr": [ROOT, a(1, b"a", xattrs={b"trusted.overlay.opaque": b"y"})],
}


@pytest.mark.parametrize("records", BAD.values(), ids=list(BAD))
def test_what_would_not_have_been_written_is_refused(records: list[Record]) -> None:
    with pytest.raises(FormatError):
        read(directory_table.parents_table(records))


@given(st.data())
def test_any_damage_is_refused_or_read_as_another_table(data: st.DataObject) -> None:
    table = bytearray(directory_table.parents_table(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(table[: data.draw(st.integers(0, len(table)))]) if data.draw(st.booleans()) else bytes(table)
    try:
        found = read(cut)
    except FormatError:
        return
    # What lies in unused fields is the only thing that may get lost.
    assert len(directory_table.parents_table(found)) == len(cut)


def layer_table() -> bytes:
    return make(F(b"a/b/c") + D(b"a/") + EOA).table


def test_a_layers_table_has_what_it_made_and_what_is_above() -> None:
    layer = make(D(b"t/", mode=0o700) + F(b"t/m/x") + D(b"e/") + F(b"a/b/c") + D(b"a/", uid=5) + EOA)
    assert [(record.depth, record.name, record.flags) for record in layer.made()] == [
        (0, b"", 0), (1, b"a", MADE | ENTRY), (2, b"b", MADE | directory_table.IN_MADE), (1, b"t", ENTRY),
        (2, b"m", MADE),
    ]  # fmt: skip
    assert [record.attributes.mode for record in layer.made()] == [0o755, 0o755, 0o755, 0o700, 0o755]


def test_a_layer_that_made_nothing_has_no_table_and_one_that_kept_nothing_an_empty_one() -> None:
    assert make(D(b"a/") + F(b"a/x") + EOA).table == b""
    gone = make(F(b"a/x") + F(b"a") + EOA)
    assert [record.name for record in gone.made()] == [b""]


def test_every_byte_of_a_layers_table_counts() -> None:
    layer = make(F(b"a/b/c") + EOA)
    for at in range(len(layer.table)):
        bad = bytearray(layer.table)
        bad[at] ^= 1
        with pytest.raises(FormatError):
            list(replace(layer, table=bytes(bad)).made())
    with pytest.raises(FormatError):
        list(replace(layer, table=layer.table + b"\0").made())
    for size in range(1, len(layer.table)):
        with pytest.raises(FormatError):
            list(replace(layer, table=layer.table[:size]).made())


def test_a_count_that_the_table_does_not_have_costs_nothing() -> None:
    table = struct.pack("<8sII", directory_table.LAYER_MAGIC, 1, 2**32 - 1) + DIFF_ID + ROOT.pack()
    with pytest.raises(FormatError, match="ends within"):
        read_layer(table + hashlib.sha256(table).digest())


def chain(*tars: bytes) -> list[Made]:
    return [make(tar + EOA) for tar in tars]


def test_too_many_directories_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parents, "DIRECTORIES_MAX", 3)
    top = carried(chain(D(b"a/", uid=1) + D(b"b/", uid=1), F(b"a/x") + F(b"b/x")))[-1]
    assert top is not None
    assert len(read(parents.pack(top))) == 3
    with pytest.raises(LimitExceeded, match="at most 3"):
        carried(chain(b"".join(D(b"%c/" % name, uid=1) for name in b"abcd"), b"".join(F(b"%c/x" % n) for n in b"abcd")))
    # With the root it is one more.
    top = carried(chain(D(b"a/", uid=1) + D(b"b/", uid=1) + D(b"c/", uid=1), F(b"a/x") + F(b"b/x") + F(b"c/x")))[-1]
    assert top is not None
    with pytest.raises(LimitExceeded, match="at most 3"):
        parents.pack(top)


def test_what_is_not_carried_in_the_end_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parents, "DIRECTORIES_MAX", 3)
    low = b"".join(D(b"%c/" % name) for name in b"abcdefgh")
    assert carried(chain(low, b"".join(F(b"%c/x" % name) for name in b"abcdefgh")))[-1] is None


def test_xattrs_are_bounded_while_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parents, "TABLE_BYTES_MAX", 100_000)
    large = PX((b"SCHILY.xattr.user.a", b"v" * 60_000))
    low = large + D(b"a/") + large + D(b"b/")
    assert carried(chain(low, F(b"a/x")))[-1] is not None
    with pytest.raises(LimitExceeded, match="100000 bytes"):
        carried(chain(low, F(b"a/x") + F(b"b/x")))


def test_xattrs_that_no_inode_has_room_for_are_refused() -> None:
    def pax(letter: bytes) -> Iterator[bytes]:

        yield PX(*((b"SCHILY.xattr.user." + letter + b"%d" % n, b"v" * 60000) for n in range(3)))

    top = carried(chain(b"".join(pax(b"l")) + D(b"a/"), F(b"a/x") + b"".join(pax(b"o")) + D(b"a/")))[-1]
    assert top is not None
    with pytest.raises(LimitExceeded, match="xattrs"):
        parents.pack(top)


def test_layers_below_are_opened_only_as_far_as_they_are_needed() -> None:
    layers = chain(*(D(b"a/", uid=1) + D(b"b%d/" % number) for number in range(20)), F(b"a/x"), F(b"b7/y"))
    below = parents.merged(
        None, layers[20].made(), layers[20].cursor(), (layer.cursor() for layer in reversed(layers[:20]))
    )
    opened = 0

    def lowers() -> Iterator[parents.Cursor]:
        nonlocal opened
        for layer in reversed(layers[:21]):
            opened += 1
            yield layer.cursor()

    found = parents.merged(below, layers[21].made(), layers[21].cursor(), lowers())
    assert opened == 14  # to the one that has b7
    assert found is not None
    assert found.children.keys() == {b"a"}  # b7 is 0755, as it was made
    opened = 0
    # What is carried needs no look below.
    parents.merged(found, layers[20].made(), layers[20].cursor(), lowers())
    assert opened == 0


def test_paths_of_any_depth() -> None:
    name = b"/".join([b"d"] * 2000)

    top = carried(chain(D(b"d/", uid=1), PX((b"path", name + b"/x")) + F(b"x"), PX((b"path", name + b"/y")) + F(b"y")))
    assert top[1] is not None
    assert top[2] is not None
    assert parents.pack(top[1]) == parents.pack(top[2])
