# SPDX-License-Identifier: Apache-2.0
"""Golden layers as others see them: the kernel's mount, fsck.erofs and veritysetup, against the model of the document.

So the bytes of a vector are no agreement between two programs of ours only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from blockdev.formats.layer_file import FORMATS
from blockdev.kernel import mounts
from tests.chains import make
from tests.golden import test_erofs_4k, test_tar_index
from tests.golden.test_tar_index import tar_of
from tests.harness import EROFS_UTILS, erofs_tool
from tests.property import reference
from verity import veritysetup
from verity.tree import Geometry

pytestmark = [pytest.mark.root, pytest.mark.tool]


def marks(layer_format: str, name: str) -> pytest.MarkDecorator | tuple[()]:
    """Of erofs-4k those that are about more than the tree; all of them in ./dev soak."""
    return pytest.mark.soak if layer_format == "erofs-4k" and not name.startswith("ek-") else ()


TAKEN: Final = [
    pytest.param(layer_format, vector, id=f"{layer_format}-{vector['name']}", marks=marks(layer_format, vector["name"]))
    for layer_format, vectors in (("tar-index", test_tar_index.MORE), ("erofs-4k", test_erofs_4k.VECTORS))
    for vector in vectors
    if "refused" not in vector
]

golden = pytest.mark.parametrize(("layer_format", "vector"), TAKEN)


@pytest.fixture
def layer(layer_format: str, vector: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "layer"
    path.write_bytes(make(tar_of(vector["name"]), layer_format).file)
    return path


@pytest.fixture
def mounted(layer_format: str, layer: Path, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "mounted"
    target.mkdir()
    mounts.mount_erofs(layer, target, FORMATS[layer_format].block_bytes)
    try:
        yield target
    finally:
        mounts.unmount(target)


def seen(path: bytes) -> dict[str, Any]:
    """What the kernel says of one name."""
    # The kernel takes no name over 255 bytes in a call, prefix included; of a longer one it says only that it is there.
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    return {
        "mode": status.st_mode,
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "links": status.st_nlink,
        "device": (os.major(status.st_rdev), os.minor(status.st_rdev)),
        "link": os.readlink(path) if kind == stat.S_IFLNK else b"",
        "data": Path(os.fsdecode(path)).read_bytes() if kind == stat.S_IFREG else b"",
        "xattrs": {
            os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) if len(name) <= 255 else b""
            for name in os.listxattr(path, follow_symlinks=False)
        },
    }


@pytest.mark.erofs
@golden
def test_the_kernel_sees_the_tree_of_the_model(vector: dict[str, Any], mounted: Path) -> None:
    root = reference.read_tar(tar_of(vector["name"]))
    nodes, counts = reference.flat(root), reference.link_counts(root)
    base = os.fsencode(mounted)
    found = {b""}
    for directory, directories, files in os.walk(base):
        found |= {os.path.relpath(os.path.join(directory, name), base) for name in directories + files}
    assert found == nodes.keys()
    inodes: dict[int, reference.Node] = {}
    for path, node in nodes.items():
        assert seen(base + b"/" + path if path else base) == {
            "mode": reference.FORMAT_BITS[node.kind] | node.mode,
            "owner": (node.uid, node.gid),
            "mtime": node.mtime[0] * 10**9 + node.mtime[1],
            "links": counts[id(node)],
            "device": node.rdev,
            "link": node.target,
            "data": node.data,
            "xattrs": {name: value if len(name) <= 255 else b"" for name, value in node.xattrs.items()},
        }, path
        assert inodes.setdefault(os.lstat(base + b"/" + path).st_ino, node) is node


@golden
def test_veritysetup_takes_the_tree(layer_format: str, vector: dict[str, Any], layer: Path) -> None:
    params = FORMATS[layer_format].params
    geometry = Geometry(vector["data_size"] // params.data_block_bytes, params)
    veritysetup.verify(str(layer), geometry, bytes.fromhex(vector["root_hash"]))


@pytest.mark.skipif(not EROFS_UTILS.exists(), reason="no erofs-utils 1.9; ./dev setup brings it")
@golden
def test_fsck_extracts_the_tree_of_the_model(vector: dict[str, Any], layer: Path, tmp_path: Path) -> None:
    nodes = reference.flat(reference.read_tar(tar_of(vector["name"])))
    extracted = tmp_path / "extracted"
    erofs_tool("fsck.erofs", f"--extract={extracted}", "--preserve", layer)
    base = os.fsencode(extracted)
    for path, node in nodes.items():
        status = os.lstat(base + b"/" + path)
        assert stat.S_IFMT(status.st_mode) == reference.FORMAT_BITS[node.kind], path
        if node.kind == "file":
            assert Path(os.fsdecode(base + b"/" + path)).read_bytes() == node.data, path
            assert (status.st_uid, status.st_gid) == (node.uid, node.gid), path
    assert sum(len(files) + len(directories) for _, directories, files in os.walk(base)) == len(nodes) - 1
