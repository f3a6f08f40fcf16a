# SPDX-License-Identifier: Apache-2.0
"""Disks of a real QEMU: with a Linux guest where the guest has a part in it, else with the firmware alone."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import QMPClient

from blockdev.errors import DiskConflict, GuestTimeout, NoFreeSlot, UnfitDisk, VmGone, VmmError, VmmRefused, VmmTimeout
from blockdev.vmm import gpt, qemu
from blockdev.vmm.hotplug import Disk, attach_all
from blockdev.vmm.vmdk import Extent, FlatDisk
from tests.guest import Guest, make_initramfs

# In ./dev test the guests of tests/uvm get their disks that way.
pytestmark = [pytest.mark.guest, pytest.mark.soak]

SLOTS = 64


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "initramfs"
    path.write_bytes(make_initramfs())
    return path


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory, initramfs: Path) -> Iterator[Guest]:
    """One for all tests that do not kill it; with a disk of its own that is not ours to touch."""
    directory = tmp_path_factory.mktemp("linux")
    (directory / "own").write_bytes(bytes(512))
    own = f"driver=file,node-name=own-node,filename={directory}/own,read-only=on"
    arguments = ["-blockdev", own, "-device", "virtio-blk-pci,id=own,drive=own-node,serial=own"]
    guest = Guest(directory / "vm", [*qemu.slot_arguments(SLOTS), *arguments], initramfs)
    yield guest
    guest.stop()


@pytest.fixture
def firmware(tmp_path: Path) -> Iterator[Guest]:
    """Nobody in it lets a disk go."""
    guest = Guest(tmp_path / "vm", qemu.slot_arguments(SLOTS))
    yield guest
    guest.stop()


async def ask(guest: Guest, command: str, **arguments: object) -> Any:
    client = QMPClient()
    await client.connect(str(guest.second_qmp))
    try:
        return await client.execute(command, arguments)
    finally:
        await client.disconnect()


async def state(guest: Guest) -> list[Any]:
    """All that attaching could leave: block back-ends, nodes, devices, and what is on the bridges."""
    found = [await ask(guest, "query-block"), await ask(guest, "query-named-block-nodes", flat=True)]
    devices = await ask(guest, "qom-list", path="/machine/peripheral")
    found.append(sorted(device["name"] for device in devices))
    for device in devices:
        if device["type"] == "child<pci-bridge>":
            bus = await ask(guest, "qom-list", path="/machine/peripheral/{0}/{0}".format(device["name"]))
            found.append(sorted(item["name"] for item in bus))
    return found


@pytest_asyncio.fixture
async def vm(linux: Guest) -> AsyncIterator[qemu.Qemu]:
    """Each test gives the VM back as it was."""
    before = await state(linux)
    async with qemu.connect(linux.qmp) as client:
        yield client
        after = await state(linux)
        await asyncio.gather(*(client.detach(one.disk.id) for one in await client.list()))
    assert after == before


def layer(directory: Path, number: int = 0, sectors: int = 16) -> Path:
    path = directory / f"layer-{number}"
    path.write_bytes(hashlib.sha256(b"%d" % number).digest() * (sectors * 16))
    return path


async def seen(guest: Guest, *serials: str) -> dict[str, str]:
    """Device by serial, when the guest has found all of them."""
    for _ in range(300):
        lines = guest.run("cd /sys/block; for d in *; do echo $(cat $d/serial) $d; done").splitlines()
        found = {serial: device for serial, _, device in (line.rpartition(" ") for line in lines)}
        if set(serials) <= set(found):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"the guest sees {sorted(found)}, not {serials}")


async def test_64_disks_in_one_vm(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    disks = [Disk(f"l{n}", layer(tmp_path, n, n + 1), f"serial-{n}") for n in range(SLOTS)]
    attached = await attach_all(vm, disks)
    assert [one.disk for one in attached] == disks
    assert len({one.address for one in attached}) == SLOTS
    listed = await vm.list()
    assert sorted(listed, key=lambda one: disks.index(one.disk)) == attached
    with pytest.raises(NoFreeSlot, match="no free slot on its 2 bridges"):
        await vm.attach(Disk("one-more", disks[0].path))
    with pytest.raises(NoFreeSlot):
        await attach_all(vm, [*disks, Disk("one-more", disks[0].path)])  # these were there before, and stay
    assert await vm.list() == listed

    devices = await seen(linux, *(f"serial-{n}" for n in range(SLOTS)))
    sums = linux.run(f"cd /dev; sha256sum {' '.join(devices[f'serial-{n}'] for n in range(SLOTS))}").splitlines()
    assert [line.split()[0] for line in sums] == [hashlib.sha256(disk.path.read_bytes()).hexdigest() for disk in disks]
    paths = linux.run("cd /sys/block; for d in *; do echo $(cat $d/serial) $(cat $d/ro) $(readlink -f $d); done")
    for disk, one in zip(disks, attached, strict=True):
        (line,) = (line for line in paths.splitlines() if line.startswith(f"{disk.serial} "))
        assert line.split()[1] == "1", "the guest may write"
        bridge, slot = one.address.split("/")
        assert f"/0000:00:{bridge}.0/" in line
        assert f":{slot}.0/virtio" in line

    await asyncio.gather(*(vm.detach(disk.id) for disk in disks))
    assert await vm.list() == ()
    # In slots that were just left: a guest that has noted a removal twice would take these away, too.
    again = await attach_all(vm, disks[:6])
    await seen(linux, *(f"serial-{n}" for n in range(6)))
    await asyncio.sleep(1)
    assert await vm.list() == tuple(again)
    await asyncio.gather(*(vm.detach(disk.id) for disk in disks[:6]))
    assert linux.run("cat /sys/block/*/serial") == "own"
    assert not open_files(linux, tmp_path)


def open_files(guest: Guest, directory: Path) -> dict[str, int]:
    """Flags by path of what QEMU has open there."""
    found = {}
    process = Path("/proc", str(guest.process.pid))
    for link in (process / "fd").iterdir():
        if (path := os.readlink(link)).startswith(f"{directory}/layer"):
            (flags,) = (
                line.split()[1]
                for line in (process / "fdinfo" / link.name).read_text().splitlines()
                if line.startswith("flags:")
            )
            found[path] = int(flags, 8)
    return found


async def test_the_same_again_is_the_same(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    disk = Disk("a", layer(tmp_path), "s")
    first, second = await asyncio.gather(vm.attach(disk), vm.attach(disk))
    assert first == second == await vm.attach(disk)
    assert await vm.list() == (first,)
    others = Disk("a", layer(tmp_path, 1), "s"), Disk("a", disk.path), Disk("a", disk.path, "s", read_only=False)
    for other in others:
        with pytest.raises(DiskConflict, match="belongs to"):
            await vm.attach(other)
    assert open_files(linux, tmp_path)[str(disk.path)] & os.O_ACCMODE == os.O_RDONLY
    await vm.detach("a")
    await vm.detach("a")


async def test_a_failed_one_undoes_the_earlier_ones(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    """At each step that can fail: our look at the file, blockdev-add, device_add."""
    kept = await vm.attach(Disk("kept", layer(tmp_path, 99), "kept"))
    await seen(linux, "kept")
    before = await state(linux)
    good = [kept.disk, *(Disk(f"l{n}", layer(tmp_path, n)) for n in range(5))]
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(1000))
    failing: list[tuple[Disk, type[VmmError], str]] = [
        (Disk("bad", odd), UnfitDisk, "whole sectors"),
        (Disk("own-node", good[0].path), VmmRefused, "[Nn]ode.*own-node"),
        (Disk("own", good[0].path), VmmRefused, "device_add: Duplicate device ID 'own'"),
        (Disk("disk-slots0", good[0].path), VmmRefused, "Duplicate device ID 'disk-slots0'"),
    ]
    for bad, error, message in failing:
        with pytest.raises(error, match=message):
            await attach_all(vm, [*good, bad, Disk("never", good[0].path)])
        assert await state(linux) == before, message
        with pytest.raises(error, match=message):
            await vm.attach(bad)
        assert await state(linux) == before, f"{message}, alone"
    assert await vm.list() == (kept,)
    await vm.detach("kept")


async def test_what_is_not_a_disk_of_ours_is_not_touched(linux: Guest, vm: qemu.Qemu) -> None:
    before = await state(linux)
    for name in ("own", "own-node", "disk-slots0", "nothing"):
        if name == "own-node":
            with pytest.raises(VmmRefused, match="in use"):
                await vm.detach(name)
        else:
            await vm.detach(name)
    assert await state(linux) == before
    assert linux.run("cat /sys/block/*/serial") == "own"


async def test_a_caller_that_was_killed_half_way(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    disk = Disk("a", layer(tmp_path), "s")
    node = {"driver": "raw", "node-name": "a", "file": {"driver": "null-co", "size": 512}}
    await ask(linux, "blockdev-add", **node)
    await vm.attach(disk)
    await seen(linux, "s")
    await ask(linux, "device_del", id="a")
    await vm.detach("a")
    await ask(linux, "blockdev-add", **node)
    await vm.detach("a")


async def test_cancelling_leaves_nothing_half_done(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    disks = [Disk(f"l{n}", layer(tmp_path, n)) for n in range(20)]
    for turns in (1, 8, 40, 120):
        before = await state(linux)
        task = asyncio.create_task(attach_all(vm, disks))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await state(linux) == before


async def test_bytes_that_look_like_an_image_stay_bytes(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    """A qcow2 header that names another file of the host as what it is based on."""
    secret = layer(tmp_path, 1)
    name = str(secret).encode()
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(name), 16, 1 << 20, 0, 1, 65536, 131072, 1, 0, 0)
    path = tmp_path / "layer-qcow2"
    path.write_bytes((header + name).ljust(4 * 65536, b"\0"))
    await vm.attach(Disk("a", path, "qcow2"))
    (node,) = (node for node in await ask(linux, "query-named-block-nodes") if node["node-name"] == "a")
    assert (node["drv"], node["image"]["virtual-size"]) == ("raw", 4 * 65536)
    device = (await seen(linux, "qcow2"))["qcow2"]
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert linux.run(f"sha256sum /dev/{device}").split()[0] == expected
    await vm.detach("a")


async def test_vms_share_a_file_and_no_writer_gets_it(
    linux: Guest, vm: qemu.Qemu, firmware: Guest, tmp_path: Path
) -> None:
    shared, other = layer(tmp_path), layer(tmp_path, 1)
    await vm.attach(Disk("a", shared, "shared"))
    async with qemu.connect(firmware.qmp) as second:
        await second.attach(Disk("a", shared))
        before = await state(firmware)
        with pytest.raises(VmmRefused, match="lock"):
            await second.attach(Disk("w", shared, read_only=False))
        assert await state(firmware) == before
        # The other way round: what somebody writes to is no layer for us.
        await second.attach(Disk("w", other, read_only=False))
        with pytest.raises(VmmRefused, match="lock"):
            await vm.attach(Disk("b", other))
        firmware.process.kill()
        firmware.process.wait()
    await vm.attach(Disk("b", other))  # the lock went with its process
    device = (await seen(linux, "shared"))["shared"]
    assert linux.run(f"sha256sum /dev/{device}").split()[0] == hashlib.sha256(shared.read_bytes()).hexdigest()
    await vm.detach("a")
    await vm.detach("b")


async def test_a_guest_that_lets_nothing_go(firmware: Guest, tmp_path: Path) -> None:
    disk = Disk("a", layer(tmp_path))
    async with qemu.connect(firmware.qmp, detach_timeout_s=1.5) as vm:
        attached = await vm.attach(disk)
        for _ in range(2):
            with pytest.raises(GuestTimeout, match=r"did not let disk a go in 1\.5 s"):
                await vm.detach("a")
        assert await vm.list() == (attached,)
        with pytest.raises(DiskConflict, match="not let it go yet"):
            await vm.attach(disk)
        odd = tmp_path / "odd"
        odd.write_bytes(b"1")
        with pytest.raises(UnfitDisk, match=r"whole sectors.*; not undone: b \(.*did not let disk b go"):
            await attach_all(vm, [Disk("b", disk.path), Disk("c", odd)])


@pytest.mark.parametrize("moment", ["attach", "detach", "idle"])
async def test_a_vm_that_is_killed(firmware: Guest, tmp_path: Path, moment: str) -> None:
    disks = [Disk(f"l{n}", layer(tmp_path, n)) for n in range(SLOTS)]
    async with qemu.connect(firmware.qmp) as vm:
        await vm.attach(disks[0])
        calls = {"attach": attach_all(vm, disks), "detach": vm.detach("l0")}
        task = asyncio.create_task(calls.pop(moment)) if moment in calls else None
        for call in calls.values():
            call.close()
        await asyncio.sleep(0.05 if moment == "attach" else 0.3)
        os.kill(firmware.process.pid, signal.SIGKILL)
        if task:
            with pytest.raises(VmGone, match="gone at"):
                await task
        firmware.process.wait()
        for again in (vm.attach(disks[0]), vm.detach("l0"), vm.list()):
            with pytest.raises(VmGone, match="gone at"):
                await again
    with pytest.raises(VmGone, match=str(firmware.qmp)):
        async with qemu.connect(firmware.qmp):
            pass


@pytest.mark.parametrize("same_client", [True, False])
async def test_a_vm_that_hangs(firmware: Guest, tmp_path: Path, same_client: bool) -> None:
    """What we gave up waiting for may still happen; the next attach finds out."""
    disk = Disk("a", layer(tmp_path))
    async with qemu.connect(firmware.qmp, call_timeout_s=1) as vm:
        os.kill(firmware.process.pid, signal.SIGSTOP)
        with pytest.raises(VmmTimeout, match=r"no answer to .* in 1 s"):
            await vm.attach(disk)
        if same_client:
            os.kill(firmware.process.pid, signal.SIGCONT)
            attached = await vm.attach(disk)
            assert await vm.list() == (attached,)
    os.kill(firmware.process.pid, signal.SIGCONT)
    async with qemu.connect(firmware.qmp) as vm:
        attached = await vm.attach(disk)
        assert await vm.list() == (attached,)


async def test_a_guest_that_answers_none_is_waited_for_once(firmware: Guest, tmp_path: Path) -> None:
    disks = [Disk(f"l{n}", layer(tmp_path, n)) for n in range(20)]
    async with qemu.connect(firmware.qmp, detach_timeout_s=1.5) as vm:
        await attach_all(vm, disks)
        async with asyncio.timeout(15):
            results = await asyncio.gather(*(vm.detach(disk.id) for disk in disks), return_exceptions=True)
        assert [type(result) for result in results] == [GuestTimeout] * 20
        assert len(await vm.list()) == 20


async def test_one_client_at_a_time(firmware: Guest) -> None:
    async with qemu.connect(firmware.qmp):
        with pytest.raises(VmmTimeout, match="another client"):
            async with qemu.connect(firmware.qmp, call_timeout_s=0.5):
                pass
    async with qemu.connect(firmware.qmp) as vm:
        assert await vm.list() == ()


@pytest.mark.parametrize("disks", [-1, 0, 257])
def test_more_slots_than_there_can_be(disks: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 256"):
        qemu.slot_arguments(disks)


# One disk of several files


async def test_a_disk_of_several_files(linux: Guest, vm: qemu.Qemu, tmp_path: Path) -> None:
    """The guest's kernel finds their bytes in the partitions; QEMU takes none of them for more than bytes."""
    paths = [layer(tmp_path, n, 2040 + n * 9) for n in range(3)]
    paths[1].write_bytes(b"QFI\xfb\x00\x00\x00\x03" + paths[1].read_bytes()[8:])
    flat = FlatDisk("many", tuple(gpt.layout([*paths, paths[0]]).extents()), "flat")
    before = await ask(linux, "query-fdsets")
    address = await vm.attach_flat(flat)
    (listed,) = await vm.list()
    assert (listed.disk.id, listed.disk.serial, listed.disk.read_only) == ("many", "flat", True)
    assert listed.address == address
    nodes = await ask(linux, "query-named-block-nodes", flat=True)
    assert sorted(node["drv"] for node in nodes if node["node-name"] != "own-node") == ["file"] * 9 + ["vmdk"]
    device = (await seen(linux, "flat"))["flat"]
    for number, path in enumerate([*paths, paths[0]], 1):
        (found, _) = linux.run(f"sha256sum /dev/{device}{number}").split()
        assert found == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError):
        linux.run(f"dd if=/dev/zero of=/dev/{device}1 bs=512 count=1 conv=fsync")
    with pytest.raises(DiskConflict, match="id many is taken"):
        await vm.attach_flat(flat)
    with pytest.raises(DiskConflict):
        await vm.attach(Disk("many", paths[0]))
    # As with any other disk, the files have another name meanwhile, or none.
    for path in paths:
        path.unlink()
    await vm.detach("many")
    assert await vm.list() == ()
    assert await ask(linux, "query-fdsets") == before


async def test_a_disk_of_several_files_that_cannot_be_leaves_nothing(
    linux: Guest, vm: qemu.Qemu, tmp_path: Path
) -> None:
    path = layer(tmp_path)
    before = await ask(linux, "query-fdsets")
    for extents in ((), (Extent(path, 17),), (Extent(path, 16), Extent(tmp_path / "gone", 1)), (Extent(b"", 1),)):
        with pytest.raises(UnfitDisk):
            await vm.attach_flat(FlatDisk("many", extents))
    with pytest.raises(UnfitDisk, match="serial"):
        await vm.attach_flat(FlatDisk("many", (Extent(path, 16),), "a b"))
    for name in ("own-node", "own"):  # at blockdev-add, at device_add
        with pytest.raises(VmmRefused):
            await vm.attach_flat(FlatDisk(name, (Extent(path, 16), Extent(bytes(512), 1))))
    assert await ask(linux, "query-fdsets") == before
