# SPDX-License-Identifier: Apache-2.0
"""A tar mounted through metadata on another device shows what its `tar-index` layer shows."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from blockdev.errors import BlockdevError
from blockdev.formats.limits import Limits
from blockdev.formats.tar_mount import TarMountWriter
from blockdev.kernel import loop, mounts
from tests.differential.trees import walk
from tests.golden.test_tar_index import VECTORS, build, tar_of
from tests.harness import run

TAKEN = [vector["name"] for vector in VECTORS if "refused" not in vector]


def written(tar: bytes, piece_bytes: int = 1 << 20) -> bytes:
    writer, out = TarMountWriter(Limits()), io.BytesIO()
    for at in range(0, len(tar), piece_bytes):
        writer.feed(tar[at : at + piece_bytes])
    size = writer.write(out.write, hashlib.sha256(tar).digest())
    assert (size, size % 4096) == (len(out.getvalue()), 0)
    return out.getvalue()


def test_pieces_make_no_difference() -> None:
    tar = tar_of(TAKEN[0])
    assert written(tar, 511) == written(tar)


def test_what_tar_index_refuses_is_refused() -> None:
    for vector in VECTORS:
        if "refused" in vector:
            with pytest.raises(BlockdevError):
                written(tar_of(vector["name"]))


@pytest.mark.root
@pytest.mark.erofs
@pytest.mark.parametrize("name", TAKEN)
def test_the_kernel_shows_the_same_tree(name: str, tmp_path: Path) -> None:
    tar = tar_of(name)
    paths = [tmp_path / kind for kind in ("tar", "index", "layer")]
    # As in a tarfs layer: what follows the tar is nothing to the mount. A loop device has whole sectors.
    paths[0].write_bytes(tar + bytes(-len(tar) % 4096))
    paths[1].write_bytes(written(tar))
    paths[2].write_bytes(build(tar)[1])
    target = tmp_path / "mounted"
    target.mkdir()
    mounts.mount_erofs(paths[2], target, 512)
    try:
        expected = walk(target)
    finally:
        mounts.unmount(target)
    fd = os.open(paths[0], os.O_RDONLY)
    device = loop.attach_read_only(fd, 512)
    os.close(fd)
    try:
        run("mount", "-t", "erofs", "-o", f"ro,device={os.readlink(f'/proc/self/fd/{device}')}", paths[1], target)
        try:
            assert walk(target) == expected
        finally:
            run("umount", target)
    finally:
        os.close(device)
