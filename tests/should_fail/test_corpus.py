# SPDX-License-Identifier: Apache-2.0
"""Every layer of the corpus through the real workers, and once more in this process.

make_corpus.py writes the files. A bad one must end in the error beside it, soon and in little memory,
and leave nothing behind that anybody could take for a layer file.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from blockdev import errors
from blockdev.errors import BlockdevError, FormatError
from blockdev.formats.compression import compression_of, decompress
from blockdev.formats.entry import Entry
from blockdev.formats.erofs_reader import Reader
from blockdev.formats.layer_file import HEAD_BYTES, open_layer_file
from blockdev.formats.layer_writer import BuiltLayer
from blockdev.formats.limits import Limits
from blockdev.workers.launch import BuildRecord, BuildRequest, run_build
from blockdev.workers.parameters import Output
from tests.chains import make_of
from tests.should_fail import make_corpus
from tests.should_fail.make_corpus import BAD, NEUTRALISED, Case

# The interpreter, the buffers of the pipeline and the largest file tree of the corpus; the floor of the
# expansion ratio alone lets 64 MiB through.
WORKER_BYTES_MAX: Final = 400 << 20
FAMILY: Final = (errors.FormatError, errors.UnsupportedError, errors.LimitExceeded, errors.CompressionError)


def test_the_corpus_is_what_its_generator_writes() -> None:
    for directory, cases in make_corpus.directories().items():
        expected = {f"{name}{case.extension}" for name, case in cases.items()} | {f"{name}.json" for name in cases}
        assert {path.name for path in directory.iterdir()} == expected
        for name, case in cases.items():
            assert (directory / f"{name}.json").read_text() == make_corpus.text(case), name
            committed = (directory / f"{name}{case.extension}").read_bytes()
            assert len(committed) <= 20_000, name
            assert make_corpus.same(committed, case), name


def test_the_corpus_has_every_class_of_error() -> None:
    assert {case.expected["error"] for case in BAD.values()} == {kind.__name__ for kind in FAMILY}
    assert len(BAD) >= 70


def committed(name: str, case: Case) -> tuple[bytes, dict[str, Any]]:
    directory = make_corpus.HERE / ("corpus" if case is BAD.get(name) else "neutralised")
    blob = (directory / f"{name}{case.extension}").read_bytes()
    return blob, json.loads((directory / f"{name}.json").read_text())


# --- through the workers


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def note_peaks(peaks: dict[int, int]) -> None:
    """Most resident memory of each worker by now, by the kernel's own mark."""
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            # Before its exec a child is a copy of this process, whose memory is not the workers'.
            if b"blockdev.workers" in Path(f"/proc/{pid}/cmdline").read_bytes():
                match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                if match:
                    peaks[pid] = int(match[1]) * 1024


async def watch(peaks: dict[int, int]) -> None:
    while True:
        note_peaks(peaks)
        await asyncio.sleep(0.02)


async def build_in_workers(
    name: str, case: Case, directory: Path, layer_format: str = "tar-index"
) -> tuple[BuildRecord, bytes]:
    blob, expected = committed(name, case)
    (directory / "blob").write_bytes(blob)
    blob_fd = os.open(directory / "blob", os.O_RDONLY)
    staged_fd = os.open(directory / "staged", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    spool_fd = os.open(directory / "spool", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    peaks: dict[int, int] = {}
    watcher = asyncio.create_task(watch(peaks))
    try:
        [record] = await run_build(
            BuildRequest(
                blob_fd=blob_fd, outputs=(Output(layer_format, staged_fd, spool_fd),),
                media_type=expected["media_type"], layer_name=f"corpus/{name}",
                expected_size_bytes=len(blob), limits=Limits(**expected.get("limits", {})),
            )
        )  # fmt: skip
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        for fd in (blob_fd, staged_fd, spool_fd):
            os.close(fd)
        assert all(peak < WORKER_BYTES_MAX for peak in peaks.values()), peaks
        assert not list(descendants(os.getpid()))
    return record, (directory / "staged").read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("layer_format", ["tar-index", pytest.param("erofs-4k", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", BAD)
async def test_the_workers_refuse(name: str, layer_format: str, tmp_path: Path) -> None:
    expected = BAD[name].expected
    with pytest.raises(BlockdevError) as caught:
        await build_in_workers(name, BAD[name], tmp_path, layer_format)
    message = str(caught.value)
    assert type(caught.value).__name__ == expected["error"], message
    assert message.startswith(f"layer corpus/{name}: ")
    assert expected["message"] in message
    assert len(message) < 5000
    assert (tmp_path / "staged").stat().st_size < 200 << 20
    assert_no_layer_file(tmp_path / "staged")


def assert_no_layer_file(path: Path) -> None:
    staged = path.read_bytes()
    with pytest.raises(FormatError):
        open_layer_file(lambda offset, size: staged[offset : offset + size], len(staged))
    assert not any(staged[:HEAD_BYTES])  # the head comes last, so a part of a file never looks like one


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["gzip-empty", "gzip-method-7", "gzip-junk-behind", "zstd-cut-in-the-second-frame"])
async def test_a_stream_that_is_refused_leaves_no_layer_file(name: str, tmp_path: Path) -> None:
    """The caller throws the file away anyhow; but nothing that was refused looks like a layer file."""
    with pytest.raises(BlockdevError):
        await build_in_workers(name, BAD[name], tmp_path)
    assert_no_layer_file(tmp_path / "staged")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NEUTRALISED)
async def test_the_workers_take_without_what_it_tried(name: str, tmp_path: Path) -> None:
    record, staged = await build_in_workers(name, NEUTRALISED[name], tmp_path)
    assert_neutralised(NEUTRALISED[name].expected, record.warnings, record.entries, staged)


# --- in this process

formats = pytest.mark.parametrize("layer_format", ["tar-index", "erofs-4k"])


def build(blob: bytes, expected: dict[str, Any], layer_format: str) -> tuple[BuiltLayer, bytes]:
    limits = Limits(**expected.get("limits", {}))
    kind = compression_of(expected["media_type"])
    made = make_of(map(bytes, decompress(kind, io.BytesIO(blob).read, 1 << 20)), layer_format, limits)
    return made.built, made.file


@contextmanager
def refusal(expected: dict[str, Any]) -> Iterator[None]:
    with pytest.raises(BlockdevError) as caught:
        yield
    assert type(caught.value).__name__ == expected["error"], caught.value
    assert expected["message"] in str(caught.value)


# What a stream may expand to is the builder program's to bound: it knows the blob.
@pytest.mark.parametrize("name", [name for name in BAD if "expands" not in BAD[name].expected["message"]])
@formats
def test_the_engine_refuses(name: str, layer_format: str) -> None:
    blob, expected = committed(name, BAD[name])
    with refusal(expected):
        build(blob, expected, layer_format)


@pytest.mark.parametrize("name", NEUTRALISED)
@formats
def test_the_engine_takes_without_what_it_tried(name: str, layer_format: str) -> None:
    blob, expected = committed(name, NEUTRALISED[name])
    built, file = build(blob, expected, layer_format)
    assert_neutralised(expected, built.warnings, built.entries, file)


def assert_neutralised(expected: dict[str, Any], warnings: dict[str, int], entries: int, file: bytes) -> None:
    found = walked(file)
    assert warnings == expected.get("warnings", {})
    assert entries == expected.get("entries", entries)
    for path, xattrs in expected.get("xattrs", {}).items():
        assert {name.decode(): value.hex() for name, value in found[path].xattrs.items()} == xattrs, path
    assert not found.keys() & set(expected.get("absent", []))
    marks = {path for path, entry in found.items() if any(b"overlay" in name for name in entry.xattrs)}
    assert marks == {path for path, xattrs in expected.get("xattrs", {}).items() if xattrs.keys() & {OPAQUE}}


OPAQUE: Final = "trusted.overlay.opaque"


def walked(file: bytes) -> dict[str, Entry]:
    def read_at(offset: int, size: int) -> bytes:
        return file[offset : offset + size]

    layer = open_layer_file(read_at, len(file))
    return {entry.path.decode(): entry for entry in Reader(read_at, layer.data_size_bytes).walk()}
