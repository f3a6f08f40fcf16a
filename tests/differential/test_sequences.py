# SPDX-License-Identifier: Apache-2.0
"""Members in any sequence, through containerd's unpacker and through ours.

What the exceptions and the findings of expected.py come to here is allowed for one by one, each where it is sure to be
the reason; the sequences leave out what can only be told from the outside: set-group-ID directories, ACLs, `..` on
the way to a parent, a `/` behind a hardlink's target.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from blockdev.errors import BlockdevError
from tests.differential.shapes import capability, star
from tests.differential.test_unpacker import OPAQUE, without_the_time_of_unpacking
from tests.differential.trees import Node, Tree, Unpacked, differences, mounted, unpack
from tests.golden.make_tars import EOA, GNU, LL, PX, T0, USTAR, V7, hdr, pad
from tests.golden.test_tar_index import build

pytestmark = [pytest.mark.unpacker, pytest.mark.root, pytest.mark.erofs]

# Names that are whited out; the others are so only now and then, or nothing would be left of most sequences.
GONE: Final = (b"w", b"x")


@dataclass(frozen=True)
class Item:
    """One member with all its headers. `mark` is the name that it whites out."""

    tar: bytes
    kind: bytes
    name: bytes
    mtime: int  # nanoseconds
    mark: bytes = b""
    link: bytes = b""


parts = st.sampled_from([b"a", b"b", b"c", b"a", b"b", b"c", b"d", b"\xff\xfe", b"w", b"e" * 120])
paths = st.lists(parts, min_size=1, max_size=3).map(b"/".join)
decorated = st.builds(
    lambda front, path, back: front + path + back,
    st.sampled_from([b"", b"", b"", b"./", b"/", b".//", b"/./"]), paths, st.sampled_from([b"", b"", b"", b"/", b"/."]),
)  # fmt: skip
targets = st.builds(lambda front, path: front + path, st.sampled_from([b"", b"", b"/", b"./", b"//"]), paths)
kinds = st.sampled_from([b"0"] * 4 + [b"5"] * 4 + [b"2"] * 2 + [b"1"] * 3 + [b"3", b"4", b"6", b"w", b"o", b"."])
times = st.sampled_from([0, T0, T0 + 1, T0 + 2, T0 + 3, 2**33 - 1])
forms = st.sampled_from(["ustar", "ustar", "gnu", "v7", "star", "pax", "pax", "long"])
xattrs = st.lists(
    st.tuples(
        st.sampled_from([b"user.a", b"user.b", b"security.s", b"trusted.t", b"trusted.overlay.opaque", b"other.o"]),
        st.sampled_from([b"", b"1", b"y", b"two\nlines\0"]),
    ) | st.just((b"security.capability", capability())),
    max_size=2, unique_by=lambda pair: pair[0],
)  # fmt: skip


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    made: list[Item] = []
    for kind in draw(st.lists(kinds, min_size=1, max_size=14)):
        made.append(an_item(draw, kind, made))
    return made


def an_item(draw: st.DrawFn, kind: bytes, made: list[Item]) -> Item:
    # A name that was there before, often, or few members would meet.
    earlier = [item.name for item in made if item.kind in b"0123456" and not item.mark]
    again = bool(earlier) and draw(st.booleans())
    name: bytes = draw(st.sampled_from(earlier) | decorated if again else decorated)
    mark = link = data = b""
    flag = kind
    if kind in (b"w", b"o"):
        flag = draw(st.sampled_from([b"0", b"0", b"5", b"2"]))
        parent = name.rstrip(b"/.") + b"/" if draw(st.booleans()) else b""
        mark = draw(st.sampled_from([*GONE, *GONE, b"v", b"u", b"a"])) if kind == b"w" else b""
        name = parent + (b".wh." + mark if mark else b".wh..wh..opq")
    elif kind == b".":
        name, flag = draw(st.sampled_from([b".", b"./", b"/", b"//."])), draw(st.sampled_from([b"5", b"0"]))
    if flag == b"1":
        files = [item.name.rstrip(b"/.") for item in made if item.kind in b"012346" and not item.mark]
        link = draw(st.sampled_from(files) | targets if files else targets)
    elif flag == b"2":
        link = draw(targets)
    elif flag == b"0":
        data = draw(st.sampled_from([b"", b"1", b"22" * 256, b"3" * 600]))
    mode = draw(st.sampled_from([0, 0o644, 0o755, 0o1777, 0o4711, 0o5000 if flag == b"5" else 0o7000]))
    uid, gid, seconds = draw(st.sampled_from([0, 1, 1000, 2**21 - 1])), draw(st.sampled_from([0, 5, 1000])), draw(times)
    device = draw(st.sampled_from([(1, 3), (7, 300), (0, 5)])) if flag in (b"3", b"4") else (0, 0)
    form, mtime = draw(forms), seconds * 10**9
    records = []
    if form == "pax":
        records = [(b"SCHILY.xattr." + key, value) for key, value in draw(xattrs)] + [(b"path", name)]
        if draw(st.booleans()):
            mtime += draw(st.sampled_from([0, 500_000_000, 123_456_789]))
            records.append((b"mtime", b"%d.%09d" % divmod(mtime, 10**9)))
    front = LL(name) if form == "long" or (len(name) > 100 and form != "pax") else b""
    front += LL(link, b"K") if len(link) > 100 else b""
    front += PX(*records) if records else b""
    header = hdr(
        name, flag, len(data), mode=mode, uid=uid, gid=gid, mtime=seconds, link=link, dev=device,
        magic={"gnu": GNU, "long": GNU, "v7": V7}.get(form, USTAR),
    )  # fmt: skip
    if form == "star":
        header = star(header)
    return Item(front + header + pad(data), kind if flag == kind else b"m", name, mtime, mark, link)


def basename(name: bytes) -> bytes:
    return name.rstrip(b"/.").rpartition(b"/")[2]


def root_path(tree: Tree, name: bytes) -> bytes | None:
    """Where a name leads, symlinks followed, the last one too; None where it leads nowhere."""
    here, todo, hops = list[bytes](), name.split(b"/")[::-1], 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        node = tree.get(b"/".join([*here, part]))
        if node is None or hops > 255:
            return None
        if node.link:
            hops += 1
            here = [] if node.link.startswith(b"/") else here
            todo += node.link.split(b"/")[::-1]
        else:
            here.append(part)
    return b"/".join(here)


def with_late_times(items: list[Item], ours: Tree) -> Tree | None:
    """The finding: times of directories are set at the end, by name. None where containerd then refuses."""
    tree = dict(ours)
    for item in items:
        if item.kind != b"5":
            continue
        place = root_path(tree, item.name)
        if place is None:
            return None
        if place:
            first = tree[place].first
            tree |= {name: replace(node, mtime=item.mtime) for name, node in tree.items() if node.first == first}
    return tree


def compare(items: list[Item], theirs: Unpacked, root: Path, ours: Tree, our_error: str) -> None:
    event(f"containerd {'refuses' if theirs.error else 'accepts'}, we {'refuse' if our_error else 'accept'}")
    marks = {item.mark for item in items if item.mark}
    if our_error:
        if not theirs.error:
            # The finding: a hardlink to a whiteout.
            assert "hardlink target not earlier in this layer" in our_error
            assert any(item.kind == b"1" and basename(item.link) in marks for item in items)
        return
    late = with_late_times(items, ours)
    if theirs.error:
        if re.search(r"failed to convert whiteout file .*: file exists", theirs.error):
            assert marks  # E20, E22
            return
        below = re.search(f"{re.escape(str(root))}/(.*): not a directory", theirs.error, re.DOTALL)
        if below and marks & set(below[1].encode(errors="surrogateescape").split(b"/")):
            return  # the finding: below a name that was whited out before
        assert late is None, theirs.error
        return
    assert late is not None
    expected = without_the_time_of_unpacking(theirs, ours, owners=True)
    for name, node in ours.items():
        if OPAQUE in node.xattrs and basename(name) in marks and name in expected:
            expected[name] = replace(expected[name], xattrs=expected[name].xattrs | {OPAQUE})  # E21
    assert differences(expected, late) == {}


@settings(max_examples=max(150, settings().max_examples))
@given(items=items(), end=st.sampled_from([EOA, EOA, b"", bytes(512), EOA + b"junk"]))
def test_any_sequence(items: list[Item], end: bytes, work: Path) -> None:
    tar = b"".join(item.tar for item in items) + end
    ours, our_error = dict[bytes, Node](), ""
    try:
        (work / "layer").write_bytes(build(tar)[1])
    except BlockdevError as error:
        our_error = str(error)
    else:
        ours = mounted(work / "layer", work / "mnt")
    (work / "layer.tar").write_bytes(tar)
    root = work / "sequence"
    root.mkdir()
    try:
        compare(items, unpack(work / "layer.tar", root), root, ours, our_error)
    finally:
        shutil.rmtree(root)
