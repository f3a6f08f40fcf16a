# SPDX-License-Identifier: Apache-2.0
"""The contract `kata-erofs`, to the byte, and what the peers make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev.formats.layer_file import FORMATS
from blockdev.vmm import gpt
from snapshotter.contracts import Lower, Mount, kata_erofs
from snapshotter.contracts.kata_erofs import MAX_LAYERS, sidecar, sidecar_contradiction, sidecar_path
from tests import kata_erofs_peer as peer
from tests.kata_peer import Refused

UPPER, WORK = Path("/r/snapshots/7/fs"), Path("/r/snapshots/7/work")
STORE = Path("/r/layers/erofs-4k")
SALT = bytes(32)


def lowers(*names: str, directory: Path = STORE) -> list[Lower]:
    return [Lower(directory / name, "erofs-4k", f"{ord(name[-1]):02x}" * 32) for name in names]


def answer(stack: list[Lower], writable_bytes: int = 0) -> list[Mount]:
    return kata_erofs.container_mounts(stack, UPPER, WORK, "", writable_bytes)


def erofs(name: str) -> Mount:
    path = f"/r/layers/erofs-4k/{name}"
    return Mount("erofs", path, ("ro", "loop", f"X-containerd.dmverity={path}.dmverity"))


def test_without_a_writable_file_system_to_the_byte() -> None:
    assert answer(lowers("c", "b", "a")) == [
        erofs("c"), erofs("b"), erofs("a"),
        Mount("format/mkdir/overlay", "overlay", (
            "workdir=/r/snapshots/7/work", "upperdir=/r/snapshots/7/fs", "lowerdir={{ overlay 0 2 }}",
        )),
    ]  # fmt: skip


def test_with_a_writable_file_system_to_the_byte() -> None:
    assert answer(lowers("b", "a"), 10 << 30) == [
        Mount("mkfs/ext4", "/r/snapshots/7/rwlayer.img", (
            "X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=10737418240", "rw", "loop",
        )),
        erofs("b"), erofs("a"),
        Mount("format/mkdir/overlay", "overlay", (
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}",
        )),
    ]  # fmt: skip


def test_a_view_has_nothing_to_write_to() -> None:
    for writable_bytes in (0, 1 << 30):
        assert kata_erofs.container_mounts(lowers("b", "a"), None, None, "", writable_bytes) == [
            erofs("b"), erofs("a"), Mount("format/mkdir/overlay", "overlay", ("lowerdir={{ overlay 0 1 }}",)),
        ]  # fmt: skip


def test_a_single_layer_is_not_named_alone() -> None:
    with pytest.raises(ValueError, match="would not be verified"):
        answer(lowers("a"))


@pytest.mark.parametrize("writable_bytes", [0, 1 << 30])
def test_the_files_are_read_back(writable_bytes: int) -> None:
    stack = lowers("c", "b", "a")
    assert kata_erofs.layer_files(answer(stack, writable_bytes)) == [lower.path for lower in stack]
    for other in ([], [Mount("overlay", "overlay", ())], [erofs("a")]):
        with pytest.raises(ValueError, match="not of this contract"):
            kata_erofs.layer_files(other)


def test_a_sidecar_to_the_byte() -> None:
    assert sidecar_path(STORE / "ab") == Path("/r/layers/erofs-4k/ab.dmverity")
    assert sidecar("ab" * 32, 45056, SALT) == (
        b'{"roothash": "' + b"ab" * 32 + b'", "hashoffset": 45056, "salt": "' + b"00" * 32 + b'"}'
    )


SIDECAR = {"roothash": "ab" * 32, "hashoffset": 45056, "salt": "00" * 32}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (json.dumps(SIDECAR), ""),
        (json.dumps(SIDECAR | {"roothash": "cd" * 32}), "another root hash"),
        (json.dumps(SIDECAR | {"hashoffset": 45057}), "another offset"),
        (json.dumps(SIDECAR | {"hashoffset": "45056"}), "another offset"),
        (json.dumps(SIDECAR | {"salt": "01" + "00" * 31}), "another salt"),
        (json.dumps({"roothash": "ab" * 32, "hashoffset": 45056}), "another salt"),
        (json.dumps(SIDECAR | {"blocksize": 512}), "in another way"),
        (json.dumps(SIDECAR) + "\n", "in another way"),
        (json.dumps(SIDECAR) + " " * (64 << 10), "no description"),
        ("", "no description"),
        ("[]", "no description"),
        ("[" * 10000, "no description"),
        ("\xff", "no description"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sidecar(raw: str, reason: str) -> None:
    said = sidecar_contradiction(raw.encode("latin-1"), "ab" * 32, 45056, SALT)
    assert reason in said
    assert bool(said) == bool(reason)


def test_only_formats_with_blocks_of_4096_bytes_in_erofs() -> None:
    taken = {name for name, known in FORMATS.items() if kata_erofs.takes(known)}
    assert taken == {"erofs-4k", "erofs-4k-parents"}
    assert {"erofs-4k"} == kata_erofs.FORMATS


# With files


def stored(directory: Path, count: int, size: int = 12288) -> list[Lower]:
    """Files of their size with their sidecars; the hash tree of each is one block."""
    directory.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        path = directory / f"{number:03}"
        path.write_bytes(bytes([number % 256]) * (size + 4096 * number))
        lower = Lower(path, "erofs-4k", f"{number:064x}")
        sidecar_path(path).write_bytes(sidecar(lower.root_hash, size + 4096 * number - 8192, SALT))
        found.append(lower)
    return found


def test_the_peers_verify_every_layer(tmp_path: Path) -> None:
    stack = stored(tmp_path / "erofs-4k", 3)
    guest = peer.agent(peer.shim(peer.activated(answer(stack))).storages)
    assert guest.tables == [
        f"1 /dev/vda{n + 1} /dev/vda{n + 1} 4096 4096 {n + 1} {n + 1} sha256 {n:064x} {'0' * 64}" for n in range(3)
    ]
    assert "lowerdir=lower-0:lower-1:lower-2," in guest.overlay
    assert guest.made == []


def test_the_peers_make_the_directories_of_a_writable_file_system(tmp_path: Path) -> None:
    plan = peer.shim(peer.activated(answer(stored(tmp_path, 2), 1 << 30)))
    assert plan.writable == Path("/r/snapshots/7/rwlayer.img")
    assert plan.storages[0].options == ("rw", "X-kata.overlay-upper", "X-kata.multi-layer=true")
    base = f"/run/kata-containers/{'c' * 64}/multi-layer/upper"
    assert peer.agent(plan.storages).made == [f"{base}/upper", f"{base}/work"]


def test_our_disk_is_the_one_that_the_shim_makes(tmp_path: Path) -> None:
    stack = stored(tmp_path / "erofs-4k", 9, size=600_064 * 8 + 4096 - 600_064 * 8 % 4096)
    plan = peer.shim(answer(stack))
    layout = gpt.layout([lower.path for lower in stack])
    assert [(part.number, part.path, part.first_lba, part.last_lba, part.name) for part in plan.partitions] == [
        (number, part.path, part.first_lba, part.last_lba, part.name)
        for number, part in enumerate(layout.partitions, 1)
    ]
    assert plan.extents == [
        (extent.source if isinstance(extent.source, Path) else None, extent.sectors, extent.offset_sectors)
        for extent in layout.extents()
    ]


def test_of_a_single_layer_the_peers_would_drop_the_verity(tmp_path: Path) -> None:
    """Why there are always two."""
    one, _, overlay = answer(stored(tmp_path, 2))
    plan = peer.shim([one, overlay])
    assert (plan.partitions, peer.agent(plan.storages).tables) == ([], [""])


def test_as_many_layers_as_the_contract_takes_and_no_more(tmp_path: Path) -> None:
    stack = stored(tmp_path, MAX_LAYERS + 2)
    for writable_bytes in (0, 1 << 30):
        plan = peer.shim(peer.activated(answer(stack[:MAX_LAYERS], writable_bytes)))
        assert len(plan.partitions) == len(peer.agent(plan.storages).tables) == MAX_LAYERS == 128
        with pytest.raises(Refused, match="maximum"):
            peer.shim(peer.activated(answer(stack[: MAX_LAYERS + 1], writable_bytes)))


def test_one_layer_twice_has_two_partitions(tmp_path: Path) -> None:
    (one,) = stored(tmp_path, 1)
    tables = peer.agent(peer.shim(answer([one, one])).storages).tables
    assert [table.split()[1] for table in tables] == ["/dev/vda1", "/dev/vda2"]


def test_what_containerd_appends_under_selinux_changes_nothing(tmp_path: Path) -> None:
    mounts = answer(stored(tmp_path, 2))
    labelled = [replace(mount, options=(*mount.options, 'context="a:b:c1,c2"')) for mount in mounts]
    assert peer.shim(labelled) == peer.shim(mounts)


@pytest.mark.parametrize("raw", [None, b"", b"{}", b'{"roothash": 1, "hashoffset": 4096}', b" " * (65 << 10)])
def test_the_shim_refuses_a_sidecar_that_it_cannot_read(tmp_path: Path, raw: bytes | None) -> None:
    stack = stored(tmp_path, 2)
    sidecar_path(stack[1].path).unlink()
    if raw is not None:
        sidecar_path(stack[1].path).write_bytes(raw)
    with pytest.raises(Refused):
        peer.shim(answer(stack))
