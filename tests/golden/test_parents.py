# SPDX-License-Identifier: Apache-2.0
"""Golden chains: the engine makes the parents layers of the vectors, and others see in them what the model says."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any, Final

import pytest

from blockdev.formats.layer_file import FORMATS
from blockdev.kernel import mounts
from tests.chains import make, parents_layer
from tests.golden.make_parents import CHAINS, VECTORS, tars_of
from tests.golden.make_vectors import known
from tests.harness import EROFS_UTILS, erofs_tool
from tests.property import parents_model
from verity import veritysetup
from verity.tree import Geometry

ALL: Final = [(of, vector) for of, path in VECTORS.items() for vector in known(path).values()]
NEEDED: Final = [(of, vector) for of, vector in ALL if "needs" not in vector]


def parametrized(vectors: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    """`of`: the format of the layers."""
    cases = [pytest.param(of, vector, id=f"{of}-{vector['name']}") for of, vector in vectors]
    return pytest.mark.parametrize(("of", "vector"), cases)


def test_every_chain_has_one_vector() -> None:
    for path in VECTORS.values():
        assert list(known(path)) == list(CHAINS)


@parametrized(ALL)
def test_vector(of: str, vector: dict[str, Any]) -> None:
    tars = tars_of(vector["name"])
    assert [hashlib.sha256(tar).hexdigest() for tar in tars] == vector["tar_sha256"], "the generator changed"
    layer = parents_layer([make(tar, of) for tar in tars])
    if layer is None:
        assert vector["needs"] == "none"
        return
    built = layer.built
    assert built.diff_id.hex() == vector["identity"]
    assert built.tar_size_bytes == vector["table_size"]
    assert built.entries == vector["inodes"]
    assert built.data_size_bytes == vector["data_size"]
    assert built.root_hash.hex() == vector["root_hash"]
    assert len(layer.file) == built.file_size_bytes == vector["file_size"]
    assert hashlib.sha256(layer.file).hexdigest() == vector["file_sha256"]


@pytest.fixture
def file(of: str, vector: dict[str, Any], tmp_path: Path) -> Path:
    made = parents_layer([make(tar, of) for tar in tars_of(vector["name"])])
    assert made is not None
    (tmp_path / "layer").write_bytes(made.file)
    return tmp_path / "layer"


def carried(vector: dict[str, Any]) -> dict[bytes, parents_model.Attributes]:
    view = parents_model.view_of(tars_of(vector["name"]))
    return {
        b"/".join(path[:length]): view[path[:length]].true
        for path, directory in view.items()
        if directory.differs
        for length in range(len(path) + 1)
    }


@pytest.mark.root
@pytest.mark.erofs
@parametrized(NEEDED)
def test_the_kernel_sees_the_directories_of_the_model(
    of: str, vector: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    mounts.mount_erofs(file, target, FORMATS[of].block_bytes)
    try:
        base, found = os.fsencode(target), {}
        for directory, _, files in os.walk(base):
            assert not files
            status = os.lstat(directory)
            xattrs = {os.fsencode(name): os.getxattr(directory, name) for name in os.listxattr(directory)}
            path = os.path.relpath(directory, base)
            found[b"" if path == b"." else path] = parents_model.Attributes(
                stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, divmod(status.st_mtime_ns, 10**9),
                tuple(sorted(xattrs.items())),
            )  # fmt: skip
    finally:
        mounts.unmount(target)
    assert found == carried(vector)


@pytest.mark.tool
@parametrized(NEEDED)
def test_veritysetup_takes_the_tree(of: str, vector: dict[str, Any], file: Path) -> None:
    params = FORMATS[of].params
    geometry = Geometry(vector["data_size"] // params.data_block_bytes, params)
    veritysetup.verify(str(file), geometry, bytes.fromhex(vector["root_hash"]))


@pytest.mark.root
@pytest.mark.skipif(not EROFS_UTILS.exists(), reason="no erofs-utils 1.9; ./dev setup brings it")
@parametrized(NEEDED)
def test_fsck_extracts_the_directories(vector: dict[str, Any], file: Path, tmp_path: Path) -> None:
    extracted = tmp_path / "extracted"
    erofs_tool("fsck.erofs", f"--extract={extracted}", "--preserve", file)
    base = os.fsencode(extracted)
    found = {os.path.relpath(directory, base) for directory, _, _ in os.walk(base)}
    assert {b"" if path == b"." else path for path in found} == carried(vector).keys()
