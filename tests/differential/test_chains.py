# SPDX-License-Identifier: Apache-2.0
"""Whole chains: containerd unpacks layer upon layer, we stack ours with the parents layer; both overlays show the same.

Where containerd looks at directories that the layers above have deleted, the overlay decides here (E25, E26): what
comes of it is left out of the random chains and has tests of its own.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from blockdev.kernel import mounts
from tests.chains import make, parents_layer
from tests.differential.trees import unpack
from tests.golden.make_tars import EOA, PX, D, F, S
from tests.property import parents_model, reference

pytestmark = [pytest.mark.unpacker, pytest.mark.root, pytest.mark.erofs]


@dataclass(frozen=True)
class Shown:
    """Of one name. A directory's time is left out: of one without an entry it is that of unpacking."""

    kind: int
    mode: int
    owner: tuple[int, int]
    mtime: int
    content: bytes
    xattrs: frozenset[tuple[bytes, bytes]]


def walk(root: Path) -> dict[bytes, Shown]:
    """A whiteout of nothing is listed and not there."""
    found: dict[bytes, Shown] = {}
    base, todo = os.fsencode(root), [b""]
    while todo:
        name = todo.pop()
        path = os.path.join(base, name)
        with suppress(FileNotFoundError):
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content = b""
            if kind == stat.S_IFREG:
                content = Path(os.fsdecode(path)).read_bytes()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            elif kind == stat.S_IFDIR:
                todo += [os.path.join(name, child) for child in os.listdir(path)]
            found[name] = Shown(
                kind, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid),
                0 if kind == stat.S_IFDIR else status.st_mtime_ns, content,
                frozenset(
                    (os.fsencode(key), os.getxattr(path, key, follow_symlinks=False))
                    for key in os.listxattr(path, follow_symlinks=False)
                ),
            )  # fmt: skip
    return found


@contextmanager
def overlay(lowers: Sequence[Path], target: Path) -> Iterator[Path]:
    """`lowers`: topmost first."""
    options = "lowerdir=" + ":".join(map(str, lowers))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"ro,{options}", target], check=True, timeout=60)
    try:
        yield target
    finally:
        mounts.unmount(target)


def containerds(tars: Sequence[bytes], work: Path) -> tuple[list[Path], str]:
    """Directories of the layers, topmost first, up to the first that is refused; and why it was."""
    layers: list[Path] = []
    for number, tar in enumerate(tars):
        source, target = work / f"{number}.tar", work / f"unpacked-{number}"
        source.write_bytes(tar)
        target.mkdir()
        flags = ["-parent", ":".join(map(str, layers))] if layers else ["-first"]
        done = unpack(source, target, *flags)
        if done.error:
            return layers, done.error
        layers.insert(0, target)
    return layers, ""


def shown_by_containerd(layers: Sequence[Path], work: Path) -> dict[bytes, Shown]:
    (work / "theirs").mkdir()
    empty = work / "empty"
    empty.mkdir()
    with overlay([*layers, empty], work / "theirs") as target:
        return walk(target)


def shown_by_us(tars: Sequence[bytes], work: Path, *, with_parents: bool = True) -> dict[bytes, Shown]:
    made = [make(tar) for tar in tars]
    top = parents_layer(made) if with_parents else None
    (work / "ours").mkdir()
    empty = work / "nothing"
    empty.mkdir()
    with ExitStack() as stack:
        points: list[Path] = []
        for number, layer in enumerate([*made, *([top] if top else [])]):
            file, point = work / f"layer-{number}", work / f"m{number}"
            file.write_bytes(layer.file)
            point.mkdir()
            mounts.mount_erofs(file, point, 512)
            stack.callback(mounts.unmount, point)
            points.insert(0, point)
        return walk(stack.enter_context(overlay([*points, empty], work / "ours")))


@pytest.fixture
def place(work: Path) -> Iterator[Path]:
    made = work / "chain"
    made.mkdir()
    yield made
    shutil.rmtree(made)


# --- random chains

paths = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=4)
modes = st.sampled_from([0o755, 0o700, 0o2755, 0o2770, 0o1777])
ids = st.sampled_from([0, 7, 1000])


@dataclass(frozen=True)
class Item:
    """`kind`: d, f, s, w (whiteout of it) or o (opaque mark beside it)."""

    kind: str
    path: tuple[bytes, ...]
    mode: int
    uid: int
    gid: int
    xattr: bytes

    def tar(self) -> bytes:
        name, beside = b"/".join(self.path), b"".join(part + b"/" for part in self.path[:-1])
        made: bytes
        if self.kind == "d":
            made = PX((b"SCHILY.xattr.user." + self.xattr, b"%o" % self.mode)) if self.xattr else b""
            made += D(name + b"/", mode=self.mode, uid=self.uid, gid=self.gid)
        elif self.kind == "f":
            made = F(name, b"1")
        elif self.kind == "s":
            made = S(name, b"nowhere")
        else:
            made = F(beside + (b".wh." + self.path[-1] if self.kind == "w" else b".wh..wh..opq"))
        return made


def layers(kinds: str) -> st.SearchStrategy[list[Item]]:
    item = st.builds(
        Item, st.sampled_from(kinds), paths.map(tuple), modes, ids, ids, st.sampled_from([b"", b"", b"x", b"y"])
    )
    return st.lists(item, min_size=1, max_size=6).map(without_exceptions)


def without_exceptions(items: list[Item]) -> list[Item]:
    """Those of single layers: marks of names that the layer itself has, and the same mark twice."""
    kept: list[Item] = []
    for number, item in enumerate(items):
        others = items[:number] + items[number + 1 :]
        below = any(other.path[: len(item.path)] == item.path for other in others)
        if not (item.kind in "sw" and below):
            kept.append(item)
    return kept


def tar_of(items: list[Item]) -> bytes:
    return b"".join(item.tar() for item in items) + EOA


def looked_through(tars: Sequence[bytes]) -> set[tuple[bytes, ...]]:
    """Directories that are new in the overlay where they were made, though a layer below has one of that path."""
    found: set[tuple[bytes, ...]] = set()
    there: set[tuple[bytes, ...]] = set()
    view: parents_model.View = {}
    for tar in tars:
        layer = reference.read_tar(tar)
        before, names = view, list(parents_model.names_of(layer))
        view = parents_model.above(view, layer)
        hidden = {path for path, node in names if path and node.opaque}
        for path, node in names:
            if node.made and path in there:
                covered = any(path[:length] in hidden for length in range(len(path)))
                if path not in before or covered or path in found:
                    found.add(path)
            elif node.entry:
                found.discard(path)
        there |= {path for path, node in names if node.kind == "directory"}
    return found


def is_taken(tar: bytes) -> bool:
    try:
        reference.read_tar(tar)
    except reference.Refused:
        return False
    return True


@settings(max_examples=max(60, settings().max_examples // 10))
@given(layers("ddddf"), st.lists(layers("ddffffffswo"), min_size=1, max_size=5))
def test_any_chain(work: Path, first: list[Item], others: list[list[Item]]) -> None:
    tars = [tar_of(items) for items in (first, *others)]
    assume(is_taken(tars[0]))
    tars = [tar for tar in tars if is_taken(tar)]
    place = work / "random"
    place.mkdir()
    try:
        theirs, error = containerds(tars, place)
        if error:
            assert "not a directory" in error  # E26
        taken = tars[: len(theirs)]
        event("refused by containerd" if error else f"{len(taken)} layers")
        expected, ours = shown_by_containerd(theirs, place), shown_by_us(taken, place)
        for path in looked_through(taken):
            for seen in (expected, ours):
                for name in [name for name in seen if (tuple(name.split(b"/")) + path)[: len(path)] == path]:
                    if name.count(b"/") + 1 == len(path) or stat.S_ISDIR(seen[name].kind):
                        del seen[name]
        assert expected == ours
        event("a parents layer" if parents_model.table(taken) else "none needed")
    finally:
        shutil.rmtree(place)


# --- what the random chains leave out


LOW = D(b"a/", mode=0o700, uid=7, gid=8) + D(b"a/b/", mode=0o711, uid=9, gid=10) + F(b"a/b/x") + EOA


def test_the_layers_alone_show_made_attributes(place: Path) -> None:
    """What the parents layer is for."""
    tars = [LOW, F(b"a/b/y") + EOA]
    layers, error = containerds(tars, place)
    assert not error
    theirs = shown_by_containerd(layers, place)
    assert (theirs[b"a"].mode, theirs[b"a"].owner) == (0o700, (7, 8))
    alone = shown_by_us(tars, place, with_parents=False)
    assert (alone[b"a"].mode, alone[b"a"].owner) == (0o755, (0, 0))


def test_a_directory_below_an_opaque_one_e25(place: Path) -> None:
    tars = [LOW, F(b"a/.wh..wh..opq") + F(b"a/b/y") + EOA]
    layers, error = containerds(tars, place)
    assert not error
    theirs, ours = shown_by_containerd(layers, place), shown_by_us(tars, place)
    assert (theirs[b"a/b"].mode, theirs[b"a/b"].owner) == (0o711, (9, 10)), "E25 is obsolete"
    assert (ours[b"a/b"].mode, ours[b"a/b"].owner) == (0o755, (0, 0))
    assert theirs[b"a"] == ours[b"a"]
    assert theirs.keys() == ours.keys()


def test_a_directory_below_one_that_was_deleted_in_between_e26(place: Path) -> None:
    tars = [LOW, F(b".wh.a") + EOA, D(b"a/", mode=0o750) + EOA, F(b"a/b/y") + EOA]
    assert "not a directory" in containerds(tars, place)[1], "E26 is obsolete"
    ours = shown_by_us(tars, place)
    assert (ours[b"a"].mode, ours[b"a/b"].mode, ours[b"a/b"].owner) == (0o750, 0o755, (0, 0))
    assert b"a/b/x" not in ours


def test_an_opaque_root_hides_nothing(place: Path) -> None:
    """Neither to overlayfs: it looks at no mark of a layer's own root."""
    tars = [LOW, F(b".wh..wh..opq") + F(b"a/b/y") + EOA]
    layers, error = containerds(tars, place)
    assert not error
    theirs, ours = shown_by_containerd(layers, place), shown_by_us(tars, place)
    assert theirs == ours
    assert b"a/b/x" in ours
    assert ours[b"a"].mode == 0o700


def test_a_lower_symlink_in_the_way_e27(place: Path) -> None:
    tars = [D(b"real/", mode=0o700, uid=7) + S(b"a", b"real") + EOA, F(b"a/y") + EOA]
    layers, error = containerds(tars, place)
    assert not error
    theirs, ours = shown_by_containerd(layers, place), shown_by_us(tars, place)
    assert (theirs[b"a"].mode, theirs[b"a"].owner) == (0o700, (7, 0)), "E27 is obsolete"
    assert (ours[b"a"].mode, ours[b"a"].owner) == (0o755, (0, 0))


def test_an_entry_that_came_after_its_directory_was_made_keeps_the_lower_xattrs(place: Path) -> None:
    xattr = PX((b"SCHILY.xattr.user.low", b"1"))
    tars = [
        xattr + D(b"a/", mode=0o700) + EOA,
        F(b"a/y") + PX((b"SCHILY.xattr.user.own", b"2")) + D(b"a/", mode=0o711) + EOA,
    ]
    layers, error = containerds(tars, place)
    assert not error
    theirs, ours = shown_by_containerd(layers, place), shown_by_us(tars, place)
    assert theirs == ours
    assert dict(ours[b"a"].xattrs) == {b"user.low": b"1", b"user.own": b"2"}
    assert ours[b"a"].mode == 0o711


def test_the_group_of_a_lower_set_group_id_directory(place: Path) -> None:
    tars = [D(b"a/", mode=0o2775, gid=50) + EOA, F(b"a/new/deep/y") + EOA]
    layers, error = containerds(tars, place)
    assert not error
    theirs, ours = shown_by_containerd(layers, place), shown_by_us(tars, place)
    assert theirs == ours
    assert ours[b"a/new"].owner == (0, 50)
