# SPDX-License-Identifier: Apache-2.0
"""Boot the UVM under QEMU, give it a policy and disks, and read what it says until it ends.

Nothing is left behind: the policy and the guest's port are descriptors that QEMU inherits, not files, and
QEMU gets SIGKILL when this process dies. All of a machine's state is in memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from blockdev.errors import VmGone, VmmError
from blockdev.vmm import gpt, hotplug, qemu
from blockdev.vmm.vmdk import Extent, FlatDisk
from uvm import accel, frames
from uvm.errors import MachineError
from uvm.frames import Kind
from uvm.image import Image
from uvm.policy import Policy, PolicyLayer, Process, kernel_command_line

QEMU: Final = "qemu-system-x86_64"
MEMORY_MIB: Final = 256
TIMEOUT_SECONDS: Final = 120.0
OUTPUT_BYTES_MAX: Final = 64 << 20
_TEXTS_MAX: Final = 1000  # lines of the kernel, and the like
_READ_BYTES: Final = 256 << 10
_MONITOR_SECONDS: Final = 30.0  # for one answer of QEMU, on a busy host
_STDERR_TAIL_BYTES: Final = 4096
# Without hot-plug: slots of q35's root bus that nothing else has, with eight functions each.
_FIRST_SLOT, _LAST_SLOT, _FUNCTIONS = 8, 30, 8
DISKS_MAX: Final = (_LAST_SLOT - _FIRST_SLOT + 1) * _FUNCTIONS


@dataclass(frozen=True, slots=True)
class Disk:
    """A file for the guest, read-only and raw whatever its bytes look like. `serial` is all that the guest is told."""

    serial: str
    path: Path


@dataclass(frozen=True, slots=True)
class OneDisk:
    """Files for the guest as the partitions of one disk. `extents`: of the whole disk, as `gpt.Layout` has them."""

    serial: str
    extents: Sequence[Extent]


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """What the guest's kernel says of a layer after the process has ended (`dmsetup status` and `dmsetup table`).

    `verified`: no block was met that is not the policy's. Blocks that were not read were not looked at.
    """

    name: str
    disk: str
    verified: bool
    table: str

    @property
    def root_hash(self) -> str:
        fields = self.table.split(" ")
        return fields[11] if len(fields) > 11 else ""


@dataclass(slots=True)
class Result:
    """Where nothing was run, `exit_status` is None and `refused` says why. `phases`: seconds since the start."""

    exit_status: int | None = None
    refused: str | None = None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    layers: list[LayerStatus] = field(default_factory=list)
    kernel_log: list[str] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    accelerator: str = ""


async def run(
    image: Image,
    layers: Sequence[tuple[PolicyLayer, Path]],
    process: Process,
    *,
    one_disk: str = "",
    memory_mib: int = MEMORY_MIB,
    timeout_s: float | None = TIMEOUT_SECONDS,
    on_output: Callable[[Kind, bytes], None] | None = None,
) -> Result:
    """Run one process on the layers, top first. A refusal is a Result. Raises PolicyError, MachineError, ImageError.

    `one_disk`: the serial of a disk whose partitions they are; without, each has a disk of its own.
    """
    policy = Policy([layer for layer, _ in layers], process, one_disk)
    disks: list[Disk | OneDisk] = [Disk(layer.name, path) for layer, path in layers]
    if one_disk:
        disks = [partitioned(one_disk, [path for _, path in layers])]
    return await run_policy(
        image, policy.text(), disks, memory_mib=memory_mib, timeout_s=timeout_s, on_output=on_output
    )


def partitioned(serial: str, paths: Sequence[Path]) -> OneDisk:
    """Raises MachineError for files that cannot be the partitions of one disk."""
    try:
        return OneDisk(serial, tuple(gpt.layout(paths).extents()))
    except VmmError as error:
        raise MachineError(str(error)) from None


async def run_policy(
    image: Image,
    policy_text: bytes,
    disks: Sequence[Disk | OneDisk],
    *,
    command_line: str | None = None,
    hot_plug: bool = True,
    memory_mib: int = MEMORY_MIB,
    timeout_s: float | None = TIMEOUT_SECONDS,
    on_output: Callable[[Kind, bytes], None] | None = None,
) -> Result:
    """The same with policy and disks apart, as a host would have it that shows other disks than the policy names, or
    another policy than the kernel's command line.

    `hot_plug`: the disks come while the guest boots, as they do with containers; only so are files refused beforehand
    that no guest would see as they are. Else they are there from the start, which a OneDisk cannot be.
    """
    cold = () if hot_plug else tuple(disk for disk in disks if isinstance(disk, Disk))
    if not hot_plug and len(cold) != len(disks):
        raise MachineError("a disk of partitions is attached while the guest runs")
    image.check()
    kind = await accel.chosen(image, lambda: _boots_with_kvm(image))
    line = kernel_command_line(policy_text) if command_line is None else command_line
    started = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            slots = len(disks) if hot_plug else 0
            async with _machine(image, kind, line, policy_text, cold, slots, memory_mib) as machine:
                result = Result(accelerator=kind)
                if hot_plug:
                    await machine.attach(disks)
                    result.phases["attached"] = time.monotonic() - started
                await machine.say(f"disks {len(disks)}\n")
                async for frame in machine.frames():
                    _take(result, frame, time.monotonic() - started, on_output)
                if result.exit_status is None and result.refused is None:
                    raise MachineError("the guest ended without a word")
                return result
    except TimeoutError:
        raise MachineError(f"the guest was not done after {timeout_s:g} s") from None


def _take(
    result: Result, frame: frames.Frame, elapsed_s: float, on_output: Callable[[Kind, bytes], None] | None
) -> None:
    match frame.kind:
        case Kind.STDOUT | Kind.STDERR:
            if on_output:
                on_output(frame.kind, frame.payload)
                return
            stream = result.stdout if frame.kind is Kind.STDOUT else result.stderr
            stream += frame.payload
            if len(stream) > OUTPUT_BYTES_MAX:
                raise MachineError(f"the process wrote over {OUTPUT_BYTES_MAX} bytes")
        case Kind.PHASE:
            if len(result.phases) < _TEXTS_MAX:
                result.phases[frame.text.partition(" ")[0]] = elapsed_s
        case Kind.KERNEL:
            if len(result.kernel_log) < _TEXTS_MAX:
                result.kernel_log.append(frame.text)
        case Kind.LAYER:
            name, _, rest = frame.text.partition(" ")
            disk, _, rest = rest.partition(" ")
            status, _, table = rest.partition(" ")
            if len(result.layers) < _TEXTS_MAX:
                result.layers.append(LayerStatus(name, disk, status == "V", table))
        case Kind.REFUSED:
            result.refused = frame.text
        case Kind.EXIT:
            if not (frame.text.isascii() and frame.text.isdigit() and len(frame.text) <= 3):
                raise MachineError(f"the guest says {frame.text[:80]!r} for an exit status")
            result.exit_status = int(frame.text)


class _Machine:
    def __init__(self, process: asyncio.subprocess.Process, port: socket.socket, monitor: socket.socket) -> None:
        self._process, self._port, self._monitor = process, port, monitor
        assert process.stderr is not None
        self._stderr = process.stderr

    async def attach(self, disks: Sequence[Disk | OneDisk]) -> None:
        """All, in this order. Once: the monitor has nothing to say after that."""
        try:
            async with qemu.connect(self._monitor, call_timeout_s=_MONITOR_SECONDS) as machine:
                for number, disk in enumerate(disks):
                    name = f"disk{number}"
                    if isinstance(disk, OneDisk):
                        await machine.attach_flat(FlatDisk(name, tuple(disk.extents), disk.serial))
                    else:
                        await machine.attach(hotplug.Disk(name, disk.path.absolute(), disk.serial))
        except VmGone:
            raise await self._ended() from None
        except VmmError as error:
            raise MachineError(str(error)) from None

    async def say(self, text: str) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._port, text.encode("ascii"))
        except OSError:
            raise await self._ended() from None

    async def frames(self) -> AsyncIterator[frames.Frame]:
        """Up to the one that says that it was the last. Raises MachineError where the machine ends before."""
        decoder, loop = frames.Decoder(), asyncio.get_running_loop()
        while True:
            try:
                piece = await loop.sock_recv(self._port, _READ_BYTES)
            except OSError:
                piece = b""
            if not piece:
                raise await self._ended()
            for frame in decoder.feed(piece):
                if frame.kind is Kind.DONE:
                    return
                yield frame

    async def _ended(self) -> MachineError:
        said = (await self._stderr.read())[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip()
        status = await self._process.wait()
        return MachineError(f"QEMU ended early (status {status}): {said or 'it says nothing'}")


@asynccontextmanager
async def _machine(
    image: Image,
    kind: str,
    command_line: str,
    policy_text: bytes,
    disks: Sequence[Disk],
    slots: int,
    memory_mib: int,
) -> AsyncIterator[_Machine]:
    """A running QEMU with these disks and slots for so many more; gone afterwards in any case. Raises MachineError."""
    if len(disks) > DISKS_MAX:
        raise MachineError(f"{len(disks)} disks; {DISKS_MAX} have a place")
    missing = [tool for tool in (QEMU, "setpriv") if not shutil.which(tool)]
    if missing:
        raise MachineError(f"not installed: {', '.join(missing)} (Debian: qemu-system-x86, util-linux)")
    (port, its_port), (monitor, its_monitor) = socket.socketpair(), socket.socketpair()
    policy_fd = os.memfd_create("tardev-policy", os.MFD_CLOEXEC)
    process = None
    try:
        port.setblocking(False)
        monitor.setblocking(False)
        os.write(policy_fd, policy_text)  # into memory, where nothing is short
        arguments = [
            *_arguments(image, kind, command_line, memory_mib),
            "-fw_cfg", f"name=opt/tardev/policy,file=/proc/self/fd/{policy_fd}",
            "-chardev", f"socket,id=port,fd={its_port.fileno()}",
            "-chardev", f"socket,id=monitor,fd={its_monitor.fileno()}", "-mon", "chardev=monitor,mode=control",
            *(qemu.slot_arguments(slots) if slots else ()),
            *(argument for number, disk in enumerate(disks) for argument in _disk_arguments(number, disk)),
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", QEMU, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            pass_fds=(its_port.fileno(), its_monitor.fileno(), policy_fd), start_new_session=True,
        )  # fmt: skip
        its_port.close()
        its_monitor.close()
        yield _Machine(process, port, monitor)
    finally:
        for end in (port, its_port, monitor, its_monitor):
            end.close()
        os.close(policy_fd)
        if process is not None:
            if process.returncode is None:
                process.kill()
            await asyncio.shield(process.wait())


def _arguments(image: Image, kind: str, command_line: str, memory_mib: int) -> list[str]:
    """A machine with nothing but a processor, memory, PCI, fw_cfg and a virtio-serial port."""
    return [
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "q35,usb=off", "-accel", kind, "-cpu", "host" if kind == "kvm" else "max",
        "-m", str(memory_mib), "-smp", "1",
        "-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", command_line,
        "-device", "virtio-serial-pci,addr=07.0", "-device", "virtserialport,chardev=port,name=tardev",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]  # fmt: skip


def _disk_arguments(number: int, disk: Disk) -> list[str]:
    slot, function = divmod(number, _FUNCTIONS)
    node: dict[str, Any] = {
        "driver": "raw", "node-name": f"disk{number}", "read-only": True,
        "file": {"driver": "file", "filename": str(disk.path), "read-only": True},
    }  # fmt: skip
    device: dict[str, Any] = {
        "driver": "virtio-blk-pci", "drive": f"disk{number}", "serial": disk.serial, "num-queues": 1,
        "disable-legacy": "on", "addr": f"{_FIRST_SLOT + slot:02x}.{function}", "multifunction": function == 0,
    }  # fmt: skip
    return ["-blockdev", json.dumps(node), "-device", json.dumps(device)]


async def _boots_with_kvm(image: Image) -> bool:
    """Whether a guest gets as far as its first word, which without a policy is a refusal."""
    try:
        async with asyncio.timeout(accel.PROBE_SECONDS):
            async with _machine(image, "kvm", "probe", b"", (), 0, MEMORY_MIB) as machine:
                async for _ in machine.frames():
                    return True
    except (TimeoutError, MachineError):
        pass
    return False
