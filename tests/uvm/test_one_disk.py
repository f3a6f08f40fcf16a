# SPDX-License-Identifier: Apache-2.0
"""Layers as the partitions of one disk, as Kata's runtime-rs shows them to its guest; and a host that cheats so."""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from blockdev.vmm import gpt
from blockdev.vmm.hotplug import SECTOR_BYTES
from blockdev.vmm.vmdk import Extent
from tests.conftest import in_every_run
from tests.images import mkimage
from tests.uvm.conftest import Guest, Layer, agreed, layers_of, tree_of, write_layer
from tests.uvm.test_runs import PARENTS
from tests.uvm.test_tamper import (
    CONTENT,
    GOOD,
    HEAD_UNREADABLE,
    OTHER_SIZE,
    READ_ALL,
    TARGET,
    TRAILER,
    UNREADABLE,
    Chain,
    flipped,
    middle_layer,
    older,
    qcow2,
    refusal,
    swapped,
    top_layer,
)
from uvm.errors import MachineError
from uvm.policy import Policy
from uvm.runner import Disk, OneDisk, Result, partitioned

pytestmark = [pytest.mark.uvm, pytest.mark.slow]

DISK = "layers"
HEADER_AT, ENTRIES_AT, ENTRY_BYTES = 512, 1024, 128


def on_one_disk(layers: list[Layer], *args: str) -> tuple[Policy, OneDisk]:
    """As policy and host agree. Layers: bottom first."""
    policy, disks = agreed(layers, *args)
    return dataclasses.replace(policy, disk=DISK), partitioned(DISK, [disk.path for disk in disks])


def run(guest: Guest, layers: list[Layer], *args: str) -> Result:
    policy, disk = on_one_disk(layers, *args)
    return guest.boot(policy.text(), [disk])


def assert_shows(guest: Guest, layers: list[Layer], listing: Layer, expected: dict[str, Any]) -> None:
    layers = [*layers, listing]
    result = run(guest, layers, "/.listing", "/")
    assert (result.refused, result.exit_status, bytes(result.stderr)) == (None, 0, b"")
    shown = tree_of(bytes(result.stdout))
    del shown[".listing"]
    assert mkimage.differences(expected, shown) == []
    assert [(status.name, status.disk, status.verified, status.root_hash) for status in result.layers] == [
        (f"layer-{len(layers) - number}", f"vda{number}", True, layer.built.root_hash.hex())
        for number, layer in enumerate(reversed(layers), 1)
    ]


@pytest.mark.soak
def test_the_guest_shows_the_merged_tree(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    parents = write_layer(mkimage.layer_tar(PARENTS), tmp_path / "parents.layer")
    assert_shows(guest, [*layers_of("layers", tmp_path), parents], listing_layer, expected_tree("layers"))


@pytest.mark.soak
def test_as_many_layers_as_there_may_be(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    """Some of them several times: they have a partition each."""
    layers = layers_of("many", tmp_path)
    layers = [*layers[:1] * (gpt.PARTITIONS_MAX - 1 - len(layers)), *layers]
    assert len(layers) + 1 == gpt.PARTITIONS_MAX
    assert_shows(guest, layers, listing_layer, expected_tree("many"))


def test_more_layers_than_partitions_are_refused_before_a_guest_is_there(hello: Layer) -> None:
    with pytest.raises(MachineError, match="129 layers on one disk: from 1 to 128"):
        partitioned(DISK, [hello.path] * (gpt.PARTITIONS_MAX + 1))


@pytest.fixture(scope="module")
def originals(hello: Layer, tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    directory = tmp_path_factory.mktemp("chain")
    return [
        hello,
        write_layer(middle_layer(CONTENT), directory / "middle.layer"),
        write_layer(top_layer(b"top\n"), directory / "top.layer"),
    ]


@pytest.fixture
def chain(originals: list[Layer], tmp_path: Path) -> Chain:
    """Copies, to be changed."""
    layers = []
    for layer in originals:
        shutil.copy(layer.path, tmp_path / layer.path.name)
        layers.append(dataclasses.replace(layer, path=tmp_path / layer.path.name))
    return Chain(layers, tmp_path)


# What the host does to the files → the reason why nothing is run.
FILES: dict[str, tuple[Callable[[Chain], None], str]] = {
    "a bit of the superblock": (flipped(lambda chain: 1024 + 8), HEAD_UNREADABLE),
    "a bit of tree level 1": (flipped(lambda chain: chain.level(1) + 7), HEAD_UNREADABLE),
    "a bit of the trailer": (flipped(lambda chain: chain.trailer() + 2000), TRAILER + "2000 on"),
    "an older layer of the same size": (older, HEAD_UNREADABLE),
    "two layers swapped": (swapped, "layer layer-2: its disk has "),
    "the head of a qcow2 image": (qcow2, HEAD_UNREADABLE),
}


@pytest.mark.soak
@pytest.mark.parametrize("case", FILES)
def test_a_changed_file_is_refused(guest: Guest, chain: Chain, case: str) -> None:
    change, reason = FILES[case]
    change(chain)
    policy, disk = on_one_disk(chain.layers, *READ_ALL)
    said = refusal(guest.boot(policy.text(), [disk]))
    assert said.startswith(reason)


@pytest.mark.soak
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_changed_bit_is_an_error_of_its_reader(guest: Guest, chain: Chain, case: str) -> None:
    UNREADABLE[case](chain)
    result = run(guest, chain.layers, *READ_ALL)
    assert result.refused is None
    assert set(result.stdout.decode().splitlines()) < set(GOOD.splitlines())
    assert [status.name for status in result.layers if not status.verified] == [TARGET]


@pytest.mark.soak
def test_an_unchanged_chain_is_read(guest: Guest, chain: Chain) -> None:
    result = run(guest, chain.layers, *READ_ALL)
    assert (result.refused, result.stdout.decode()) == (None, GOOD)
    assert all(status.verified for status in result.layers)


# What the host does to the table. It is the host's word alone: what holds is size and root hash of each layer.


def table(change: Callable[[bytearray], None]) -> Callable[[OneDisk], OneDisk]:
    """With checksums that are right, so that the guest's kernel takes it."""

    def with_changed_table(disk: OneDisk) -> OneDisk:
        first, *others = disk.extents
        assert isinstance(first.source, bytes)
        head = bytearray(first.source)
        change(head)
        entries = head[ENTRIES_AT : ENTRIES_AT + gpt.PARTITIONS_MAX * ENTRY_BYTES]
        struct.pack_into("<II", head, HEADER_AT + 16, 0, 0)
        struct.pack_into("<I", head, HEADER_AT + 88, zlib.crc32(entries))
        struct.pack_into("<I", head, HEADER_AT + 16, zlib.crc32(head[HEADER_AT : HEADER_AT + 92]))
        return OneDisk(disk.serial, [Extent(bytes(head), first.sectors), *others])

    return with_changed_table


def entry(head: bytearray, number: int) -> slice:
    return slice(ENTRIES_AT + (number - 1) * ENTRY_BYTES, ENTRIES_AT + number * ENTRY_BYTES)


def exchanged(head: bytearray) -> None:
    head[entry(head, 1)], head[entry(head, 2)] = head[entry(head, 2)], head[entry(head, 1)]


def one_less(head: bytearray) -> None:
    head[entry(head, 2)] = bytes(ENTRY_BYTES)


def one_more(head: bytearray) -> None:
    """Over sectors that another one has: it is the number that is not named."""
    extra = bytearray(head[entry(head, 1)])
    head[entry(head, 4)] = extra


def moved(head: bytearray) -> None:
    """By a sector, of the same size."""
    first, last = struct.unpack_from("<QQ", head, entry(head, 2).start + 32)
    struct.pack_into("<QQ", head, entry(head, 2).start + 32, first + 1, last + 1)


def cut(head: bytearray) -> None:
    (last,) = struct.unpack_from("<Q", head, entry(head, 2).start + 40)
    struct.pack_into("<Q", head, entry(head, 2).start + 40, last - 1)


def renamed(head: bytearray) -> None:
    head[entry(head, 2).start + 56 : entry(head, 2).start + 58] = b"x\0"


def spoilt(disk: OneDisk) -> OneDisk:
    first, *others = disk.extents
    assert isinstance(first.source, bytes)
    return OneDisk(disk.serial, [Extent(bytes(HEADER_AT + 8) + first.source[HEADER_AT + 8 :], first.sectors), *others])


def files_exchanged(disk: OneDisk) -> OneDisk:
    """Table as it was, the files of the first two partitions in each other's place as far as they go."""
    extents = list(disk.extents)
    at = [number for number, extent in enumerate(extents) if isinstance(extent.source, Path)]
    one, other = extents[at[0]], extents[at[2]]
    shared = min(one.sectors, other.sectors)
    assert isinstance(one.source, Path)
    assert isinstance(other.source, Path)
    rest = Extent(bytes((other.sectors - shared) * SECTOR_BYTES or SECTOR_BYTES), other.sectors - shared)
    extents[at[2] : at[2] + 1] = [Extent(one.source, shared), *([rest] if rest.sectors else [])]
    return OneDisk(disk.serial, extents)


NO_FIRST = "layer layer-2: disk vda has no partition 1"
TABLES: dict[str, tuple[Callable[[OneDisk], OneDisk], str | None]] = {
    "two partitions exchanged": (table(exchanged), "layer layer-2: its disk has "),
    "a partition less": (table(one_less), f"layer {TARGET}: disk vda has no partition 2"),
    "a partition more": (table(one_more), "disk vda has a partition 4, which the policy does not name"),
    "a partition a sector further": (table(moved), HEAD_UNREADABLE),
    "a partition a sector shorter": (table(cut), OTHER_SIZE),
    "another name of a partition": (table(renamed), None),
    "no table": (spoilt, NO_FIRST),
    "another file in a partition": (files_exchanged, "layer layer-0: its head cannot be read: Input/output error"),
    "another serial": (
        lambda disk: OneDisk("other", disk.extents),
        "disk vda has the serial 'other', which the policy does not name",
    ),
}


@pytest.mark.parametrize("case", in_every_run(TABLES, {"two partitions exchanged"}.__contains__))
def test_a_changed_disk_is_refused(guest: Guest, chain: Chain, case: str) -> None:
    policy, disk = on_one_disk(chain.layers, *READ_ALL)
    change, reason = TABLES[case]
    result = guest.boot(policy.text(), [change(disk)])
    if reason is None:
        assert (result.refused, result.stdout.decode()) == (None, GOOD)
    else:
        assert refusal(result).startswith(reason)


@pytest.mark.soak
def test_the_guest_takes_the_layers_only_as_the_policy_says(guest: Guest, chain: Chain) -> None:
    """A disk each or partitions of one: what the host does otherwise, or beside it, is refused."""
    policy, disk = on_one_disk(chain.layers, *READ_ALL)
    each, disks = agreed(chain.layers, *READ_ALL)
    shows: list[tuple[bytes, Sequence[Disk | OneDisk], str]] = [
        (policy.text(), disks, r"disk vd. has the serial 'layer-.', which the policy does not name"),
        (each.text(), [disk], "disk vda has the serial 'layers', which the policy does not name"),
        (policy.text(), [disk, Disk("more", chain.target.path)], "disk vdb has the serial 'more', which the policy"),
        (policy.text(), [disk, disk], "more than one disk has the serial layers"),
        (policy.text(), [], "no disk has the serial layers"),
    ]
    for text, shown, reason in shows:
        assert re.match(reason, refusal(guest.boot(text, shown)))
