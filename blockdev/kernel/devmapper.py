# SPDX-License-Identifier: Apache-2.0
"""dm-verity devices (Linux: include/uapi/linux/dm-ioctl.h; Documentation/admin-guide/device-mapper/verity.rst).

A device here is made, opened by a mount, and told to go with its last user: so its life is the mount's, whatever
becomes of the process that made it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from blockdev.errors import KernelError
from verity.tree import Geometry

CONTROL: Final = "/dev/mapper/control"
NAME_BYTES_MAX: Final = 127

# struct dm_ioctl: u32 version[3], data_size, data_start, target_count, s32 open_count, u32 flags, event_nr, padding,
# u64 dev, char name[128], uuid[129], data[7]
_HEADER: Final = struct.Struct("<3I3Ii3IQ128s129s7x")
assert _HEADER.size == 312
# struct dm_target_spec: u64 sector_start, length, s32 status, u32 next, char target_type[16]
_TARGET: Final = struct.Struct("<2QiI16s")
_VERSION: Final = (4, 0, 0)
_SECTOR_BYTES: Final = 512
_REPLY_BYTES: Final = 64 << 10

_LIST_DEVICES: Final = 2
_DEV_CREATE: Final = 3
_DEV_REMOVE: Final = 4
_DEV_SUSPEND: Final = 6
_DEV_STATUS: Final = 7
_TABLE_LOAD: Final = 9
_GET_TARGET_VERSION: Final = 17

_READ_ONLY: Final = 1 << 0
_BUFFER_FULL: Final = 1 << 8
_DEFERRED_REMOVE: Final = 1 << 17


def verity_table(device: str, geometry: Geometry, root_hash: bytes) -> str:
    """The target's parameters; data and tree are on one device, the tree right after the data."""
    params = geometry.params
    hash_start, left = divmod(geometry.data_size_bytes, params.hash_block_bytes)
    if left:
        raise ValueError(f"data of {geometry.data_size_bytes} bytes do not end with a hash block")
    fields = (
        1, device, device, params.data_block_bytes, params.hash_block_bytes, geometry.data_blocks, hash_start,
        "sha256", root_hash.hex(), params.salt.hex() or "-",
    )  # fmt: skip
    return " ".join(map(str, fields))


def pack(name: str = "", flags: int = 0, data: bytes = b"", *, targets: int = 0) -> bytearray:
    """A request, with room for the reply behind its header."""
    raw = name.encode("ascii")
    if len(raw) > NAME_BYTES_MAX:
        raise ValueError(f"device name {name!r} is over {NAME_BYTES_MAX} bytes")
    size = _HEADER.size + max(len(data), _REPLY_BYTES)
    header = _HEADER.pack(*_VERSION, size, _HEADER.size, targets, 0, flags, 0, 0, 0, raw, b"")
    return bytearray(header + data).ljust(size, b"\0")


def pack_target(sectors: int, kind: str, parameters: str) -> bytes:
    """One target over the whole device."""
    text = parameters.encode("ascii") + b"\0"
    size = -(-(_TARGET.size + len(text)) // 8) * 8
    return (_TARGET.pack(0, sectors, 0, size, kind.encode("ascii")) + text).ljust(size, b"\0")


def unpack_names(data: bytes) -> list[tuple[str, int]]:
    """(name, device number) of a list: u64 dev, u32 next, char name[], each from the one before (0: the last)."""
    found: list[tuple[str, int]] = []
    at = 0
    while at + 12 <= len(data):
        device, following = struct.unpack_from("<QI", data, at)
        if not device:
            break  # there are none
        name = data[at + 12 :].split(b"\0", 1)[0]
        found.append((name.decode("utf-8", "surrogateescape"), device))
        if not following:
            break
        at += following
    return found


def check() -> None:
    """Raises KernelError where there is no device-mapper, or none with the target."""
    try:
        _call(_GET_TARGET_VERSION, pack("verity"))  # the kernel loads its module for that
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return  # before Linux 5.4 only its use tells
        raise KernelError(f"no dm-verity: {error}") from None


@contextmanager
def verity_device(name: str, device: str, geometry: Geometry, root_hash: bytes) -> Iterator[str]:
    """A read-only device that gives what has the root hash, and EIO for the rest; its path, for a mount.

    At the end it goes: at once, or with whoever has opened it within. Raises KernelError.
    """
    sectors = geometry.data_size_bytes // _SECTOR_BYTES
    try:
        number = _header(_call(_DEV_CREATE, pack(name))).device
        try:
            table = pack_target(sectors, "verity", verity_table(device, geometry, root_hash))
            _call(_TABLE_LOAD, pack(name, _READ_ONLY, table, targets=1))
            _call(_DEV_SUSPEND, pack(name, _READ_ONLY))  # without the flag of a suspension it is a resumption
        except OSError:
            with suppress(OSError):
                _call(_DEV_REMOVE, pack(name))
            raise
    except OSError as error:
        raise KernelError(f"dm-verity device {name} on {device}: {error}") from None
    try:
        with _node(number) as path:
            yield path
    finally:
        remove(name)


@contextmanager
def _node(number: int) -> Iterator[str]:
    """Of the device; where /dev has none, as in a chroot, one that is made."""
    device = _decoded(number)
    path = f"/dev/dm-{os.minor(device)}"
    with suppress(OSError):
        if os.stat(path).st_rdev == device:
            yield path
            return
    made = f"/dev/.tardev-{os.getpid()}-{os.minor(device)}"
    try:
        os.mknod(made, stat.S_IFBLK | 0o600, device)
    except OSError as error:
        raise KernelError(f"no node for dm device {os.minor(device)}: {error}") from None
    try:
        yield made
    finally:
        os.unlink(made)


def _decoded(number: int) -> int:
    """As stat(2) has it; the kernel's huge_encode_dev() is the same for what Linux gives out."""
    return os.makedev((number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00))


def remove(name: str) -> None:
    """At once, or with its last user; nothing to do where it is gone. Raises KernelError."""
    try:
        _call(_DEV_REMOVE, pack(name, _DEFERRED_REMOVE))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise KernelError(f"dm device {name} cannot be removed: {error}") from None


def unused(prefix: str) -> list[str]:
    """Devices of such names that nobody has open. Raises KernelError; nothing where there is no device-mapper."""
    if not Path(CONTROL).exists():
        return []
    found = []
    try:
        reply = _call(_LIST_DEVICES, pack())
        start = _header(reply).data_start
        for name, _ in unpack_names(bytes(reply[start:])):
            if name.startswith(prefix):
                with suppress(FileNotFoundError):
                    if not _header(_status(name)).open_count:
                        found.append(name)
    except OSError as error:
        raise KernelError(f"dm devices cannot be listed: {error}") from None
    return found


def _status(name: str) -> bytearray:
    """Raises FileNotFoundError where it is gone, OSError."""
    try:
        return _call(_DEV_STATUS, pack(name))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise FileNotFoundError(errno.ENOENT, "no such dm device", name) from None
        raise


def major() -> int | None:
    """Of the device numbers of all dm devices; None without device-mapper."""
    with suppress(OSError):
        for line in Path("/proc/devices").read_text().rpartition("Block devices:")[2].splitlines():
            number, _, name = line.strip().partition(" ")
            if name == "device-mapper":
                return int(number)
    return None


class _Header(NamedTuple):
    data_start: int
    open_count: int
    flags: int
    device: int


def _header(reply: bytearray) -> _Header:
    fields = _HEADER.unpack_from(reply)
    return _Header(fields[4], fields[6], fields[7], fields[10])


def _call(command: int, request: bytearray) -> bytearray:
    """The reply, in the request's place. Raises OSError."""
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        # _IOWR(0xfd, command, struct dm_ioctl)
        fcntl.ioctl(fd, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command, request, True)
    finally:
        os.close(fd)
    if _header(request).flags & _BUFFER_FULL:
        raise OSError(errno.ENOSPC, f"reply to dm command {command} is over {_REPLY_BYTES} bytes")
    return request
