# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import pytest

from verity import trailer, veritysetup
from verity.errors import VerificationFailed, VerityError, VeritysetupFailed
from verity.hasher import LeafStore, leaf_digests
from verity.params import Params
from verity.table import dm_table
from verity.tree import Geometry, write_tree
from verity.verify import read_verified, verify_all

needs_veritysetup = pytest.mark.skipif(
    not shutil.which("veritysetup", path="/usr/sbin:/usr/bin"), reason="veritysetup is not installed (cryptsetup-bin)"
)


def make(blocks: int, params: Params) -> tuple[bytes, Geometry, bytes]:
    """Data with its tree behind it, the geometry, the root hash."""
    data = b"".join(hashlib.sha256(b"%d" % i).digest() * (params.data_block_bytes // 32) for i in range(blocks))
    leaves = LeafStore()
    leaves.append(leaf_digests(data, params))
    out = io.BytesIO()
    root = write_tree(leaves, params, out.write)
    leaves.close()
    return data + out.getvalue(), Geometry(blocks, params), root


def reader(file: bytes):  # type: ignore[no-untyped-def]
    return lambda offset, size: file[offset : offset + size]


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 16384, 16385])
def test_geometry_is_the_kernels(blocks: int) -> None:
    levels = Geometry(blocks, Params(512, 4096)).levels
    expected = {1: [], 2: [1], 128: [1], 129: [1, 2], 16384: [1, 128], 16385: [1, 2, 129]}[blocks]
    assert [count for _, count in levels] == expected
    assert [offset for offset, _ in levels] == [4096 * sum(expected[:i]) for i in range(len(expected))]


def test_one_block_has_no_tree() -> None:
    params = Params(512, 4096)
    file, geometry, root = make(1, params)
    assert geometry.tree_size_bytes == 0
    assert root == hashlib.sha256(params.salt + file).digest()
    verify_all(reader(file), geometry, root)
    assert read_verified(reader(file), geometry, root, 0) == file


@needs_veritysetup
@pytest.mark.tool
@pytest.mark.parametrize("params", [Params(512, 512), Params(512, 4096), Params(4096, 4096), Params(1024, 2048, b"ab")])
@pytest.mark.parametrize("blocks", [2, 16, 17, 300, 5000])
def test_veritysetup_agrees(tmp_path: Path, params: Params, blocks: int) -> None:
    blocks += -blocks % (params.hash_block_bytes // params.data_block_bytes)
    file, geometry, root = make(blocks, params)
    path = tmp_path / "file"
    path.write_bytes(file)
    veritysetup.verify(str(path), geometry, root)
    data = tmp_path / "data"
    data.write_bytes(file[: geometry.data_size_bytes])
    assert veritysetup.format_tree(str(data), str(tmp_path / "tree"), params, blocks) == root
    assert (tmp_path / "tree").read_bytes() == file[geometry.data_size_bytes :]
    path.write_bytes(b"\xff" + file[1:])
    with pytest.raises(VeritysetupFailed):
        veritysetup.verify(str(path), geometry, root)


def test_every_flipped_bit_is_found() -> None:
    file, geometry, root = make(300, Params(512, 512))
    verify_all(reader(file), geometry, root)
    for offset in range(0, len(file), 97):
        bad = bytearray(file)
        bad[offset] ^= 1 << offset % 8
        with pytest.raises(VerificationFailed):
            verify_all(reader(bytes(bad)), geometry, root)


def test_the_first_bad_block_is_named() -> None:
    file, geometry, root = make(300, Params(512, 4096))
    bad = bytearray(file)
    bad[17 * 512 + 3] ^= 1
    bad[200 * 512] ^= 1
    with pytest.raises(VerificationFailed, match="data block 17 "):
        verify_all(reader(bytes(bad)), geometry, root)
    assert read_verified(reader(bytes(bad)), geometry, root, 18) == file[18 * 512 : 19 * 512]
    with pytest.raises(VerificationFailed, match="data block 17 "):
        read_verified(reader(bytes(bad)), geometry, root, 17)
    bad[geometry.data_size_bytes + 4096 + 1] ^= 1
    with pytest.raises(VerificationFailed, match="hash block of level 0 0 "):
        verify_all(reader(bytes(bad)), geometry, root)


def test_leaf_blocks_of_the_same_root_are_no_data() -> None:
    """A root hash binds no depth: the geometry that travels with it does."""
    file, geometry, root = make(300, Params(512, 4096))
    leaf_level = file[geometry.data_size_bytes + 4096 :]
    top = file[geometry.data_size_bytes : geometry.data_size_bytes + 4096]
    shallow = Geometry(len(leaf_level) // 4096, Params(4096, 4096))
    verify_all(reader(leaf_level + top), shallow, root)
    with pytest.raises(VerificationFailed):
        verify_all(reader(leaf_level + top), geometry, root)


def test_spare_bytes_of_the_tree_must_be_zero() -> None:
    params = Params(512, 4096)
    data = bytes(512 * 8)
    digests = leaf_digests(data, params)
    block = digests + b"x" + bytes(4096 - len(digests) - 1)
    root = hashlib.sha256(params.salt + block).digest()
    with pytest.raises(VerificationFailed, match="not zero"):
        verify_all(reader(data + block), Geometry(8, params), root)


def test_a_short_file_is_refused() -> None:
    file, geometry, root = make(300, Params(512, 4096))
    with pytest.raises(VerificationFailed, match="file ends"):
        verify_all(reader(file[:-1]), geometry, root)


def test_table_line() -> None:
    geometry = Geometry(16, Params(512, 4096))
    line = dm_table("/dev/vda", geometry, bytes(range(32)))
    assert line == f"0 16 verity 1 /dev/vda /dev/vda 512 4096 16 2 sha256 {bytes(range(32)).hex()} {'0' * 64}"
    with pytest.raises(VerityError):
        dm_table("/dev/vda", Geometry(15, Params(512, 4096)), bytes(32))


def test_parameters_are_checked() -> None:
    for sizes in ((256, 4096), (512, 8192), (513, 4096), (0, 0)):
        with pytest.raises(VerityError):
            Params(*sizes)
    with pytest.raises(VerityError):
        Params(512, 512, bytes(257))
    with pytest.raises(VerityError):
        Geometry(0, Params(512, 512))


def test_trailer_record() -> None:
    raw = trailer.pack(512, 4096, 77)
    assert raw == bytes.fromhex("00020000001000004d00000000000000")
    assert trailer.unpack(raw) == (512, 4096, 77)
