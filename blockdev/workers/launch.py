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

from blockdev.errors import BlockdevError, BuildFailed, DigestMismatch
from blockdev.formats.compression import Compression, compression_of
from blockdev.formats.layer_file import format_named
from blockdev.formats.limits import Limits
from blockdev.workers import protocol

_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Descriptors stay the caller's. `staged_fd` and `spool_fd` are empty, writable files.

    `layer_name` goes into every error. With `expected_digest` and `expected_size_bytes` the blob is
    checked against them.
    """

    blob_fd: int
    staged_fd: int
    spool_fd: int
    format: str
    media_type: str
    layer_name: str
    expected_digest: str | None = None
    expected_size_bytes: int | None = None
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


async def run_build(request: BuildRequest) -> BuildRecord:
    """Build one layer file. Cancelling kills both processes.

    Raises UnsupportedError, FormatError, CompressionError, LimitExceeded, DigestMismatch, NoSpace or
    BuildFailed; the message begins with `layer_name`.
    """
    try:
        format_named(request.format)
        return await _run(request, compression_of(request.media_type))
    except BlockdevError as error:
        raise type(error)(f"layer {request.layer_name}: {error}") from None


async def _run(request: BuildRequest, compression: Compression) -> BuildRecord:
    with ExitStack() as ends:
        compressed_read = compressed_write = tar_read = tar_write = -1
        if compression is not Compression.NONE:
            compressed_read, compressed_write = _pipe(ends)
            tar_read, tar_write = _pipe(ends)
        parameters = protocol.BuilderParameters(
            blob_fd=request.blob_fd,
            compressed_fd=compressed_write,
            tar_fd=tar_read,
            staged_fd=request.staged_fd,
            spool_fd=request.spool_fd,
            format=request.format,
            expected_digest=request.expected_digest,
            expected_size_bytes=request.expected_size_bytes,
            limits=request.limits,
            parent_pid=os.getpid(),
        )
        kept = [request.blob_fd, request.staged_fd, request.spool_fd, compressed_write, tar_read]
        processes: list[asyncio.subprocess.Process] = []
        try:
            builder = await _start(
                "builder", parameters.encode(), stdout=asyncio.subprocess.PIPE, pass_fds=[fd for fd in kept if fd >= 0]
            )
            processes.append(builder)
            waits = [_report(builder, builder.stdout)]
            if compression is not Compression.NONE:
                decompressor = await _start(
                    "decompressor", compression.value, str(os.getpid()),
                    stdin=compressed_read, stdout=tar_write, stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
                processes.append(decompressor)
                waits.append(_report(decompressor, decompressor.stderr))
            ends.close()  # or no end of a pipe would ever be seen
            reports = await asyncio.gather(*waits)
        except BaseException:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in processes:
                await process.wait()
            raise
    return _verdict(reports)


def _verdict(reports: list[dict[str, Any]]) -> BuildRecord:
    """A rotten blob explains all else; a stream that broke off explains what the builder saw of it."""
    failures = [protocol.decode_error(report) if "error" in report else None for report in reports]
    built, unpacked = failures[0], failures[1] if len(failures) > 1 else None
    if isinstance(built, DigestMismatch):
        raise built
    if unpacked is not None:
        raise unpacked
    if built is not None:
        raise built
    report = reports[0]
    if len(reports) > 1:
        if reports[1].get("size_bytes") != report["tar_size_bytes"]:
            raise BuildFailed("the decompressor and the builder disagree about the size of the tar")
        report["usage"]["decompressor"] = {
            name: reports[1][name] for name in ("cpu_seconds", "peak_rss_bytes") if name in reports[1]
        }
    return BuildRecord(**report)


async def _start(program: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
    options.setdefault("stdin", asyncio.subprocess.DEVNULL)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-m", f"blockdev.workers.{program}", *arguments,
        env=_ENVIRONMENT, cwd="/", start_new_session=True, **options,
    )  # fmt: skip


async def _report(process: asyncio.subprocess.Process, stream: asyncio.StreamReader | None) -> dict[str, Any]:
    assert stream is not None
    text = b""
    while len(text) <= protocol.MESSAGE_BYTES_MAX and (piece := await stream.read(protocol.MESSAGE_BYTES_MAX)):
        text += piece
    status = await process.wait()
    try:
        reply = json.loads(text)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or ("error" not in reply) == (status != 0):
        how = f"signal {-status}" if status < 0 else f"status {status}"
        tail = text[-500:].decode("ascii", "backslashreplace").strip()
        return protocol.encode_error(BuildFailed(f"a build process ended by {how} without a report {tail}".rstrip()))
    return reply


def _pipe(ends: ExitStack) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    ends.callback(os.close, read)
    ends.callback(os.close, write)
    protocol.enlarge_pipe(write)
    return read, write
