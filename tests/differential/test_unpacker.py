# SPDX-License-Identifier: Apache-2.0
"""The same layers through containerd's own unpacker and through ours: refused by both, or the same tree.

The exceptions of docs/formats.md are in expected.py, each with the cases that show it.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from blockdev.errors import BlockdevError
from tests import harness
from tests.differential.expected import EXPECTED, KERNEL_JUDGES, REFUSED_AFTER_A_MARK, REMOVED_BY_A_MARK
from tests.differential.shapes import SHAPES
from tests.differential.trees import Differences, Node, Tree, Unpacked, differences, mounted, read, unpack_all, walk
from tests.golden import make_tars
from tests.golden.test_tar_index import build

pytestmark = [pytest.mark.unpacker, pytest.mark.root, pytest.mark.erofs]

CASES: Final[dict[str, bytes]] = {f"golden-{name}": make() for name, make in make_tars.CASES.items()} | SHAPES
MARKED: Final = {name for name, tar in CASES.items() if b".wh." in tar}
OPAQUE: Final = (b"trusted.overlay.opaque", b"y")
# Of the directories of the lower layer. The time is later than any unpacking: one that came from there is told by it.
LOWER_MODE, LOWER_UID, LOWER_GID, LOWER_TIME = 0o1711, 77, 88, 4_000_000_000
LOWER_XATTRS: Final = {"user.lower": b"1", "trusted.lower": b"2"}
COPIED_UP: Final = (LOWER_MODE, LOWER_UID, LOWER_GID, frozenset({(b"user.lower", b"1")}))


@functools.cache
def layer_file(name: str) -> tuple[bytes, str]:
    """Ours of a case, or the error."""
    try:
        return build(CASES[name])[1], ""
    except BlockdevError as error:
        return b"", f"{type(error).__name__}: {error}"


_mounted: dict[str, Tree] = {}


def kernel_tree(name: str, work: Path) -> Tree:
    """Of a case that we take."""
    if name not in _mounted:
        (work / "layer").write_bytes(layer_file(name)[0])
        _mounted[name] = mounted(work / "layer", work / "mnt")
    return _mounted[name]


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, Unpacked]:
    """Onto an overlay's upper directory, with no look at the layers below."""
    (work / "alone").mkdir()
    return unpack_all(CASES.items(), work / "alone")


@pytest.fixture(scope="module")
def above(work: Path, alone: dict[str, Unpacked]) -> dict[str, Unpacked]:
    """The same as it is in a pull: above a layer that has a directory wherever a case has one."""
    lower = work / "lower"
    lower.mkdir()
    names = {name for each in alone.values() for name, node in each.tree.items() if name and node.kind == stat.S_IFDIR}
    for name in sorted(names):
        path = os.path.join(os.fsencode(lower), name)
        os.makedirs(path, exist_ok=True)
    for name in names:
        path = os.path.join(os.fsencode(lower), name)
        os.chown(path, LOWER_UID, LOWER_GID)
        os.chmod(path, LOWER_MODE)
        os.utime(path, (LOWER_TIME, LOWER_TIME))
        for key, value in LOWER_XATTRS.items():
            os.setxattr(path, key, value)
    (work / "above").mkdir()
    return unpack_all(CASES.items(), work / "above", "-parent", str(lower))


@pytest.fixture(scope="module")
def first(work: Path) -> dict[str, Unpacked]:
    """As the first layer of an image, which containerd unpacks without an overlay: marks make a difference."""
    (work / "first").mkdir()
    return unpack_all(((name, CASES[name]) for name in MARKED), work / "first", "-first")


def is_whiteout(node: Node) -> bool:
    return (node.kind, node.mode, node.rdev) == (stat.S_IFCHR, 0, (0, 0))


def without_the_time_of_unpacking(theirs: Unpacked, ours: Tree, *, owners: bool = False) -> Tree:
    """Containerd's tree with the times of ours where they came from no tar: those of the root, of made parents (E17)
    and of whiteouts (E18), of these with `owners` the owner, too."""
    expected = dict(theirs.tree)
    for name, node in theirs.tree.items():
        if node.mtime < theirs.started or name not in ours or ours[name].mtime:
            continue
        if node.kind == stat.S_IFDIR:
            expected[name] = replace(node, mtime=0)
        elif is_whiteout(node):
            expected[name] = replace(node, mtime=0)
            if owners:
                expected[name] = replace(expected[name], uid=0, gid=0)
    return expected


def without_what_was_copied_up(above: Unpacked, alone: Unpacked) -> Unpacked:
    """E17: where a made parent has mode, owner and xattrs of the lower layer's directory, those that it has alone.

    Of one that got an entry later only the xattrs are left to see.
    """
    expected = dict(above.tree)
    for name, node in above.tree.items():
        copied = COPIED_UP[3] & node.xattrs
        if not copied or name not in alone.tree:
            continue
        as_made = alone.tree[name]
        expected[name] = replace(node, xattrs=node.xattrs - copied)
        if (node.mode, node.uid, node.gid) == COPIED_UP[:3]:
            expected[name] = replace(expected[name], mode=as_made.mode, uid=as_made.uid, gid=as_made.gid)
    return replace(above, tree=expected)


def check(name: str, theirs: Unpacked, our_error: str, differing: Differences) -> None:
    expected = EXPECTED.get(name)
    if expected is None:
        assert bool(theirs.error) == bool(our_error), f"containerd: {theirs.error!r}; ours: {our_error!r}"
        assert differing == {}
        return
    obsolete = f"{expected.exception} is obsolete: containerd and we agree on {name}"
    if expected.refused_by:
        by_us = expected.refused_by == "us"
        assert bool(theirs.error) != bool(our_error), obsolete
        assert bool(our_error) == by_us
        assert re.search(expected.because, our_error if by_us else theirs.error.rstrip())
        assert {key: getattr(theirs.tree[key[0]], key[1]) for key in expected.shows} == expected.shows
        return
    assert differing, obsolete
    assert differing == expected.differs


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, work: Path, alone: dict[str, Unpacked], above: dict[str, Unpacked]) -> None:
    error = layer_file(name)[1]
    for theirs in (alone[name], without_what_was_copied_up(above[name], alone[name])):
        differing: Differences = {}
        if not theirs.error and not error:
            ours = kernel_tree(name, work)
            differing = differences(without_the_time_of_unpacking(theirs, ours), ours)
        check(name, theirs, error, differing)


# The kernel takes no path as long as that one.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"too-long-path"}))
def test_our_reader_sees_what_the_kernel_sees(name: str, work: Path) -> None:
    file, error = layer_file(name)
    if error:
        return
    differing = differences(kernel_tree(name, work), read(file))
    assert {field for _, field in differing} == ({"xattrs"} if name in KERNEL_JUDGES else set())


@pytest.mark.parametrize("name", sorted((MARKED - EXPECTED.keys()) | REMOVED_BY_A_MARK.keys()))
def test_first_layer(name: str, work: Path, first: dict[str, Unpacked]) -> None:
    """Marks leave nothing there; all else comes out as in other layers."""
    error = layer_file(name)[1]
    theirs = first[name]
    assert bool(theirs.error) == bool(error)
    if error:
        return
    ours = {
        path: replace(node, xattrs=node.xattrs - {OPAQUE})
        for path, node in kernel_tree(name, work).items()
        if not (is_whiteout(node) and path not in theirs.tree)
    }
    differing = differences(without_the_time_of_unpacking(theirs, ours), ours)
    removed = REMOVED_BY_A_MARK.get(name, [])
    assert {key for key in differing if key[1] == "there"} == {(path, "there") for path in removed}
    # Links and subdirectories that went are not counted in what they were.
    assert {field for _, field in differing} <= ({"there", "nlink", "first"} if removed else set())


@pytest.mark.parametrize("name", REFUSED_AFTER_A_MARK)
def test_first_layer_in_which_a_mark_removes_a_directory_with_an_entry(name: str, first: dict[str, Unpacked]) -> None:
    assert not layer_file(name)[1]
    assert "UtimesNanoAt" in first[name].error


def test_made_parents_e17(work: Path, alone: dict[str, Unpacked], above: dict[str, Unpacked]) -> None:
    ours = kernel_tree("e-17-made", work)
    paths = (b"made", b"made/deep")
    assert {ours[path].mtime for path in paths} == {0}
    expected = {(path, "mtime") for path in (b"", *paths)}
    assert differences(alone["e-17-made"].tree, ours).keys() == expected, "E17 is obsolete"
    expected |= {(path, field) for path in paths for field in ("mode", "uid", "gid", "xattrs")}
    assert differences(above["e-17-made"].tree, ours).keys() == expected, "E17 is obsolete"


def test_time_of_a_whiteout_e18(work: Path, alone: dict[str, Unpacked]) -> None:
    ours = kernel_tree("e-18-whiteout", work)
    their_time, our_time = differences(alone["e-18-whiteout"].tree, ours)[b"w", "mtime"]
    assert their_time >= alone["e-18-whiteout"].started, "E18 is obsolete"
    assert our_time == 0


def test_every_exception_of_the_format_has_a_case() -> None:
    table = (harness.CHECKOUT / "docs/formats.md").read_text().partition("### Exceptions")[2]
    documented = set(re.findall(r"^\| (E\d+) \|", table, re.MULTILINE))
    # E17 is in all layers with made parents, and has a test of its own; those of chains are in test_chains.py.
    of_chains = set(re.findall(r"_e(\d+)\(", (harness.CHECKOUT / "tests/differential/test_chains.py").read_text()))
    assert documented == {expected.exception for expected in EXPECTED.values()} | {"E17"} | {f"E{n}" for n in of_chains}
    assert EXPECTED.keys() | REMOVED_BY_A_MARK.keys() | KERNEL_JUDGES <= CASES.keys()


def test_walking_sees_every_attribute(tmp_path: Path) -> None:
    """What the comparison cannot see it cannot compare."""
    (tmp_path / "f").write_bytes(b"1")
    os.link(tmp_path / "f", tmp_path / "g")
    os.symlink("f", tmp_path / "s")
    os.mknod(tmp_path / "c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    before = walk(tmp_path)
    assert before[b"f"].first == before[b"g"].first == b"f"
    assert before[b"s"].link == b"f"
    assert before[b"c"].rdev == (1, 3)
    os.utime(tmp_path / "f", ns=(0, 1))
    os.chmod(tmp_path / "c", 0o611)
    os.lchown(tmp_path / "s", 5, 6)
    os.setxattr(tmp_path / "g", "trusted.x", b"1")
    os.unlink(tmp_path / "g")
    seen = differences(before, walk(tmp_path))
    assert seen.keys() - {(b"", "mtime")} == {
        (b"f", "mtime"), (b"f", "nlink"), (b"f", "xattrs"), (b"g", "there"), (b"c", "mode"), (b"s", "uid"),
        (b"s", "gid"),
    }  # fmt: skip
