# SPDX-License-Identifier: Apache-2.0
"""An image in the reference UVM, without its words on the screen."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blockdev.formats.layer_file import format_named
from snapshotter import images
from snapshotter.config import Config
from snapshotter.content import Caller, Content
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.image_layers import PlacedLayer, built, on_the_node
from snapshotter.images import Image
from snapshotter.metastore import Layer
from uvm import runner, tarfs
from uvm.frames import Kind
from uvm.image import Image as Guest
from uvm.policy import PolicyLayer, Process

LAYOUT: Final = "oci:"
ARCHIVE: Final = "oci-archive:"
_DIRECTORIES: Final = "tardev-uvm-"


@dataclass(frozen=True, slots=True)
class Request:
    """`image`: a reference in containerd, or a path after LAYOUT or ARCHIVE, with a tag behind it where there are
    several. `command` takes the place of the image's own. `tamper`: the topmost layer comes with a bit changed.

    `snapshotter` ("": the one whose layers are for VMs) and `namespace` matter for containerd, `format` for others.
    """

    image: str
    command: Sequence[str]
    guest: Guest
    settings: Config
    snapshotter: str = ""
    namespace: str = "default"
    format: str = "tar-index"
    tamper: bool = False
    memory_mib: int = runner.MEMORY_MIB
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`layers`: what each is, topmost first; where it was plugged and whether its blocks were right, the guest says."""

    result: runner.Result
    layers: list[dict[str, Any]]


async def run(request: Request, on_output: Callable[[Kind, bytes], None] | None = None) -> Outcome:
    """Boot the guest, plug the image's layers, run its command or the given one.

    Raises SnapshotterError, BlockdevError, UVMError, OSError.
    """
    request.guest.check()
    async with AsyncExitStack() as held:
        directory = held.enter_context(working_directory())
        image, placed = await _found(request, directory, held)
        policy = [_policy_layer(number, each.layer) for number, each in enumerate(placed)]
        if request.tamper:
            placed = [_tampered(placed[0], directory), *placed[1:]]
        disks = list(_with_indexes(policy, placed, directory))
        process = image.process
        result = await runner.run(
            request.guest,
            disks,
            Process(
                process.arguments(request.command), process.env or (), process.working_dir or "/", process.user or ""
            ),
            memory_mib=request.memory_mib,
            timeout_s=request.timeout_s,
            on_output=on_output,
        )
    return Outcome(result, [_row(layer, each, result) for layer, each in zip(policy, placed, strict=True)])


async def _found(request: Request, directory: Path, held: AsyncExitStack) -> tuple[Image, list[PlacedLayer]]:
    if request.image.startswith((LAYOUT, ARCHIVE)):
        kind, _, rest = request.image.partition(":")
        path, tag = _split(rest)
        if f"{kind}:" == ARCHIVE:
            images.unpack_archive(path, directory / "layout")
            path = directory / "layout"
        layout = Content(path, "")
        image = await images.from_layout(layout, path, tag)
        (directory / "built").mkdir()
        return image, await built(layout, image, directory / "built", request.format)
    settings, caller = request.settings, Caller(request.namespace)
    content = Content(Path(settings.containerd.content), settings.containerd.address)
    held.push_async_callback(content.close)
    image = await images.from_containerd(content, request.image, caller)
    snapshotter = request.snapshotter or _for_vms(settings)
    return image, await held.enter_async_context(on_the_node(settings, snapshotter, image, content, caller))


def _split(text: str) -> tuple[Path, str]:
    """Path and tag, of which a path that is there has none."""
    path, colon, tag = text.rpartition(":")
    return (Path(path), tag) if colon and not Path(text).exists() else (Path(text), "")


def _for_vms(settings: Config) -> str:
    names = list(settings.snapshotters)
    contracts = {name: CONTRACTS[chosen.contract] for name, chosen in settings.snapshotters.items()}
    return next((name for name in names if contracts[name].PLACE is not Place.MOUNTED), names[0])


def _policy_layer(number: int, layer: Layer) -> PolicyLayer:
    params = format_named(layer.format).params
    return PolicyLayer(f"layer-{number}", layer.format, bytes.fromhex(layer.root_hash), layer.data_size_bytes, params)


def _with_indexes(
    policy: Sequence[PolicyLayer], placed: Sequence[PlacedLayer], directory: Path
) -> Iterator[tuple[PolicyLayer, Path]]:
    """A mainline kernel mounts `tarfs` only through an index beside it."""
    for number, (layer, each) in enumerate(zip(policy, placed, strict=True)):
        yield layer, each.path
        if layer.format == "tarfs":
            index = directory / f"index-{number}"
            yield tarfs.write_index(each.path, index, index.name), index


def _tampered(placed: PlacedLayer, directory: Path) -> PlacedLayer:
    """A copy, with one bit of its first block changed."""
    copy = directory / "tampered"
    shutil.copyfile(placed.path, copy)
    with copy.open("r+b") as file:
        (first,) = file.read(1)
        file.seek(0)
        file.write(bytes([first ^ 1]))
    return PlacedLayer(placed.layer, copy)


def _row(layer: PolicyLayer, placed: PlacedLayer, result: runner.Result) -> dict[str, Any]:
    status = next((status for status in result.layers if status.name == layer.name), None)
    return {
        "device": status.disk if status else "-",
        "name": layer.name,
        "layer": placed.layer.diff_id,
        "format": layer.format,
        "root_hash": layer.root_hash.hex(),
        "verified": {None: "-", True: "yes", False: "NO"}[status.verified if status else None],
        "file": str(placed.path),
    }


@contextmanager
def working_directory() -> Iterator[Path]:
    """Of this process alone, and gone at its end. What processes that were killed have left goes at the start."""
    for path in Path(tempfile.gettempdir()).glob(f"{_DIRECTORIES}*"):
        _remove_abandoned(path)
    path, fd = _locked_directory()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _locked_directory() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_DIRECTORIES))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else another process has taken it for an abandoned one
            return path, fd
        os.close(fd)


def _remove_abandoned(path: Path) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
