# SPDX-License-Identifier: Apache-2.0
"""What the launcher and its two programs say to each other: one JSON object each way."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from blockdev import errors
from blockdev.formats.limits import Limits
from blockdev.workers.ring import RingEnd

# Linux: include/uapi/linux/prctl.h, include/uapi/linux/fcntl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
PIECE_BYTES: Final = 1 << 20
MESSAGE_BYTES_MAX: Final = 64 << 10

_KINDS: Final = {
    kind.__name__: kind
    for kind in (
        errors.FormatError,
        errors.CompressionError,
        errors.UnsupportedError,
        errors.LimitExceeded,
        errors.DigestMismatch,
        errors.NoSpace,
        errors.CutShort,
        errors.BuildFailed,
    )
}


@dataclass(frozen=True, slots=True)
class Output:
    """One layer file of a build: `staged_fd` and `spool_fd` are empty files that can be read and written."""

    format: str
    staged_fd: int
    spool_fd: int


@dataclass(frozen=True, slots=True)
class BuilderParameters:
    """File descriptor numbers are the builder's own. A plain blob needs no decompressor, and so no rings."""

    blob_fd: int
    compressed: RingEnd | None  # to the decompressor
    tar: RingEnd | None  # from it
    outputs: tuple[Output, ...]
    strict: bool
    expected_digest: str | None
    expected_size_bytes: int | None
    limits: Limits
    parent_pid: int

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> BuilderParameters:
        fields = json.loads(text)
        return cls(
            **{
                **fields,
                "compressed": _ring_end(fields["compressed"]),
                "tar": _ring_end(fields["tar"]),
                "outputs": tuple(Output(**output) for output in fields["outputs"]),
                "limits": Limits(**fields["limits"]),
            }
        )


def _ring_end(fields: dict[str, int] | None) -> RingEnd | None:
    return RingEnd(**fields) if fields is not None else None


@dataclass(frozen=True, slots=True)
class DecompressorParameters:
    """File descriptor numbers are the decompressor's own."""

    compression: str
    compressed: RingEnd
    tar: RingEnd
    parent_pid: int

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> DecompressorParameters:
        fields = json.loads(text)
        return cls(**{**fields, "compressed": RingEnd(**fields["compressed"]), "tar": RingEnd(**fields["tar"])})


def usage() -> dict[str, float | int]:
    """Of the calling process: CPU in seconds, peak resident memory in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss: a process inherits that of who started it.
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        "peak_rss_bytes": int(peak[1]) * 1024 if peak else 0,
    }


def encode_error(error: BaseException) -> dict[str, str]:
    if isinstance(error, OSError) and not isinstance(error, errors.BlockdevError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind: type[errors.BlockdevError] = errors.NoSpace if full else errors.BuildFailed
    elif isinstance(error, MemoryError):
        return {"error": "LimitExceeded", "message": "the build's memory limit"}
    else:
        kind = next((k for k in _KINDS.values() if type(error) is k), errors.BuildFailed)
    text = str(error) if isinstance(error, errors.BlockdevError) else f"{type(error).__name__}: {error}"
    # Names from a layer may be any bytes; what leaves the worker is plain text.
    return {"error": kind.__name__, "message": text.encode("utf-8", "backslashreplace").decode()[:4000]}


def decode_error(reply: dict[str, Any]) -> errors.BlockdevError:
    return _KINDS.get(str(reply.get("error")), errors.BuildFailed)(str(reply.get("message")))


def settle(parent_pid: int, *, address_space_bytes: int, file_size_bytes: int | None = None) -> None:
    """First act of a worker: die with the parent, gain nothing by exec, leave no core file, keep to the bounds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)  # it died before the line above
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    if file_size_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_bytes, file_size_bytes))


def answer(fd: int, work: Callable[[], dict[str, Any]]) -> None:
    """Run `work` and write its result, or its error, to `fd`; ends the process."""
    try:
        reply, status = work(), 0
    except BaseException as error:
        reply, status = encode_error(error), 1
    data = json.dumps(reply).encode()[:MESSAGE_BYTES_MAX]
    while data:
        data = data[os.write(fd, data) :]
    sys.stderr.flush()
    os._exit(status)  # threads of a failed build may still hang in a read
