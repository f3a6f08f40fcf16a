# SPDX-License-Identifier: Apache-2.0
"""Start the two processes of a build, wait for both, and make one verdict of their reports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from blockdev.errors import BlockdevError, BuildFailed, CutShort, DigestMismatch, FormatError, NoSpace, UnsupportedError
from blockdev.formats.compression import Compression, compression_of
from blockdev.formats.layer_file import format_named
from blockdev.formats.limits import Limits
from blockdev.workers import protocol
from blockdev.workers.protocol import Output
from blockdev.workers.ring import RingEnd, make_ring

_COMPRESSED_PIECES: Final = 4
_TAR_PIECES: Final = 8
_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Descriptors stay the caller's. One pass over the blob makes all `outputs`, of different formats.

    `layer_name` goes into every error. With `expected_digest` and `expected_size_bytes` the blob is
    checked against them. `strict`: see LayerWriter.
    """

    blob_fd: int
    outputs: tuple[Output, ...]
    media_type: str
    layer_name: str
    expected_digest: str | None = None
    expected_size_bytes: int | None = None
    strict: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """A finished layer file, durable but not yet in its place. Sizes in bytes, hashes in hexadecimal."""

    format: str
    diff_id: str  # with "sha256:"
    root_hash: str
    tar_size_bytes: int
    data_size_bytes: int
    tree_size_bytes: int
    file_size_bytes: int
    entries: int
    blob_digest: str
    blob_size_bytes: int
    warnings: dict[str, int]
    usage: dict[str, dict[str, float]]


async def run_build(request: BuildRequest) -> list[BuildRecord]:
    """Build the layer files of one layer, one record for each output. Cancelling kills both processes.

    Raises UnsupportedError, FormatError, CompressionError, LimitExceeded, DigestMismatch, NoSpace or
    BuildFailed; the message begins with `layer_name`.
    """
    try:
        for output in request.outputs:
            format_named(output.format)
        return await _run(request, compression_of(request.media_type))
    except BlockdevError as error:
        raise type(error)(f"layer {request.layer_name}: {error}") from None


async def _run(request: BuildRequest, compression: Compression) -> list[BuildRecord]:
    with ExitStack() as reports, ExitStack() as rings:
        # (writer's end, reader's end)
        compressed = tar = None
        if compression is not Compression.NONE:
            compressed = _ring(rings, _COMPRESSED_PIECES)
            tar = _ring(rings, _TAR_PIECES)
        parameters = protocol.BuilderParameters(
            blob_fd=request.blob_fd,
            compressed=compressed[0] if compressed else None,
            tar=tar[1] if tar else None,
            outputs=request.outputs,
            strict=request.strict,
            expected_digest=request.expected_digest,
            expected_size_bytes=request.expected_size_bytes,
            limits=request.limits,
            parent_pid=os.getpid(),
        )
        kept = {request.blob_fd, *(fd for output in request.outputs for fd in (output.staged_fd, output.spool_fd))}
        for end in (parameters.compressed, parameters.tar):
            kept.update(end.descriptors() if end else ())
        workers: list[_Worker] = []
        try:
            report = _report_file(reports)
            builder = await _start("builder", parameters.encode(), stdout=report, pass_fds=kept)
            workers.append(_Worker(builder, report))
            if compressed and tar:
                ends = protocol.DecompressorParameters(compression.value, compressed[1], tar[0], os.getpid())
                report = _report_file(reports)
                decompressor = await _start(
                    "decompressor", ends.encode(), stdout=asyncio.subprocess.DEVNULL, stderr=report,
                    pass_fds={*ends.compressed.descriptors(), *ends.tar.descriptors()},
                )  # fmt: skip
                workers.append(_Worker(decompressor, report))
            rings.close()  # or no end of one would ever be seen
            await asyncio.gather(*(worker.process.wait() for worker in workers))
            return _verdict([worker.report() for worker in workers])
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                await worker.process.wait()


@dataclass(frozen=True, slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    report_fd: int

    def kill(self) -> None:
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def report(self) -> dict[str, Any]:
        """What it said; an error of ours where it ended without saying anything that makes sense."""
        text = os.pread(self.report_fd, protocol.MESSAGE_BYTES_MAX + 1, 0)
        status = self.process.returncode
        try:
            reply = json.loads(text) if len(text) <= protocol.MESSAGE_BYTES_MAX else None
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or ("error" not in reply) == (status != 0):
            how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
            tail = text[-500:].decode("ascii", "backslashreplace").strip()
            return protocol.encode_error(
                BuildFailed(f"a build process ended by {how} without a report {tail}".rstrip())
            )
        return reply


def _report_file(ends: ExitStack) -> int:
    """Not a pipe: whatever a worker writes, or leaves open behind it, its end is its end."""
    fd = os.memfd_create("report", os.MFD_CLOEXEC)
    ends.callback(os.close, fd)
    return fd


def _verdict(reports: list[dict[str, Any]]) -> list[BuildRecord]:
    """The cause of several failures, where one brought about the others.

    A rotten blob explains all else. A builder that the disk or the kernel failed explains a stream cut
    short, and a stream cut short or corrupt explains what the builder saw of it.
    """
    built, unpacked = [*(_failure(report) for report in reports), None][:2]
    if isinstance(unpacked, _NOT_A_DECOMPRESSORS):
        unpacked = BuildFailed(f"the decompressor says {type(unpacked).__name__}: {unpacked}")
    if isinstance(built, (DigestMismatch, BuildFailed)) and not isinstance(built, CutShort):
        raise built
    if unpacked is not None:
        raise unpacked
    if isinstance(built, CutShort):
        raise BuildFailed(f"{built}, and says that all is well")
    if built is not None:
        raise built
    report = reports[0]
    try:
        if len(reports) > 1:
            if reports[1].get("size_bytes") != report["tar_size_bytes"]:
                raise BuildFailed("the decompressor and the builder disagree about the size of the tar")
            report["usage"]["decompressor"] = {
                name: float(reports[1][name]) for name in ("cpu_seconds", "peak_rss_bytes")
            }
        return [BuildRecord(**report, **layer) for layer in report.pop("layers")]
    except (KeyError, TypeError, ValueError) as error:
        raise BuildFailed(f"a report that makes no sense: {error!r}") from None


# What these are about, only the builder sees.
_NOT_A_DECOMPRESSORS: Final = (DigestMismatch, FormatError, UnsupportedError, NoSpace)


def _failure(report: dict[str, Any]) -> BlockdevError | None:
    return protocol.decode_error(report) if "error" in report else None


async def _start(program: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
    """Raises BuildFailed."""
    options.setdefault("stdin", asyncio.subprocess.DEVNULL)
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", f"blockdev.workers.{program}", *arguments,
            env=_ENVIRONMENT, cwd="/", start_new_session=True, **options,
        )  # fmt: skip
    except OSError as error:
        raise BuildFailed(f"a build process could not be started: {error}") from None


def _ring(ends: ExitStack, pieces: int) -> tuple[RingEnd, RingEnd]:
    """Raises BuildFailed."""
    try:
        return make_ring(ends, slots=pieces, slot_bytes=protocol.PIECE_BYTES)
    except OSError as error:
        raise BuildFailed(f"no memory or descriptors for a build: {error}") from None
