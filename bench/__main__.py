# SPDX-License-Identifier: Apache-2.0
"""`./dev bench`: the table of docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import layers, measure, through_containerd
from bench.measure import Figures
from blockdev.formats.layer_file import format_named
from tests.harness import CACHE, sha256_of
from verity.hasher import IMPLEMENTATION, ONE_PASS

# Builds are measured in these, the first one through containerd too.
FORMATS: Final = ("tar-index", "erofs-4k", "tarfs")
# How much longer than the limit a build may take; memory of one worker; work in Python for one entry.
BUILD_TO_LIMIT_MAX: Final = 1.15
WORKER_PEAK_BYTES_MAX: Final = {300_000: 400_000_000, 1_000_000: 1_000_000_000}
ENTRY_MICROSECONDS_MAX: Final = 12.0
# Where there is SHA-NI: leaves to hashlib's sha256 of one stream, in bytes per second; both hashes in one call
# to one after the other, in seconds. And everywhere: veritysetup's verify to ours, in seconds.
LEAVES_TO_STREAM_MIN: Final = 1.6
ONE_CALL_TO_TWO_MAX: Final = 0.8
VERITYSETUP_TO_VERIFY_MIN: Final = 1.5
_DIGEST_BYTES: Final = 32
_PAGES_BYTES: Final = 1 << 20  # the kernel counts what is written in whole pages
_MILLION: Final = 1_000_000
# What the machine makes of the limit when nothing but the stages runs: as programs that know nothing of each other.
_AT_ONCE: Final = "stages at once,"
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
    """The facts are those of the layer in each format."""
    runs = Runs()
    facts: dict[str, Any] = {name: {} for name in FORMATS}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for kind in layers.KINDS:
            for name in FORMATS:
                built = measure.program("build", kind, layer.files[kind], directory, name)
                facts[name] |= runs.add(f"build {kind}, {name}", built).said
            if kind != "plain":
                runs.add(f"inflate {kind}", measure.program("inflate", kind, layer.files[kind]))
        runs.add("build zstd, all formats", measure.program("build", "zstd", layer.files["zstd"], directory, *FORMATS))
        runs.add("sha256 of the tar", measure.program("sha256", layer.tar))
        for name in FORMATS:
            runs.add(f"leaf hashing, {name}", measure.program("leaves", layer.tar, name))
            size = str(facts[name]["file_size_bytes"])
            runs.add(f"writing, fsync, {name}", measure.program("write", size, directory))
        for kind in layers.KINDS:
            for name in FORMATS:
                stages = [("sha256", layer.tar), ("leaves", layer.tar, name)]
                stages.append(("write", str(facts[name]["file_size_bytes"]), directory))
                if kind != "plain":
                    stages.append(("inflate", kind, layer.files[kind]))
                runs.add(f"{_AT_ONCE} {kind}, {name}", measure.at_once(*stages))
        said = measure.program("hashes").said
        facts["hashes"] = {name: max(rate, facts.get("hashes", said)[name]) for name, rate in said.items()}
        runs.add("two builds at once", measure.program("pair", "zstd", layer.files["zstd"], directory, FORMATS[0]))
    data = directory / "layer"
    _built_layer(layer, data)
    first = facts[FORMATS[0]]
    for _ in range(rounds):
        tree = measure.program("veritysetup", data, str(first["data_size_bytes"]), directory)
        if runs.add("veritysetup format", tree).said["root_hash"] != first["root_hash"]:
            raise SystemExit("bench: veritysetup's root hash is another")
        checked = (data, str(first["data_size_bytes"]), first["root_hash"])
        runs.add("verify", measure.program("verify", *checked))
        runs.add("veritysetup verify", measure.program("veritysetup-verify", *checked))
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
    """What this machine could reach at best: all cores busy and nothing waits, or one stage that cannot be split.

    By compression and format, as the names of the builds have them.
    """
    cores = os.cpu_count() or 1
    found = {}
    for kind in layers.KINDS:
        inflate = runs.best(f"inflate {kind}").wall_seconds if kind != "plain" else 0.0
        for name in FORMATS:
            stages = ("sha256 of the tar", f"leaf hashing, {name}", f"writing, fsync, {name}")
            rest = sum(runs.best(stage).wall_seconds for stage in stages)
            found[f"{kind}, {name}"] = max(inflate, (inflate + rest) / cores)
    return found


def _row(runs: Runs, name: str, limit: float | None) -> tuple[str, ...]:
    best = runs.best(name)
    waits = best.said.get("usage", {}).get("builder", {}).get("sync_wait_seconds")
    return (
        name, f"{best.wall_seconds:.2f}", f"{runs.worst_seconds(name):.2f}", f"{best.cpu_seconds:.2f}",
        f"{waits:.2f}" if waits is not None else "", f"{best.peak_bytes / 1e6:.0f}",
        f"{best.written_bytes / 1e6:.0f}", f"{best.wall_seconds / limit:.2f}" if limit else "",
    )  # fmt: skip


def _limit_for(name: str, bounds: dict[str, float]) -> float | None:
    """Of what containerd does: that of the same blob in the first format."""
    if name.startswith("containerd"):
        return bounds[f"{name.rpartition(' ')[2]}, {FORMATS[0]}"]
    return bounds.get(name.removeprefix("build ").removeprefix(f"{_AT_ONCE} "))


def table(runs: Runs) -> Table:
    shown = Table("", box=None, pad_edge=False)
    for name in ("WALL S", "SLOWEST S", "CPU S", "FSYNC S", "PEAK MB", "WRITTEN MB", "TO LIMIT"):
        shown.add_column(name, justify="right")
    bounds = limits(runs)
    for name in runs.names():
        shown.add_row(*_row(runs, name, _limit_for(name, bounds)))
    for name, limit in bounds.items():
        shown.add_row(f"limit of this machine, {name}", f"{limit:.2f}")
    return shown


def peak_of_workers(figures: Figures) -> int:
    return max(int(worker["peak_rss_bytes"]) for worker in figures.said["usage"].values())


Verdict = tuple[str, str, str, bool]  # what, target, figure, reached


def verdicts(runs: Runs, facts: dict[str, Any]) -> Iterator[Verdict]:
    """About the layer of /usr."""
    for name, limit in limits(runs).items():
        ratio = runs.best(f"build {name}").wall_seconds / limit
        yield f"build {name}, to the limit", f"≤ {BUILD_TO_LIMIT_MAX}", f"{ratio:.2f}", ratio <= BUILD_TO_LIMIT_MAX
    for name in limits(runs):
        ratio = runs.best(f"build {name}").wall_seconds / runs.best(f"{_AT_ONCE} {name}").wall_seconds
        yield f"build {name}, to its stages at once", "≤ 1.00", f"{ratio:.2f}", ratio <= 1
    for name in FORMATS:
        written = max(runs.best(f"build {kind}, {name}").written_bytes for kind in layers.KINDS)
        block = format_named(name).params.data_block_bytes
        most = facts[name]["file_size_bytes"] + facts[name]["data_size_bytes"] // block * _DIGEST_BYTES
        if format_named(name).split:  # ends of files and what is kept of the tar wait in the spool, too
            most = facts[name]["file_size_bytes"] + facts[name]["usage"]["builder"]["spooled_bytes"] + _PAGES_BYTES
        yield (f"bytes written, {name}: layer file and what is spooled", f"≤ {most / 1e6:.0f} MB",
               f"{written / 1e6:.0f} MB", written <= most)  # fmt: skip
    at_once = runs.best("two builds at once")
    ratio = at_once.wall_seconds / at_once.said["one_by_one_seconds"]
    yield "two builds at once, to one after the other", "≤ 1.00", f"{ratio:.2f}", ratio <= 1
    ratio = runs.best("veritysetup verify").wall_seconds / runs.best("verify").wall_seconds
    yield ("veritysetup verify to ours, time", f"≥ {VERITYSETUP_TO_VERIFY_MIN}", f"{ratio:.2f}",
           ratio >= VERITYSETUP_TO_VERIFY_MIN)  # fmt: skip


def hash_verdicts(hashes: dict[str, float]) -> Iterator[Verdict]:
    """`hashes`: bytes per second of the stage of that name."""
    ratio = hashes["leaves"] / hashes["stream"]
    yield ("leaf hashing to one-stream sha256, speed", f"≥ {LEAVES_TO_STREAM_MIN}", f"{ratio:.2f}",
           ratio >= LEAVES_TO_STREAM_MIN)  # fmt: skip
    ratio = 1 / hashes["both"] / (1 / hashes["stream"] + 1 / hashes["leaves"])
    yield ("both hashes in one call to two calls, time", f"≤ {ONE_CALL_TO_TWO_MAX}", f"{ratio:.2f}",
           ratio <= ONE_CALL_TO_TWO_MAX)  # fmt: skip


def entries_verdicts(small: layers.Layer, directory: Path, rounds: int) -> Iterator[Verdict]:
    """About layers of many small files."""
    for name in FORMATS:
        runs = [measure.program("index", small.tar, name) for _ in range(rounds)]
        each = min(run.said["work_seconds"] / run.said["entries"] for run in runs) * 1e6
        yield (f"work in Python for an entry, {name}", f"≤ {ENTRY_MICROSECONDS_MAX:.0f} µs", f"{each:.1f} µs",
               each <= ENTRY_MICROSECONDS_MAX)  # fmt: skip
        built = measure.program("build", "gzip", small.files["gzip"], directory, name)
        yield _memory(built, name)
        alone = measure.program("inflate", "gzip", small.files["gzip"]).wall_seconds
        progress(f"{built.said['entries']:,} inodes, {name}: {built.wall_seconds:.2f} s, inflate alone {alone:.2f} s")


def _memory(built: Figures, name: str) -> Verdict:
    entries = built.said["entries"]
    most = next(most for count, most in WORKER_PEAK_BYTES_MAX.items() if entries <= 1.1 * count)
    peak = peak_of_workers(built)
    return (
        f"peak memory of a worker, {entries:,} inodes, {name}",
        f"≤ {most / 1e6:.0f} MB",
        f"{peak / 1e6:.0f} MB",
        peak <= most,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the layer (default 1 GiB)")
    parser.add_argument("--entries", type=int, default=300_000, help="files of the layer of many entries")
    parser.add_argument("--rounds", type=int, default=3, help="the quickest of them counts (default 3)")
    parser.add_argument("--no-containerd", action="store_true", help="leave containerd's own unpack out")
    parser.add_argument("--no-million", action="store_true", help="leave the layer of a million files out")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    parser.add_argument("--plot", type=Path, help="draw them into this directory, too (docs/performance)")
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
        found = list(verdicts(runs, facts))
        if ONE_PASS:
            found += hash_verdicts(facts["hashes"])
        progress("many entries")
        found += entries_verdicts(small, directory, options.rounds)
        if not options.no_million:
            progress("a million entries")
            blob = layers.many(kept, _MILLION).files["gzip"]
            found += [_memory(measure.program("build", "gzip", blob, directory, name), name) for name in FORMATS]

    sizes = ", ".join(f"{kind} {layer.files[kind].stat().st_size / 1e6:.0f} MB" for kind in layers.KINDS)
    console.print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()},"
                  f" leaf hashing by {IMPLEMENTATION}")  # fmt: skip
    files = ", ".join(f"{name} {facts[name]['file_size_bytes'] / 1e6:.0f} MB" for name in FORMATS)
    console.print(f"layer of /usr: {sizes}; {facts[FORMATS[0]]['entries']:,} inodes; layer files: {files}")
    console.print()
    console.print(table(runs))
    console.print()
    rates = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in facts["hashes"].items())
    console.print(f"hashes in memory, GB/s: {rates}")
    console.print()
    for what, target, figure, reached in found:
        console.print(f"{'reached' if reached else 'MISSED ':8} {what}: {figure} (target {target})")
    figures = {"figures": {name: vars(runs.best(name)) for name in runs.names()}, "limits": limits(runs)}
    figures["hashes"] = facts["hashes"]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plot:
        from bench.plot import draw  # its library is large, and only wanted here

        for path in draw(figures, options.plot):
            progress(f"drew {path}")


if __name__ == "__main__":
    main()
