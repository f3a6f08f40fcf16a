# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.containers`: what a container's Prepare costs with many snapshots stored and many layers mounted."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from blockdev.formats.layer_file import FORMATS
from blockdev.formats.layer_writer import LayerWriter
from blockdev.formats.limits import Limits
from blockdev.workers.launch import BuildRecord
from policy.chain import chain_id
from snapshotter.api.proto import snapshots_pb2
from snapshotter.metastore import FILE_NAME, Kind, Metastore, Snapshot
from tests.harness import CACHE, SNAPSHOTTER, Client, Daemon
from verity.hasher import LeafStore

PREPARE_P99_SECONDS_MAX: Final = 0.005
# With hundreds of mounts and 10,000 snapshots, to a daemon that has nothing but the image.
TO_EMPTY_MAX: Final = 1.5
_FORMAT: Final = "tar-index"


def _layer(root: Path, text: str) -> BuildRecord:
    """A layer file of one small file, in its place."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(text)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    data = out.getvalue()
    digest = hashlib.sha256(data).digest()
    body, heads, leaves = bytearray(), list[bytes](), LeafStore()
    try:
        writer = LayerWriter(
            FORMATS[_FORMAT], write=body.extend, write_head=heads.append, leaves=leaves, limits=Limits()
        )
        writer.feed(data)
        built = writer.finish(digest)
    finally:
        leaves.close()
    directory = root / "layers" / _FORMAT
    directory.mkdir(parents=True, exist_ok=True)
    (directory / digest.hex()).write_bytes(b"".join(heads) + bytes(body))
    return BuildRecord(
        _FORMAT, f"sha256:{digest.hex()}", built.root_hash.hex(), built.tar_size_bytes, built.data_size_bytes,
        built.tree_size_bytes, built.file_size_bytes, built.entries, {}, f"sha256:{digest.hex()}", len(data), {},
    )  # fmt: skip


async def fill(root: Path, images: int, depth: int, snapshots: int) -> list[str]:
    """Images of distinct layers, and containers that were made of them in turn; the names of the images' tops."""
    store = Metastore(root / FILE_NAME)
    tops: list[Snapshot] = []
    for image in range(images):
        parent: Snapshot | None = None
        for number in range(depth):
            layer = await store.publish(_layer(root, f"{image}-{number}"), "none", 0.0)
            key = f"default/1/{image}-{number}"
            made = await store.create(SNAPSHOTTER, key, parent.name if parent else "", Kind.ACTIVE, {}, extraction=True)
            chain = chain_id(parent.chain_id if parent else None, layer.diff_id)
            await store.commit(made, f"default/2/{chain}", {}, layer.id, chain, parent.id if parent else None)
            parent = await store.stat(SNAPSHOTTER, f"default/2/{chain}")
        assert parent is not None
        tops.append(parent)
    for number in range(snapshots - images * depth):
        top = tops[number % images]
        await store.create(SNAPSHOTTER, f"k8s.io/3/{number:064x}", top.name, Kind.ACTIVE, {}, extraction=False)
    await store.close()
    return [top.name for top in tops]


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _calls(client: Client, key: str, parent: str) -> dict[str, Callable[[], object]]:
    stub, name = client.snapshots, SNAPSHOTTER
    prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=name, key=key, parent=parent)
    return {
        "Prepare": lambda: stub.Prepare(prepare, timeout=60),
        "Mounts": lambda: stub.Mounts(snapshots_pb2.MountsRequest(snapshotter=name, key=key), timeout=60),
        "Remove": lambda: stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=name, key=key), timeout=60),
    }


def measure(directory: Path, images: int, depth: int, snapshots: int, rounds: int) -> dict[str, Any]:
    """Seconds of each call; all images are mounted before."""
    (directory / "content/io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    daemon = Daemon(directory / "daemon", directory / "content")
    daemon.root.mkdir(mode=0o700)
    tops = asyncio.run(fill(daemon.root, images, depth, snapshots))
    os.sync()
    daemon.start()
    found: dict[str, list[float]] = {"Prepare": [], "Mounts": [], "Remove": []}
    try:
        with daemon.client() as client:
            first = [timed(_calls(client, f"default/4/{number}", top)["Prepare"]) for number, top in enumerate(tops)]
            mounts = len(daemon.mounts())
            for number in range(rounds):
                for name, call in _calls(client, f"default/5/{number}", tops[number % images]).items():
                    found[name].append(timed(call))
    finally:
        daemon.clean_up()
    return {"mounts": mounts, "first": first, **found}


def p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.containers", description=__doc__)
    parser.add_argument("--images", type=int, default=10, help="with distinct layers, all of them in use (default 10)")
    parser.add_argument("--depth", type=int, default=60, help="layers of each (default 60)")
    parser.add_argument("--snapshots", type=int, default=10_000, help="stored in all (default 10,000)")
    parser.add_argument("--rounds", type=int, default=500, help="containers made and removed (default 500)")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    options = parser.parse_args()
    kept = Path(os.path.realpath(CACHE))  # as mountinfo has it
    kept.mkdir(exist_ok=True)
    figures = {}
    for what, images, snapshots in (("alone", 1, 0), ("crowded", options.images, options.snapshots)):
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            figures[what] = measure(Path(scratch), images, options.depth, snapshots, options.rounds)
    for what, found in figures.items():
        print(f"{what}: {found['mounts']} layers mounted, {options.depth} in each chain")
        print(f"  first Prepare of an image, which mounts its layers: {statistics.median(found['first']) * 1e3:.1f} ms")
        for call in ("Prepare", "Mounts", "Remove"):
            seconds = found[call]
            print(f"  {call}: median {statistics.median(seconds) * 1e3:.2f} ms, p99 {p99(seconds) * 1e3:.2f} ms")
    worst = p99(figures["crowded"]["Prepare"])
    ratio = statistics.median(figures["crowded"]["Prepare"]) / statistics.median(figures["alone"]["Prepare"])
    for what, figure, limit, reached in (
        ("Prepare, p99", f"{worst * 1e3:.2f} ms", f"< {PREPARE_P99_SECONDS_MAX * 1e3:.0f} ms",
         worst < PREPARE_P99_SECONDS_MAX),
        ("Prepare, crowded to alone", f"{ratio:.2f}", f"≤ {TO_EMPTY_MAX}", ratio <= TO_EMPTY_MAX),
    ):  # fmt: skip
        print(f"{'reached' if reached else 'MISSED ':8} {what}: {figure} (target {limit})")
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
