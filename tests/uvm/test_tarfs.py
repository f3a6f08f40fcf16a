# SPDX-License-Identifier: Apache-2.0
"""`tarfs` layers in the guest: verified as they are, mounted through an index of our own. Microsoft's kernel module is
not in a mainline kernel and was not run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.images import mkimage
from tests.uvm.conftest import Guest, Layer, layers_of, tree_of, write_layer
from uvm.errors import ImageError
from uvm.policy import Policy, PolicyLayer, Process
from uvm.runner import Disk, Result
from uvm.tarfs import write_index

pytestmark = [pytest.mark.uvm, pytest.mark.slow]

READ_ALL = ("sh", "-c", "cd /data; for f in *; do sha256sum $f; done; cat /etc/hello")
# First bytes of a tar that other programs would take for their own: a member's name has room for them.
HEADS = {"qcow2": b"QFI\xfb\x03", "VHD": b"conectix", "initdata": b"initdata"}


def layer_with(head: bytes, directory: Path, name: str) -> Layer:
    entries = [mkimage.F(head, "odd"), mkimage.D("data"), mkimage.F("data/file", mkimage.noise(name, 300_000))]
    tar = mkimage.layer_tar(entries)
    assert tar.startswith(head)
    return write_layer(tar, directory / f"{name}.layer", "tarfs")


def run(guest: Guest, layers: list[Layer], directory: Path, *args: str) -> Result:
    """Bottom first; each `tarfs` layer with its index."""
    named: list[PolicyLayer] = []
    disks: list[Disk] = []
    for number, layer in reversed(list(enumerate(layers))):
        named.append(layer.policy(f"layer-{number}"))
        disks.append(Disk(f"layer-{number}", layer.path))
        if layer.built.format == "tarfs":
            index = directory / f"{number}.index"
            named.append(write_index(layer.path, index, f"index-{number}"))
            disks.append(Disk(f"index-{number}", index))
    return guest.boot(Policy(named, Process(args, ["PATH=/bin"])).text(), disks)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Layer]:
    return {name: layer_with(head, tmp_path, name) for name, head in HEADS.items()}


def test_tars_that_look_like_something_else(guest: Guest, hello: Layer, odd: dict[str, Layer], tmp_path: Path) -> None:
    """QEMU is told that a layer is raw; were it to guess, the first bytes of these would decide."""
    for name, layer in odd.items():
        assert layer.path.read_bytes().startswith(HEADS[name])
    result = run(guest, [hello, *odd.values()], tmp_path, "sh", "-c", "cat /data/file | sha256sum; cat /QFI* /conectix")
    assert (result.refused, result.exit_status, bytes(result.stderr)) == (None, 0, b"")
    wanted = hashlib.sha256(mkimage.noise("initdata", 300_000)).hexdigest()
    assert result.stdout.decode() == f"{wanted}  -\noddodd"
    assert len(result.layers) == 7
    assert all(status.verified for status in result.layers)


@pytest.mark.soak
def test_the_guest_shows_the_merged_tree(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    layers = []
    for number, entries in enumerate(mkimage.IMAGES["many"][0](mkimage.static_busybox())[:10]):
        layers.append(write_layer(mkimage.layer_tar(entries), tmp_path / f"{number}.layer", "tarfs"))
    merged: dict[bytes, Any] = {}
    for entries in mkimage.IMAGES["many"][0](mkimage.static_busybox())[:10]:
        mkimage.apply_layer(merged, entries)
    expected = {path: item for path, item in mkimage.describe(merged).items() if path not in ("dev", "proc", "sys")}
    result = run(guest, [*layers, listing_layer], tmp_path, "/.listing", "/")
    assert result.refused is None
    shown = tree_of(bytes(result.stdout))
    del shown[".listing"]
    assert mkimage.differences(expected, shown) == []


@pytest.mark.soak
@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        ("trailer", "layer layer-1: its trailer is not what the policy gives, from byte 3584 on"),
        ("index", "layer index-1: mount as EROFS: Input/output error"),
        ("data", None),
    ],
)
def test_changes_are_refused(guest: Guest, hello: Layer, tmp_path: Path, offset: str, reason: str | None) -> None:
    layer = layer_with(b"first", tmp_path, "plain")
    changed = tmp_path / "changed.layer"
    shutil.copy(layer.path, changed)
    policy = [layer.policy("layer-1"), write_index(layer.path, tmp_path / "index", "index-1"), hello.policy("layer-0")]
    at = {
        "trailer": (changed, layer.built.file_size_bytes - 512),
        "index": (tmp_path / "index", 1024 + 20),
        "data": (changed, layer.path.read_bytes().index(mkimage.noise("plain", 300_000)) + 100_000),
    }[offset]
    raw = bytearray(at[0].read_bytes())
    raw[at[1]] ^= 1
    at[0].write_bytes(raw)
    disks = [Disk("layer-1", changed), Disk("index-1", tmp_path / "index"), Disk("layer-0", hello.path)]
    result = guest.boot(Policy(policy, Process(READ_ALL, ["PATH=/bin"])).text(), disks)
    assert result.refused == reason
    if reason is None:
        assert result.stdout.decode() == "hello from a tar layer\n"
        assert [status.name for status in result.layers if not status.verified] == ["layer-1"]


@pytest.mark.soak
def test_layer_and_index_come_together(guest: Guest, hello: Layer, tmp_path: Path) -> None:
    layer = layer_with(b"first", tmp_path, "plain")
    index = write_index(layer.path, tmp_path / "index", "index-1")
    alone = [layer.policy("layer-1"), hello.policy("layer-0")]
    disks = [Disk("layer-1", layer.path), Disk("layer-0", hello.path)]
    result = guest.boot(Policy(alone, Process(["true"])).text(), disks)
    assert result.refused == "layer layer-1: a tarfs layer and its index come together"
    reverse = [index, layer.policy("layer-1"), hello.policy("layer-0")]
    result = guest.boot(Policy(reverse, Process(["true"])).text(), [*disks, Disk("index-1", tmp_path / "index")])
    assert result.refused == "layer layer-1: a tarfs layer and its index come together"


def test_only_tarfs_has_such_an_index(tmp_path: Path) -> None:
    (layer, *_) = layers_of("hello", tmp_path)
    with pytest.raises(ImageError, match="tar-index, not tarfs"):
        write_index(layer.path, tmp_path / "index", "index")
