# SPDX-License-Identifier: Apache-2.0
"""`./dev bench image`: `tardevctl image hash` of a large image in a local registry, and what bounds it.

The limit is the largest of {download alone, inflate alone, half the sum of all CPU work}: two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.request import urlopen

from isal import isal_zlib
from rich.console import Console
from rich.table import Table

from bench import layers
from tests.harness import CACHE, CHECKOUT, Registry, oci_archive, sha256_of

LAYERS: Final = 5
TO_LIMIT_MAX: Final = 1.15
WARM_SECONDS_MAX: Final = 0.5
_PIECE_BYTES: Final = 1 << 20
_TARDEVCTL: Final = Path(sys.executable).with_name("tardevctl")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def image(directory: Path, size_bytes: int) -> tuple[Path, list[Path]]:
    """An OCI archive, made once, of this machine's /usr cut into layers; and its blobs."""
    paths = [path for path, _ in layers._below("/usr") if os.path.isfile(path) and not os.path.islink(path)]
    share = size_bytes // LAYERS
    blobs: list[Path] = []
    diff_ids: list[str] = []
    for number in range(LAYERS):

        def write(tar: tarfile.TarFile, number: int = number) -> None:
            for path in paths[number::LAYERS]:
                if tar.offset >= share:
                    return
                tar.add(path, path.lstrip("/"), recursive=False)
            # A small /usr: what is missing compresses about as programs do.
            while tar.offset < share:
                layers.add(tar, f"more/{tar.offset}", sys.executable)

        layer = layers._layer(directory, f"image-{size_bytes}-{number}", write)
        blobs.append(layer.files["gzip"])
        diff_ids.append(f"sha256:{sha256_of(layer.tar)}")
    archive = directory / f"image-{size_bytes}.tar"
    if not archive.exists():
        oci_archive(archive, "bench:1", blobs, layers.MEDIA_TYPES["gzip"], diff_ids)
    return archive, blobs


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds, of this process and of those that it waits for."""
    before, started = _cpu_seconds(), time.monotonic()
    work()
    return time.monotonic() - started, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def download(urls: Sequence[str]) -> None:
    for url in urls:
        with urlopen(url) as answer:
            while answer.read(_PIECE_BYTES):
                pass


def inflate(blobs: Sequence[Path]) -> None:
    for blob in blobs:
        inflator = isal_zlib.decompressobj(zlib.MAX_WBITS | 16)
        with blob.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                inflator.decompress(piece)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench image", description=__doc__)
    parser.add_argument("--size", type=int, default=1_300_000_000, help="bytes of all tars (default 1.3 GB)")
    parser.add_argument("--rounds", type=int, default=3, help="the quickest of them counts (default 3)")
    parser.add_argument("--format", action="append", help="of the layers (default tar-index, erofs-4k, tarfs, each)")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    options = parser.parse_args()
    kept = CACHE / "bench"
    archive, blobs = image(kept, options.size)
    formats = options.format or ["tar-index", "erofs-4k", "tarfs"]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=kept, prefix="run-") as scratch:
        registry = Registry(Path(scratch) / "registry")
        registry.start()
        try:
            reference = registry.push(archive, "bench:1")
            urls = [f"http://{registry.host}/v2/bench/blobs/sha256:{sha256_of(blob)}" for blob in blobs]
            environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}

            def tardevctl(*arguments: str) -> None:
                subprocess.run(
                    [str(_TARDEVCTL), "image", "hash", "--json", reference, *arguments],
                    env=environment, check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT,
                )  # fmt: skip

            def skopeo() -> None:
                with tempfile.TemporaryDirectory(dir=scratch) as target:
                    subprocess.run(
                        ["skopeo", "copy", "-q", "--insecure-policy", "--src-tls-verify=false",
                         f"docker://{reference}", f"dir:{target}"], check=True,
                    )  # fmt: skip

            work: dict[str, Callable[[], object]] = {
                "download alone": lambda: download(urls),
                "inflate alone": lambda: inflate(blobs),
                "skopeo copy alone": skopeo,
                **{name: lambda name=name: tardevctl("--no-cache", "--format", name) for name in formats},  # type: ignore[misc]
                "to the cache": lambda: tardevctl("--format", formats[0]),
                "warm cache": lambda: tardevctl("--format", formats[0]),
                "tardevctl --help": lambda: subprocess.run(
                    [str(_TARDEVCTL), "--help"], check=True, stdout=subprocess.DEVNULL
                ),
            }
            for _ in range(options.rounds):
                for name, each in work.items():
                    found.setdefault(name, []).append(timed(each))
        finally:
            registry.stop()
    best = {name: min(runs) for name, runs in found.items()}
    table = Table(box=None, pad_edge=False)
    for column in ("", "SECONDS", "CPU SECONDS", "WORST", "TO THE LIMIT"):
        table.add_column(column, justify="left" if not column else "right")
    verdicts = []
    for name, (wall, cpu) in best.items():
        ratio = ""
        if name in formats:
            limit = max(best["download alone"][0], best["inflate alone"][0], cpu / 2)
            ratio = f"{wall / limit:.2f}"
            verdicts.append((f"{name} to the limit", wall / limit, TO_LIMIT_MAX))
        table.add_row(name, f"{wall:.2f}", f"{cpu:.2f}", f"{max(found[name])[0]:.2f}", ratio)
    verdicts.append(("warm cache, seconds", best["warm cache"][0], WARM_SECONDS_MAX))
    compressed = sum(blob.stat().st_size for blob in blobs)
    console.print(f"{LAYERS} layers, {options.size / 1e6:.0f} MB, gzip {compressed / 1e6:.0f} MB")
    console.print(table)
    for what, figure, most in verdicts:
        console.print(f"{'reached' if figure <= most else 'MISSED ':8} {what}: {figure:.2f} (target {most})")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
