# SPDX-License-Identifier: Apache-2.0
"""`./dev bench load`: a full store, many clients, many pulls and one very large layer."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from rich.table import Table

from bench import load_store
from bench.__main__ import Verdict, console, progress
from bench.load_store import HOST, KATA, tar_of
from bench.through_containerd import servers
from blockdev.kernel.mounts import mounted_below
from snapshotter.api.proto import diff_pb2, diff_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc, types_pb2
from tests.harness import (
    CACHE,
    CHECKOUT,
    Containerd,
    Daemon,
    Registry,
    oci_archive,
    releases,
    run,
    unmount_below,
    wait_for,
)

PARTS: Final = ("store", "clients", "pulls", "large")
_PLAIN: Final = "application/vnd.oci.image.layer.v1.tar"
_ZSTD: Final = f"{_PLAIN}+zstd"
_CONFIG: Final = '[snapshotters.tardev-host]\ncontract = "host"\nformat = "tar-index"\n'
_KATA: Final = f'{_CONFIG}[snapshotters.tardev]\ncontract = "kata-tardev"\nformat = "tar-index"\n'

PREPARE_MOUNTS_MAX: Final = 0.005
REMOVE_MAX: Final = 0.010
COMMIT_MAX: Final = 0.100
STAT_MAX: Final = 0.050
START_MAX: Final = 1.0
RESIDENT_MAX: Final = 90_000_000
WORKER_MAX: Final = 400_000_000


@dataclass
class Times:
    """Seconds of calls, by what was called. Rows of the table are in the order in which they came."""

    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.rows.setdefault(name, []).append(seconds)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.add(name, time.monotonic() - started)

    def quantile(self, name: str, share: float) -> float:
        found = sorted(self.rows[name])
        return found[min(len(found) - 1, int(share * len(found)))]

    def table(self) -> Table:
        shown = Table("MILLISECONDS", box=None, pad_edge=False)
        for column in ("CALLS", "P50", "P99", "MAX"):
            shown.add_column(column, justify="right")
        for name, found in self.rows.items():
            figures = (statistics.median(found), self.quantile(name, 0.99), max(found))
            shown.add_row(name, f"{len(found):,}", *(f"{1000 * each:.1f}" for each in figures))
        return shown


@dataclass
class Found:
    times: Times = field(default_factory=Times)
    verdicts: list[Verdict] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def at_most(self, what: str, most: float, figure: float, unit: str, scale: float) -> None:
        self.verdicts.append((what, f"≤ {most * scale:.0f} {unit}", f"{figure * scale:.1f} {unit}", figure <= most))

    def p99(self, name: str, most: float) -> None:
        self.at_most(f"{name}, p99", most, self.times.quantile(name, 0.99), "ms", 1000)

    def none(self, what: str, found: Sequence[str]) -> None:
        self.verdicts.append((what, "none", "none" if not found else "; ".join(map(str, found))[:400], not found))


def resident(pid: int) -> tuple[int, int]:
    """(now, at its peak), bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    now, peak = (re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    assert now
    assert peak
    return int(now[1]) * 1024, int(peak[1]) * 1024


class Service:
    """The daemon's, through one connection of this process."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)  # type: ignore[no-untyped-call]
        self.diff = diff_pb2_grpc.DiffStub(channel)  # type: ignore[no-untyped-call]

    def prepare(self, name: str, key: str, parent: str = "") -> Any:
        return self.snapshots.Prepare(snapshots_pb2.PrepareSnapshotRequest(snapshotter=name, key=key, parent=parent))

    def mounts(self, name: str, key: str) -> Any:
        return self.snapshots.Mounts(snapshots_pb2.MountsRequest(snapshotter=name, key=key))

    def remove(self, name: str, key: str) -> None:
        self.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=name, key=key))

    def stat(self, name: str, key: str) -> Any:
        return self.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter=name, key=key))

    def list(self, name: str) -> int:
        return sum(len(part.info) for part in self.snapshots.List(snapshots_pb2.ListSnapshotsRequest(snapshotter=name)))


@contextmanager
def connected(daemon: Daemon) -> Iterator[Service]:
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        yield Service(channel)


def new_daemon(directory: Path, extra: str = _KATA) -> Daemon:
    content = directory / "containerd"
    (content / "io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True, exist_ok=True)
    return Daemon(directory / "daemon", content, extra)


# The store


def full_store(directory: Path, found: Found, *, layers: int, snapshots: int, calls: int) -> load_store.Stored:
    """The daemon ends with it; its root stays, for the clients."""
    progress(f"a store of {snapshots:,} snapshots over {layers:,} layers")
    daemon = new_daemon(directory)
    stored = load_store.fill(daemon.root, layers, snapshots)
    started = []
    for _ in range(3):
        started.append(_start(daemon))
        daemon.stop()
    _start(daemon)
    found.at_most("from start to an answer of the socket", START_MAX, min(first for first, _ in started), "s", 1)
    found.facts.append(f"from start to the first answer about a snapshot: {min(last for _, last in started):.2f} s")
    try:
        with connected(daemon) as service:
            _one_client(service, daemon, found, stored.images, calls)
            _busy(service, daemon, directory, found, stored.images[0], calls)
        assert daemon.process is not None
        now, peak = resident(daemon.process.pid)
        found.facts.append(
            f"serving process with the full store: {now / 1e6:.0f} MB resident, {peak / 1e6:.0f} MB peak"
        )
        found.at_most("serving process, resident at its peak", RESIDENT_MAX, peak, "MB", 1e-6)
    finally:
        daemon.clean_up()
    return stored


def _start(daemon: Daemon) -> tuple[float, float]:
    """Seconds until the socket answers: an Apply that is another snapshotter's, which waits for no recovery; and until
    a call is answered that does."""
    foreign = [types_pb2.Mount(type="bind", source="/var/lib/elsewhere", options=["rw"])]
    started = time.monotonic()
    with daemon.log.open("a") as log:
        log.write("reset\n")
    daemon.address.unlink(missing_ok=True)
    daemon.launch()
    # Before that a client's own back-off would be measured.
    wait_for("the socket", daemon.address.exists)
    with connected(daemon) as service:
        with suppress(grpc.RpcError):
            service.diff.Apply(diff_pb2.ApplyRequest(mounts=foreign), wait_for_ready=True, timeout=60)
        answered = time.monotonic() - started
        with suppress(grpc.RpcError):
            service.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter=HOST, key="none"), timeout=60)
    return answered, time.monotonic() - started


def _one_client(service: Service, daemon: Daemon, found: Found, images: list[str], calls: int) -> None:
    times = found.times
    few = images[:20]
    for name in (KATA, HOST):
        for number, parent in enumerate(few):
            with times.of(f"Prepare + Mounts, first of its image, {name}"):
                service.prepare(name, f"first/{number}", parent)
                service.mounts(name, f"first/{number}")
        for number in range(calls):
            with times.of(f"Prepare + Mounts, {name}"):
                service.prepare(name, f"one/{number}", few[number % len(few)])
                service.mounts(name, f"one/{number}")
        for number in range(calls):
            with times.of(f"Stat, {name}"):
                service.stat(name, few[number % len(few)])
        for number in range(calls):
            with times.of(f"Remove, {name}"):
                service.remove(name, f"one/{number}")
        for number in range(len(few)):
            service.remove(name, f"first/{number}")
        found.p99(f"Prepare + Mounts, {name}", PREPARE_MOUNTS_MAX)
        found.p99(f"Remove, {name}", REMOVE_MAX)
    for _ in range(10):
        with times.of("List of all of one name"):
            count = service.list(HOST)
    found.facts.append(
        f"List of {HOST}: {count:,} snapshots in {1000 * times.quantile('List of all of one name', 0.5):.0f} ms"
    )


def _busy(service: Service, daemon: Daemon, directory: Path, found: Found, parent: str, calls: int) -> None:
    """Every container's root is mounted and a file in its layers is open while it is removed."""
    name = f"Remove, {HOST}, layers held busy"
    count = min(calls, 200)
    opened = []
    point = directory / "mounted"
    point.mkdir()
    for number in range(count):
        mount = service.prepare(HOST, f"busy/{number}", parent).mounts[0]
        root = point / str(number)
        root.mkdir()
        run("mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, root,
            env={**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})  # fmt: skip
        opened.append(next(path for path in root.iterdir() if path.name.startswith("file-")).open("rb"))
    for number in range(count):
        with found.times.of(name):
            service.remove(HOST, f"busy/{number}")
    found.p99(name, REMOVE_MAX)
    for file in opened:
        file.close()
    unmount_below(point)


# Many clients


def many_clients(directory: Path, stored: load_store.Stored, found: Found, *, clients: int, seconds: float) -> None:
    progress(f"{clients} clients for {seconds:.0f} s")
    daemon = new_daemon(directory, f'{_KATA}[cache]\nmax_size = "0"\n')
    blobs = directory / "containerd/io.containerd.content.v1.content/blobs/sha256"
    content = []
    for number in range(20):
        tar = tar_of(f"blob-{number}", os.urandom(1000))
        digest = hashlib.sha256(tar).hexdigest()
        (blobs / digest).write_bytes(tar)
        content.append((f"sha256:{digest}", len(tar)))
    _start(daemon)
    before = {(row.snapshotter, row.name) for row in daemon.snapshots()}
    files = set(daemon.layer_files())
    assert daemon.process is not None
    asked = {"address": str(daemon.address), "clients": clients, "seconds": seconds, "images": stored.images[:20],
             "blobs": content}  # fmt: skip
    try:
        with Peaks(daemon.process.pid) as peaks:
            done = subprocess.run(
                [sys.executable, "-m", "bench.load_clients"], input=json.dumps(asked).encode(), capture_output=True,
                cwd=CHECKOUT, check=False, timeout=10 * seconds + 300,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"bench: the clients failed: {done.stderr.decode()[-2000:]}")
        said = json.loads(done.stdout)
        for method, each in sorted(said["seconds"].items()):
            found.times.rows[f"{method}, {clients} clients"] = each
        total = sum(map(len, said["seconds"].values()))
        found.facts.append(
            f"{clients} clients: {total:,} calls in {seconds:.0f} s, {total / seconds:.0f} a second; serving process"
            f" {peaks.serving / 1e6:.0f} MB at its peak"
        )
        found.none(f"wrong answers to {clients} clients", said["wrong"])
        found.none("what they leave", _left(daemon, before, files))
        found.at_most(f"serving process with {clients} clients, at its peak", RESIDENT_MAX, peaks.serving, "MB", 1e-6)
    finally:
        daemon.clean_up()


def _left(daemon: Daemon, before: set[tuple[str, str]], files: set[Path]) -> list[str]:
    """The last clients' removals go on behind their replies. Layers that nobody needs may stay, for minutes."""

    def look() -> list[str]:
        rows = daemon.snapshots()
        now = {(row.snapshotter, row.name) for row in rows}
        wanted = {str(row.id) for row in rows if row.has_directory}
        left = [f"snapshot {each}" for each in now ^ before]
        left += [f"directory {path.name}" for path in (daemon.root / "snapshots").iterdir() if path.name not in wanted]
        left += [f"staged {path.name}" for path in daemon.staged()]
        left += [f"lost {path.name}" for path in files - set(daemon.layer_files())]
        ready = {layer.diff_id.removeprefix("sha256:") for layer in daemon.layers()}
        layer_files = {path.name for path in (daemon.root / "layers/tar-index").iterdir()}
        return left + [f"layer {name}" for name in ready ^ layer_files]

    with suppress(TimeoutError):
        wait_for("all is gone", lambda: not look(), 30)
    return look()


class Peaks:
    """Resident memory of the daemon and of its children, looked at now and then."""

    def __init__(self, pid: int) -> None:
        self._pid, self._end = pid, threading.Event()
        self.serving = self.worker = 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peaks:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        self.serving = max(self.serving, resident(self._pid)[1])

    def _look(self) -> None:
        while not self._end.wait(0.1):
            with suppress(OSError, AssertionError):
                for child in Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split():
                    self.worker = max(self.worker, resident(int(child))[1])


# Many pulls


def many_pulls(directory: Path, found: Found, *, images: int) -> None:
    """All at once, through the newest containerd; of three layers one is in all, one in every third."""
    progress(f"{images} images pulled at once")
    registry = Registry(directory / "registry")
    registry.start()
    try:
        shared = tar_of("shared", os.urandom(1 << 20))
        tars = [
            [shared, tar_of(f"third-{number % 3}", b"%d" % (number % 3)), tar_of(f"own-{number}", os.urandom(100_000))]
            for number in range(images)
        ]
        with ThreadPoolExecutor(4) as pool:
            references = list(pool.map(lambda each: _push(registry, directory, *each), enumerate(tars)))
        with servers(directory / "pulls", _CONFIG) as (containerd, daemon):
            started = time.monotonic()
            with ThreadPoolExecutor(images) as pool:
                list(pool.map(containerd.pull, references))
            seconds = time.monotonic() - started
            distinct = len({hashlib.sha256(tar).hexdigest() for each in tars for tar in each})
            builds = daemon.metric("tardev_builds_total", result="ok")
            found.facts.append(
                f"{images} images pulled at once: {seconds:.1f} s, {distinct} layers, {builds:.0f} builds"
            )
            found.at_most("builds for each layer", 1, builds / distinct, "", 1)
            commits = logged(daemon, "Commit")
            found.times.rows["Commit, pulls at once"] = commits
            found.p99("Commit, pulls at once", COMMIT_MAX)
            committed = sum(row.kind == "committed" for row in daemon.snapshots())
            found.none("layers that are missing", [str(distinct - committed)] if committed != distinct else [])
    finally:
        registry.stop()


def _push(registry: Registry, directory: Path, number: int, tars: Sequence[bytes]) -> str:
    archive = directory / f"image-{number}.tar"
    diff_ids = ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in tars]
    oci_archive(archive, f"localhost/bench-{number}:latest", list(tars), _PLAIN, diff_ids)
    reference = registry.push(archive, f"bench-{number}:latest")
    archive.unlink()
    return reference


def logged(daemon: Daemon, method: str) -> list[float]:
    """Seconds of each call that ended well, from the log."""
    found = []
    for line in daemon.log.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == "rpc" and entry["method"] == method and entry["code"] == "OK":
                found.append(float(entry["seconds"]))
    return found


def walking_differ(directory: Path, found: Found, size: int) -> None:
    """containerd 1.6 has no differ of ours: it unpacks itself, and its Commit finds or joins the build."""
    release = releases().get("1.6")
    if release is None:
        found.facts.append("no containerd 1.6: its Commit is not measured")
        return
    tar = tar_of("big", os.urandom(size))
    archive = directory / "image.tar"
    oci_archive(archive, "localhost/bench-big:latest", [tar], _PLAIN, ["sha256:" + hashlib.sha256(tar).hexdigest()])
    root = directory / "containerd"
    daemon = Daemon(directory / "daemon", root / "root", _CONFIG, containerd_socket=str(root / "c.sock"))
    containerd = Containerd(release, root, daemon.address)
    daemon.start()
    try:
        containerd.start()
        started = time.monotonic()
        containerd.import_image(archive)
        seconds = time.monotonic() - started
        longest = max(logged(daemon, "Commit"))
        found.facts.append(
            f"containerd 1.6, layer of {size / 1e6:.0f} MB: import and unpack {seconds:.2f} s,"
            f" Commit {1000 * longest:.0f} ms"
        )
    finally:
        containerd.clean_up()
        daemon.clean_up()


# One very large layer


def large_blob(kept: Path, size: int) -> tuple[Path, str, str]:
    """(file, digest, diff ID) of a layer of one file of zeros, and of a twentieth of it that cannot be compressed."""
    if not (kept / "done").exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        progress(f"makes a layer of {size / 1e9:.0f} GB")
        run(sys.executable, "-m", "bench.load_large", kept, str(size), cwd=CHECKOUT, timeout=1200)
    digest, diff_id = (kept / "done").read_text().split()
    return kept / "blob", digest, diff_id


def large_layer(directory: Path, found: Found, *, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < 1.2 * size + (4 << 30):
        found.facts.append(f"no room for a layer of {size / 1e9:.0f} GB: {free / 1e9:.0f} GB are free")
        return
    blob, digest, diff_id = large_blob(directory.parent.parent / f"large-{size}", size)
    daemon = new_daemon(directory, f"max_expansion_ratio = 1000000\n{_KATA}")
    place = directory / "containerd/io.containerd.content.v1.content/blobs/sha256" / digest.removeprefix("sha256:")
    os.link(blob, place)
    blob_size = blob.stat().st_size
    _start(daemon)
    assert daemon.process is not None
    progress(f"a layer of {size / 1e9:.0f} GB, while others go on")
    try:
        with connected(daemon) as service, Peaks(daemon.process.pid) as peaks, _others(daemon, found.times):
            key = f"load/1/extract-1 {diff_id}"
            prepared = service.prepare(HOST, key)
            descriptor = types_pb2.Descriptor(media_type=_ZSTD, digest=digest, size=blob_size)
            started = time.monotonic()
            applied = service.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=prepared.mounts), timeout=1800)
            seconds = time.monotonic() - started
            assert applied.applied.digest == diff_id
            with found.times.of("Commit of the large layer"):
                service.snapshots.Commit(
                    snapshots_pb2.CommitSnapshotRequest(snapshotter=HOST, key=key, name=f"load/2/{diff_id}")
                )
        found.facts.append(
            f"layer of {size / 1e9:.1f} GB: built in {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s; serving process"
            f" {peaks.serving / 1e6:.0f} MB, largest worker {peaks.worker / 1e6:.0f} MB at their peaks"
        )
        found.p99("Stat, during the large build", STAT_MAX)
        found.p99("Commit of the large layer", COMMIT_MAX)
        found.at_most("serving process, during the large build", RESIDENT_MAX, peaks.serving, "MB", 1e-6)
        found.at_most("largest worker", WORKER_MAX, peaks.worker, "MB", 1e-6)
    finally:
        daemon.clean_up()


@contextmanager
def _others(daemon: Daemon, times: Times) -> Iterator[None]:
    """Clients that look, and others that write, until the block ends."""
    end = threading.Event()

    def look() -> None:
        with connected(daemon) as service:
            service.prepare(HOST, "looked-at")
            while not end.wait(0.01):
                with times.of("Stat, during the large build"):
                    service.stat(HOST, "looked-at")

    def write() -> None:
        with connected(daemon) as service:
            number = 0
            while not end.wait(0.05):
                number += 1
                with times.of("Prepare, during the large build"):
                    service.prepare(HOST, f"written/{number}")
                with times.of("Remove, during the large build"):
                    service.remove(HOST, f"written/{number}")

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(look), pool.submit(write)]
        try:
            yield
        finally:
            end.set()
        for each in both:
            each.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench load", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything: a minute or two")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="leave the other parts out")
    parser.add_argument("--seconds", type=float, default=0, help="that many clients go on for (default 120)")
    parser.add_argument("--size", type=float, default=0, help="GB of the large layer (default 20)")
    parser.add_argument("--directory", type=Path, default=CACHE / "bench", help="where there is room for it all")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("bench: must run as root")
    quick = options.quick
    found = Found()
    kept: Path = options.directory
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.realpath(kept), prefix="run-") as scratch:
        directory = Path(scratch)

        def place(name: str) -> Path:
            (directory / name).mkdir()
            return directory / name

        stored = None
        if {"store", "clients"} & {*options.only}:
            sizes = {"layers": 400, "snapshots": 2000, "calls": 200} if quick else {
                "layers": 2000, "snapshots": 10_000, "calls": 1000}  # fmt: skip
            stored = full_store(place("store"), found, **sizes)
        if stored and "clients" in options.only:
            seconds = options.seconds or (15 if quick else 120)
            many_clients(directory / "store", stored, found, clients=40 if quick else 200, seconds=seconds)
        shutil.rmtree(directory / "store", ignore_errors=True)
        if "pulls" in options.only:
            many_pulls(place("pulls"), found, images=10 if quick else 60)
            walking_differ(place("walking"), found, 64 << 20 if quick else 512 << 20)
        if "large" in options.only:
            large_layer(place("large"), found, size=int((options.size or (1 if quick else 20)) * 1e9))
        assert not mounted_below(directory)
    console.print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
                  f"{', quick' if quick else ''}")  # fmt: skip
    for fact in found.facts:
        console.print(fact)
    console.print()
    console.print(found.times.table())
    console.print()
    for what, target, figure, reached in found.verdicts:
        console.print(f"{'reached' if reached else 'MISSED ':8} {what}: {figure} (target {target})")
    if options.json:
        options.json.write_text(json.dumps({"times": found.times.rows, "facts": found.facts,
                                            "verdicts": found.verdicts}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
