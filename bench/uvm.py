# SPDX-License-Identifier: Apache-2.0
"""`./dev bench uvm`: the tables of docs/performance.md, "In the guest"."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from bench import first_output, guest_reads, layers, sharing
from bench.__main__ import console, progress
from bench.first_output import CACHES, COMMANDS, Start
from bench.guest_reads import EXT4, Reads
from bench.sharing import Shared
from tests.harness import CACHE, UVM_IMAGE, run
from uvm.image import Image
from uvm.runner import QEMU

PARTS: Final = ("reads", "start", "sharing")
_BIG_BYTES: Final = 16 << 20
_SHARED_LAYERS: Final = 4


def _table(first: str, *columns: str) -> Table:
    shown = Table(first, box=None, pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="right")
    return shown


def seconds_table(reads: Reads) -> Table:
    """The best of all rounds, and beside it the median."""
    shown = _table("SECONDS, BEST (MEDIAN)", *(name.upper() for name in reads.measures))
    for variant in reads.variants:
        cells = (
            f"{reads.best(variant.name, name):.2f} ({reads.median(variant.name, name):.2f})" for name in reads.measures
        )
        shown.add_row(variant.name, *cells)
    return shown


def ratio_table(reads: Reads) -> Table:
    """Of the best: to the same file without verity, and to ext4."""
    shown = _table("RATIO", *(name.upper() for name in reads.measures))
    for variant in reads.variants:
        for other in (variant.without_verity, EXT4):
            if other and other != variant.name:
                cells = (f"{reads.ratio(variant.name, other, name):.2f}" for name in reads.measures)
                shown.add_row(f"{variant.name}, to {other}", *cells)
    return shown


def start_table(starts: Sequence[Start]) -> Table:
    """The phases of the quickest run; below, how long the slowest took."""
    columns = [(command, cache) for command in COMMANDS for cache in CACHES]
    shown = _table("SECONDS SINCE THE CALL", *(f"{command}, {cache}".upper() for command, cache in columns))
    runs = [first_output.best(starts, *column) for column in columns]
    for phase in runs[0].phases:
        shown.add_row(phase, *(f"{run.phases[phase]:.2f}" for run in runs))
    shown.add_row(
        "first output, slowest", *(f"{first_output.slowest_seconds(starts, *column):.2f}" for column in columns)
    )
    shown.add_row("MB cached before", *(_mb(run.cached_bytes) for run in runs))
    return shown


def sharing_table(sizes: Sequence[int], found: Sequence[Shared]) -> Table:
    """All in MB. Copies: what as many copies of the layer files would take of the disk, and of the page cache."""
    shown = _table(
        "VMS", "S", "QEMUS' MEMORY", "FOR EACH", "OF THEM FILES", "LAYERS CACHED", "READ", "WRITTEN", "DATA ROOT",
        "COPIES",
    )  # fmt: skip
    for each in found:
        megabytes = (
            each.memory, each.memory // each.machines, each.memory - each.of_guests, each.cached, each.read,
            each.written, each.data_root, each.machines * sum(sizes),
        )  # fmt: skip
        shown.add_row(str(each.machines), f"{each.seconds:.0f}", *map(_mb, megabytes))
    return shown


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}" if 0 < size < 10_000_000 else f"{size / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench uvm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of the guest's reads (default 5)")
    parser.add_argument("--starts", type=int, default=3, help="of each command with each cache (default 3)")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 2, 5, 10], help="at once (default 1 2 5 10)")
    parser.add_argument(
        "--layer-size", type=int, default=64 << 20, help="bytes of each of four layers (default 64 MiB)"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="leave the other parts out")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    options = parser.parse_args()

    image = Image(UVM_IMAGE).check()
    kept = Path(os.path.realpath(CACHE)) / "bench"  # as mountinfo has it
    python = layers.python(kept, _BIG_BYTES)
    figures: dict[str, Any] = {}
    tables: list[Table | str] = []
    with tempfile.TemporaryDirectory(dir=kept, prefix="run-") as scratch:
        directory = Path(scratch)
        if "reads" in options.only:
            progress(f"what a guest reads, {options.rounds} rounds in one boot")
            reads = guest_reads.measure(python, directory, options.rounds, layers.PYTHON_SCRIPT)
            figures["reads"] = [asdict(line) for line in reads.lines]
            sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in reads.sizes.items())
            counts = ", ".join(f"{name} {reads.count(name):,}" for name in reads.measures)
            tables += [f"reads ({reads.accelerator}): {sizes}; {counts}", seconds_table(reads), ratio_table(reads)]
        if "start" in options.only:
            progress("from the call to the first output")
            starts = first_output.measure(image, python, directory, options.starts)
            figures["start"] = [asdict(start) for start in starts]
            tables += ["first output", start_table(starts)]
        if "sharing" in options.only:
            progress(f"VMs at once: {', '.join(map(str, options.machines))}")
            tars = sharing.image_tars(kept, _SHARED_LAYERS, options.layer_size)
            files, found = sharing.measure(image, directory, tars, options.machines)
            figures["sharing"] = {"layer_files": files, "found": [asdict(each) for each in found]}
            about = f"{len(files)} layer files, {sum(files) / 1e6:.0f} MB; {sharing.MEMORY_MIB} MiB for each VM"
            tables += [f"sharing: {about}; MB", sharing_table(files, found)]

    version = run(QEMU, "--version").splitlines()[0]
    console.print(f"{os.cpu_count()} cores, Linux {platform.release()}, {version}")
    for shown in tables:
        console.print()
        console.print(shown)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
