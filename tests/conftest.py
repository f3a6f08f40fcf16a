# SPDX-License-Identifier: Apache-2.0
"""What a test needs and does not find it says by its marker; the closing lines name every skip with its reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings

from tests import guest, harness

settings.register_profile("default", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
IMAGES = (
    "hello", "hello-zstd", "hello-plain", "hello-docker", "layers", "layers-zstd", "layers-plain", "layers-mixed",
    "many", "dup",
)  # fmt: skip
_TOOLS = (
    "runc", "skopeo", "docker-registry", "veritysetup", "strace", "zstd", "host-local", "dmsetup", "mkfs.xfs",
)  # fmt: skip


T = TypeVar("T")


def in_every_run(values: Iterable[T], kept: Callable[[T], bool]) -> list[Any]:
    """The values to parametrise a test with: those that are not kept are for ./dev soak alone."""
    return [pytest.param(value, marks=() if kept(value) else pytest.mark.soak) for value in values]


def _knows_erofs() -> bool:
    return any(line.split()[-1] == "erofs" for line in Path("/proc/filesystems").read_text().splitlines())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not SOAK:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    root = os.geteuid() == 0
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/usr/lib/cni")]
    releases = set(harness.releases())
    suites = harness.CONFORMANCE.values() if SOAK else [harness.CONFORMANCE[harness.LATER_CONFORMANCE]]
    built = all(path.exists() for path in (harness.UNPACK, *suites, harness.CONFORMANCE_REFERENCE))
    no_guest = guest.missing()
    no_uvm = no_guest or harness.without_uvm()
    faults = missing or releases != harness.RELEASES or not built or (no_uvm and guest.ON_THIS_MACHINE)
    if os.environ.get("TARDEV_SET_UP") and faults:
        # ./dev has set all of this up: what is not here now is a fault of it, not of the machine.
        raise pytest.UsageError(
            f"not there after the set-up: {missing}, containerd: {releases or 'none'}, the Go programs: {built}"
            f"; {no_uvm or 'guests can run'}"
        )
    for item in items:
        if item.get_closest_marker("unpacker") and not built:
            item.add_marker(pytest.mark.skip(reason="the programs of tests/build-go are not there; ./dev setup does"))
        if item.get_closest_marker("guest") and no_guest:
            item.add_marker(pytest.mark.skip(reason=no_guest))
        if item.get_closest_marker("root") and not root:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("erofs") and not _knows_erofs():
            item.add_marker(pytest.mark.skip(reason="this kernel has no EROFS (modprobe erofs)"))
        if item.get_closest_marker("tool") and missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}; ./dev setup does"))
        if item.get_closest_marker("uvm") and no_uvm:
            item.add_marker(pytest.mark.skip(reason=no_uvm))
        if item.get_closest_marker("containerd") and releases != harness.RELEASES:
            item.add_marker(pytest.mark.skip(reason="not every containerd is there; ./dev setup fetches them"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with NAME.tar and NAME.json of every test image."""
    return harness.make_images(tmp_path_factory.mktemp("images"), *IMAGES)


@pytest.fixture
def layer_format() -> str:
    """What `daemon` makes; a test may be parametrized by others."""
    return "tar-index"


@pytest.fixture
def daemon(tmp_path: Path, layer_format: str) -> Iterator[harness.Daemon]:
    """One of its own, with an empty content directory in place of containerd's."""
    (tmp_path / "containerd/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    named = f'[snapshotters.{harness.SNAPSHOTTER}]\ncontract = "host"\nformat = "{layer_format}"\n'
    server = harness.Daemon(tmp_path / "daemon", tmp_path / "containerd", named if layer_format != "tar-index" else "")
    server.start()
    yield server
    server.clean_up()
