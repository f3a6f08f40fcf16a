# SPDX-License-Identifier: Apache-2.0
"""`./dev bench`: the table of docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import layers, measure, through_containerd
from bench.measure import Figures
from tests.harness import CACHE, sha256_of
from verity.hasher import IMPLEMENTATION

# How much longer than the limit a build may take, and what one worker may hold in memory.
BUILD_TO_LIMIT_MAX: Final = 1.4
WORKER_PEAK_BYTES_MAX: Final = 150_000_000
_DIGEST_BYTES: Final = 32
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


class Runs:
    """Noise only ever adds time: of several rounds the quickest counts, the slowest is shown beside it."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Figures]] = {}

    def add(self, name: str, figures: Figures) -> Figures:
        self._runs.setdefault(name, []).append(figures)
        return figures

    def best(self, name: str) -> Figures:
        return min(self._runs[name], key=lambda figures: figures.wall_seconds)

    def worst_seconds(self, name: str) -> float:
        return max(figures.wall_seconds for figures in self._runs[name])

    def names(self) -> Iterable[str]:
        return self._runs


def progress(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"bench: {text}")


def speed(layer: layers.Layer, directory: Path, rounds: int, with_containerd: bool) -> tuple[Runs, dict[str, Any]]:
    runs = Runs()
    facts: dict[str, Any] = {}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for kind in layers.KINDS:
            built = runs.add(f"build {kind}", measure.program("build", kind, layer.files[kind], directory))
            facts |= built.said
            if kind != "plain":
                runs.add(f"inflate {kind}", measure.program("inflate", kind, layer.files[kind]))
        runs.add("sha256 of the tar", measure.program("sha256", layer.tar))
        runs.add("leaf hashing", measure.program("leaves", layer.tar))
        runs.add("writing, fsync", measure.program("write", str(facts["file_size_bytes"]), directory))
    data = directory / "layer"
    _built_layer(layer, data)
    for _ in range(rounds):
        tree = measure.program("veritysetup", data, str(facts["data_size_bytes"]), directory)
        if runs.add("veritysetup format", tree).said["root_hash"] != facts["root_hash"]:
            raise SystemExit("bench: veritysetup's root hash is another")
    data.unlink()
    if with_containerd:
        diff_id = "sha256:" + sha256_of(layer.tar)
        for number in range(rounds):
            for kind in ("gzip", "zstd"):
                progress(f"containerd, {kind}, round {number + 1} of {rounds}")
                with tempfile.TemporaryDirectory(dir=directory) as scratch:
                    found = through_containerd.unpack(layer.files[kind], kind, diff_id, Path(scratch))
                for snapshotter, figures in found.items():
                    runs.add(f"containerd, {snapshotter}, {kind}", figures)
    return runs, facts


def _built_layer(layer: layers.Layer, target: Path) -> None:
    from snapshotter.cli import layer as command

    command.build(layer.tar, target, "tar-index")


def limits(runs: Runs) -> dict[str, float]:
    """What this machine could reach at best: all cores busy and nothing waits, or one stage that cannot be split."""
    cores = os.cpu_count() or 1
    rest = sum(runs.best(name).wall_seconds for name in ("sha256 of the tar", "leaf hashing", "writing, fsync"))
    found = {}
    for kind in layers.KINDS:
        inflate = runs.best(f"inflate {kind}").wall_seconds if kind != "plain" else 0.0
        found[kind] = max(inflate, (inflate + rest) / cores)
    return found


def _row(runs: Runs, name: str, limit: float | None) -> tuple[str, ...]:
    best = runs.best(name)
    return (
        name, f"{best.wall_seconds:.2f}", f"{runs.worst_seconds(name):.2f}", f"{best.cpu_seconds:.2f}",
        f"{best.peak_bytes / 1e6:.0f}", f"{best.written_bytes / 1e6:.0f}",
        f"{best.wall_seconds / limit:.2f}" if limit else "",
    )  # fmt: skip


def table(runs: Runs) -> Table:
    shown = Table("", box=None, pad_edge=False)
    for name in ("WALL S", "SLOWEST S", "CPU S", "PEAK MB", "WRITTEN MB", "TO LIMIT"):
        shown.add_column(name, justify="right")
    bounds = limits(runs)
    for name in runs.names():
        kind = name.rpartition(" ")[2]
        shown.add_row(*_row(runs, name, bounds[kind] if name.startswith(("build", "containerd")) else None))
    for kind, limit in bounds.items():
        shown.add_row(f"limit of this machine, {kind}", f"{limit:.2f}")
    return shown


def peak_of_workers(figures: Figures) -> int:
    return max(int(worker["peak_rss_bytes"]) for worker in figures.said["usage"].values())


def verdicts(runs: Runs, facts: dict[str, Any], entries: Figures) -> list[tuple[str, str, str, bool]]:
    """(what, target, figure, reached)"""
    found = []
    for kind, limit in limits(runs).items():
        ratio = runs.best(f"build {kind}").wall_seconds / limit
        found.append((f"build from {kind} to the limit", f"≤ {BUILD_TO_LIMIT_MAX}", f"{ratio:.2f}",
                      ratio <= BUILD_TO_LIMIT_MAX))  # fmt: skip
    written = max(runs.best(f"build {kind}").written_bytes for kind in layers.KINDS)
    most = facts["file_size_bytes"] + facts["data_size_bytes"] // 512 * _DIGEST_BYTES
    found.append(("bytes written: layer file and spooled leaf digests", f"≤ {most / 1e6:.0f} MB",
                  f"{written / 1e6:.0f} MB", written <= most))  # fmt: skip
    peak = peak_of_workers(entries)
    found.append(
        (
            f"peak memory of a worker, {entries.said['entries']:,} inodes",
            f"≤ {WORKER_PEAK_BYTES_MAX / 1e6:.0f} MB",
            f"{peak / 1e6:.0f} MB",
            peak <= WORKER_PEAK_BYTES_MAX,
        )
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the layer (default 1 GiB)")
    parser.add_argument("--entries", type=int, default=100_000, help="files of the layer of many entries")
    parser.add_argument("--rounds", type=int, default=3, help="the quickest of them counts (default 3)")
    parser.add_argument("--no-containerd", action="store_true", help="leave containerd's own unpack out")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    options = parser.parse_args()

    progress("makes the layers (kept in .cache/bench)")
    kept = CACHE / "bench"
    layer, small = layers.usr(kept, options.size), layers.many(kept, options.entries)
    with tempfile.TemporaryDirectory(dir=kept, prefix="run-") as scratch:
        directory = Path(scratch)
        for path in layer.files.values():
            with path.open("rb", buffering=0) as file:  # all rounds read from the page cache
                while file.read(1 << 22):
                    pass
        runs, facts = speed(layer, directory, options.rounds, not options.no_containerd)
        progress("many entries")
        entries = measure.program("build", "gzip", small.files["gzip"], directory)

    sizes = ", ".join(f"{kind} {layer.files[kind].stat().st_size / 1e6:.0f} MB" for kind in layers.KINDS)
    console.print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()},"
                  f" leaf hashing by {IMPLEMENTATION}")  # fmt: skip
    console.print(f"layer of /usr: {sizes}; {facts['entries']:,} inodes; layer file"
                  f" {facts['file_size_bytes'] / 1e6:.0f} MB")  # fmt: skip
    console.print()
    console.print(table(runs))
    console.print()
    per_entry = entries.wall_seconds / entries.said["entries"]
    console.print(f"{entries.said['entries']:,} inodes: {entries.wall_seconds:.2f} s, {per_entry * 1e6:.1f} µs each")
    console.print()
    for what, target, figure, reached in verdicts(runs, facts, entries):
        console.print(f"{'reached' if reached else 'MISSED ':8} {what}: {figure} (target {target})")
    if options.json:
        figures = {name: vars(runs.best(name)) for name in runs.names()}
        options.json.write_text(json.dumps({"figures": figures, "limits": limits(runs)}, indent=1))


if __name__ == "__main__":
    main()
