# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import shutil
import threading
from pathlib import Path

import pytest

from verity import trailer, verify, veritysetup
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


def place(geometry: Geometry, offset: int) -> tuple[str, int | None, int, int]:
    """(kind, level, block, offset of the block) of what lies at `offset`."""
    params = geometry.params
    if offset < geometry.data_size_bytes:
        block = offset // params.data_block_bytes
        return "data", None, block, block * params.data_block_bytes
    in_tree = offset - geometry.data_size_bytes
    depth = max(number for number, (start, _) in enumerate(geometry.levels) if start <= in_tree)
    start = geometry.levels[depth][0]
    block = (in_tree - start) // params.hash_block_bytes
    at = geometry.data_size_bytes + start + block * params.hash_block_bytes
    return "hash", len(geometry.levels) - 1 - depth, block, at


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("piece_bytes", [1, 16384, 1 << 20])
@pytest.mark.parametrize("params", [Params(512, 512), Params(512, 4096), Params(4096, 512, b"salt")])
def test_a_flipped_byte_is_named_wherever_it_lies(
    monkeypatch: pytest.MonkeyPatch, params: Params, piece_bytes: int, threads: int
) -> None:
    monkeypatch.setattr(verify, "_PIECE_BYTES", max(piece_bytes, params.hash_block_bytes))
    file, geometry, root = make(300, params)
    borders = {0, geometry.data_size_bytes, len(file)}
    borders |= {geometry.data_size_bytes + start for start, _ in geometry.levels}
    offsets = {border + step for border in borders for step in (-512, -1, 0, 31, 32)}
    offsets |= set(range(0, len(file), len(file) // 40))
    for offset in sorted(offset for offset in offsets if 0 <= offset < len(file)):
        bad = bytearray(file)
        bad[offset] ^= 0x80
        with pytest.raises(VerificationFailed) as caught:
            verify_all(reader(bytes(bad)), geometry, root, threads=threads)
        found = caught.value
        assert (found.kind, found.level, found.block, found.offset_bytes) == place(geometry, offset)


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
    with pytest.raises(VerificationFailed, match="not zero") as caught:
        verify_all(reader(data + block), Geometry(8, params), root)
    found = caught.value
    assert (found.kind, found.level, found.block, found.offset_bytes) == ("hash", 0, 0, len(data))


def test_a_short_file_is_refused() -> None:
    file, geometry, root = make(300, Params(512, 4096))
    with pytest.raises(VerificationFailed, match="file ends") as caught:
        verify_all(reader(file[:-1]), geometry, root)
    found = caught.value
    assert (found.kind, found.level, found.block, found.offset_bytes) == ("end", None, None, len(file) - 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 5000])
def test_progress_goes_up_to_all_bytes(blocks: int, threads: int) -> None:
    file, geometry, root = make(blocks, Params(512, 512))
    seen: list[tuple[int, int, int]] = []
    verify_all(
        reader(file), geometry, root, threads=threads,
        progress=lambda done, total: seen.append((done, total, threading.get_ident())),
    )  # fmt: skip
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (len(file), len(file))
    assert {total for _, total, _ in seen} == {len(file)}
    assert {thread for _, _, thread in seen} == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_reading_error_has_its_place_in_the_order(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """And little more is read once something is wrong; no thread is left behind."""
    monkeypatch.setattr(verify, "_PIECE_BYTES", 1 << 16)
    file, geometry, root = make(20_000, Params(512, 4096))
    bad = bytearray(file)
    bad[600_000] ^= 1
    for broken, expected in ((300_000, OSError), (900_000, VerificationFailed)):
        reads = 0

        def read_at(offset: int, size: int, broken: int = broken) -> bytes:
            nonlocal reads
            reads += 1
            if offset <= broken < offset + size:
                raise OSError("broken disk")
            return bytes(bad[offset : offset + size])

        with pytest.raises(expected):
            verify_all(read_at, geometry, root, threads=threads)
        assert reads < 2 * (900_000 // (1 << 16) + threads + verify._PIECES_AHEAD)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify")]


def test_what_progress_raises_ends_it() -> None:
    file, geometry, root = make(20_000, Params(512, 4096))

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_all(reader(file), geometry, root, progress=progress, threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify")]


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
