# SPDX-License-Identifier: Apache-2.0
"""What the launcher and its two programs say to each other: one JSON object each way."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from blockdev import errors
from blockdev.workers import sandbox

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
        errors.NoResources,
        errors.SourceChanged,
        errors.KernelError,
        errors.KernelExhausted,
        errors.CutShort,
        errors.BuildFailed,
    )
}


def usage(status_fd: int) -> dict[str, float | int]:
    """Of the calling process, once: CPU in seconds, peak resident memory in bytes."""
    # Not getrusage(2): its ru_maxrss is inherited from who started the process.
    peak = 0
    for line in os.read(status_fd, 16 << 10).splitlines():
        if line.startswith(b"VmHWM:"):
            peak = int(line.split()[1]) * 1024
    return {"cpu_seconds": round(time.process_time(), 3), "peak_rss_bytes": peak}


def encode_error(error: BaseException) -> dict[str, str]:
    if isinstance(error, OSError) and not isinstance(error, errors.BlockdevError):
        kind: type[errors.BlockdevError] = type(errors.build_failed("", error))
    else:
        kind = next((k for k in _KINDS.values() if type(error) is k), errors.BuildFailed)
    text = str(error) if isinstance(error, errors.BlockdevError) else f"{type(error).__name__}: {error}"
    # Names from a layer may be any bytes; what leaves the worker is plain text.
    return {"error": kind.__name__, "message": text.encode("utf-8", "backslashreplace").decode()[:4000]}


def decode_error(reply: dict[str, Any]) -> errors.BlockdevError:
    return _KINDS.get(str(reply.get("error")), errors.BuildFailed)(str(reply.get("message")))


def answer(fd: int, profile: sandbox.Profile, parent_pid: int, work: Callable[[], dict[str, Any]]) -> None:
    """Shut the door, run `work` and write its result, or its error, to `fd`; ends the process."""
    try:
        active = sandbox.shut(profile, parent_pid)
        reply, status = {**work(), "sandbox": active}, 0
    except BaseException as error:
        reply, status = encode_error(_in_words(error, profile)), 1
    data = json.dumps(reply).encode()[:MESSAGE_BYTES_MAX]
    try:
        while data:
            data = data[os.write(fd, data) :]
        sys.stderr.flush()
    finally:
        # Threads of a failed build may still hang in a read, and the interpreter's own end makes calls that are shut.
        os._exit(status)


def _in_words(error: BaseException, profile: sandbox.Profile) -> BaseException:
    if isinstance(error, MemoryError):
        bytes_max = profile.bounds.address_space_bytes
        return errors.LimitExceeded(f"the {profile.name} is over its memory of {bytes_max} bytes")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        bytes_max = profile.bounds.file_size_bytes
        return errors.LimitExceeded(f"the {profile.name} is over its file size of {bytes_max} bytes")
    return error
