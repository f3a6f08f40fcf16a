# SPDX-License-Identifier: Apache-2.0
"""What a guest reads of each format, with dm-verity and without, and of an ext4 disk with the same tree: one boot.

bench/guest.c does it. Between two measurements it unmounts, takes the verity target away and drops its caches; the
host's page cache holds the files all the time.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from blockdev.formats.layer_file import FORMATS, LAYER_FORMATS
from snapshotter.cli import layer as command
from tests.guest import KERNEL
from tests.harness import run as run_program
from uvm import image
from uvm.policy import Policy, PolicyLayer, Process
from uvm.runner import Disk, Result, run_policy
from uvm.tarfs import write_index

MEMORY_MIB: Final = 512
EXT4: Final = "ext4"
_MEASURES: Final = ("sequential", "random", "find", "python")
_GUEST: Final = Path(__file__).with_name("guest.c")
_SOURCES: Final = ("machine.c", "policy.c", "report.c", "sha256.c", "verity.c")
_FLAGS: Final = ("-Wall", "-Wextra", "-Werror", "-Wno-format-truncation")
_TIMEOUT_SECONDS: Final = 3600.0
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to the tree. `devices`: what is mounted, and what it refers to, as bench/guest.c takes them."""

    name: str
    file_system: str
    devices: tuple[str, ...]
    without_verity: str = ""  # the name of what differs in nothing else

    def argument(self) -> str:
        return ",".join((self.name, self.file_system, *self.devices))


def index_name(layer_format: str) -> str:
    return f"{layer_format}-index"


def variants_of(layer_format: str) -> list[Variant]:
    """A file system that a mainline kernel has is mounted as it is; a tar through the index beside it."""
    bare = f"{layer_format} bare"
    if FORMATS[layer_format].file_system == "erofs":
        return [
            Variant(layer_format, "erofs", (f"{layer_format}+verity",), bare),
            Variant(bare, "erofs", (layer_format,)),
        ]
    index = index_name(layer_format)
    return [
        Variant(layer_format, "erofs", (f"{index}+verity", f"{layer_format}+verity+loop"), bare),
        Variant(bare, "erofs", (index, f"{layer_format}+loop")),
        # Its loop device is there for verity's sake.
        Variant(f"{bare} no loop", "erofs", (index, layer_format)),
    ]


@dataclass(frozen=True, slots=True)
class Line:
    """A measurement, as the guest says it."""

    variant: str
    measure: str
    seconds: float
    count: int  # of bytes, or of what was found
    check: int


@dataclass(frozen=True, slots=True)
class Reads:
    variants: Sequence[Variant]
    lines: Sequence[Line]
    accelerator: str
    sizes: Mapping[str, int]  # bytes of the layer files and the disk

    @property
    def measures(self) -> list[str]:
        return [name for name in _MEASURES if any(line.measure == name for line in self.lines)]

    def _of(self, variant: str, measure: str) -> list[float]:
        return [line.seconds for line in self.lines if (line.variant, line.measure) == (variant, measure)]

    def best(self, variant: str, measure: str) -> float:
        return min(self._of(variant, measure))

    def median(self, variant: str, measure: str) -> float:
        return median(self._of(variant, measure))

    def count(self, measure: str) -> int:
        return next(line.count for line in self.lines if line.measure == measure)

    def ratio(self, variant: str, other: str, measure: str) -> float:
        return self.best(variant, measure) / self.best(other, measure)


def parse(said: bytes) -> list[Line]:
    """Raises ValueError where two variants do not show the same."""
    lines = []
    seen: dict[str, tuple[int, int]] = {}
    for text in said.decode("ascii").splitlines():
        _, variant, measure, nanoseconds, count, check = text.split("\t")
        line = Line(variant, measure, int(nanoseconds) / 1e9, int(count), int(check))
        if seen.setdefault(measure, (line.count, line.check)) != (line.count, line.check):
            raise ValueError(f"{measure}: {variant} shows something else than those before it")
        lines.append(line)
    return lines


def guest_image(directory: Path) -> image.Image:
    program = image.compiled_init(_FLAGS, main=_GUEST, sources=_SOURCES)
    return image.build(KERNEL, directory, program)


def layer_file(tar: Path, path: Path, layer_format: str, name: str) -> PolicyLayer:
    built = command.build(tar, path, layer_format)
    root_hash = bytes.fromhex(built["root_hash"])
    return PolicyLayer(name, layer_format, root_hash, built["data_size_bytes"], FORMATS[layer_format].params)


def ext4_disk(tar: Path, path: Path) -> None:
    """With mkfs.ext4's own defaults."""
    with tempfile.TemporaryDirectory(dir=path.parent) as tree:
        run_program("tar", "-xpf", tar, "-C", tree)
        with path.open("wb") as file:
            file.truncate((tar.stat().st_size * 5 // 4 // _MIB + 64) * _MIB)
        run_program("mkfs.ext4", "-q", "-d", tree, path, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})


def measure(tar: Path, directory: Path, rounds: int, script: str) -> Reads:
    """`script`: for Python in the guest; "" where the tar has none. Raises RuntimeError with the guest's reason."""
    layers: list[PolicyLayer] = []
    disks: list[Disk] = []
    variants = [variant for name in LAYER_FORMATS for variant in variants_of(name)]
    for name in LAYER_FORMATS:
        path, index = directory / name, directory / index_name(name)
        layers.append(layer_file(tar, path, name, name))
        disks.append(Disk(name, path))
        if any(index.name in variant.devices for variant in variants):
            layers.append(write_index(path, index, index.name))
            disks.append(Disk(index.name, index))
    ext4_disk(tar, directory / EXT4)
    variants.append(Variant(EXT4, EXT4, (EXT4,)))
    disks.append(Disk(EXT4, directory / EXT4))
    arguments = ["bench", str(rounds), script, *(variant.argument() for variant in variants)]
    policy = Policy(layers, Process(arguments)).text()
    result = asyncio.run(_boot(guest_image(directory / "image"), policy, disks))
    return Reads(variants, parse(bytes(result.stdout)), result.accelerator,
                 {disk.serial: disk.path.stat().st_size for disk in disks})  # fmt: skip


async def _boot(guest: image.Image, policy: bytes, disks: Sequence[Disk]) -> Result:
    result = await run_policy(guest, policy, disks, memory_mib=MEMORY_MIB, timeout_s=_TIMEOUT_SECONDS)
    if result.refused is not None or result.exit_status != 0:
        raise RuntimeError(f"the guest: {result.refused}; {result.kernel_log}")
    if spoilt := [layer.name for layer in result.layers if not layer.verified]:
        raise RuntimeError(f"the guest's kernel does not vouch for {spoilt}")
    return result
