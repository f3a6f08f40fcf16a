# SPDX-License-Identifier: Apache-2.0
"""Layer files for the guest, and what the guest shows of them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockdev.formats.layer_file import FORMATS
from blockdev.formats.layer_writer import BuiltLayer
from tests.chains import make
from tests.harness import UVM_IMAGE
from tests.images import mkimage
from uvm import image
from uvm.policy import Policy, PolicyLayer, Process
from uvm.runner import Disk, OneDisk, Result, run_policy

LISTING = Path(__file__).with_name("listing.c")
# QEMU inherits it, and so is known for one of ours.
os.environ["TARDEV_TEST_SESSION"] = uuid.uuid4().hex
SESSION = os.environb[b"TARDEV_TEST_SESSION"]
TIMEOUT_SECONDS = 240.0  # of one guest: software emulation on a busy machine


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer file and what vouches for it."""

    path: Path
    built: BuiltLayer

    def policy(self, name: str) -> PolicyLayer:
        built = self.built
        params = FORMATS[built.format].params
        return PolicyLayer(name, built.format, built.root_hash, built.data_size_bytes, params)


def write_layer(tar: bytes, path: Path, layer_format: str = "tar-index") -> Layer:
    made = make(tar, layer_format)
    path.write_bytes(made.file)
    return Layer(path, made.built)


def layers_of(name: str, directory: Path) -> list[Layer]:
    """The layer files of a test image, bottom first as images have them; equal layers are one file."""
    layers: dict[bytes, Layer] = {}
    chain = []
    for number, entries in enumerate(mkimage.IMAGES[name][0](mkimage.static_busybox())):
        tar = mkimage.layer_tar(entries, global_header=(number == 7))
        key = hashlib.sha256(tar).digest()
        if key not in layers:
            layers[key] = write_layer(tar, directory / f"{key.hex()[:12]}.layer")
        chain.append(layers[key])
    return chain


@pytest.fixture(scope="session")
def uvm_image() -> image.Image:
    return image.Image(UVM_IMAGE).check()


@pytest.fixture(scope="session")
def listing_layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """One file, /.listing: the program that says what the tree looks like."""
    program = image.compiled_init(("-Wall", "-Wextra", "-Werror"), main=LISTING, sources=("sha256.c",))
    tar = mkimage.layer_tar([mkimage.F(".listing", program, 0o755)])
    return write_layer(tar, tmp_path_factory.mktemp("listing") / "listing.layer")


@pytest.fixture(scope="session")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    (layer,) = layers_of("hello", tmp_path_factory.mktemp("hello"))
    return layer


def machines() -> list[str]:
    """The QEMU processes that this run of the tests has started, their parents alive or not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if SESSION in (process / "environ").read_bytes() and "qemu" in (process / "exe").readlink().name:
                found.append(process.name)
    return found


@dataclass(frozen=True, slots=True)
class Guest:
    image: image.Image

    def __call__(self, layers: Sequence[Layer], *args: str, **process: Any) -> Result:
        """Run a command on the layers, bottom first, as policy and host agree."""
        policy, disks = agreed(layers, *args, **process)
        return self.boot(policy.text(), disks)

    def boot(self, policy: bytes, disks: Sequence[Disk | OneDisk], **options: Any) -> Result:
        return asyncio.run(run_policy(self.image, policy, disks, timeout_s=TIMEOUT_SECONDS, **options))


def agreed(layers: Sequence[Layer], *args: str, **process: Any) -> tuple[Policy, list[Disk]]:
    named = [(f"layer-{number}", layer) for number, layer in enumerate(layers)][::-1]
    process.setdefault("env", ["PATH=/bin"])
    policy = Policy([layer.policy(name) for name, layer in named], Process(args or ("true",), **process))
    return policy, [Disk(name, layer.path) for name, layer in named]


@pytest.fixture
def guest(uvm_image: image.Image) -> Iterator[Guest]:
    """Boots guests; the test fails if one leaves anything on the host."""
    descriptors = set(os.listdir("/proc/self/fd"))
    yield Guest(uvm_image)
    assert machines() == []
    assert set(os.listdir("/proc/self/fd")) == descriptors


def tree_of(listing: bytes) -> dict[str, Any]:
    """What the guest lists, as mkimage's `scan` describes a tree; what the guest mounts is left out."""
    found: dict[str, Any] = {}
    inodes: dict[str, list[str]] = {}
    for line in listing.decode("ascii").splitlines():
        name, *fields = line.split(" ")
        path = os.fsdecode(bytes.fromhex(name))
        if len(fields) == 1:
            found[path] = {"type": fields[0]}
            continue
        mode, uid, gid, seconds, nanoseconds, size, nlink, inode, major, minor, content, link, xattrs = fields
        kind = mkimage.KINDS[stat.S_IFMT(int(mode, 8))]
        item: dict[str, Any] = {
            "type": kind, "mode": f"{stat.S_IMODE(int(mode, 8)):04o}", "uid": int(uid), "gid": int(gid),
            "mtime": f"{seconds}.{int(nanoseconds):09d}",
        }  # fmt: skip
        if kind == "symlink":
            item["linkname"] = os.fsdecode(bytes.fromhex(link))
        if kind == "file":
            item |= {"size": int(size), "sha256": content}
            inodes.setdefault(inode, []).append(path)
            item["inode"], item["nlink"] = inode, int(nlink)
        if kind in ("char", "block"):
            item["rdev"] = [int(major), int(minor)]
        pairs = (pair.split("=") for pair in xattrs.rstrip(",").split(",") if "=" in pair)
        shown = {os.fsdecode(bytes.fromhex(key)): value for key, value in pairs}
        if kept := {key: value for key, value in shown.items() if not key.startswith(mkimage.IGNORED_XATTRS)}:
            item["xattrs"] = dict(sorted(kept.items()))
        found[path] = item
    for item in found.values():
        names = inodes.get(item.pop("inode", ""), [])
        nlink = item.pop("nlink", 1)
        if len(names) > 1 or nlink > 1:
            item["links"] = sorted(names)
    return found


@pytest.fixture(scope="session")
def expected_tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What an image must show in a guest: its tree without /dev, /proc and /sys, which the guest mounts."""

    def tree(name: str) -> dict[str, Any]:
        merged: dict[bytes, Any] = {}
        for entries in mkimage.IMAGES[name][0](mkimage.static_busybox()):
            mkimage.apply_layer(merged, entries)
        described = mkimage.describe(merged)
        return {path: item for path, item in described.items() if path not in ("dev", "proc", "sys")}

    return tree
