# SPDX-License-Identifier: Apache-2.0
"""One layer as a tree, seen three ways: what containerd unpacks, what the kernel mounts, what our reader reads."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import Trailer
from blockdev.kernel import mounts
from tests.harness import UNPACK


@dataclass(frozen=True, slots=True)
class Node:
    """All that one name shows. `first` is the first name of its inode: two names are hardlinks where it is the same."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int  # nanoseconds
    nlink: int
    rdev: tuple[int, int]
    link: bytes
    content: bytes
    xattrs: frozenset[tuple[bytes, bytes]]
    first: bytes


Tree = dict[bytes, Node]
# (name, field) → (containerd's, ours); a name that only one side has is the field "there".
Differences = dict[tuple[bytes, str], tuple[Any, Any]]


def walk(root: Path) -> Tree:
    tree: Tree = {}
    firsts: dict[int, bytes] = {}
    todo = [b""]
    while todo:
        name = todo.pop()
        path = os.path.join(os.fsencode(root), name)
        found = os.lstat(path)
        first = firsts.setdefault(found.st_ino, name)
        kind = stat.S_IFMT(found.st_mode)
        device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        tree[name] = Node(
            kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns, found.st_nlink,
            (os.major(found.st_rdev), os.minor(found.st_rdev)) if device else (0, 0),
            os.readlink(path) if kind == stat.S_IFLNK else b"",
            Path(os.fsdecode(path)).read_bytes() if kind == stat.S_IFREG else b"",
            frozenset((os.fsencode(key), _xattr(path, key)) for key in os.listxattr(path, follow_symlinks=False)),
            first,
        )  # fmt: skip
        if kind == stat.S_IFDIR:
            todo += sorted((name + b"/" + child if name else child for child in os.listdir(path)), reverse=True)
    return tree


def _xattr(path: bytes, key: str) -> bytes:
    try:
        return os.getxattr(path, key, follow_symlinks=False)
    except OSError as error:
        # The kernel lists a malformed ACL and does not hand it out.
        return f"error: {os.strerror(error.errno or 0)}".encode()


def mounted(file: Path, target: Path) -> Tree:
    """The layer file as the kernel shows it."""
    mounts.mount_erofs(file, target, 512)
    try:
        return walk(target)
    finally:
        mounts.unmount(target)


def read(file: bytes) -> Tree:
    """The layer file as our own reader shows it."""
    size = Trailer.unpack(file[-4096:]).data_size_bytes
    tree: Tree = {}
    firsts: dict[int, bytes] = {}
    for entry in Reader(lambda offset, length: file[offset : offset + length], size).walk():
        content = file[entry.data_offset_bytes :][: entry.size_bytes] if entry.data_offset_bytes else b""
        seconds, nanoseconds = entry.mtime
        tree[entry.path] = Node(
            stat.S_IFMT(entry.mode), stat.S_IMODE(entry.mode), entry.uid, entry.gid,
            seconds * 1_000_000_000 + nanoseconds, entry.nlink, entry.rdev, entry.link, content,
            frozenset(entry.xattrs.items()), firsts.setdefault(entry.inode, entry.path),
        )  # fmt: skip
    return tree


def differences(theirs: Tree, ours: Tree) -> Differences:
    found: Differences = {}
    for name in sorted(theirs.keys() | ours.keys()):
        their, our = theirs.get(name), ours.get(name)
        if their is None or our is None:
            found[name, "there"] = (their is not None, our is not None)
            continue
        for field in fields(Node):
            pair = getattr(their, field.name), getattr(our, field.name)
            if pair[0] != pair[1]:
                found[name, field.name] = pair
    return found


@dataclass(frozen=True)
class Unpacked:
    """By containerd: a tree, or the error that it refused the layer with."""

    tree: Tree
    error: str
    started: int  # nanoseconds: what has a later time has got it from unpacking, not from the tar


def unpack_all(tars: Iterable[tuple[str, bytes]], work: Path, *flags: str) -> dict[str, Unpacked]:
    """Many at once. `work` must be on a file system with trusted.* and user.* attributes, and be empty."""
    sources, targets = work / "tars", work / "trees"
    sources.mkdir()
    targets.mkdir()
    names = []
    for name, tar in tars:
        (sources / f"{name}.tar").write_bytes(tar)
        names.append(name)
    started = _now(work)
    subprocess.run([UNPACK, *flags, "-batch", sources, targets], check=True, timeout=300)
    found = {}
    for name in names:
        error = targets / f"{name}.error"
        refused = error.read_text(errors="replace") if error.exists() else ""
        found[name] = Unpacked({} if refused else walk(targets / name), refused, started)
    return found


def unpack(tar: Path, target: Path, *flags: str) -> Unpacked:
    # The target was made just before, maybe a tick of the clock earlier, and its time may be all that it gets.
    started = min(_now(target), target.stat().st_mtime_ns)
    done = subprocess.run([UNPACK, *flags, tar, target], capture_output=True, check=False, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert bool(done.returncode) == bool(done.stderr)
    return Unpacked(walk(target) if not done.returncode else {}, done.stderr.decode(errors="replace"), started)


def _now(directory: Path) -> int:
    """By the clock of the file system, which may be a tick behind."""
    probe = directory.parent / f"{directory.name}.now"
    probe.touch()
    try:
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink()
