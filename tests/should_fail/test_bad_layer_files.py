# SPDX-License-Identifier: Apache-2.0
"""Forged indexes, extracted: an error, and nothing outside of the directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, KernelError
from blockdev.extract import Extracted, extract
from blockdev.formats.entry import Entry
from snapshotter.cli import layer as cli_layer
from tests.unit.test_erofs_reader import Layer, directory, file, symlink

UID, GID = os.geteuid(), os.getegid()
ROOT = Entry(b"", 1, 0o040755, UID, GID, 0, (5, 0), 2, (0, 0), b"", 0, {})


def entry(path: bytes, mode: int = 0o100644, **fields: object) -> Entry:
    given: Any = {"path": path, "inode": hash(path), "mode": mode, "nlink": 1, **fields}
    return replace(ROOT, **given)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Path]:
    """A directory with what must stay as it is, beside `files`, where the layer goes."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_bytes(b"kept")
    (tmp_path / "layer").write_bytes(b"D" * 10_000)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "layer", "files"}
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept"]
    assert (tmp_path / "outside/kept").read_bytes() == b"kept"


def run(scene: Path, *entries: Entry, data_bytes_max: int = 10_000) -> Extracted:
    with (scene / "layer").open("rb") as layer:
        return extract(iter(entries), layer.fileno(), scene / "files", data_bytes_max=data_bytes_max)


FORGED: dict[str, list[Entry]] = {
    "dot-dot": [ROOT, entry(b"..")],
    "dot-dot-below": [ROOT, entry(b"a", 0o040755), entry(b"a/..")],
    "dot-dot-on-the-way": [ROOT, entry(b"../outside/new")],
    "dot-dot-as-directory": [ROOT, entry(b"..", 0o040755), entry(b"../outside", 0o040755)],
    "dot": [ROOT, entry(b".")],
    "no-name": [ROOT, entry(b"a", 0o040755), entry(b"a/")],
    "absolute": [ROOT, entry(b"/etc")],
    "slash-in-name": [ROOT, entry(b"a", 0o040755), entry(b"a//b")],
    "below-a-symlink": [ROOT, entry(b"a", 0o120777, link=b"../outside"), entry(b"a/new")],
    "below-a-symlink-as-directory": [ROOT, entry(b"a", 0o120777, link=b"../outside"), entry(b"a", 0o040755)],
    "file-over-symlink": [ROOT, entry(b"a", 0o120777, link=b"../outside/kept"), entry(b"a")],
    "symlink-over-directory": [ROOT, entry(b"a", 0o040755), entry(b"a", 0o120777, link=b"../outside"), entry(b"a/n")],
    "twice": [ROOT, entry(b"a"), entry(b"a")],
    "directory-twice": [ROOT, entry(b"a", 0o040755), entry(b"b", 0o040755), entry(b"a", 0o040755)],
    "below-a-file": [ROOT, entry(b"a"), entry(b"a/b")],
    "below-nothing": [ROOT, entry(b"a/b")],
    "below-what-was-left": [ROOT, entry(b"a", 0o040755), entry(b"b", 0o040755), entry(b"a/c")],
    "no-root": [entry(b"a")],
    "root-is-a-file": [entry(b"")],
    "root-is-a-symlink": [entry(b"", 0o120777, link=b"outside")],
    "root-twice": [ROOT, ROOT],
    "data-behind-the-end": [ROOT, entry(b"a", size_bytes=100, data_offset_bytes=9_950)],
    "too-much-data": [ROOT, entry(b"a", size_bytes=6000), entry(b"b", size_bytes=6000)],
    "long-name": [ROOT, entry(b"n" * 256)],
    "symlink-to-nothing": [ROOT, entry(b"a", 0o120777, link=b"")],
    "hardlink-to-itself-as-directory": [ROOT, entry(b"a", 0o040755), entry(b"a/b", nlink=2), entry(b"a/b", nlink=2)],
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_entries_end_in_an_error(scene: Path, name: str) -> None:
    with pytest.raises((FormatError, KernelError)):
        run(scene, *FORGED[name])


def test_the_error_names_what_could_not_be_made(scene: Path) -> None:
    with pytest.raises(KernelError, match=r"cannot extract b'a': File exists"):
        run(scene, entry(b"", 0o040755), entry(b"a"), entry(b"a"))


def test_hardlinks_stay_inside(scene: Path) -> None:
    """The second name's directory is looked up again by name; a symlink that took its place is not followed."""
    linked = entry(b"a/x", nlink=2)

    def walk() -> Iterator[Entry]:
        yield ROOT
        yield entry(b"a", 0o040755)
        yield linked
        yield entry(b"b", 0o040755)
        os.rename(scene / "files/a", scene / "files/moved")
        os.symlink("../outside", scene / "files/a")
        yield replace(linked, path=b"b/y")

    with pytest.raises(KernelError), (scene / "layer").open("rb") as layer:
        extract(walk(), layer.fileno(), scene / "files", data_bytes_max=0)


def test_a_directory_that_moves_away_is_noticed(scene: Path) -> None:
    def walk() -> Iterator[Entry]:
        yield ROOT
        yield entry(b"a", 0o040755)
        yield entry(b"a/b", 0o040755)
        os.rename(scene / "files/a/b", scene / "outside/b")
        yield entry(b"c")

    try:
        with pytest.raises(KernelError, match="moved"), (scene / "layer").open("rb") as layer:
            extract(walk(), layer.fileno(), scene / "files", data_bytes_max=0)
    finally:
        (scene / "outside/b").rmdir()


@pytest.mark.parametrize("what", ["full", "file", "symlink"])
def test_only_an_empty_directory_is_filled(scene: Path, what: str) -> None:
    target = scene / "files"
    if what == "full":
        target.mkdir()
        (target / "x").touch()
    elif what == "file":
        target.touch()
    else:
        target.symlink_to("outside")
    with pytest.raises(KernelError, match=str(target)):
        run(scene, ROOT)


def forge(edit: Callable[[Layer], None], *members: bytes) -> bytes:
    layer = Layer(*members)
    edit(layer)
    return bytes(layer.file)


def renamed(name: bytes, to: bytes) -> Callable[[Layer], None]:
    def edit(layer: Layer) -> None:
        at = layer.directory(b"")
        found = layer.file.index(name, at)
        layer.file[found : found + len(name)] = to

    return edit


def second_name(layer: Layer) -> None:
    """The directory `dd` gets the nid of the root."""
    at = layer.directory(b"")
    for record in range(at, at + 12 * 4, 12):
        if layer.file[record : record + 8] == (layer.entries()[b"dd"].inode).to_bytes(8, "little"):
            layer.file[record : record + 8] = layer.reader().superblock.root_nid.to_bytes(8, "little")
            return
    raise AssertionError("no such entry")


FILES: dict[str, bytes] = {
    "slash": forge(renamed(b"ff", b"/f"), file(b"ff", b"x")),
    "zero": forge(renamed(b"ff", b"\0f"), file(b"ff", b"x")),
    "twice": forge(renamed(b"ff", b"gg"), file(b"ff", b"x"), file(b"gg", b"y")),
    "symlink-and-directory-of-one-name": forge(
        renamed(b"s1", b"s2"), symlink(b"s1", b"../outside"), directory(b"s2"), file(b"s2/new", b"x")
    ),
    "loop": forge(second_name, directory(b"dd")),
    "size": forge(lambda layer: layer.edit(b"ff", size=1 << 40), file(b"ff", b"x")),
    "mode": forge(lambda layer: layer.edit(b"ff", mode=0o170644), file(b"ff", b"x")),
}


@pytest.mark.parametrize("name", FILES)
def test_forged_layer_files_end_in_an_error(scene: Path, name: str) -> None:
    (scene / "layer").write_bytes(FILES[name])
    with pytest.raises(BlockdevError):
        cli_layer.extract(scene / "layer", scene / "files")


def test_dot_dot_in_a_directory_is_not_a_name(scene: Path) -> None:
    """EROFS stores both dots; they say nothing to us, whatever they point at."""
    (scene / "layer").write_bytes(forge(lambda layer: None, directory(b"dd"), file(b"dd/ff", b"x")))
    assert cli_layer.extract(scene / "layer", scene / "files")["entries"] == 3
