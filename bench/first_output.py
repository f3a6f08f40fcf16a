# SPDX-License-Identifier: Apache-2.0
"""From the call that starts a VM to the first byte that its process says, by phase, with a cold and a warm page cache
of the host: that of kernel, initramfs and layer file. QEMU itself, its libraries and its firmware stay warm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import page_cache
from bench.guest_reads import layer_file
from uvm.frames import Kind
from uvm.image import Image
from uvm.policy import Process
from uvm.runner import run

COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    "sh": ("/bin/sh", "-c", "echo hello"),
    "python": ("/usr/bin/python3", "-c", "import json; print('hello')"),
}
CACHES: Final = ("cold", "warm")
FIRST_OUTPUT: Final = "first output"
_FORMAT: Final = "tar-index"
_TIMEOUT_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Start:
    """`phases`: seconds since the call, in their order; `cached_bytes`: of the files, before."""

    command: str
    cache: str
    phases: Mapping[str, float]
    cached_bytes: int

    @property
    def seconds(self) -> float:
        return self.phases[FIRST_OUTPUT]


def best(starts: Sequence[Start], command: str, cache: str) -> Start:
    return min((start for start in starts if (start.command, start.cache) == (command, cache)),
               key=lambda start: start.seconds)  # fmt: skip


def slowest_seconds(starts: Sequence[Start], command: str, cache: str) -> float:
    return max(start.seconds for start in starts if (start.command, start.cache) == (command, cache))


def measure(image: Image, tar: Path, directory: Path, rounds: int) -> list[Start]:
    path = directory / "first-output"
    layer = layer_file(tar, path, _FORMAT, "layer-0")
    files = [image.kernel, image.initramfs, path]
    starts = []
    for _ in range(rounds):
        for command, args in COMMANDS.items():
            for cache in CACHES:
                (page_cache.drop if cache == "cold" else page_cache.read)(files)
                cached = sum(map(page_cache.cached_bytes, files))
                started = time.monotonic()
                said: list[float] = []

                def heard(kind: Kind, payload: bytes, started: float = started, said: list[float] = said) -> None:
                    said.append(time.monotonic() - started)

                process = Process(args, ["PATH=/bin:/usr/bin"])
                result = asyncio.run(run(image, [(layer, path)], process, timeout_s=_TIMEOUT_SECONDS, on_output=heard))
                if result.exit_status != 0 or not said:
                    raise RuntimeError(f"{command}: {result}")
                phases = sorted({**result.phases, FIRST_OUTPUT: said[0]}.items(), key=lambda phase: phase[1])
                starts.append(Start(command, cache, dict(phases), cached))
    return starts
