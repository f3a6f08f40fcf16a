# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a blob and a block device.

BlockdevError
├── FormatError          the tar or the layer file breaks a rule of its format
├── CompressionError     the compressed stream is truncated, corrupt or followed by foreign bytes
├── UnsupportedError     well formed, but of a kind that no format of ours can express or read
├── LimitExceeded        a configured bound; the message names it
├── DigestMismatch       bytes that do not have the digest or size they were asked for by
├── BuildFailed          a worker died, or the disk failed it
│   ├── NoSpace          the file system of the staged file is full
│   └── NoResources      no descriptor or no memory could be had for it
├── NotInLayer           a path that the layer does not have, or not as what was asked for
├── SourceChanged        a directory that was written to while it was read
├── KernelError          a system call refused
│   └── KernelExhausted  for want of memory, descriptors, space, or of another number that has an end
└── VmmError             a virtual machine monitor did not do what it was asked to
    ├── VmGone           nothing answers at its socket (any more), or it has no VM
    ├── VmmTimeout       no answer in time; what was asked for may still happen
    ├── GuestTimeout     the guest did not let a disk go in time
    ├── DiskConflict     the id belongs to another disk, or to one that is being removed
    ├── NoFreeSlot       the VM was not prepared for so many disks
    ├── UnfitDisk        a file, an id or a serial that no VMM could take
    └── VmmRefused       anything else that it refused, in its own words
"""

from __future__ import annotations

import errno
from typing import Final

# Of a system call that may do the same later, when others have given something back.
EXHAUSTED: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class BlockdevError(Exception):
    """Base of everything this package raises on purpose."""


class FormatError(BlockdevError):
    pass


class CompressionError(BlockdevError):
    pass


class UnsupportedError(BlockdevError):
    pass


class LimitExceeded(BlockdevError):
    pass


class DigestMismatch(BlockdevError):
    pass


class BuildFailed(BlockdevError):
    pass


class CutShort(BuildFailed):
    """The other process of a build ended before its stream did; why, is for that one to say."""


class NoSpace(BuildFailed):
    pass


class NoResources(BuildFailed):
    pass


class NotInLayer(BlockdevError):
    pass


class SourceChanged(BlockdevError):
    pass


class KernelError(BlockdevError):
    pass


class KernelExhausted(KernelError):
    pass


class VmmError(BlockdevError):
    pass


class VmGone(VmmError):
    pass


class VmmTimeout(VmmError):
    pass


class GuestTimeout(VmmError):
    pass


class DiskConflict(VmmError):
    pass


class NoFreeSlot(VmmError):
    pass


class UnfitDisk(VmmError):
    pass


class VmmRefused(VmmError):
    pass


def kernel_error(message: str, number: int | None) -> KernelError:
    """Of a call that ended with this error number."""
    return (KernelExhausted if number in EXHAUSTED else KernelError)(message)


def build_failed(message: str, error: OSError) -> BuildFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message)
    return (NoResources if error.errno in EXHAUSTED else BuildFailed)(message)
