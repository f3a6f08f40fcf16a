# SPDX-License-Identifier: Apache-2.0
"""The archiver as builds start it: what it writes, what it says, what it may do, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from zstandard import ZstdDecompressor

from blockdev.errors import BuildFailed, FormatError, LimitExceeded, UnsupportedError
from blockdev.formats.compression import Compression
from blockdev.formats.limits import Limits
from blockdev.workers.archive import Archive, ArchiveRecord, ArchiveRequest, archiving
from blockdev.workers.launch import BuildRequest, run_build
from blockdev.workers.parameters import Output
from tests.chains import make
from tests.golden import make_tars
from tests.unit.test_changeset import archive as archive_here
from tests.unit.test_sandbox import descriptors_of, limits_of, threads_of
from tests.unit.test_workers import children, command, digest_of

needs_filter = pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no table of system calls")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    directory = tmp_path / "fs"
    (directory / "d").mkdir(parents=True)
    (directory / "d" / "big").write_bytes(hashlib.shake_128(b"seed").digest(3 << 20))
    (directory / "plain").write_text("x")
    (directory / "link").symlink_to("plain")
    os.setxattr(directory / "plain", "user.a", b"b")
    return directory


@asynccontextmanager
async def running(source: Path, **fields: Any) -> AsyncIterator[Archive]:
    fd = os.open(source, os.O_RDONLY)
    try:
        async with archiving(ArchiveRequest(source_fd=fd, name="some changes", **fields)) as archive:
            yield archive
    finally:
        os.close(fd)
    assert not children()


async def read(fd: int) -> bytes:
    def all_of_it() -> bytes:
        out = bytearray()
        while piece := os.read(fd, 1 << 20):
            out += piece
        return bytes(out)

    return await asyncio.to_thread(all_of_it)


async def archived(source: Path, **fields: Any) -> tuple[bytes, ArchiveRecord]:
    async with running(source, **fields) as archive:
        out = await read(archive.fd)
        record = await archive.finish()
    assert record is not None
    return out, record


async def test_the_tar_is_that_of_the_directory(top: Path) -> None:
    expected, changeset = archive_here(top)
    out, record = await archived(top, digests=True)
    assert out == expected
    assert record == ArchiveRecord(len(out), len(out), digest_of(out), digest_of(out), changeset.entries, {})


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.ZSTD])
async def test_compressed_it_is_the_same_tar_and_the_same_bytes_each_time(top: Path, kind: Compression) -> None:
    expected, _ = archive_here(top)
    out, record = await archived(top, compression=kind, digests=True)
    unpacked = gzip.decompress(out) if kind is Compression.GZIP else ZstdDecompressor().decompressobj().decompress(out)
    assert unpacked == expected
    assert (record.diff_id, record.blob_digest) == (digest_of(expected), digest_of(out))
    assert (record.tar_size_bytes, record.blob_size_bytes) == (len(expected), len(out))
    assert (await archived(top, compression=kind))[0] == out


@pytest.mark.parametrize("layer_format", ["tar-index", "erofs-4k"])
async def test_the_tar_of_a_layer_file_is_given_back(tmp_path: Path, layer_format: str) -> None:
    path, tar = tmp_path / "file", make_tars.CASES["sizes"]()
    file = make(tar, layer_format).file
    path.write_bytes(file)
    out, record = await archived(path, layer_size_bytes=len(file), digests=True)
    assert out == tar
    assert record.diff_id == digest_of(out)
    with pytest.raises(FormatError, match=r"^some changes: no valid trailer"):
        await archived(path, layer_size_bytes=len(file) - 4096)


async def test_an_error_names_what_it_was_about(top: Path) -> None:
    with pytest.raises(LimitExceeded, match=r"^some changes: .*over the limit of 1000"):
        await archived(top, limits=Limits(tar_bytes=1000))
    (top / ".wh.x").touch()
    with pytest.raises(UnsupportedError, match=r"^some changes: b'.wh.x'"):
        await archived(top)


async def test_who_wants_no_more_ends_it(top: Path) -> None:
    async with running(top) as archive:
        assert await archive.finish() is None


async def test_leaving_it_leaves_no_process(top: Path) -> None:
    with pytest.raises(RuntimeError):
        async with running(top):
            raise RuntimeError
    assert not children()


async def test_one_that_is_killed_has_written_nothing(top: Path) -> None:
    async with running(top) as archive:
        [pid] = children()
        os.kill(pid, signal.SIGKILL)
        await read(archive.fd)
        with pytest.raises(BuildFailed, match="some changes: the archiver was killed by signal 9"):
            await archive.finish()


async def shut(pid: int) -> None:
    for _ in range(2000):
        if b"archiver" in command(pid) and all(task["Seccomp"] == "2" for task in threads_of(pid)):
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


@needs_filter
async def test_it_keeps_what_reading_needs_and_no_more(top: Path) -> None:
    async with running(top) as archive:
        [pid] = children()
        await shut(pid)
        [status] = threads_of(pid)
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            # CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 1 << 2 | 1 << 21
            assert int(status["CapBnd"], 16) == int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
            found = descriptors_of(pid)
            assert [target for target in found if "memfd" in target] == ["/memfd:report (deleted)"] * 2
            assert len([target for target in found if target.startswith("pipe:")]) == 1
            assert not [target for target in found if target.startswith("socket:")]
        limits = limits_of(pid)
        # By the numbers that this process gave it, and a few for the directories that it goes through.
        highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
        assert int(limits["open files"]) <= highest + 32
        assert limits["core file size"] == "0"
        await read(archive.fd)
        assert await archive.finish() is not None


@pytest.mark.root
async def test_it_reads_what_is_nobodys_to_read(top: Path) -> None:
    (top / "d" / "big").chmod(0)
    (top / "d").chmod(0)
    os.chown(top / "d", 1234, 1234)
    os.setxattr(top / "d", "trusted.overlay.opaque", b"y")
    expected, _ = archive_here(top)
    out, _ = await archived(top)
    assert out == expected
    assert b"d/.wh..wh..opq" in out


async def test_a_build_takes_it_as_its_blob(top: Path, tmp_path: Path) -> None:
    expected, _ = archive_here(top)
    staged = os.open(tmp_path / "staged", os.O_RDWR | os.O_CREAT)
    spool = os.open(tmp_path / "spool", os.O_RDWR | os.O_CREAT)
    try:
        async with running(top) as archive:
            [record] = await run_build(
                BuildRequest(
                    blob_fd=archive.fd,
                    outputs=(Output("tar-index", staged, spool),),
                    media_type="application/vnd.oci.image.layer.v1.tar",
                    layer_name="some changes",
                )
            )
            assert await archive.finish() is not None
    finally:
        os.close(staged)
        os.close(spool)
    assert record.diff_id == record.blob_digest == digest_of(expected)
