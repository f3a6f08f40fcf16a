# SPDX-License-Identifier: Apache-2.0
"""The client of cloud-hypervisor's API against that API's schema; not against a cloud-hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from blockdev.errors import DiskConflict, GuestTimeout, NoFreeSlot, UnfitDisk, VmGone, VmmError, VmmRefused, VmmTimeout
from blockdev.vmm.cloud_hypervisor import CloudHypervisor, foreign_kind, kata_segment
from blockdev.vmm.hotplug import AttachedDisk, Disk, Hotplug, attach_all
from tests.cloud_hypervisor import CloudHypervisorApi


@pytest_asyncio.fixture
async def api(tmp_path: Path) -> AsyncIterator[CloudHypervisorApi]:
    server = CloudHypervisorApi(tmp_path / "api.sock")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
    assert not server.strays


def client(api: CloudHypervisorApi, *, call_s: float = 5.0, detach_s: float = 5.0) -> Hotplug:
    return CloudHypervisor(api.socket, call_timeout_s=call_s, detach_timeout_s=detach_s)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "layer"
    path.write_bytes(bytes(1024))
    return path


async def test_a_disk_comes_and_goes(api: CloudHypervisorApi, layer: Path) -> None:
    vm, disk = client(api), Disk("layer-0", layer, "0123456789")
    attached = await vm.attach(disk)
    assert attached == AttachedDisk(disk, "0001:00:01.0")
    assert ("vm.add-disk", {
        "id": "layer-0", "path": str(layer), "readonly": True, "image_type": "Raw", "pci_segment": 1,
        "serial": "0123456789",
    }) in api.requests  # fmt: skip
    assert await vm.list() == (attached,)
    await vm.detach("layer-0")
    assert await vm.list() == ()
    assert set(api.tree) == {"_net0", "_virtio-pci-_net0"}
    await vm.detach("layer-0")
    assert [name for name, _ in api.requests].count("vm.remove-device") == 1


async def test_the_same_again_is_the_same(api: CloudHypervisorApi, layer: Path) -> None:
    vm, disk = client(api), Disk("a", layer)
    first, second = await asyncio.gather(vm.attach(disk), vm.attach(disk))
    assert first == second == await vm.attach(disk)
    assert len(api.disks) == 1
    for other in (Disk("a", layer, "s"), Disk("a", layer.with_name("other")), Disk("a", layer, read_only=False)):
        other.path.write_bytes(bytes(512))
        with pytest.raises(DiskConflict, match="belongs to"):
            await vm.attach(other)
    api.disks[0]["image_type"] = "Qcow2"
    with pytest.raises(DiskConflict, match="Qcow2"):
        await vm.attach(disk)


@pytest.mark.parametrize("version", ["v50.0", "v52.0"])
async def test_an_id_that_something_else_has(api: CloudHypervisorApi, layer: Path, version: str) -> None:
    """Taken between our look and our request: 409, or 500 of a version that has no other."""
    api.version = version
    vm = client(api)
    await vm.attach(Disk("a", layer))
    free = {"config": {"payload": {}, "disks": None, "platform": {"num_pci_segments": 2}}, "state": "Running"}
    api.refuse["vm.info"] = [(200, free)]
    with pytest.raises(DiskConflict, match="not unique"):
        await vm.attach(Disk("a", layer))


async def test_every_slot_of_every_segment(api: CloudHypervisorApi, layer: Path) -> None:
    api.segments = 3
    vm = client(api)
    attached = await attach_all(vm, [Disk(f"d{n}", layer) for n in range(62)])
    assert [one.address[:4] for one in attached] == ["0001"] * 31 + ["0002"] * 31
    with pytest.raises(NoFreeSlot, match="no free slot"):
        await vm.attach(Disk("one-more", layer))
    await vm.detach("d7")
    assert (await vm.attach(Disk("one-more", layer))).address == attached[7].address


async def test_a_vm_with_one_segment_has_its_own_devices_there(api: CloudHypervisorApi, layer: Path) -> None:
    api.segments = 1
    vm = client(api)
    with pytest.raises(NoFreeSlot):
        await attach_all(vm, [Disk(f"d{n}", layer) for n in range(31)])
    assert await vm.list() == ()
    assert len(await attach_all(vm, [Disk(f"d{n}", layer) for n in range(30)])) == 30


async def test_a_vm_that_has_not_booted(tmp_path: Path, layer: Path) -> None:
    api = CloudHypervisorApi(tmp_path / "cold.sock", booted=False)
    await api.start()
    try:
        vm = client(api)
        assert await vm.attach(Disk("a", layer)) == AttachedDisk(Disk("a", layer), "")
        await vm.detach("a")
        assert await vm.list() == ()
    finally:
        await api.stop()
    assert not api.strays


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, VmmRefused), (404, VmGone), (409, DiskConflict), (429, VmmRefused), (500, VmmRefused), (301, VmmRefused)],
)
async def test_statuses(api: CloudHypervisorApi, layer: Path, status: int, error: type[VmmError]) -> None:
    api.refuse["vm.add-disk"] = [(status, ["Error from API", "the reason \u2028"])]
    with pytest.raises(error, match=rf"vm\.add-disk: status {status} .*the reason"):
        await client(api).attach(Disk("a", layer))
    assert await client(api).list() == ()


async def test_a_vmm_without_a_vm(api: CloudHypervisorApi, layer: Path) -> None:
    api.exists = False
    for call in (client(api).attach(Disk("a", layer)), client(api).detach("a"), client(api).list()):
        with pytest.raises(VmGone, match="no VM"):
            await call


@pytest.mark.parametrize("endpoint", ["vm.info", "vm.add-disk"])
async def test_a_vmm_that_dies(api: CloudHypervisorApi, layer: Path, endpoint: str) -> None:
    api.drop.add(endpoint)
    with pytest.raises(VmGone, match=endpoint):
        await client(api).attach(Disk("a", layer))


async def test_nobody_at_the_socket(tmp_path: Path, layer: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(VmGone, match=name):
            await CloudHypervisor(tmp_path / name).attach(Disk("a", layer))


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"{", b'{"config": {}}', b'{"config": {"disks": 3}, "state": "Running"}', b"\xff" * 100,
        b'{"config": {}, "state": "Running", "device_tree": {"x": {"pci_bdf": 7}}}', b"[" * 100_000,
        pytest.param(b" " * (17 << 20), id="17 MiB"),
    ],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
async def test_answers_that_are_not_the_apis(api: CloudHypervisorApi, layer: Path, answer: bytes) -> None:
    api.refuse["vm.info"] = [(200, answer)]
    with pytest.raises(VmmRefused, match="answer"):
        await client(api).attach(Disk("a", layer))


async def test_a_slow_answer(api: CloudHypervisorApi, layer: Path) -> None:
    """The disk comes after we gave up; undoing waits for its turn and finds it."""
    api.delays_s["vm.add-disk"] = 0.5
    vm = client(api, call_s=0.4)
    with pytest.raises(VmmTimeout, match=r"vm\.add-disk: no answer in 0.4 s"):
        await attach_all(vm, [Disk("a", layer)])
    assert [name for name, _ in api.requests][-3:].count("vm.info")
    assert await vm.list() == ()
    assert len(api.tree) == 2


async def test_a_guest_that_takes_its_time(api: CloudHypervisorApi, layer: Path) -> None:
    api.guest_lets_go_after_s = None
    vm = client(api, detach_s=0.3)
    await vm.attach(Disk("a", layer))
    with pytest.raises(GuestTimeout, match=r"did not let disk a go in 0\.3 s"):
        await vm.detach("a")
    assert await vm.list() == ()
    with pytest.raises(DiskConflict, match="not let it go yet"):
        await vm.attach(Disk("a", layer))
    api.let_go("a", 0.1)
    await vm.detach("a")
    assert await vm.attach(Disk("a", layer))


async def test_a_failed_one_undoes_the_earlier_ones(api: CloudHypervisorApi, layer: Path) -> None:
    vm = client(api)
    kept = await vm.attach(Disk("kept", layer))
    disks = [Disk("kept", layer), *(Disk(f"d{n}", layer) for n in range(6))]
    before = [*api.disks], {**api.tree}
    api.refuse["vm.add-disk"] = [(200, {"id": "d0", "bdf": "0001:00:02.0"}), (500, ["Disk cannot be opened"])]
    with pytest.raises(VmmRefused, match="cannot be opened"):
        await attach_all(vm, disks)
    assert (api.disks, api.tree) == before
    assert await vm.list() == (kept,)
    assert [one.disk for one in await attach_all(vm, disks)] == disks


async def test_what_could_not_be_undone_is_said(api: CloudHypervisorApi, layer: Path) -> None:
    api.guest_lets_go_after_s = None
    api.segments = 1
    vm = client(api, detach_s=0.2)
    with pytest.raises(NoFreeSlot, match=r"no free slot.*; not undone: d0 \(.*did not let disk d0 go.*d29 "):
        await attach_all(vm, [Disk(f"d{n}", layer) for n in range(31)])


async def test_an_id_given_twice(api: CloudHypervisorApi, layer: Path) -> None:
    with pytest.raises(UnfitDisk, match="twice"):
        await attach_all(client(api), [Disk("a", layer), Disk("b", layer), Disk("a", layer)])
    assert api.requests == []


async def test_cancelling_leaves_nothing_half_done(api: CloudHypervisorApi, layer: Path) -> None:
    vm = client(api)
    api.delays_s["vm.add-disk"] = 0.3
    task = asyncio.create_task(attach_all(vm, [Disk(f"d{n}", layer) for n in range(3)]))
    await api.adding.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await vm.list() == ()
    assert len(api.tree) == 2


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"QFI\xfb" + bytes(1020), "a qcow2 image"),
        (b"vhdxfile" + bytes(1016), "a VHDX image"),
        (bytes(512) + b"conectix" + bytes(504), "a VHD image"),
        (b"conectix" + bytes(1016), ""),
        (bytes(1024), ""),
    ],
)
async def test_bytes_that_look_like_an_image(api: CloudHypervisorApi, layer: Path, content: bytes, kind: str) -> None:
    """A version that would believe them is not given them: a qcow2 header names files of the host."""
    layer.write_bytes(content)  # noqa: ASYNC240
    assert foreign_kind(layer) == kind
    await client(api).attach(Disk("on-52", layer))
    for number, version in enumerate(("v50.0", "v51.1", "52.0-dirty", "main", "")):
        api.version = version
        if kind and version in ("v50.0", "main", ""):
            with pytest.raises(UnfitDisk, match=f"looks like {kind}"):
                await client(api).attach(Disk(f"d{number}", layer))
        else:
            await client(api).attach(Disk(f"d{number}", layer))


@pytest.mark.parametrize("name", ["", "1a", "__a", "_a", "a" * 32, "a b", "a/b", "ä", "a\n"])
async def test_names_that_some_vmm_refuses(api: CloudHypervisorApi, layer: Path, name: str) -> None:
    with pytest.raises(UnfitDisk, match="disk id"):
        await client(api).attach(Disk(name, layer))


@pytest.mark.parametrize("serial", ["", "s" * 21, "a,b", "a\0", "ä"])
async def test_serials_that_no_guest_would_see(api: CloudHypervisorApi, layer: Path, serial: str) -> None:
    with pytest.raises(UnfitDisk, match="serial"):
        await client(api).attach(Disk("a", layer, serial))


async def test_files_that_no_guest_would_see_as_they_are(api: CloudHypervisorApi, tmp_path: Path) -> None:
    for size in (0, 1, 511, 513, 1000):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        with pytest.raises(UnfitDisk, match="whole sectors"):
            await client(api).attach(Disk("a", path))
    for path, reason in (
        (tmp_path, "not a regular file"),
        (tmp_path / "none", "No such file"),
        (Path("relative"), "absolute"),
        (tmp_path / "\udcff", "UTF-8"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(UnfitDisk, match=reason):
            await client(api).attach(Disk("a", path))
    assert api.requests == []


def test_the_segments_of_microsofts_kata() -> None:
    """index/31 + 1 with ten segments: virtcontainers/clh.go of 3.2.0.azl4."""
    assert [kata_segment(index) for index in (0, 30, 31, 61, 62, 278)] == [1, 1, 2, 2, 3, 9]
    with pytest.raises(NoFreeSlot, match="room for 279"):
        kata_segment(279)
