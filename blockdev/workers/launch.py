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
from pathlib import Path
from typing import Any, Final

from blockdev.errors import (
    BlockdevError,
    BuildFailed,
    CutShort,
    DigestMismatch,
    FormatError,
    LimitExceeded,
    NoSpace,
    UnsupportedError,
    build_failed,
)
from blockdev.formats.compression import Compression, compression_of
from blockdev.formats.layer_file import layer_format_named
from blockdev.formats.limits import Limits
from blockdev.workers import protocol
from blockdev.workers.parameters import BuilderParameters, Output
from blockdev.workers.ring import RingEnd, make_ring
from blockdev.workers.sandbox import PROTECTIONS

_COMPRESSED_PIECES: Final = 4
_TAR_PIECES: Final = 8
# Each has a `main`.
PROGRAMS: Final = {
    "builder": "blockdev.workers.builder",
    "decompressor": "blockdev.workers.decompressor",
    "archiver": "blockdev.workers.archiver",
}
# Where they find what is not the standard library's: there where it was found here. Without `site`, whose
# .pth files and finders cost a program as small as these half of its start.
_BESIDE: Final = ("blockdev", "verity", "isal", "zstandard")
_PATHS: Final = list(dict.fromkeys(str(Path(sys.modules[name].__path__[0]).parent) for name in _BESIDE))
_BOOT: Final = "import sys; sys.path += {paths!r}; from {program} import main; main()"
_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Descriptors stay the caller's. One pass over the blob makes all `outputs`, of different formats.

    `layer_name` goes into every error. With `expected_digest` and `expected_size_bytes` the blob is
    checked against them, with `expected_diff_id` what it unpacks to. `strict`: see LayerWriter.
    `cpu_seconds` bounds each process.
    """

    blob_fd: int
    outputs: tuple[Output, ...]
    media_type: str
    layer_name: str
    expected_digest: str | None = None
    expected_size_bytes: int | None = None
    expected_diff_id: str | None = None
    strict: bool = False
    cpu_seconds: int = 3600
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A finished layer file, durable but not yet in its place. Sizes in bytes, hashes in hexadecimal."""

    format: str
    diff_id: str  # with "sha256:"
    root_hash: str
    tar_size_bytes: int
    data_size_bytes: int
    tree_size_bytes: int
    file_size_bytes: int
    entries: int
    warnings: dict[str, int]


@dataclass(frozen=True, slots=True)
class BuildRecord(LayerRecord):
    """One that was built from a blob. `sandbox`: by process, the protections that were in force
    (`sandbox.PROTECTIONS`)."""

    blob_digest: str
    blob_size_bytes: int
    usage: dict[str, dict[str, float]]
    sandbox: dict[str, list[str]] = field(default_factory=dict)


async def run_build(request: BuildRequest) -> list[BuildRecord]:
    """Build the layer files of one layer, one record for each output. Cancelling kills both processes.

    Raises UnsupportedError, FormatError, CompressionError, LimitExceeded, DigestMismatch, NoSpace or
    BuildFailed; the message begins with `layer_name`.
    """
    try:
        for output in request.outputs:
            layer_format_named(output.format)
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
        parameters = BuilderParameters(
            blob_fd=request.blob_fd,
            compressed=compressed[0] if compressed else None,
            tar=tar[1] if tar else None,
            outputs=request.outputs,
            strict=request.strict,
            expected_digest=request.expected_digest,
            expected_size_bytes=request.expected_size_bytes,
            expected_diff_id=request.expected_diff_id,
            limits=request.limits,
            cpu_seconds=request.cpu_seconds,
            parent_pid=os.getpid(),
        )
        kept = {request.blob_fd, *(fd for output in request.outputs for fd in output.descriptors())}
        for end in (parameters.compressed, parameters.tar):
            kept.update(end.descriptors() if end else ())
        workers: list[Worker] = []
        try:
            report = report_file(reports)
            builder = await start("builder", parameters.encode(), stdout=report, stderr=report, pass_fds=kept)
            workers.append(Worker("builder", builder, report, request.cpu_seconds))
            if compressed and tar:
                ends = compressed[1], tar[0]
                report = report_file(reports)
                decompressor = await start(
                    "decompressor", compression.value, *(end.encode() for end in ends), str(request.cpu_seconds),
                    str(os.getpid()), stdout=asyncio.subprocess.DEVNULL, stderr=report,
                    pass_fds={fd for end in ends for fd in end.descriptors()},
                )  # fmt: skip
                workers.append(Worker("decompressor", decompressor, report, request.cpu_seconds))
            rings.close()  # or no end of one would ever be seen
            await asyncio.gather(*(worker.process.wait() for worker in workers))
            return _verdict([worker.report() for worker in workers])
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                await worker.process.wait()


@dataclass(frozen=True, slots=True)
class Worker:
    """A process of ours, and what it writes its report to."""

    name: str
    process: asyncio.subprocess.Process
    report_fd: int
    cpu_seconds: int

    def kill(self) -> None:
        if self.process.returncode is None:
            # A root that is not allowed CAP_KILL must wait for what runs as another user.
            with suppress(ProcessLookupError, PermissionError):
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
            tail = text[-500:].decode("ascii", "backslashreplace").strip()
            return protocol.encode_error(self._end(status or 0, tail))
        return reply

    def _end(self, status: int, said: str) -> BlockdevError:
        """In words, what became of a worker that did not report."""
        if status >= 0:
            return BuildFailed(f"the {self.name} ended by status {status} without a report {said}".rstrip())
        if -status == signal.SIGSYS:
            return BuildFailed(f"the {self.name} was killed: it tried a system call that it may not make")
        if -status == signal.SIGXCPU:
            return LimitExceeded(f"the {self.name} was killed: over its CPU time of {self.cpu_seconds} s")
        if -status == signal.SIGXFSZ:
            return LimitExceeded(f"the {self.name} was killed: over its file size")
        if -status == signal.SIGKILL:
            return BuildFailed(f"the {self.name} was killed by signal 9: by somebody, or by the kernel short of memory")
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "no signal with a name"
        crashed = f"the {self.name} crashed: signal {-status}, {name}"
        return BuildFailed(f"{crashed}; it said: {said}" if said else crashed)


def report_file(ends: ExitStack) -> int:
    """Not a pipe: whatever a worker writes, or leaves open behind it, its end is its end."""
    fd = os.memfd_create("report", os.MFD_CLOEXEC)
    ends.callback(os.close, fd)
    return fd


def _verdict(reports: list[dict[str, Any]]) -> list[BuildRecord]:
    """The cause of several failures, where one brought about the others.

    A rotten blob explains all else. A builder that the disk or the kernel failed explains a stream cut
    short, and a stream cut short or corrupt explains what the builder saw of it.
    """
    built, unpacked = [*(failure_of(report) for report in reports), None][:2]
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
    active: dict[str, list[str]] = {}
    try:
        if len(reports) > 1:
            if reports[1].get("size_bytes") != report["tar_size_bytes"]:
                raise BuildFailed("the decompressor and the builder disagree about the size of the tar")
            report["usage"]["decompressor"] = {
                name: float(reports[1][name]) for name in ("cpu_seconds", "peak_rss_bytes")
            }
        for name, said in zip(PROGRAMS, reports, strict=False):
            active[name] = [what for what in said["sandbox"] if str(what).rstrip("0123456789") in PROTECTIONS]
        report["sandbox"] = active
        return [BuildRecord(**report, **layer) for layer in report.pop("layers")]
    except (KeyError, TypeError, ValueError) as error:
        raise BuildFailed(f"a report that makes no sense: {error!r}") from None


# What these are about, only the builder sees.
_NOT_A_DECOMPRESSORS: Final = (DigestMismatch, FormatError, UnsupportedError, NoSpace)


def failure_of(report: dict[str, Any]) -> BlockdevError | None:
    """What a worker's report says went wrong."""
    return protocol.decode_error(report) if "error" in report else None


async def start(program: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
    """One of PROGRAMS, in a session of its own. Raises BuildFailed."""
    options.setdefault("stdin", asyncio.subprocess.DEVNULL)
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _BOOT.format(paths=_PATHS, program=PROGRAMS[program]), *arguments,
            env=_ENVIRONMENT, cwd="/", start_new_session=True, **options,
        )  # fmt: skip
    except OSError as error:
        raise build_failed(f"a build process could not be started: {error}", error) from None


def _ring(ends: ExitStack, pieces: int) -> tuple[RingEnd, RingEnd]:
    """Raises BuildFailed."""
    try:
        return make_ring(ends, slots=pieces, slot_bytes=protocol.PIECE_BYTES)
    except OSError as error:
        raise build_failed(f"no memory or descriptors for a build: {error}", error) from None
