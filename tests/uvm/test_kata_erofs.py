# SPDX-License-Identifier: Apache-2.0
"""Images that a real containerd has pulled for the contract `kata-erofs`, in the guest: one disk with a partition for
each layer, as Kata's shim makes it of our mounts, and the verity targets that its agent would make."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockdev.formats.layer_file import FORMATS, TRAILER_BYTES
from policy.chain import ChainID
from snapshotter import metastore
from tests import kata_erofs_peer as peer
from tests.harness import SNAPSHOTTER
from tests.images import mkimage
from tests.integration.conftest import a_node
from tests.integration.test_images import promised, reference
from tests.integration.test_kata import told
from tests.integration.test_kata_erofs import FORMAT, named
from tests.integration.test_snapshots_api import Api
from tests.uvm.conftest import LISTING, Guest, Layer, tree_of, write_layer
from tests.uvm.test_tamper import flip
from uvm import image
from uvm.policy import Policy, PolicyLayer, Process
from uvm.runner import Result, partitioned

pytestmark = [
    pytest.mark.uvm, pytest.mark.slow, pytest.mark.root, pytest.mark.erofs, pytest.mark.tool, pytest.mark.containerd,
]  # fmt: skip

DISK = "layers"


@dataclasses.dataclass(frozen=True)
class Container:
    """What a shim was told: layers, topmost first, each with the row that vouches for it."""

    plan: peer.Plan
    layers: list[tuple[metastore.Layer, Path]]

    def run(
        self, guest: Guest, *args: str, above: tuple[Layer, ...] = (), spoilt: tuple[Path, Path] | None = None
    ) -> Result:
        """On one disk. `above`: layers that the image does not have; `spoilt`: a file, and what is shown for it."""
        policy = [layer.policy(f"above-{number}") for number, layer in enumerate(above)]
        policy += [
            PolicyLayer(
                f"layer-{number}", row.format, bytes.fromhex(row.root_hash), row.data_size_bytes,
                FORMATS[row.format].params,
            )
            for number, (row, _) in enumerate(self.layers)
        ]  # fmt: skip
        shown = [
            *(layer.path for layer in above),
            *(spoilt[1] if spoilt and path == spoilt[0] else path for _, path in self.layers),
        ]
        process = Process(args, ["PATH=/bin"])
        return guest.boot(Policy(policy, process, DISK).text(), [partitioned(DISK, shown)])


@contextmanager
def pulled(directory: Path, images: Path, name: str, label: str = "later") -> Iterator[Container]:
    """An image as containerd has it and a container on it, as the shim is asked to make one."""
    with a_node(directory, label, named()) as node:
        node.containerd.import_image(images / f"{name}.tar")
        chain = ChainID(promised(images, name)["chain_ids"][-1])
        node.containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "pod", chain)
        snapshots, layers = metastore.read(node.daemon.root / metastore.FILE_NAME)
        (key,) = [snapshot.name for snapshot in snapshots if snapshot.kind is metastore.Kind.ACTIVE]
        with node.daemon.client() as client:
            plan = peer.shim(peer.activated(told(Api(node.daemon, client).mounts(key))))
        rows = {(layer.format, layer.diff_id.removeprefix("sha256:")): layer for layer in layers}
        paths = [partition.path for partition in plan.partitions]
        yield Container(plan, [(rows[path.parent.name, path.name], path) for path in paths])
        node.containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "rm", "pod")
        node.containerd.ctr("images", "rm", "--sync", reference(name))


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    program = image.compiled_init(main=LISTING, sources=("sha256.c",))
    tar = mkimage.layer_tar([mkimage.F(".listing", program, 0o755)])
    return write_layer(tar, tmp_path_factory.mktemp("listing") / "listing.layer", FORMAT)


def assert_tables(container: Container, result: Result, above: int = 0) -> None:
    """The guest's targets are, device and name apart, those that Kata's agent makes of the storages that it is sent."""
    agents = peer.agent(container.plan.storages).tables
    guests = [status for status in result.layers if status.name.startswith("layer-")]
    assert len(agents) == len(guests) >= 2
    for number, (agent, status) in enumerate(zip(agents, guests, strict=True), 1):
        assert status.verified
        assert status.disk == f"vda{number + above}"
        assert agent.split()[:1] == status.table.split()[3:4]
        assert agent.split()[3:] == status.table.split()[6:]


def test_an_image_of_containerd_from_one_disk(
    guest: Guest, tmp_path: Path, images: Path, listing: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    """Its tree is the one promised, a parents layer on top among them; root hashes are those of another build."""
    with pulled(tmp_path, images, "layers") as container:
        result = container.run(guest, "/.listing", "/", above=(listing,))
        assert (result.refused, result.exit_status, bytes(result.stderr)) == (None, 0, b"")
        shown = tree_of(bytes(result.stdout))
        del shown[".listing"]
        assert mkimage.differences(expected_tree("layers"), shown) == []
        assert_tables(container, result, above=1)
        formats = [row.format for row, _ in container.layers]
        assert formats == [f"{FORMAT}-parents", *[FORMAT] * 8]
        entries = mkimage.IMAGES["layers"][0](mkimage.static_busybox())[-1]
        again = write_layer(mkimage.layer_tar(entries, global_header=True), tmp_path / "again", FORMAT)
        assert again.built.root_hash.hex() == container.layers[1][0].root_hash == result.layers[2].root_hash


@pytest.mark.soak
@pytest.mark.parametrize("label", ["1.7", "later"])
def test_an_image_of_one_layer_is_verified_too(guest: Guest, tmp_path: Path, images: Path, label: str) -> None:
    """Alone, Kata would mount it as the host gives it."""
    with pulled(tmp_path, images, "hello", label) as container:
        assert [row.tar_size_bytes for row, _ in container.layers][1:] == [1024]
        result = container.run(guest, "cat", "/etc/hello")
        assert (result.refused, result.stdout.decode()) == (None, "hello from a tar layer\n")
        assert_tables(container, result)
        (row, path), (empty, empty_path) = container.layers
        spoilt = tmp_path / "spoilt"
        for layer, at, name in ((path, 1024, 0), (path, row.data_size_bytes, 0), (empty_path, 2048, 1)):
            shutil.copy(layer, spoilt)
            flip(spoilt, at)
            result = container.run(guest, "cat", "/etc/hello", spoilt=(layer, spoilt))
            assert result.refused == f"layer layer-{name}: its head cannot be read: Input/output error"
        assert empty.entries == 1


@pytest.mark.soak
def test_sixty_layers_of_containerd(
    guest: Guest, tmp_path: Path, images: Path, listing: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    with pulled(tmp_path, images, "many") as container:
        result = container.run(guest, "/.listing", "/", above=(listing,))
        assert (result.refused, result.exit_status) == (None, 0)
        shown = tree_of(bytes(result.stdout))
        del shown[".listing"]
        assert mkimage.differences(expected_tree("many"), shown) == []
        assert_tables(container, result, above=1)
        assert len(container.layers) == 60


# A host that cheats, with this format

CONTENT = mkimage.noise("erofs-4k", 2 << 20)  # so much that the tree has two levels
UNREADABLE = "layer layer-0: its head cannot be read: Input/output error"


def data_layer(content: bytes, path: Path) -> Layer:
    tar = mkimage.layer_tar([mkimage.F("data", content), mkimage.F("small", "small\n")])
    return write_layer(tar, path, FORMAT)


@pytest.mark.soak
def test_changes_are_refused(guest: Guest, tmp_path: Path) -> None:
    top = data_layer(CONTENT, tmp_path / "top")
    older = data_layer(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), tmp_path / "older")
    base = write_layer(
        mkimage.layer_tar(mkimage.IMAGES["hello"][0](mkimage.static_busybox())[0]), tmp_path / "base", FORMAT
    )
    data, end = top.built.data_size_bytes, top.built.file_size_bytes
    assert older.built.file_size_bytes == end
    shown = tmp_path / "shown"
    policy = Policy(
        [top.policy("layer-0"), base.policy("layer-1")],
        Process(["sh", "-c", "sha256sum /data; cat /small /etc/hello"], ["PATH=/bin"]),
        DISK,
    )

    def run(path: Path, *more: Path) -> Result:
        return guest.boot(policy.text(), [partitioned(DISK, [path, base.path, *more])])

    assert (good := run(top.path)).refused is None
    assert good.stdout.decode().splitlines()[1:] == ["small", "hello from a tar layer"]
    for at, reason in (
        (1024 + 8, UNREADABLE),
        (data, UNREADABLE),  # the upper level of the tree
        (data + 4096 + 31, UNREADABLE),
        (end - TRAILER_BYTES + 88, "layer layer-0: its trailer is not what the policy gives, from byte 88 on"),
        (end - 512, "layer layer-0: its trailer is not what the policy gives, from byte 3584 on"),
        (-1, UNREADABLE),
    ):
        shutil.copy(top.path if at >= 0 else older.path, shown)
        if at >= 0:
            flip(shown, at)
        assert run(shown).refused == reason
    shutil.copy(top.path, shown)
    flip(shown, top.path.read_bytes().index(CONTENT[1 << 20 : (1 << 20) + 64]))
    result = run(shown)
    assert result.refused is None
    assert result.stdout == b"small\nhello from a tar layer\n"
    assert [status.name for status in result.layers if not status.verified] == ["layer-0"]
    assert run(top.path, base.path).refused == "disk vda has a partition 3, which the policy does not name"
