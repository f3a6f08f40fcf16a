# SPDX-License-Identifier: Apache-2.0
"""The same layer in several ways must be the same files: the kernel's mount, our extraction, GNU tar's."""

from __future__ import annotations

import filecmp
import os
import struct
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import layers
from blockdev.formats.layer_file import FORMATS
from blockdev.kernel import mounts
from snapshotter.cli import layer as cli_layer
from tests.chains import make
from tests.file_trees import differences, observe
from tests.golden import test_tar_index
from tests.golden.test_tar_index import tar_of
from tests.harness import EROFS_UTILS, erofs_tool
from verity import veritysetup
from verity.tree import Geometry

pytestmark = [pytest.mark.root, pytest.mark.erofs]

GNU_OPTIONS = ("--format=pax", "--xattrs", "--xattrs-include=*", "--sort=name")
NO_ID = 0xFFFFFFFF  # in an entry of an ACL that is about no user of its own
SLICE_BYTES = 1 << 30  # that of ./dev bench, which leaves it there


@contextmanager
def mounted(layer: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    mounts.mount_erofs(layer, at, cli_layer.inspect(layer)["data_block_bytes"])
    try:
        yield at
    finally:
        mounts.unmount(at)


# Attributes that ext4, on which tests run, has no room for.
TOO_MUCH = ("mt-xattr-limits", "mt-xattr-body-limit", "ek-tails-behind-xattrs")
NAMES = [v["name"] for v in test_tar_index.VECTORS if "refused" not in v and v["name"] not in TOO_MUCH]
formats = pytest.mark.parametrize("layer_format", ["tar-index", "erofs-4k"])


def in_4k(name: str) -> pytest.MarkDecorator | tuple[()]:
    """Those that are about more than the tree; all of them in ./dev soak."""
    return () if name.startswith("ek-") else pytest.mark.soak


@pytest.mark.parametrize(
    ("layer_format", "name"),
    [
        *(pytest.param("tar-index", name) for name in NAMES),
        *(pytest.param("erofs-4k", name, marks=in_4k(name)) for name in NAMES),
    ],
)
def test_an_extracted_golden_layer_is_what_the_kernel_shows(tmp_path: Path, layer_format: str, name: str) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(make(tar_of(name), layer_format).file)
    done = cli_layer.extract(layer, tmp_path / "files")
    with mounted(layer, tmp_path / "mount") as mount:
        assert differences(observe(tmp_path / "files"), observe(mount)) == {}
    assert done["warnings"] == {}


def gnu_tar(*arguments: str | Path) -> None:
    subprocess.run(["tar", *map(str, arguments)], check=True, capture_output=True, timeout=600)


@pytest.mark.parametrize(
    ("layer_format", "directory"),
    [
        ("tar-index", "/etc"),
        ("tar-index", sysconfig.get_path("stdlib")),
        ("erofs-4k", "/etc"),
        pytest.param("erofs-4k", sysconfig.get_path("stdlib"), marks=pytest.mark.soak),
        pytest.param("erofs-4k", "/usr/share", marks=pytest.mark.soak),
    ],
)
def test_files_of_this_machine_are_the_same_mounted_extracted_and_by_gnu_tar(
    tmp_path: Path, layer_format: str, directory: str
) -> None:
    source = tmp_path / "tar"
    gnu_tar("-C", directory, *GNU_OPTIONS, "-cf", source, ".")
    compare_all(tmp_path, source, layer_format)


@formats
def test_every_kind_of_file_is_the_same_mounted_extracted_and_by_gnu_tar(tmp_path: Path, layer_format: str) -> None:
    top = os.fsencode(tmp_path / "source")
    os.makedirs(top + b"/d/sticky")
    for name, mode in ((b"plain", 0o640), (b"setuid", 0o4755), (b"\xff\x1b[31m", 0), (b"n" * 255, 0o777)):
        with open(os.path.join(top, b"d", name), "wb") as file:
            file.write(name * 3000)
        os.chmod(file.name, mode)
        os.utime(file.name, ns=(0, 1_700_000_000_123_456_789))
    os.setxattr(top + b"/d/plain", "user.name", b"value\0\xff")
    os.setxattr(top + b"/d/plain", "user.empty", b"")
    os.setxattr(top + b"/d/setuid", "security.capability", struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0))
    # version, then (tag, permissions, id): owner, user 7, group, mask, others
    acl = struct.pack("<I" + "HHI" * 5, 2, 1, 6, NO_ID, 2, 4, 7, 4, 4, NO_ID, 16, 4, NO_ID, 32, 0, NO_ID)
    os.setxattr(top + b"/d/plain", "system.posix_acl_access", acl)
    os.setxattr(top + b"/d/sticky", "system.posix_acl_default", acl)
    os.chown(top + b"/d/sticky", 3_000_000, 4)
    os.chmod(top + b"/d/sticky", 0o3751)
    with open(top + b"/d/sticky/inherits", "wb"):
        pass
    os.link(top + b"/d/plain", top + b"/a-link")
    os.symlink(b"/nowhere/\xfe", top + b"/symlink")
    os.lchown(top + b"/symlink", 5, 6)
    os.link(top + b"/symlink", top + b"/z-symlink", follow_symlinks=False)
    os.mkfifo(top + b"/fifo", 0o622)
    os.mknod(top + b"/char", 0o020666, os.makedev(1, 3))
    os.mknod(top + b"/block", 0o060660, os.makedev(4000, 70_000))
    gnu_tar("-C", tmp_path / "source", *GNU_OPTIONS, "-cf", tmp_path / "tar", ".")
    compare_all(tmp_path, tmp_path / "tar", layer_format)


@pytest.mark.slow
@pytest.mark.soak  # 1 GiB of /usr
@formats
def test_a_large_slice_of_usr_is_the_same_mounted_extracted_and_by_gnu_tar(tmp_path: Path, layer_format: str) -> None:
    cache = Path(__file__).parents[2] / ".cache/bench"
    compare_all(tmp_path, layers.usr(cache, SLICE_BYTES).tar, layer_format, (b"usr",))


def compare_all(directory: Path, source: Path, layer_format: str, unnamed: tuple[bytes, ...] = ()) -> None:
    """And the tar that comes back; of erofs-utils and veritysetup that they take the file."""
    layer = directory / "layer"
    record = cli_layer.build(source, layer, layer_format)
    cli_layer.tar(layer, directory / "back", diff_id=record["diff_id"])
    assert filecmp.cmp(directory / "back", source, shallow=False)
    params = FORMATS[layer_format].params
    geometry = Geometry(record["data_size_bytes"] // params.data_block_bytes, params)
    veritysetup.verify(str(layer), geometry, bytes.fromhex(record["root_hash"]))
    if EROFS_UTILS.exists():
        erofs_tool("fsck.erofs", f"--extract={directory / 'fsck'}", layer)
    done = cli_layer.extract(layer, directory / "ours", root_hash=record["root_hash"])
    assert done["warnings"] == {}
    (directory / "theirs").mkdir()
    # Without the delay GNU tar has set a directory's time by when members of it come that are not right behind it.
    options = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--delay-directory-restore")
    gnu_tar("-C", directory / "theirs", "-xpf", source, *options)
    ours, theirs = observe(directory / "ours"), observe(directory / "theirs")
    with mounted(layer, directory / "mount") as mount:
        kernels = observe(mount)
    assert len(kernels) > 10
    assert differences(ours, kernels) == {}
    # A layer's root, and parents that its tar does not name, have attributes that only the format's rules give them.
    for path in {b"", *unnamed}:
        assert kernels.pop(path)["mode"] == "0o40755"
        del theirs[path]
    assert differences(theirs, kernels) == {}
