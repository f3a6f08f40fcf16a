# SPDX-License-Identifier: Apache-2.0
"""What a caller is told: one family, each kind with its gRPC status code.

The codes are containerd's errdefs mapping. Its listings go on only over a NOT_FOUND of Stat, its
garbage collection only over a FAILED_PRECONDITION of Remove, and an UNIMPLEMENTED of Apply makes it
ask the next differ.
"""

from __future__ import annotations

import errno
import re
from typing import ClassVar, Final

from grpc import StatusCode

from blockdev import errors as blockdev

MESSAGE_BYTES_MAX: Final = 4096
_HALF_PERCENT: Final = re.compile(r"%2?\Z")


class SnapshotterError(Exception):
    """Base of everything that a call may end with on purpose."""

    code: ClassVar[StatusCode] = StatusCode.INTERNAL


class NotFound(SnapshotterError):
    code = StatusCode.NOT_FOUND


class AlreadyExists(SnapshotterError):
    code = StatusCode.ALREADY_EXISTS


class FailedPrecondition(SnapshotterError):
    code = StatusCode.FAILED_PRECONDITION


class InvalidArgument(SnapshotterError):
    code = StatusCode.INVALID_ARGUMENT


class DataLoss(SnapshotterError):
    code = StatusCode.DATA_LOSS


class Unimplemented(SnapshotterError):
    code = StatusCode.UNIMPLEMENTED


class Unavailable(SnapshotterError):
    code = StatusCode.UNAVAILABLE


class ResourceExhausted(SnapshotterError):
    code = StatusCode.RESOURCE_EXHAUSTED


class OverLimit(ResourceExhausted):
    """A bound for layers, which this one is over whenever it is built; of a full disk it is ResourceExhausted alone."""


class DeadlineExceeded(SnapshotterError):
    code = StatusCode.DEADLINE_EXCEEDED


class Internal(SnapshotterError):
    code = StatusCode.INTERNAL


class ConfigError(Exception):
    """The configuration cannot be used; the message says where and why."""


_KINDS: Final[tuple[tuple[type[blockdev.BlockdevError], type[SnapshotterError]], ...]] = (
    (blockdev.DigestMismatch, DataLoss),
    (blockdev.FormatError, InvalidArgument),
    (blockdev.CompressionError, InvalidArgument),
    # Not UNIMPLEMENTED: another differ would unpack the layer unverified.
    (blockdev.UnsupportedError, InvalidArgument),
    (blockdev.SourceChanged, FailedPrecondition),
    (blockdev.LimitExceeded, OverLimit),
    (blockdev.NoSpace, ResourceExhausted),
    (blockdev.NoResources, ResourceExhausted),
    (blockdev.KernelExhausted, ResourceExhausted),
)


def translate(error: Exception) -> SnapshotterError:
    """The family's member for an error from below. Never raises."""
    if isinstance(error, SnapshotterError):
        return error
    if isinstance(error, blockdev.BlockdevError):
        kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), Internal)
        return kind(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"no space left: {error}")
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in blockdev.EXHAUSTED):
        return ResourceExhausted(f"{type(error).__name__}: {error}")
    return Internal(f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """Printable ASCII in one line, of at most 4096 bytes in the form in which gRPC sends it.

    A lone surrogate, as Python makes of a file name that is not UTF-8, keeps gRPC from sending any
    status at all, and containerd would wait for ever. A percent sign travels as three bytes, and a
    trailer over the other side's limit comes out there as another error.
    """
    plain = text[: MESSAGE_BYTES_MAX + 1].encode("ascii", "backslashreplace").decode("ascii")
    plain = "".join(char if " " <= char <= "~" else f"\\x{ord(char):02x}" for char in plain)
    sent = plain.replace("%", "%25")
    if len(sent) <= MESSAGE_BYTES_MAX:
        return plain
    return _HALF_PERCENT.sub("", sent[: MESSAGE_BYTES_MAX - 3]).replace("%25", "%") + "..."
