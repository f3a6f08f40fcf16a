# SPDX-License-Identifier: Apache-2.0
"""What every virtual machine monitor (VMM) can be asked for: attach a file as a virtio-blk disk, detach, list.

The state is the VM's alone: a client remembers nothing that it does not ask again, so that a caller
that was killed takes up where it was by asking for the same again.
"""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from blockdev.errors import UnfitDisk, VmGone, VmmError

# Of virtio-blk. QEMU rounds a file up to it and cloud-hypervisor down: neither is the file.
SECTOR_BYTES: Final = 512
# QEMU: an id is a letter, then letters, digits, "-._", and a node name has at most 31 characters.
# cloud-hypervisor: any string that does not begin with "__".
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")
# VIRTIO_BLK_ID_BYTES (Linux: include/uapi/linux/virtio_blk.h) is 20.
_SERIAL: Final = re.compile(r"[A-Za-z0-9._-]{1,20}")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Disk:
    """A file for a VM; always raw, whatever its bytes look like.

    `id`: the VMM's name for it, a letter and up to 30 of letters, digits and "-._". `path`: absolute, as
    the VMM process sees it too. `serial`: 1 to 20 of the same characters, which the guest finds in
    /sys/block/vdX/serial; the one name that is sure to mean the same disk on both sides.
    """

    id: str
    path: Path
    serial: str | None = None
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """`address`: where the guest finds it on PCI, in the VMM's notation; empty in a VM that has not booted."""

    disk: Disk
    address: str


class Hotplug(Protocol):
    """Every call has a bound in time, given to the client. All raise VmmError, of the kinds in blockdev/errors.py.

    Cancelling a call waits for its step that is under way: a disk is then attached or not, never half.
    """

    async def attach(self, disk: Disk) -> AttachedDisk:
        """Attach one file, to be seen by the guest soon. The same disk again is the same answer.

        Raises UnfitDisk, DiskConflict, NoFreeSlot, VmmRefused, VmmTimeout, VmGone.
        """

    async def detach(self, disk_id: str) -> None:
        """Wait until the guest has let the disk go and the VMM has closed the file; quiet if there is none.

        Raises GuestTimeout (asking again goes on waiting), VmmRefused, VmmTimeout, VmGone.
        """

    async def list(self) -> tuple[AttachedDisk, ...]:
        """The disks that the VM has under an id, those among them that somebody else attached. Raises as above."""


async def attach_all(vm: Hotplug, disks: Sequence[Disk]) -> list[AttachedDisk]:
    """Attach all in this order, or leave the VM as it was; disks that it had before stay in any case.

    Raises what `attach` raises; where undoing failed as well, the message ends with what is still there.
    """
    if len({disk.id for disk in disks}) != len(disks):
        raise UnfitDisk(f"an id is given twice: {', '.join(disk.id for disk in disks)}")
    before = {attached.disk.id for attached in await vm.list()}
    done: list[AttachedDisk] = []
    try:
        for disk in disks:
            done.append(await vm.attach(disk))
    except BaseException as error:
        # The one that failed is among them: after a timeout it may have come nevertheless.
        ours = [disk.id for disk in disks[: len(done) + 1] if disk.id not in before]
        left = await uncut(_detach_all(vm, ours))
        if left and isinstance(error, VmmError):
            raise type(error)(f"{error}; not undone: {'; '.join(left)}") from error
        raise
    return done


async def _detach_all(vm: Hotplug, ids: Sequence[str]) -> list[str]:
    """What failed, in words; at once, so that a guest that lets none go is waited for only once."""
    results = await asyncio.gather(*(vm.detach(name) for name in ids), return_exceptions=True)
    failed: list[str] = []
    for name, result in zip(ids, results, strict=True):
        if isinstance(result, BaseException) and not isinstance(result, VmGone):  # which leaves nothing behind
            failed.append(f"{name} ({result})")
    return failed


async def uncut(step: Coroutine[object, object, _T]) -> _T:
    """The step to its end, even if the caller is cancelled, who then learns of it afterwards."""
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would complain
        raise


def check_names(disk_id: str, serial: str | None) -> None:
    """Raises UnfitDisk for names that some VMM does not take."""
    if not _ID.fullmatch(disk_id):
        raise UnfitDisk(f"disk id {disk_id!r}: not a letter and up to 30 of letters, digits and '-._'")
    if serial is not None and not _SERIAL.fullmatch(serial):
        raise UnfitDisk(f"disk {disk_id}: serial {serial!r} is not 1 to 20 of letters, digits and '-._'")


def check_disk(disk: Disk) -> None:
    """Raises UnfitDisk for names that some VMM does not take, and for files that no guest would see as they are."""
    check_names(disk.id, disk.serial)
    if not disk.path.is_absolute():
        raise UnfitDisk(f"disk {disk.id}: {str(disk.path)!r} is not an absolute path")
    try:
        str(disk.path).encode()
    except UnicodeEncodeError:
        raise UnfitDisk(f"disk {disk.id}: {str(disk.path)!r} is not UTF-8, as JSON is") from None
    try:
        size_bytes(disk.path)
    except UnfitDisk as error:
        raise UnfitDisk(f"disk {disk.id}: {error}") from None


def size_bytes(path: Path) -> int:
    """Raises UnfitDisk for what is no regular file of whole sectors."""
    name = repr(str(path))
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UnfitDisk(f"{name}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnfitDisk(f"{name} is not a regular file")
    if not status.st_size or status.st_size % SECTOR_BYTES:
        raise UnfitDisk(f"{name} has {status.st_size} bytes, not whole sectors of {SECTOR_BYTES}")
    return status.st_size
