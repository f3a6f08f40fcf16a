# SPDX-License-Identifier: Apache-2.0
"""`tardevctl uvm run`: an image from where a person has it into a real guest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import BIN, SNAPSHOTTER, Registry, host_state, run, wait_for
from tests.images import mkimage
from tests.integration.conftest import Node, a_node
from tests.uvm.conftest import TIMEOUT_SECONDS, Layer, machines, tree_of
from uvm.image import Image

pytestmark = [pytest.mark.uvm, pytest.mark.slow]

PARENTS = "tar-index-parents"
NOT_RUN = 125
HELLO = "hello from a tar layer\n"


def uvm_run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [BIN / "tardevctl", "uvm", "run", "--timeout", str(TIMEOUT_SECONDS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_SECONDS, check=False, **options)


def table(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The rows that a person sees: device, layer, root hash, verified."""
    lines = done.stderr.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["DEVICE", "LAYER"])
    return [line.split() for line in lines[head + 1 :] if len(line.split()) == 4]


def build_image(name: str, directory: Path, listing: bytes | None = None) -> dict[str, Any]:
    """An OCI archive of a test image; with `listing`, on top a layer that has the program of that name alone."""
    if listing is None:
        mkimage.build(name, directory, mkimage.static_busybox())
    else:
        make, compressions = mkimage.IMAGES[name]
        program = [mkimage.F(".listing", listing, 0o755)]
        mkimage.IMAGES["listed"] = (lambda busybox: [*make(busybox), program], compressions)
        try:
            mkimage.build("listed", directory, mkimage.static_busybox())
        finally:
            del mkimage.IMAGES["listed"]
    described: dict[str, Any] = json.loads((directory / f"{'listed' if listing else name}.json").read_text())
    return described


@pytest.fixture(scope="module")
def listing(listing_layer: Layer) -> bytes:
    """The program itself."""
    with tempfile.TemporaryDirectory() as directory:
        run(BIN / "tardevctl", "layer", "extract", listing_layer.path, directory)
        return (Path(directory) / ".listing").read_bytes()


@pytest.fixture(autouse=True)
def nothing_left(uvm_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    yield
    assert machines() == []
    assert list(temporary.iterdir()) == []


KATA = f"""
[snapshotters.{SNAPSHOTTER}]
contract = "kata-tardev"
format = "tar-index"
"""


@pytest.fixture(scope="module")
def kata_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with a_node(tmp_path_factory.mktemp("node"), "later", KATA) as made:
        yield made


@pytest.mark.root
@pytest.mark.tool
@pytest.mark.containerd
def test_an_image_that_containerd_pulled_runs_from_the_layer_files_that_it_left(
    kata_node: Node, tmp_path: Path, listing: bytes, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    """The tree that the guest sees is the image's; every layer is verified, with the root hash of `layer build`."""
    containerd, daemon = kata_node.containerd, kata_node.daemon
    promised = build_image("layers", tmp_path, listing)
    registry = Registry(tmp_path / "registry")
    registry.start()
    try:
        reference = registry.push(tmp_path / "listed.tar", "layers:vm")
        containerd.pull(reference)
    finally:
        registry.stop()
    before = daemon.layer_files()
    done = uvm_run("--config", daemon.config, "--json", reference, "--", "/.listing", "/")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    shown = tree_of(said["stdout"].encode())
    assert shown.pop(".listing")["size"] == len(listing)
    assert mkimage.differences(expected_tree("layers"), shown) == []

    rows = {row["diff_id"]: row for row in daemon.tardevctl("layers")}
    (on_top, *layers) = said["layers"]
    assert on_top["format"] == PARENTS
    assert on_top["root_hash"] == rows[on_top["layer"]]["root_hash"]
    assert [layer["layer"] for layer in layers] == promised["diff_ids"][::-1]
    archive = tmp_path / "archive"
    shutil.unpack_archive(tmp_path / "listed.tar", archive, "tar")
    for layer, descriptor in zip(layers, reversed(promised["layers"]), strict=True):
        blob = archive / "blobs" / descriptor["digest"].replace(":", "/")
        record = json.loads(run(BIN / "tardevctl", "layer", "build", blob, "--output", tmp_path / "own", "--json"))
        assert (record["diff_id"], record["root_hash"]) == (layer["layer"], layer["root_hash"])
        assert Path(layer["file"]).parent == daemon.root / "layers"  # the links that the mounts name
        assert os.path.samefile(
            layer["file"], daemon.root / "layers/tar-index" / layer["layer"].removeprefix("sha256:")
        )
    assert all(layer["verified"] == "yes" for layer in said["layers"])
    assert sorted(layer["device"] for layer in said["layers"]) == [f"vd{letter}" for letter in "abcdefghij"]

    assert daemon.layer_files() == before
    assert "view" not in [row["kind"] for row in daemon.tardevctl("snapshots")]
    assert "tardev-uvm" not in containerd.ctr("leases", "list")
    assert daemon.mounts() == []


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.tool
@pytest.mark.containerd
def test_a_changed_layer_of_containerds_is_refused(kata_node: Node, tmp_path: Path) -> None:
    build_image("hello", tmp_path)
    kata_node.containerd.import_image(tmp_path / "hello.tar")
    reference = "localhost/tardev-test/hello:latest"
    before = [path.read_bytes() for path in kata_node.daemon.layer_files()]
    done = uvm_run("--config", kata_node.daemon.config, "--tamper", reference)
    assert (done.returncode, done.stdout) == (NOT_RUN, "")
    assert "the guest refuses: layer layer-0: its head cannot be read: Input/output error" in done.stderr
    assert [path.read_bytes() for path in kata_node.daemon.layer_files()] == before
    done = uvm_run("--config", kata_node.daemon.config, reference)
    assert (done.returncode, done.stdout) == (0, HELLO)


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.tool
@pytest.mark.containerd
@pytest.mark.parametrize(("name", "layers"), [("hello", 1), ("layers", 9)])
def test_layers_for_upstreams_kata_run_as_well(tmp_path: Path, name: str, layers: int) -> None:
    """Without the empty one that its mounts name below a single layer; with the parents layer on top of the others."""
    names = KATA.replace("kata-tardev", "kata-erofs").replace("tar-index", "erofs-4k")
    with a_node(tmp_path, "later", names) as node:
        build_image(name, tmp_path)
        node.containerd.import_image(tmp_path / f"{name}.tar")
        reference = f"localhost/tardev-test/{name}:latest"
        done = uvm_run("--config", node.daemon.config, reference, "--", "cat", "/etc/hello")
        assert done.stdout.startswith("hello from"), done.stderr
        assert len(table(done)) == layers


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.tool
@pytest.mark.containerd
def test_layers_that_the_host_mounts_run_as_well(tmp_path: Path) -> None:
    with a_node(tmp_path, "later") as node:
        build_image("layers", tmp_path)
        node.containerd.import_image(tmp_path / "layers.tar")
        reference = "localhost/tardev-test/layers:latest"
        done = uvm_run("--config", node.daemon.config, reference, "--", "ls", "-ld", "/tree/attrs")
        assert done.stdout.startswith("drwxr-x---"), done.stderr
        assert len(table(done)) == 9
        done = uvm_run("--config", node.daemon.config, "localhost/tardev-test/none:latest")
        assert (done.returncode, done.stdout) == (NOT_RUN, "")
        assert "not found" in done.stderr
        done = uvm_run("--config", node.daemon.config, "--snapshotter", "other", reference)
        assert f"has no snapshotter 'other'; it has: {SNAPSHOTTER}" in done.stderr
        node.containerd.ctr("images", "import", "--snapshotter", "overlayfs", tmp_path / "layers.tar", namespace="b")
        # The daemon has the layers, whoever pulled them: it is containerd's image that must be there.
        done = uvm_run("--config", node.daemon.config, "--namespace", "b", reference)
        assert done.returncode == 0
        done = uvm_run("--config", node.daemon.config, "--namespace", "c", reference)
        assert done.returncode == NOT_RUN


def test_a_bit_is_changed_and_the_guest_refuses(tmp_path: Path) -> None:
    build_image("hello", tmp_path)
    done = uvm_run("--tamper", f"oci-archive:{tmp_path / 'hello.tar'}", "--", "cat", "/etc/hello")
    assert (done.returncode, done.stdout) == (NOT_RUN, "")
    assert done.stderr.endswith("the guest refuses: layer layer-0: its head cannot be read: Input/output error\n")
    ((device, layer, _, verified),) = table(done)
    assert (device, verified) == ("-", "-")
    assert layer == json.loads((tmp_path / "hello.json").read_text())["diff_ids"][0]


@pytest.mark.soak
@pytest.mark.parametrize("layer_format", ["tar-index", "tarfs"])
@pytest.mark.parametrize("tag", ["", ":latest"])
def test_an_oci_layout(tmp_path: Path, layer_format: str, tag: str) -> None:
    build_image("hello", tmp_path)
    shutil.unpack_archive(tmp_path / "hello.tar", tmp_path / "layout", "tar")
    script = "cat /etc/hello; echo b >&2; exit 7"
    done = uvm_run("--format", layer_format, f"oci:{tmp_path / 'layout'}{tag}", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (7, HELLO)
    assert done.stderr.startswith("b\n")
    ((_, _, root_hash, verified),) = table(done)
    (descriptor,) = json.loads((tmp_path / "hello.json").read_text())["layers"]
    blob = tmp_path / "layout/blobs" / descriptor["digest"].replace(":", "/")
    own = ("--format", layer_format, "--output", tmp_path / "own", "--json")
    record = json.loads(run(BIN / "tardevctl", "layer", "build", blob, *own))
    assert (root_hash, verified) == (record["root_hash"], "yes")


@pytest.mark.soak
def test_sixty_layers_of_an_archive(
    tmp_path: Path, listing: bytes, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    build_image("many", tmp_path, listing)
    done = uvm_run("--json", f"oci-archive:{tmp_path / 'listed.tar'}", "--", "/.listing", "/")
    said = json.loads(done.stdout)
    shown = tree_of(said["stdout"].encode())
    del shown[".listing"]
    assert mkimage.differences(expected_tree("many"), shown) == []
    assert len({layer["device"] for layer in said["layers"]}) == len(said["layers"]) >= 61


def test_what_is_no_image_is_said_in_one_line(tmp_path: Path) -> None:
    """The corpus of images is tests/unit/test_images.py."""
    (tmp_path / "index.json").write_text("{}")
    for image, reason in (
        (f"oci:{tmp_path / 'gone'}", "is no OCI image layout"),
        (f"oci:{tmp_path}", "missing required field `manifests`"),
        (f"oci-archive:{tmp_path / 'index.json'}", "is no OCI archive"),
    ):
        done = uvm_run(image)
        assert (done.returncode, done.stdout) == (NOT_RUN, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    done = uvm_run("--uvm", tmp_path, f"oci:{tmp_path}")
    assert f"no image of a UVM in {tmp_path}" in done.stderr


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.tool
@pytest.mark.containerd
@pytest.mark.timeout(3600)
def test_fifty_runs_of_which_some_are_killed_leave_nothing(kata_node: Node, tmp_path: Path) -> None:
    """Of a run that gets SIGKILL containerd keeps a view until its lease expires, and the next run takes its files."""
    build_image("hello", tmp_path)
    kata_node.containerd.import_image(tmp_path / "hello.tar")
    before = host_state()
    images = ("localhost/tardev-test/hello:latest", f"oci-archive:{tmp_path / 'hello.tar'}")
    for number in range(50):
        command = [BIN / "tardevctl", "uvm", "run", "--config", kata_node.daemon.config, images[number % 2]]
        process = subprocess.Popen(
            [*map(str, command), "--", "cat", "/etc/hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if number % 5 < 3:
            time.sleep(0.4 + 0.15 * number)
            process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 5])
        out, error = process.communicate(timeout=TIMEOUT_SECONDS)
        if number % 5 >= 3:
            assert (process.returncode, out) == (0, HELLO.encode()), error
    wait_for("no machine is left", lambda: not machines())
    assert uvm_run(images[1], "--", "true").returncode == 0
    assert host_state() - before == set()
    views = [row for row in kata_node.daemon.tardevctl("snapshots") if row["kind"] == "view"]
    leases = kata_node.containerd.ctr("leases", "list").count("tardev-uvm-")
    assert len(views) <= leases <= 5  # every second kill met an archive, and some came before the lease
    for name in (line.split()[0] for line in kata_node.containerd.ctr("leases", "list").splitlines()[1:]):
        kata_node.containerd.ctr("leases", "delete", "--sync", name)
    wait_for("their views go", lambda: "view" not in [row["kind"] for row in kata_node.daemon.tardevctl("snapshots")])
