# SPDX-License-Identifier: Apache-2.0
"""Real builds in their two processes, and what happens when one of them, the disk or the blob fails."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blockdev.errors import (
    BlockdevError,
    BuildFailed,
    CompressionError,
    DigestMismatch,
    FormatError,
    LimitExceeded,
    NoSpace,
    UnsupportedError,
)
from blockdev.formats.limits import Limits
from blockdev.workers import launch
from blockdev.workers.launch import BuildRecord, BuildRequest, run_build
from blockdev.workers.parameters import Output
from tests.golden import make_tars
from tests.golden.test_tar_index import build as build_here
from tests.golden.test_tarfs import build as build_tarfs

LAYER = "application/vnd.oci.image.layer.v1.tar"


def big_tar(size_bytes: int = 8 << 20) -> bytes:
    tar = make_tars.T()
    tar.f("big", hashlib.shake_128(b"seed").digest(size_bytes))
    return bytes(tar.done())


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def one(builds: Awaitable[list[BuildRecord]]) -> BuildRecord:
    [record] = await builds
    return record


Run = Callable[..., Awaitable[BuildRecord]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Build a blob; the keywords replace fields of the request."""
    with ExitStack() as stack:

        def file(name: str) -> int:
            fd = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            stack.callback(os.close, fd)
            return fd

        def start(blob: bytes, suffix: str = "", **fields: Any) -> Awaitable[BuildRecord]:
            (tmp_path / "blob").write_bytes(blob)
            blob_fd = os.open(tmp_path / "blob", os.O_RDONLY)
            stack.callback(os.close, blob_fd)
            output: dict[str, Any] = {"format": "tar-index", "staged_fd": file("staged"), "spool_fd": file("spool")}
            output |= {name: fields.pop(name) for name in output.keys() & fields.keys()}
            request = {
                "blob_fd": blob_fd, "outputs": (Output(**output),), "media_type": LAYER + suffix,
                "layer_name": "some layer", "expected_digest": digest_of(blob), "expected_size_bytes": len(blob),
            }  # fmt: skip
            return one(run_build(BuildRequest(**{**request, **fields})))

        yield start
    assert not children()


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def full() -> Iterator[int]:
    """A file on a full disk."""
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


async def worker(name: str) -> int:
    for _ in range(20_000):
        for pid in children():
            if f"blockdev.workers.{name}".encode() in command(pid):
                return pid
        await asyncio.sleep(0.005)
    raise TimeoutError(name)


@pytest.mark.parametrize("suffix", ["", "+gzip"])
async def test_a_build_in_its_processes_is_the_build(run: Run, tmp_path: Path, suffix: str) -> None:
    tar = big_tar()
    built, data = build_here(tar)
    blob = gzip.compress(tar, 1) if suffix else tar
    record = await run(blob, suffix)
    assert record.root_hash == built.root_hash.hex()
    assert (record.diff_id, record.blob_digest) == (digest_of(tar), digest_of(blob))
    assert (tmp_path / "staged").read_bytes() == data
    assert set(record.usage) == ({"builder", "decompressor"} if suffix else {"builder"})
    assert all(0 < used["peak_rss_bytes"] < 150_000_000 for used in record.usage.values())


@pytest.mark.parametrize("suffix", ["", "+gzip"])
async def test_a_full_disk_is_no_rotten_blob(run: Run, full: int, suffix: str) -> None:
    tar = big_tar()
    with pytest.raises(NoSpace, match="some layer"):
        await run(gzip.compress(tar, 1) if suffix else tar, suffix, staged_fd=full)


@pytest.mark.parametrize("suffix", ["", "+gzip"])
async def test_a_rotten_blob_explains_even_a_full_disk(run: Run, full: int, suffix: str) -> None:
    blob = gzip.compress(big_tar(), 1) if suffix else big_tar()
    with pytest.raises(DigestMismatch, match="some layer"):
        await run(blob, suffix, staged_fd=full, expected_digest=digest_of(b"another"))


@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
async def test_a_blob_that_cannot_be_read_is_not_corrupt(run: Run, tmp_path: Path, suffix: str) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BuildFailed, match="Is a directory"):
            await run(b"any", suffix, blob_fd=directory)
    finally:
        os.close(directory)


@pytest.mark.parametrize("name", ["builder", "decompressor"])
async def test_a_worker_that_is_killed_fails_its_build_alone(run: Run, name: str) -> None:
    async def kill() -> None:
        os.kill(await worker(name), signal.SIGKILL)

    read, write = os.pipe()  # a blob that does not end before the kill
    try:
        killing = asyncio.create_task(kill())
        os.write(write, gzip.compress(big_tar(1 << 20), 1)[:60_000])
        building = asyncio.ensure_future(
            run(b"", "+gzip", blob_fd=read, expected_size_bytes=None, expected_digest=None)
        )
        await killing
        os.close(write)
        with pytest.raises(BuildFailed, match="signal 9"):
            await building
    finally:
        os.close(read)


async def test_a_cancelled_build_leaves_no_process(run: Run) -> None:
    read, write = os.pipe()
    try:
        building = asyncio.ensure_future(
            run(b"", "+gzip", blob_fd=read, expected_size_bytes=None, expected_digest=None)
        )
        await worker("decompressor")
        building.cancel()
        with pytest.raises(asyncio.CancelledError):
            await building
        assert not children()
    finally:
        os.close(read)
        os.close(write)


async def test_expansion_is_measured_against_the_whole_blob(run: Run) -> None:
    """Zeros first, then what does not compress: the beginning alone expands a thousand times."""
    tar = make_tars.T()
    tar.f("zeros", bytes(24 << 20))
    tar.f("random", hashlib.shake_128(b"x").digest(1 << 20))
    data = bytes(tar.done())
    blob = gzip.compress(data, 6)
    ratio = len(data) // len(blob) + 1
    bounds = {"expansion_floor_bytes": 1 << 20}
    for _ in range(3):
        await run(blob, "+gzip", limits=Limits(expansion_ratio=ratio, **bounds))
        with pytest.raises(LimitExceeded, match=f"blob of {len(blob)} bytes expands more than {ratio // 2} times"):
            await run(blob, "+gzip", limits=Limits(expansion_ratio=ratio // 2, **bounds))


@pytest.mark.parametrize(
    "report",
    [
        '{"error": "DigestMismatch", "message": "forged"}',
        '{"error": "NoSpace", "message": "forged"}',
        "[" * 60_000,
        "x" * 100_000,
        "null",
        '{"size_bytes": "many"}',
        "",
    ],
)
async def test_whatever_the_decompressor_says_the_verdict_is_ours(
    run: Run, monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    """It parses hostile bytes in C. Taken over, it can choose the tar and what it reports."""
    start = launch.start

    async def forged(program: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        if program == "builder":
            return await start(program, *arguments, **options)
        code = f"import os, sys; sys.stderr.write({report!r}); sys.stderr.flush(); os._exit({int('error' in report)})"
        return await asyncio.create_subprocess_exec(sys.executable, "-c", code, start_new_session=True, **options)

    monkeypatch.setattr(launch, "start", forged)
    with pytest.raises(BuildFailed) as caught:
        await run(gzip.compress(big_tar(1 << 20)), "+gzip")
    assert type(caught.value) is BuildFailed


@pytest.mark.parametrize(
    ("blob", "suffix", "fields", "error", "words"),
    [
        (big_tar(4096)[:3000], "", {}, FormatError, "ends inside"),
        (gzip.compress(big_tar(1 << 16))[:-9], "+gzip", {}, CompressionError, "truncated"),
        (big_tar(4096), "+brotli", {}, UnsupportedError, "media type"),
        (big_tar(4096), "", {"format": "ext4"}, FormatError, "not known"),
        (big_tar(4096), "", {"expected_size_bytes": 17}, DigestMismatch, "blob has 10240 bytes, not 17"),
        (big_tar(1 << 20), "", {"limits": Limits(tar_bytes=1 << 16)}, LimitExceeded, "65536"),
    ],
)
async def test_an_error_names_the_layer_and_the_reason(
    run: Run, blob: bytes, suffix: str, fields: dict[str, Any], error: type[BlockdevError], words: str
) -> None:
    with pytest.raises(error, match=f"layer some layer: .*{words}"):
        await run(blob, suffix, **fields)


@pytest.mark.parametrize("suffix", ["", "+gzip"])
async def test_leaves_that_cannot_be_kept_are_no_rotten_blob(run: Run, full: int, suffix: str) -> None:
    tar = big_tar(140 << 20)  # its leaves do not stay in memory
    with pytest.raises(NoSpace, match="some layer"):
        await run(gzip.compress(tar, 1) if suffix else tar, suffix, spool_fd=full)


async def test_several_formats_come_out_of_one_pass(run: Run, tmp_path: Path) -> None:
    tar = big_tar()
    blob = gzip.compress(tar, 1)
    (tmp_path / "blob").write_bytes(blob)
    names = ("tarfs", "tar-index", "tarfs-genpolicy")
    with ExitStack() as stack:

        def file(name: str) -> int:
            return stack.enter_context((tmp_path / name).open("w+b")).fileno()

        request = BuildRequest(
            blob_fd=stack.enter_context((tmp_path / "blob").open("rb")).fileno(),
            outputs=tuple(Output(name, file(name), file(f"{name}-spool")) for name in names),
            media_type=LAYER + "+gzip",
            layer_name="some layer",
            expected_digest=digest_of(blob),
        )
        records = await run_build(request)
    assert [record.format for record in records] == list(names)
    assert {record.diff_id for record in records} == {digest_of(tar)}
    built, data = build_here(tar)
    assert (tmp_path / "tar-index").read_bytes() == data
    assert records[1].root_hash == built.root_hash.hex()
    expected, tarfs = build_tarfs(tar)
    assert (tmp_path / "tarfs").read_bytes() == tarfs
    assert records[0].root_hash == records[2].root_hash == expected.root_hash.hex()


async def test_a_strict_build_refuses_what_would_come_out_wrong(run: Run) -> None:
    tar = make_tars.T()
    tar.f("su", b"", mode=0o4755)
    blob = bytes(tar.done())
    assert (await run(blob, format="tarfs")).warnings == {"lost_mode_bits": 1}
    with pytest.raises(FormatError, match=r"some layer: .*lost_mode_bits 1"):
        await run(blob, format="tarfs", strict=True)
