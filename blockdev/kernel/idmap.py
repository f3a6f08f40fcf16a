# SPDX-License-Identifier: Apache-2.0
"""Idmapped mounts (man 2 mount_setattr; Linux: filesystems/idmappings.rst): a mount whose files show other owners."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blockdev.errors import kernel_error
from blockdev.kernel import tree

# The number of every architecture (Linux: include/uapi/asm-generic/unistd.h).
_SYS_MOUNT_SETATTR: Final = 442
# Linux: include/uapi/linux/mount.h, fcntl.h
_AT_EMPTY_PATH: Final = 0x1000
_MOUNT_ATTR_IDMAP: Final = 0x100000
# struct mount_attr: u64 attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR: Final = struct.Struct("<QQQQ")
_CHILD_SECONDS: Final = 30.0
# unshare(2) of a user namespace is refused to a process that has threads, as the daemon: this one has none. It says
# so when it is in its own, and holds it until its input ends.
_CHILD: Final = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(ctypes.get_errno())
os.write(1, b"x")
os.read(0, 1)
"""


@contextmanager
def user_namespace(uid_map: str, gid_map: str) -> Iterator[int]:
    """A descriptor of a new user namespace with these maps (man 7 user_namespaces: lines INSIDE OUTSIDE LENGTH).

    Raises KernelError, also where the kernel does not take the maps.
    """
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env={}
        )
    except OSError as error:
        raise kernel_error(f"user namespace: no process for it: {error}", error.errno) from None
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if not child.stdout.read(1):
            number = child.wait(_CHILD_SECONDS)
            raise kernel_error(f"user namespace: {os.strerror(number)}", number)
        try:
            for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
                with open(f"/proc/{child.pid}/{name}", "wb", buffering=0) as file:
                    file.write(text.encode("ascii"))
            fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            what = f"user namespace with the maps {uid_map!r} and {gid_map!r}: {error}"
            raise kernel_error(what, error.errno) from None
    finally:
        child.stdin.close()
        child.stdout.close()
        child.kill()
        child.wait()
    try:
        yield fd
    finally:
        os.close(fd)


def mount_mapped(source: Path, target: Path, user_namespace_fd: int) -> None:
    """What is mounted at `source` once more at `target`, its owners mapped. Raises KernelError."""
    mapped = mapped_tree(source, user_namespace_fd)
    try:
        tree.move(mapped, target)
    except OSError as error:
        raise kernel_error(f"{source} with mapped IDs at {target}: {error.strerror}", error.errno) from None
    finally:
        os.close(mapped)


def mapped_tree(source: Path, user_namespace_fd: int) -> int:
    """A descriptor (O_PATH) of the directory `source`, with owners mapped, on a mount of its own.

    It is mounted nowhere and goes with its last descriptor. ACLs and file capabilities show mapped IDs,
    too; an ID that is not in the map shows as 65534. Raises KernelError.
    """
    try:
        mapped = tree.clone(source)
        try:
            attr = _MOUNT_ATTR.pack(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace_fd)
            tree.call(_SYS_MOUNT_SETATTR, mapped, b"", _AT_EMPTY_PATH, attr, len(attr))
        except BaseException:
            os.close(mapped)
            raise
        return mapped
    except OSError as error:
        unable = error.errno in (errno.EINVAL, errno.ENOSYS)
        hint = "; this kernel may be too old to map the IDs of such a mount" if unable else ""
        raise kernel_error(f"{source} with mapped IDs: {error.strerror}{hint}", error.errno) from None
