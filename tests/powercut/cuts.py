# SPDX-License-Identifier: Apache-2.0
"""A disk is cut at each barrier of a recorded journey, and a daemon started on what is left.

    python -m tests.powercut.cuts JOURNEY ext4|xfs [--every N] [--save FILE]

For each point two disks: all that was written before it, and that without a random half of the writes that no barrier
covered. The recording needs a guest, for device-mapper; the disks are mounted, and recovered, by this machine's kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zstandard

from snapshotter.metastore import LayerState
from tests.harness import SNAPSHOTTER, Containerd, Daemon, ProcessFailed, check_tree, releases, run, wait_for
from tests.node_guest import FIRST_DISK, NodeGuest
from tests.powercut.journey import IMAGE
from tests.powercut.write_log import Disk, Entry, Point, log_size, some_of

FILE_SYSTEMS: Final = {
    # Nothing is left for the kernel to initialise behind the journey's back; long attributes are for overlayfs.
    "ext4": (
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        "ea_inode",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
        "-J",
        "size=16",
    ),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}  # fmt: skip
_DISK_BYTES: Final = 320 << 20
_LOG_BYTES: Final = 4 << 30
_BLOCK_BYTES: Final = 4096
_AT: Final = struct.Struct("<Q")  # where a block was, in bytes
_END: Final = (1 << 64) - 1
_LOG_DISK: Final = FIRST_DISK[:-1] + chr(ord(FIRST_DISK[-1]) + 1)


@dataclass
class Figures:
    journey: str
    file_system: str
    points: int = 0
    disks: int = 0
    retried: int = 0
    acknowledged: int = 0  # commits, summed over the disks
    lost: list[str] = field(default_factory=list)  # of them
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # starts, retries


@dataclass(frozen=True)
class Recording:
    base: Path
    log: Path
    images: Path | None  # with these a retry is made at some points


def record(
    node: Callable[[list[Path]], NodeGuest], directory: Path, images: Path, journey: str, kind: str
) -> Recording:
    """The journey in a guest, on a disk of its own."""
    base, disk, log = (directory / name for name in ("base", "disk", "log"))
    for path, size in ((base, _DISK_BYTES), (log, _LOG_BYTES)):
        path.touch()
        os.truncate(path, size)
    run(*FILE_SYSTEMS[kind], base, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
    _copy(base, disk)
    guest = node([disk, log])
    try:
        guest.python("tests.powercut.journey", journey, FIRST_DISK, _LOG_DISK)
    finally:
        guest.stop()
    return Recording(base, log, images)


def save(recording: Recording, target: Path) -> None:
    """What `load` takes, in few bytes: blocks of the base that are not zero, and the log as far as it goes."""
    log_bytes = log_size(recording.log)
    with target.open("wb") as out, zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(19, window_log=27)
    ).stream_writer(out) as packed:  # fmt: skip
        with recording.base.open("rb") as base:
            for number in itertools.count():
                block = base.read(_BLOCK_BYTES)
                if not block:
                    break
                if any(block):
                    packed.write(_AT.pack(number * _BLOCK_BYTES) + block)
        packed.write(_AT.pack(_END))
        with recording.log.open("rb") as log:
            packed.write(log.read(log_bytes))


def load(source: Path, directory: Path) -> Recording:
    base, log = directory / "base", directory / "log"
    with source.open("rb") as file:
        raw = io.BytesIO(zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file).read())
    with base.open("wb") as out:
        out.truncate(_DISK_BYTES)
        while (at := _AT.unpack(raw.read(_AT.size))[0]) != _END:
            out.seek(at)
            out.write(raw.read(_BLOCK_BYTES))
    log.write_bytes(raw.read())
    return Recording(base, log, None)


def check(
    recording: Recording,
    journey: str,
    kind: str,
    scratch: Path,
    every: int = 1,
    drops: Callable[[Entry], bool] = lambda entry: False,
) -> Figures:
    """At every n-th barrier. `drops`: as `Disk` takes it."""
    figures = Figures(journey, kind)
    image, cut = scratch / "image", scratch / "cut"
    _copy(recording.base, image)
    disk = Disk(recording.log, image, drops)
    reference = _final_trees(recording, scratch) if journey == "overlayfs" else {}
    try:
        for point, waiting in disk.points():
            if point.number % every:
                continue
            figures.points += 1
            for entries in (waiting, some_of(waiting, point.number)):
                _copy(image, cut)
                fd = os.open(cut, os.O_RDWR | os.O_CLOEXEC)
                try:
                    for entry in entries:
                        disk.apply(entry, fd)
                finally:
                    os.close(fd)
                figures.disks += 1
                what = f"point {point.number}, {'all' if entries is waiting else 'some'} writes"
                with mounted(cut, scratch / "mnt", kind) as root:
                    if journey == "overlayfs":
                        _judge_containerd(figures, root, scratch, point, what, reference)
                    else:
                        retry = figures.disks % 20 == 0
                        _judge(figures, root, scratch, point, what, recording.images if retry else None)
    finally:
        disk.close()
    return figures


def _copy(source: Path, target: Path) -> None:
    run("cp", "--sparse=always", source, target)


@contextlib.contextmanager
def mounted(image: Path, target: Path, kind: str) -> Iterator[Path]:
    """With the recovery that a boot would do. The cuts of one xfs share their UUID with it."""
    target.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", "loop" + (",nouuid" if kind == "xfs" else ""), image, target)
    try:
        yield target
    finally:
        run("umount", target)


def acknowledged(point: Point) -> set[str]:
    """Chain IDs that must be there: committed, and nobody has begun to remove them. containerd's collector may have
    begun what it is only later seen to have done."""
    there: set[str] = set()
    going: set[str] = set()
    for mark in point.marks:
        word, _, name = mark.partition("/")
        if word == "committed":
            there.add(name)
        elif word == "gone":
            there.discard(name)
        elif word == "removing":
            there.clear()
    for mark in reversed(point.later):
        word, _, name = mark.partition("/")
        if word == "gone":
            going.add(name)
        elif word == "committed":
            going.discard(name)
    return there - going


def _servers(root: Path, directory: Path) -> tuple[Daemon, Containerd]:
    for name in ("daemon", "containerd"):
        (root / name).mkdir(exist_ok=True)
        (directory / name).mkdir(parents=True)
        (directory / name / "root").symlink_to(root / name)
    containerd_root = directory / "containerd" / "root"
    cache = '[cache]\nmax_size = "0"\n'
    daemon = Daemon(
        directory / "daemon", containerd_root, cache, containerd_socket=str(directory / "containerd/c.sock")
    )
    return daemon, Containerd(releases()["later"], directory / "containerd", daemon.address)


def _judge(figures: Figures, root: Path, scratch: Path, point: Point, what: str, images: Path | None) -> None:
    """Of our daemon: it starts; what was acknowledged is there and verifies; nothing else is left."""
    expected = acknowledged(point)
    figures.acknowledged += len(expected)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        daemon, containerd = _servers(root, Path(directory))
        try:
            try:
                daemon.start()
            except (ProcessFailed, TimeoutError) as error:
                figures.failed.append(f"{what}: {error}")
                figures.lost += [f"{what}: {name}" for name in expected]
                return
            layers = {layer.id: layer for layer in daemon.layers()}
            good: set[int] = set()
            for layer in layers.values():
                try:
                    if layer.state is LayerState.READY:
                        daemon.verify_layer(dataclasses.asdict(layer))
                        good.add(layer.id)
                except Exception as error:
                    figures.failed.append(f"{what}: layer {layer.diff_id}: {error}")
            found = set()
            for snapshot in daemon.snapshots():
                if snapshot.kind == "committed":
                    if snapshot.layer_id in good:
                        found.add(snapshot.name.rpartition("/")[2])
                    else:
                        figures.failed.append(f"{what}: snapshot {snapshot.name} has no good layer")
            figures.lost += [f"{what}: {name}" for name in sorted(expected - found)]
            # A build that an unpacker may still wait for begins again at a start: for a while there is a staged file,
            # then, for a moment, a file in its place without a row.
            with contextlib.suppress(TimeoutError):
                wait_for("no build runs", lambda: not _left(daemon), 30)
            figures.left += [f"{what}: {name}" for name in _left(daemon)]
            if images is not None:
                figures.retried += 1
                containerd.start()
                containerd.import_image(images / "layers.tar")
                chain_id = json.loads((images / "layers.json").read_text())["chain_ids"][-1]
                with containerd.rootfs(chain_id, Path(directory) / "m") as rootfs:
                    if wrong := check_tree(images / "layers.json", rootfs):
                        figures.failed.append(f"{what}: {wrong}")
        except ProcessFailed as error:
            figures.failed.append(f"{what}: retry: {error}")
        finally:
            containerd.clean_up()
            daemon.clean_up()
            for mount in daemon_mounts(root):
                run("umount", "-l", mount)


def daemon_mounts(root: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in reversed(lines) if line.split()[1].startswith(f"{root}/")]


def _left(daemon: Daemon) -> list[str]:
    """Files that no row accounts for."""
    root = daemon.root
    ready = {(layer.format, layer.diff_id.removeprefix("sha256:")) for layer in daemon.layers()}
    left = [f"staging/{path.name}" for path in daemon.staged()]
    for area in ("layers", "tables"):
        for path in (root / area).glob("*/*"):
            if path.is_file() and (path.parent.name, path.name.partition(".")[0]) not in ready:
                left.append(str(path.relative_to(root)))
    wanted = {str(snapshot.id) for snapshot in daemon.snapshots() if snapshot.has_directory}
    left += [f"snapshots/{path.name}" for path in (root / "snapshots").iterdir() if path.name not in wanted]
    for area in ("quarantine", "trash"):
        if (root / area).exists():
            left += [f"{area}/{path.name}" for path in (root / area).iterdir()]
    return left


def _listing(root: Path) -> str:
    """A digest of the names, modes, sizes and contents below."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        digest.update(f"{path.relative_to(root)} {about.st_mode} {about.st_rdev}\n".encode(errors="surrogateescape"))
        if stat.S_ISREG(about.st_mode):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        elif stat.S_ISLNK(about.st_mode):
            digest.update(os.fsencode(os.readlink(path)))
    return digest.hexdigest()


def _trees(containerd: Containerd, directory: Path, chain_ids: set[str]) -> dict[str, str]:
    found = {}
    for number, chain_id in enumerate(sorted(chain_ids)):
        try:
            with containerd.rootfs(chain_id, directory / f"m{number}", snapshotter="overlayfs") as rootfs:
                found[chain_id] = _listing(rootfs)
        except (ProcessFailed, OSError):
            continue
    return found


def _final_trees(recording: Recording, scratch: Path) -> dict[str, str]:
    """Of each chain after the whole journey, and a clean unmount."""
    final = scratch / "final"
    _copy(recording.base, final)
    disk = Disk(recording.log, final)
    marks = tuple(entry.mark for entry in disk.entries if entry.mark)
    for entry in disk.entries:
        if not entry.mark:
            disk.apply(entry)
    disk.close()
    kind = run("blkid", "-o", "value", "-s", "TYPE", final).strip()
    with mounted(final, scratch / "mnt", kind) as root, tempfile.TemporaryDirectory(dir=scratch) as directory:
        _, containerd = _servers(root, Path(directory))
        containerd.start()
        try:
            return _trees(containerd, Path(directory), acknowledged(Point(0, marks)))
        finally:
            containerd.clean_up()


def _judge_containerd(
    figures: Figures, root: Path, scratch: Path, point: Point, what: str, reference: dict[str, str]
) -> None:
    """Of containerd's own: what it has acknowledged is there, with the content that it had in the end."""
    expected = acknowledged(point)
    figures.acknowledged += len(expected)
    if not expected:
        return
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        _, containerd = _servers(root, Path(directory))
        try:
            containerd.start()
            found = _trees(containerd, Path(directory), expected)
            figures.lost += [
                f"{what}: {name}: {'other content' if name in found else 'gone'}"
                for name in sorted(expected)
                if found.get(name) != reference.get(name)
            ]
        except (ProcessFailed, TimeoutError) as error:
            figures.failed.append(f"{what}: {error}")
            figures.lost += [f"{what}: {name}: containerd did not start" for name in expected]
        finally:
            containerd.clean_up()


def summary(figures: Figures) -> str:
    points_lost = len({line.partition(",")[0] for line in figures.lost})
    return (
        f"{figures.journey} on {figures.file_system}: {figures.points} points, {figures.disks} disks,"
        f" {figures.acknowledged} acknowledged commits looked for, {len(figures.lost)} lost (at {points_lost} points),"
        f" {len(figures.left)} left over, {len(figures.failed)} failures, {figures.retried} retries"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journey", choices=("direct", SNAPSHOTTER, "overlayfs"))
    parser.add_argument("kind", choices=tuple(FILE_SYSTEMS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--save", type=Path, help="the recording, for tests")
    options = parser.parse_args()
    from tests.harness import make_images

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        images = make_images(directory / "images", "layers")
        more = {f"images/{path.name}": path for path in images.iterdir()}
        started = time.monotonic()
        recording = record(
            lambda disks: NodeGuest(directory / "guest", disks, more), directory, images, options.journey, options.kind
        )
        print(f"recorded in {time.monotonic() - started:.0f} s, {IMAGE}")
        if options.save:
            save(recording, options.save)
        started = time.monotonic()
        figures = check(recording, options.journey, options.kind, directory, options.every)
        print(f"{summary(figures)}; {time.monotonic() - started:.0f} s")
        for name in ("lost", "left", "failed"):
            for line in getattr(figures, name)[:20]:
                print(f"  {name}: {line}")


if __name__ == "__main__":
    main()
