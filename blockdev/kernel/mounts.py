# SPDX-License-Identifier: Apache-2.0
"""mount(2), umount2(2) and /proc/self/mountinfo (man 5 proc_pid_mountinfo)."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockdev.errors import KernelError, kernel_error
from blockdev.kernel import devmapper, loop
from verity.tree import Geometry

# Linux: include/uapi/linux/mount.h
_MS_RDONLY: Final = 0x1
_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MNT_DETACH: Final = 0x2
_UMOUNT_NOFOLLOW: Final = 0x8
_TAR_BLOCK_BYTES: Final = 512  # of a tar, and of the file system that refers to it
# EROFS mounts a plain file since 6.12; before 6.12.2 one such mount could not be told from another.
_FILE_BACKED_SINCE: Final = (6, 12, 2)
_ESCAPED: Final = re.compile(r"[ \t\n\\]")  # in paths; "#" only in sources
_OCTAL_ESCAPE: Final = re.compile(r"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountEntry:
    mount_id: int
    mount_point: str
    fs_type: str
    source: str


def parse_mountinfo(text: str) -> list[MountEntry]:
    """All mounts in the file's order: of two on one mount point the later is on top."""
    entries = []
    for line in text.split("\n"):  # the kernel escapes newlines, and no other character that splitlines() knows
        left, dash, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if dash and len(fields) >= 6 and len(rest) >= 2:
            entries.append(MountEntry(int(fields[0]), _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return entries


def _unescape(field: str) -> str:
    return _OCTAL_ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def _escaped(path: str) -> str:
    return _ESCAPED.sub(lambda match: f"\\{ord(match[0]):03o}", path)


def mounted_below(directory: Path) -> list[MountEntry]:
    """Mounts in `directory`, itself left out. Raises KernelError.

    Of a table that may have thousands of lines, only those that name the directory are looked at.
    """
    prefix = str(directory) + "/"
    named = os.fsencode(_escaped(prefix))
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError as error:
        raise kernel_error(f"cannot read mountinfo: {error}", error.errno) from None
    if named not in table:
        return []
    text = os.fsdecode(b"\n".join(line for line in table.split(b"\n") if named in line))
    return [entry for entry in parse_mountinfo(text) if entry.mount_point.startswith(prefix)]


def mounted_at(directory: Path, names: Iterable[str]) -> set[str]:
    """Those of the names in `directory` at which another file system shows; one that is not there is none of them.

    One stat(2) each, however many mounts there are: mountinfo is as long as all of them. Raises KernelError.
    """
    found = set()
    prefix = f"{directory}/"
    try:
        device = os.lstat(prefix).st_dev
        for name in names:
            with suppress(FileNotFoundError):
                if os.lstat(prefix + name).st_dev != device:
                    found.add(name)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise kernel_error(f"cannot look for mounts in {directory}: {error}", error.errno) from None
    return found


def kernel_release(text: str) -> tuple[int, int, int]:
    """The first three numbers of a release string; missing ones are 0."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2] or 0), int(match[3] or 0)) if match else (0, 0, 0)


def mounts_files() -> bool:
    """Whether this kernel mounts EROFS straight from a file."""
    return kernel_release(os.uname().release) >= _FILE_BACKED_SINCE


def mount_erofs(file: Path, target: Path, block_bytes: int, *, file_backed: bool | None = None) -> None:
    """Mount a layer file read-only, without set-user-ID programs and devices. Raises KernelError.

    By default from the file itself where the kernel can; it cannot where EROFS was built without
    that, nor from an overlay file system or tmpfs, and then a loop device stands in between.
    """
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    if mounts_files() if file_backed is None else file_backed:
        number = _mount(str(file), target, "erofs", flags)
        if not number:
            return
        if number != errno.ENOTBLK or file_backed:
            raise _mount_error(str(file), target, number)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise kernel_error(f"cannot open {file}: {error}", error.errno) from None
    try:
        device = loop.attach_read_only(fd, block_bytes)
    finally:
        os.close(fd)
    try:
        path = os.readlink(f"/proc/self/fd/{device}")
        if number := _mount(path, target, "erofs", flags):
            raise _mount_error(f"{file} through {path}", target, number)
    finally:
        os.close(device)  # the mount, if there is one, holds it now


def mount_verified(file: Path, target: Path, block_bytes: int, geometry: Geometry, root_hash: bytes, name: str) -> None:
    """As `mount_erofs`, every block held against the root hash by dm-verity, in a device of that name which lives as
    long as the mount. Raises KernelError."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"cannot open {file}: {error}") from None
    try:
        data = loop.attach_read_only(fd, block_bytes)
    finally:
        os.close(fd)
    try:
        # The loop device is the dm device's from here on, and that the mount's.
        with devmapper.verity_device(name, os.readlink(f"/proc/self/fd/{data}"), geometry, root_hash) as path:
            if number := _mount(path, target, "erofs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV):
                raise _mount_error(f"{file} through {name}", target, number)
    finally:
        os.close(data)


def mount_tar(index_fd: int, tar: Path, target: Path) -> None:
    """Mount a tar through EROFS metadata of it that is in another file (`formats.tar_mount`), as `mount_erofs` does.

    Raises KernelError.
    """
    try:
        tar_fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise kernel_error(f"cannot open {tar}: {error}", error.errno) from None
    opened = [tar_fd]
    try:
        opened += [loop.attach_read_only(fd, _TAR_BLOCK_BYTES) for fd in (tar_fd, index_fd)]
        data, index = (os.readlink(f"/proc/self/fd/{fd}") for fd in opened[1:])
        if number := _mount(index, target, "erofs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, f"device={data}"):
            raise _mount_error(f"{tar} through {data} and {index}", target, number)
    finally:
        for fd in opened:
            os.close(fd)


def _mount(source: str, target: Path, fs_type: str, flags: int, data: str = "") -> int:
    """0, or the error number."""
    arguments = (os.fsencode(source), os.fsencode(target), fs_type.encode(), ctypes.c_ulong(flags))
    if _libc.mount(*arguments, os.fsencode(data) if data else None):
        return ctypes.get_errno()
    return 0


def _mount_error(source: str, target: Path, number: int) -> KernelError:
    return kernel_error(f"mount of {source} at {target} as EROFS: {os.strerror(number)}", number)


def unmount(target: Path, *, lazily: bool = False) -> bool:
    """Take the topmost mount at `target` away; False where there is none. Raises KernelError."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)
    if _libc.umount2(os.fsencode(target), flags):
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise kernel_error(f"umount of {target}: {os.strerror(number)}", number)
        return False
    return True
