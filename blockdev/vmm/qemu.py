# SPDX-License-Identifier: Apache-2.0
"""Disks of a QEMU, over its monitor protocol QMP (QEMU: docs/interop/qemu-qmp-ref, from version 7.2).

A disk is a block node (`blockdev-add`) and a device (`device_add`) of the same name. The node says
`raw`, so nothing is guessed from the bytes of a layer, and takes QEMU's shared locks: any number of
VMs read one file, and a QEMU that would write to it is refused, as ours is where one does. That is
why neither `force-share` nor `share-rw` is set, which would give those locks away. The host's page
cache is used and so shared by all of them.

A disk of several files (`vmdk.FlatDisk`) is the one exception to raw: its node reads a VMDK descriptor that the client
makes, and the pieces behind it raw. All of them QEMU gets as open files, which have no other name.

A device goes only when the guest agrees (ACPI hot-unplug); the event DEVICE_DELETED says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from socket import socket as Socket
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from blockdev.errors import DiskConflict, GuestTimeout, NoFreeSlot, UnfitDisk, VmGone, VmmRefused, VmmTimeout
from blockdev.vmm.hotplug import SECTOR_BYTES, AttachedDisk, Disk, check_disk, check_names, uncut
from blockdev.vmm.vmdk import FlatDisk, check_extents, descriptor

_DEVICES: Final = PurePosixPath("/machine/peripheral")  # all that have an id
_BRIDGE: Final = re.compile(r"disk-slots[0-9]+")
_SLOTS: Final = 32
_MAX_BRIDGES: Final = 8
_QDEV: Final = re.compile(r"/machine/peripheral/([^/]+)/virtio-backend")
# QEMU from 8.0 on passes a repeated request on to the guest; and a VM that has gone is noticed by asking.
_ASK_AGAIN_SECONDS: Final = 1.0
# A device that is gone may hold its node for a moment more.
_NODE_SECONDS: Final = 3.0
_LOOK_AGAIN_SECONDS: Final = 0.02
# After a device has left a slot; see Qemu._unplug.
_SLOT_RESTS_SECONDS: Final = 1.0

_T = TypeVar("_T")


class _Node(msgspec.Struct, rename="kebab"):
    """BlockDeviceInfo."""

    node_name: str = ""
    file: str = ""
    drv: str = ""
    ro: bool = False


class _Block(msgspec.Struct):
    """BlockInfo."""

    qdev: str = ""
    inserted: _Node | None = None


class _Added(msgspec.Struct, rename="kebab"):
    """AddfdInfo."""

    fdset_id: int


class _Slot(NamedTuple):
    bridge: str
    number: int


class _Property(msgspec.Struct):
    """ObjectPropertyInfo."""

    name: str


# Spelt here, because in the class below `list` is a method.
_Nodes = list[_Node]
_Blocks = list[_Block]
_Properties = list[_Property]
_Names = list[str]


def slot_arguments(disks: int) -> list[str]:
    """Arguments for the command line of a QEMU (machine `q35`) that shall have room for so many disks.

    PCI bridges of 32 slots each, whose devices come and go by ACPI; a guest needs nothing but
    CONFIG_HOTPLUG_PCI_ACPI. With root ports, of one slot each, a guest would have as many more
    devices to probe while it boots. Windows: 1 MiB each, of which a slot needs 4 and 16 KiB, and no
    I/O ports, which virtio 1 does not use. They take the chassis numbers from 1 on.
    """
    bridges = -(-disks // _SLOTS)
    if not 1 <= bridges <= _MAX_BRIDGES:
        raise ValueError(f"{disks} disks: from 1 to {_MAX_BRIDGES * _SLOTS} are possible")
    options = "bus=pcie.0,shpc=off,io-reserve=0,mem-reserve=1M,pref64-reserve=1M"
    arguments = []
    for number in range(bridges):
        arguments += ["-device", f"pci-bridge,id=disk-slots{number},chassis_nr={number + 1},{options}"]
    return arguments


@contextlib.asynccontextmanager
async def connect(
    socket: Path | Socket, *, call_timeout_s: float = 10.0, detach_timeout_s: float = 30.0
) -> AsyncIterator[Qemu]:
    """A client at a monitor's unix socket, which serves one client at a time; or at a connected one, which it closes.

    `call_timeout_s` bounds each command, `detach_timeout_s` the guest's part of a detach. Raises
    VmGone; VmmTimeout, also where another client is served.
    """
    name = f"QEMU at {socket}" if isinstance(socket, Path) else "QEMU"
    client = QMPClient(name)
    client.logger.setLevel(logging.CRITICAL)  # what it logs is what we raise
    client.events.event_filter = lambda _: False  # or it would keep every event for ever
    try:
        async with asyncio.timeout(call_timeout_s):
            await _connect(client, socket)
    except TimeoutError:
        raise VmmTimeout(f"{name}: no greeting in {call_timeout_s:g} s; has it another client?") from None
    except (QMPError, OSError) as error:
        raise VmGone(f"{name}: {error}") from None
    try:
        yield Qemu(client, name, call_timeout_s, detach_timeout_s)
    finally:
        with contextlib.suppress(Exception):  # it raises what ended the connection; each call has said so
            await client.disconnect()


async def _connect(client: QMPClient, socket: Path | Socket) -> None:
    if not isinstance(socket, Path):
        return await client.connect(socket)
    while True:
        try:
            return await client.connect(str(socket))
        except ConnectError as error:
            # A socket that is not there, or that nobody listens at, is final. What comes later may be
            # about the client before us: an answer that it did not wait for, or the end of its connection.
            if isinstance(error.exc, OSError) and not isinstance(error.exc, (ConnectionResetError, BrokenPipeError)):
                raise
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)


class Qemu:
    """See `hotplug.Hotplug`; made by `connect`. An address is Kata's notation of a PCI path: "02/1f" is slot
    0x1f behind the bridge in slot 2."""

    def __init__(self, client: QMPClient, name: str, call_timeout_s: float, detach_timeout_s: float) -> None:
        self._client = client
        self._name = name
        self._call_timeout_s = call_timeout_s
        self._detach_timeout_s = detach_timeout_s
        # Under it: looking for a slot and taking it; and see _unplug.
        self._changing = asyncio.Lock()
        self._leaving: set[str] = set()  # asked to go, and QEMU does not tell them from those that stay
        self._left_at = -math.inf  # when the guest let one go last; the loop's clock
        self._free: dict[_Slot, float] = {}  # since when, by the loop's clock

    async def attach(self, disk: Disk) -> AttachedDisk:
        check_disk(disk)
        return await uncut(self._attach(disk))

    async def attach_flat(self, disk: FlatDisk) -> str:
        """One read-only disk out of pieces of files; its address. `detach` and `list` are as for the others.

        Raises what `attach` raises; DiskConflict for any disk that has this id already.
        """
        check_names(disk.id, disk.serial)
        check_extents(disk.extents)
        return await uncut(self._attach_flat(disk))

    async def detach(self, disk_id: str) -> None:
        await uncut(self._detach(disk_id))

    async def list(self) -> tuple[AttachedDisk, ...]:
        attached = []
        for block in self._converted(await self._execute("query-block"), _Blocks):
            match = _QDEV.fullmatch(block.qdev)
            if match and block.inserted and block.inserted.node_name == match[1]:
                attached.append(await self._described(block.inserted))
        return tuple(attached)

    async def _attach(self, disk: Disk) -> AttachedDisk:
        async with self._changing:
            if await self._is_attached(disk.id):
                return await self._same(disk)
            await self._plug(disk.id, disk.serial, _node_options(disk))
            return AttachedDisk(disk, await self._address(disk.id))

    async def _attach_flat(self, disk: FlatDisk) -> str:
        async with self._changing:
            if await self._is_attached(disk.id):
                raise DiskConflict(f"{self._name}: disk id {disk.id} is taken")
            async with self._handed_over(disk) as name:
                node = {
                    "driver": "vmdk", "node-name": disk.id, "read-only": True,
                    "file": {"driver": "file", "filename": name, "read-only": True},
                }  # fmt: skip
                await self._plug(disk.id, disk.serial, node)
            return await self._address(disk.id)

    async def _plug(self, disk_id: str, serial: str | None, node: dict[str, object]) -> None:
        """Node and device, or neither."""
        self._leaving.discard(disk_id)
        slot = await self._free_slot()
        try:
            await self._execute("blockdev-add", node)
        except VmmRefused:
            if not await self._node(disk_id):
                raise
            # Of an attempt that was killed, or of a detach that was not waited for.
            await self._delete_node(disk_id)
            await self._execute("blockdev-add", node)
        del self._free[slot]  # even if it is refused: perhaps for what somebody else has plugged there
        try:
            await self._execute("device_add", _device_options(disk_id, serial, slot))
        except VmmRefused:
            await self._delete_node(disk_id)
            raise

    @contextlib.asynccontextmanager
    async def _handed_over(self, disk: FlatDisk) -> AsyncIterator[str]:
        """The name under which QEMU may open the disk's descriptor meanwhile. What it has opened it keeps."""
        sets: dict[Path | bytes, int] = {}
        try:
            for extent in disk.extents:
                if extent.source not in sets:
                    sets[extent.source] = await self._hand_over(extent.source)
            names = [f"/dev/fdset/{sets[extent.source]}" for extent in disk.extents]
            text = descriptor(names, disk.extents)
            sets[text] = await self._hand_over(text)
            yield f"/dev/fdset/{sets[text]}"
        finally:
            for number in sets.values():
                await self._execute("remove-fd", {"fdset-id": number})

    async def _hand_over(self, source: Path | bytes) -> int:
        """The number of a new set of descriptors, with this one (QEMU: docs/interop/qemu-qmp-ref, add-fd)."""
        fd = _open_for_reading(source)
        try:
            self._client.send_fd_scm(fd)
            reply = await self._execute("add-fd", {})
        except OSError as error:
            raise VmGone(f"{self._name}: gone at add-fd: {error}") from None
        finally:
            os.close(fd)
        return self._converted(reply, _Added).fdset_id

    async def _same(self, disk: Disk) -> AttachedDisk:
        node = await self._node(disk.id)
        if disk.id in self._leaving or not node:
            raise DiskConflict(f"{self._name}: disk {disk.id} was detached, and the guest has not let it go yet")
        there = await self._described(node)
        if there.disk != disk or node.drv != "raw":
            raise DiskConflict(f"{self._name}: disk id {disk.id} belongs to {there.disk}, of type {node.drv}")
        return there

    async def _detach(self, disk_id: str) -> None:
        if await self._is_attached(disk_id):
            await self._unplug(disk_id)
        self._leaving.discard(disk_id)
        await self._delete_node(disk_id)

    async def _unplug(self, disk_id: str) -> None:
        """Ask the guest until it has let the device go; one device at a time, and none comes meanwhile.

        ACPI tells a guest that something is to go, and each time it looks it notes everything that has not
        gone yet. Several at once are so noted several times, and a note that is left when the device
        has gone is obeyed with the next device in that slot. The bound is for the guest to let any
        one go, so that waiting for one's turn does not count.
        """
        loop = asyncio.get_running_loop()
        asked_at = loop.time()

        def deadline() -> float:
            return max(asked_at, self._left_at) + self._detach_timeout_s

        while True:
            try:
                async with asyncio.timeout_at(deadline()):
                    await self._changing.acquire()
                break
            except TimeoutError:
                if loop.time() >= deadline():
                    raise self._kept(disk_id) from None
        try:
            slot = await self._slot_of(disk_id)
            async with asyncio.timeout_at(deadline()):
                await self._unplug_now(disk_id)
            self._left_at = loop.time()
            if slot:
                self._free[slot] = self._left_at
        except TimeoutError:
            raise self._kept(disk_id) from None
        finally:
            self._changing.release()

    def _kept(self, disk_id: str) -> GuestTimeout:
        return GuestTimeout(f"{self._name}: the guest did not let disk {disk_id} go in {self._detach_timeout_s:g} s")

    async def _unplug_now(self, disk_id: str) -> None:
        of_this = EventListener(
            ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"),
            lambda event: _event_data(event).get("device") == disk_id,
        )
        self._leaving.add(disk_id)
        with self._client.listen(of_this):
            while await self._ask_to_unplug(disk_id):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ASK_AGAIN_SECONDS):
                        event = await of_this.get()
                    if event["event"] == "DEVICE_DELETED":
                        return
                    self._leaving.discard(disk_id)
                    raise VmmRefused(f"{self._name}: the guest refused to let disk {disk_id} go")

    async def _ask_to_unplug(self, disk_id: str) -> bool:
        """False if there is no such device (any more)."""
        try:
            await self._call("device_del", {"id": disk_id})
        except ExecuteError as error:
            if error.error_class == "DeviceNotFound":
                return False
            if "in the process of unplug" not in str(error):  # which has no class of its own
                raise VmmRefused(f"{self._name}: device_del {disk_id}: {error}") from None
        return True

    async def _is_attached(self, disk_id: str) -> bool:
        """Whether there is a device of this id on a node of this name; no others are ours to touch."""
        try:
            reply = await self._call("qom-get", {"path": str(_DEVICES / disk_id), "property": "drive"})
        except ExecuteError:
            return False
        return reply == disk_id

    async def _node(self, name: str) -> _Node | None:
        reply = await self._execute("query-named-block-nodes", {"flat": True})
        return next((node for node in self._converted(reply, _Nodes) if node.node_name == name), None)

    async def _is_held(self, name: str) -> bool:
        """Whether a device that is there, of whatever id, has this node."""
        blocks = self._converted(await self._execute("query-block"), _Blocks)
        return any(block.qdev and block.inserted and block.inserted.node_name == name for block in blocks)

    async def _delete_node(self, name: str) -> None:
        """Quiet if there is none. Raises VmmRefused for one that stays in use."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _NODE_SECONDS
        while True:
            try:
                await self._execute("blockdev-del", {"node-name": name})
            except VmmRefused:
                if not await self._node(name):
                    return
                if await self._is_held(name) or loop.time() > deadline:
                    raise
            else:
                return
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    async def _free_slot(self) -> _Slot:
        """One that no disk has left, else the one that was left first. Raises NoFreeSlot."""
        if not self._free:
            await self._look_for_slots()
        slot = min(self._free, key=self._free.__getitem__)
        rest = self._free[slot] + _SLOT_RESTS_SECONDS - asyncio.get_running_loop().time()
        await asyncio.sleep(max(rest, 0))
        return slot

    async def _look_for_slots(self) -> None:
        """What is on the bridges, of ours or not; a question for each, therefore not each time."""
        bridges = [name for name in await self._children(_DEVICES) if _BRIDGE.fullmatch(name)]
        for bridge in sorted(bridges, key=lambda name: (len(name), name)):
            bus = _DEVICES / bridge / bridge
            devices = [name for name in await self._children(bus) if name.startswith("child[")]
            taken = {await self._slot(bus / name) for name in devices}
            self._free |= {_Slot(bridge, number): -math.inf for number in range(_SLOTS) if number not in taken}
        if not self._free:
            raise NoFreeSlot(f"{self._name}: no free slot on its {len(bridges)} bridges for disks")

    async def _slot_of(self, disk_id: str) -> _Slot | None:
        """None where it is on no bridge of ours."""
        bus = PurePosixPath(self._converted(await self._property(_DEVICES / disk_id, "parent_bus"), str))
        if not _BRIDGE.fullmatch(bus.name):
            return None
        return _Slot(bus.name, await self._slot(_DEVICES / disk_id))

    async def _children(self, path: PurePosixPath) -> _Names:
        reply = await self._execute("qom-list", {"path": str(path)})
        return [item.name for item in self._converted(reply, _Properties)]

    async def _described(self, node: _Node) -> AttachedDisk:
        serial = self._converted(await self._property(_DEVICES / node.node_name, "serial"), str)
        disk = Disk(node.node_name, Path(node.file), serial or None, read_only=node.ro)
        return AttachedDisk(disk, await self._address(node.node_name))

    async def _address(self, disk_id: str) -> str:
        slots = [await self._slot(_DEVICES / disk_id)]
        bus = PurePosixPath(self._converted(await self._property(_DEVICES / disk_id, "parent_bus"), str))
        if bus.parent.parent == _DEVICES:
            slots.insert(0, await self._slot(bus.parent))
        return "/".join(f"{slot:02x}" for slot in slots)

    async def _slot(self, device: PurePosixPath) -> int:
        return self._converted(await self._property(device, "addr"), int) >> 3  # the rest is the function

    async def _property(self, path: PurePosixPath, name: str) -> object:
        return await self._execute("qom-get", {"path": str(path), "property": name})

    def _converted(self, reply: object, kind: type[_T]) -> _T:
        try:
            return msgspec.convert(reply, kind)
        except msgspec.ValidationError as error:
            raise VmmRefused(f"{self._name}: an answer that is not QMP's: {error}") from None

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Raises VmmRefused, VmmTimeout, VmGone."""
        try:
            return await self._call(command, arguments)
        except ExecuteError as error:
            raise VmmRefused(f"{self._name}: {command}: {error}") from None

    async def _call(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Raises ExecuteError, VmmTimeout, VmGone."""
        try:
            async with asyncio.timeout(self._call_timeout_s):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise VmmTimeout(f"{self._name}: no answer to {command} in {self._call_timeout_s:g} s") from None
        except ExecuteError:
            raise
        except (QMPError, OSError, EOFError) as error:
            raise VmGone(f"{self._name}: gone at {command}: {error}") from None


def _node_options(disk: Disk) -> dict[str, object]:
    return {
        "driver": "raw",
        "node-name": disk.id,
        "read-only": disk.read_only,
        "file": {"driver": "file", "filename": str(disk.path)},
    }


def _open_for_reading(source: Path | bytes) -> int:
    """Raises UnfitDisk."""
    try:
        if isinstance(source, Path):
            return os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        written = os.memfd_create("disk", os.MFD_CLOEXEC)
        try:
            os.truncate(written, len(source))
            os.pwrite(written, source, 0)  # into memory, where nothing is short
            # QEMU takes a descriptor only for what it was opened for.
            return os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(written)
    except OSError as error:
        raise UnfitDisk(f"{str(source)!r}: {error}" if isinstance(source, Path) else str(error)) from None


def _device_options(disk_id: str, serial: str | None, slot: _Slot) -> dict[str, object]:
    """One queue: a queue costs the guest memory for each disk, and there are many small ones."""
    options: dict[str, object] = {
        "driver": "virtio-blk-pci",
        "id": disk_id,
        "drive": disk_id,
        "bus": slot.bridge,
        "addr": f"{slot.number:x}",
        "disable-legacy": "on",
        "num-queues": 1,
        "logical_block_size": SECTOR_BYTES,  # dm-verity with smaller data blocks would be refused
    }
    if serial is not None:
        options["serial"] = serial
    return options


def _event_data(event: Any) -> dict[str, object]:
    data = event.get("data")
    return data if isinstance(data, dict) else {}
