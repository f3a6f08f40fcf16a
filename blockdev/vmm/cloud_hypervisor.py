# SPDX-License-Identifier: Apache-2.0
"""Disks of a cloud-hypervisor, over its HTTP API (its vmm/src/api/openapi/cloud-hypervisor.yaml, v46 to v52).

A disk says `image_type: Raw`, without which the bytes of a layer would choose the driver: a qcow2
header names other files of the host to read. Versions before v51 do not know the field and guess;
there a file that looks like an image is refused. From v46 on a read-only disk takes a shared lock.

Removing is a request to the guest (ACPI). The disk leaves the VM's configuration at once and its
device tree when the guest has let go, and only then are slot and file free.

Nothing here was run against a cloud-hypervisor; the tests hold each request to the documented schema.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final, TypeVar

import aiohttp
import msgspec

from blockdev.errors import DiskConflict, GuestTimeout, NoFreeSlot, UnfitDisk, VmGone, VmmRefused, VmmTimeout
from blockdev.vmm.hotplug import AttachedDisk, Disk, check_disk, uncut

# Of the 32 of a segment's one bus, the first is the bus's own.
SLOTS_PER_SEGMENT: Final = 31
# What Microsoft's Kata configures (virtcontainers/clh.go); layers go to the segments from 1 on.
KATA_SEGMENTS: Final = 10
_BASE: Final = "http://localhost/api/v1/"
_KNOWS_IMAGE_TYPE: Final = 51
_LOOK_AGAIN_SECONDS: Final = 0.1
_MAX_ANSWER_BYTES: Final = 16 << 20
_MAX_REASON_CHARACTERS: Final = 2000

_T = TypeVar("_T")


class _DiskConfig(msgspec.Struct):
    id: str | None = None
    path: str | None = None  # none for vhost-user
    readonly: bool = False
    serial: str | None = None
    pci_segment: int = 0
    image_type: str | None = None


class _PlatformConfig(msgspec.Struct):
    num_pci_segments: int = 1


class _VmConfig(msgspec.Struct):
    disks: list[_DiskConfig] | None = None
    platform: _PlatformConfig | None = None


class _DeviceNode(msgspec.Struct):
    children: list[str] = []
    pci_bdf: str | None = None


class _VmInfo(msgspec.Struct):
    config: _VmConfig
    state: str
    device_tree: dict[str, _DeviceNode] | None = None

    def disk(self, disk_id: str) -> _DiskConfig | None:
        return next((disk for disk in self.config.disks or () if disk.id == disk_id), None)

    def address(self, disk_id: str) -> str:
        """Of the transport device that the disk is a child of; empty before the VM has booted."""
        nodes = (self.device_tree or {}).values()
        return next((node.pci_bdf for node in nodes if node.pci_bdf and disk_id in node.children), "")

    def free_segment(self) -> int | None:
        """The lowest with a free slot; segment 0, where the VM's own devices are, only if it is the only one."""
        segments = self.config.platform.num_pci_segments if self.config.platform else 1
        for segment in range(1 if segments > 1 else 0, segments):
            taken = {node.pci_bdf for node in (self.device_tree or {}).values() if _segment_of(node.pci_bdf) == segment}
            configured = sum(disk.pci_segment == segment for disk in self.config.disks or ())
            if max(len(taken), configured) < SLOTS_PER_SEGMENT:
                return segment
        return None


class _PciDeviceInfo(msgspec.Struct):
    id: str
    bdf: str


class _Ping(msgspec.Struct):
    version: str


def kata_segment(index: int) -> int:
    """The PCI segment to which Microsoft's Kata plugs the disk of this number (from 0) of a sandbox.

    Source: its 3.2.0.azl4, src/runtime/virtcontainers/clh.go. Raises NoFreeSlot.
    """
    segment = index // SLOTS_PER_SEGMENT + 1
    if segment >= KATA_SEGMENTS:
        raise NoFreeSlot(f"disk {index}: Kata has room for {(KATA_SEGMENTS - 1) * SLOTS_PER_SEGMENT} in a sandbox")
    return segment


class CloudHypervisor:
    """See `hotplug.Hotplug`. An address is a PCI one, "0001:00:03.0".

    `socket`: its --api-socket. Each call is a connection of its own, since the VMM serves only ten.
    `call_timeout_s` bounds each, `detach_timeout_s` the guest's part of a detach.
    """

    def __init__(self, socket: Path, *, call_timeout_s: float = 10.0, detach_timeout_s: float = 30.0) -> None:
        self._socket = socket
        self._name = f"cloud-hypervisor at {socket}"
        self._call_timeout_s = call_timeout_s
        self._detach_timeout_s = detach_timeout_s
        self._attaching = asyncio.Lock()  # slots are looked at, then taken

    async def attach(self, disk: Disk) -> AttachedDisk:
        check_disk(disk)
        return await uncut(self._attach(disk))

    async def detach(self, disk_id: str) -> None:
        await uncut(self._detach(disk_id))

    async def list(self) -> tuple[AttachedDisk, ...]:
        info = await self._info()
        return tuple(AttachedDisk(_disk_of(disk), info.address(disk.id)) for disk in info.config.disks or () if disk.id)

    async def _attach(self, disk: Disk) -> AttachedDisk:
        async with self._attaching:
            info = await self._info()
            if configured := info.disk(disk.id):
                if _disk_of(configured) != disk or configured.image_type not in (None, "Raw"):
                    kind = f"{_disk_of(configured)}, of type {configured.image_type}"
                    raise DiskConflict(f"{self._name}: disk id {disk.id} belongs to {kind}")
                return AttachedDisk(disk, info.address(disk.id))
            if disk.id in (info.device_tree or {}):
                raise DiskConflict(f"{self._name}: disk {disk.id} was detached, and the guest has not let it go yet")
            await self._check_version(disk)
            segment = info.free_segment()
            if segment is None:
                raise NoFreeSlot(f"{self._name}: no free slot on its PCI segments for disks")
            request: dict[str, object] = {
                "id": disk.id,
                "path": str(disk.path),
                "readonly": disk.read_only,
                "image_type": "Raw",
                "pci_segment": segment,
            }
            if disk.serial is not None:
                request["serial"] = disk.serial
            try:
                answer = await self._call("PUT", "vm.add-disk", request)
            except VmmRefused as error:
                # Before the API had statuses, a taken id was a 500 like everything else.
                if (await self._info()).disk(disk.id):
                    raise DiskConflict(str(error)) from None
                raise
            if answer is None:  # 204: the VM has not booted
                return AttachedDisk(disk, "")
            return AttachedDisk(disk, self._decoded(answer, _PciDeviceInfo).bdf)

    async def _detach(self, disk_id: str) -> None:
        info = await self._info()
        asked = False
        try:
            async with asyncio.timeout(self._detach_timeout_s):
                while info.disk(disk_id) or disk_id in (info.device_tree or {}):
                    if info.disk(disk_id) and not asked:
                        await self._ask_to_remove(disk_id)
                        asked = True
                    else:
                        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
                    info = await self._info()
        except TimeoutError:
            bound = f"{self._detach_timeout_s:g} s"
            raise GuestTimeout(f"{self._name}: the guest did not let disk {disk_id} go in {bound}") from None

    async def _ask_to_remove(self, disk_id: str) -> None:
        try:
            await self._call("PUT", "vm.remove-device", {"id": disk_id})
        except VmmRefused:
            # It may have gone since we looked, which older versions answer with 500.
            if (await self._info()).disk(disk_id):
                raise

    async def _check_version(self, disk: Disk) -> None:
        """Only where it matters: an older VMM would take this file for what it looks like."""
        if not (kind := foreign_kind(disk.path)):
            return
        answer = await self._call("GET", "vmm.ping")
        version = self._decoded(answer or b"", _Ping).version
        match = re.match(r"v?([0-9]+)\.", version)
        if not match or int(match[1]) < _KNOWS_IMAGE_TYPE:
            raise UnfitDisk(
                f"disk {disk.id}: {disk.path} looks like {kind}, and {self._name} is {version!r}:"
                f" only v{_KNOWS_IMAGE_TYPE} and later take it as raw"
            )

    async def _info(self) -> _VmInfo:
        return self._decoded(await self._call("GET", "vm.info") or b"", _VmInfo)

    def _decoded(self, answer: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:  # ValidationError is one
            raise VmmRefused(f"{self._name}: an answer that is not its API's: {error}") from None

    async def _call(self, method: str, endpoint: str, request: dict[str, object] | None = None) -> bytes | None:
        """The body, or None of a 204. Raises VmmRefused, DiskConflict, VmmTimeout, VmGone."""
        name = f"{self._name}: {endpoint}"
        try:
            async with asyncio.timeout(self._call_timeout_s):
                connector = aiohttp.UnixConnector(str(self._socket), force_close=True)
                headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
                async with (
                    aiohttp.ClientSession(connector=connector, headers=headers) as session,
                    session.request(method, _BASE + endpoint, json=request, allow_redirects=False) as response,
                ):
                    status, body = response.status, await _bounded(response)
        except TimeoutError:
            raise VmmTimeout(f"{name}: no answer in {self._call_timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise VmGone(f"{name}: {error or type(error).__name__}") from None
        if status == 200:
            return body
        if status == 204:
            return None
        reason = f"{name}: status {status} {body[:_MAX_REASON_CHARACTERS].decode(errors='replace')}".rstrip()
        if status == 404 and endpoint != "vm.remove-device":  # where it can be the device as well
            raise VmGone(f"{reason} (no VM)")
        raise (DiskConflict if status == 409 else VmmRefused)(reason)


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _MAX_ANSWER_BYTES:
            raise VmmRefused(f"cloud-hypervisor: an answer of more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _disk_of(config: _DiskConfig) -> Disk:
    return Disk(config.id or "", Path(config.path or ""), config.serial, config.readonly)


def _segment_of(bdf: str | None) -> int | None:
    match = re.match(r"([0-9a-f]{4}):", bdf or "")
    return int(match[1], 16) if match else None


def foreign_kind(path: Path) -> str:
    """The image format that a VMM which guesses would take this file for; empty if none. Raises UnfitDisk.

    Magic numbers: QEMU's docs/interop/qcow2, [MS-VHDX] 2.2.1, and the footer of a VHD, its last 512 bytes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(-512, 2)
            footer = file.read(8)
    except OSError as error:
        raise UnfitDisk(f"{path}: {error}") from None
    if head.startswith(b"QFI\xfb"):
        return "a qcow2 image"
    if head == b"vhdxfile":
        return "a VHDX image"
    return "a VHD image" if footer == b"conectix" else ""
