# SPDX-License-Identifier: Apache-2.0
"""Any upper directory → tar → layer → files: the same directory again, and from that the same tar."""

from __future__ import annotations

import os
import stat
import struct
import tempfile
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdev.changeset import write_changeset
from blockdev.formats.limits import Limits
from snapshotter.cli import layer as cli_layer
from snapshotter.trash import remove_tree
from tests.file_trees import differences, observe
from tests.golden.test_tar_index import build

# Overlay's marks, devices and owners are root's.
pytestmark = pytest.mark.root

NAMES: Final = st.one_of(
    st.sampled_from([b"a", b"b", b"c", b".wh", b"..x", b" ", b"n" * 255, "ü".encode(), b"\xff\xfe", b"\x1b[2J\n"]),
    st.binary(min_size=1, max_size=40).filter(
        lambda name: name not in (b".", b"..") and not set(b"/\0") & set(name) and not name.startswith(b".wh.")
    ),
)
IDS: Final = st.sampled_from([0, 1, 1000, 8**7 - 1, 8**7, 2**32 - 2])
# As far as a layer's go; what is later, or before 1970, is 0 there.
TIMES: Final = st.one_of(st.sampled_from([0, 1, 10**9, 1_700_000_000 * 10**9]), st.integers(0, 2**63 - 1))
CAPABILITY: Final = struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0)
XATTRS: Final = st.dictionaries(
    st.sampled_from(["user.a", "user.b.c", "user.\udcff", "security.capability"]), st.binary(max_size=50), max_size=2
)
KINDS: Final = ("file", "sparse", "directory", "opaque", "symlink", "hardlink", "fifo", "char", "whiteout")
ENTRIES: Final = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.integers(0, 20), NAMES, st.integers(0, 0o7777), IDS, IDS, TIMES, XATTRS,
        st.binary(max_size=1100),
    ),
    max_size=15,
)  # fmt: skip


def make(top: bytes, entries: list[tuple[str, int, bytes, int, int, int, int, dict[str, bytes], bytes]]) -> None:
    directories, files, late = [top], list[bytes](), list[tuple[bytes, int]]()
    for kind, where, name, mode, uid, gid, mtime, xattrs, data in entries:
        path = os.path.join(directories[where % len(directories)], name)
        if os.path.lexists(path) or len(path) > 3000:
            continue
        if kind == "whiteout":
            os.mknod(path, stat.S_IFCHR, 0)
            os.chown(path, 0, 0)  # of a whiteout no layer says an owner, and the directory's group is inherited
            os.utime(path, ns=(0, 0))
            continue
        if kind in ("directory", "opaque"):
            os.mkdir(path)
            directories.append(path)
            if kind == "opaque":
                os.setxattr(path, "trusted.overlay.opaque", b"y")
        elif kind == "hardlink":
            if files:
                os.link(files[where % len(files)], path, follow_symlinks=False)
            continue
        elif kind == "symlink":
            os.symlink(data.replace(b"\0", b"/") or b"x", path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "char":
            os.mknod(path, stat.S_IFCHR, os.makedev(1 + where, 3))
        else:
            with open(path, "wb") as file:
                file.write(data)
                if kind == "sparse":
                    file.truncate(100_000 + where)
        if kind not in ("directory", "opaque"):
            files.append(path)
        os.chown(path, uid, gid, follow_symlinks=False)
        if kind != "symlink":
            os.chmod(path, mode)
        if kind in ("file", "sparse", "directory"):
            for key, value in xattrs.items():
                if key != "security.capability":
                    os.setxattr(path, key, value)
                elif kind != "directory":
                    os.setxattr(path, key, CAPABILITY)
        late.append((path, mtime))
    for path, mtime in reversed(late):
        os.utime(path, ns=(0, mtime), follow_symlinks=False)


def tar_of(top: Path) -> bytes:
    out = bytearray()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_changeset(fd, lambda data: out.extend(data), limits=Limits())
    finally:
        os.close(fd)
    return bytes(out)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(entries=ENTRIES)
def test_a_directory_comes_out_of_its_layer_as_it_was(
    entries: list[tuple[str, int, bytes, int, int, int, int, dict[str, bytes], bytes]],
) -> None:
    here = Path(tempfile.mkdtemp(prefix="changeset-"))
    try:
        top, again, layer = here / "fs", here / "again", here / "layer"
        top.mkdir(mode=0o755)
        os.chmod(top, 0o755)
        make(os.fsencode(top), entries)
        tar = tar_of(top)
        assert tar == tar_of(top)
        layer.write_bytes(build(tar)[1])
        assert cli_layer.extract(layer, again)["warnings"] == {}
        # The top has no entry: a layer's root is always the same.
        left, right = observe(top), observe(again)
        for tree in (left, right):
            del tree[b""]["mtime_ns"]
        assert differences(left, right) == {}
        assert tar_of(again) == tar
    finally:
        remove_tree(here)
