# SPDX-License-Identifier: Apache-2.0
"""Start the archiver, hand on what it writes, and take its report."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from blockdev.errors import BlockdevError, BuildFailed
from blockdev.formats.compression import Compression
from blockdev.formats.limits import Limits
from blockdev.workers.archiver import ArchiverParameters
from blockdev.workers.launch import Worker, failure_of, report_file, start
from blockdev.workers.protocol import PIECE_BYTES


@dataclass(frozen=True, slots=True)
class ArchiveRequest:
    """`source_fd` stays the caller's: an upper directory, or, where `layer_size_bytes` is given, a layer file.

    `name` goes into every error. With `digests` the record has both. `latest_mtime`: see write_changeset.
    """

    source_fd: int
    name: str
    layer_size_bytes: int | None = None
    compression: Compression = Compression.NONE
    digests: bool = False
    latest_mtime: int | None = None
    cpu_seconds: int = 3600
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """What was written. Digests with "sha256:", or "" where none were asked for; `left_out`: see Changeset."""

    tar_size_bytes: int
    blob_size_bytes: int
    diff_id: str
    blob_digest: str
    entries: int
    left_out: dict[str, int]


class Archive:
    """One that is being written; `fd`: the end of the pipe that it comes out of."""

    def __init__(self, fd: int, worker: Worker, name: str) -> None:
        self.fd, self._worker, self._name = fd, worker, name

    def close(self) -> None:
        """No more of it is wanted: the archiver ends by that."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def finish(self) -> ArchiveRecord | None:
        """Once all was read, or no more is wanted: what was written, and None where it was not all.

        Raises SourceChanged, UnsupportedError, LimitExceeded, KernelError, FormatError or BuildFailed; the
        message begins with the request's name. Only after this was a pipe's end the end of the archive.
        """
        self.close()
        await self._worker.process.wait()
        report = self._worker.report()
        failure = failure_of(report)
        if failure is not None:
            raise type(failure)(f"{self._name}: {failure}")
        if report.get("abandoned"):
            return None
        try:
            return ArchiveRecord(**{name: report[name] for name in ArchiveRecord.__slots__})
        except (KeyError, TypeError) as error:
            raise BuildFailed(f"{self._name}: a report that makes no sense: {error!r}") from None


@asynccontextmanager
async def archiving(request: ArchiveRequest) -> AsyncIterator[Archive]:
    """Runs while the block does; leaving it kills what still runs. Raises BuildFailed where it cannot be started."""
    with ExitStack() as reports:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        worker: Worker | None = None
        try:
            try:
                _enlarge(write_fd)
                parameters = ArchiverParameters(
                    source_fd=request.source_fd,
                    out_fd=write_fd,
                    layer_size_bytes=request.layer_size_bytes,
                    latest_mtime=request.latest_mtime,
                    compression=request.compression,
                    digests=request.digests,
                    limits=request.limits,
                    cpu_seconds=request.cpu_seconds,
                    parent_pid=os.getpid(),
                )
                report_fd = report_file(reports)
                process = await start(
                    "archiver", parameters.encode(), stdout=report_fd, stderr=report_fd,
                    pass_fds={request.source_fd, write_fd},
                )  # fmt: skip
                worker = Worker("archiver", process, report_fd, request.cpu_seconds)
            except BlockdevError as error:
                raise type(error)(f"{request.name}: {error}") from None
            finally:
                os.close(write_fd)  # or the end of it would never be seen
            archive = Archive(read_fd, worker, request.name)
            read_fd = -1
            try:
                yield archive
            finally:
                archive.close()
        finally:
            if read_fd >= 0:
                os.close(read_fd)
            if worker is not None:
                worker.kill()
                await worker.process.wait()


def _enlarge(pipe_fd: int) -> None:
    """Fewer changes between the two processes; the default has room for 64 KiB (man 7 pipe)."""
    try:
        fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, PIECE_BYTES)
    except OSError:
        pass  # over what this user may have in pipes
