# SPDX-License-Identifier: Apache-2.0
"""What must hold of a daemon's root after anything whatever happened to it: nothing lost, nothing left.

The accountant takes the rows of the metadata and what lies on disk and in the kernel, and names every difference. The
oracle reads every block of every committed layer through its row's root hash.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from blockdev.formats.layer_file import FORMATS
from blockdev.kernel.mounts import mounted_below
from policy.chain import layer_name
from snapshotter import metastore
from snapshotter.contracts.kata_erofs import layer_of_sidecar
from snapshotter.metastore import Kind, Layer, LayerState, Snapshot
from tests.harness import Daemon
from verity.errors import VerityError
from verity.verify import verify_all

# Of a root, but for links directories of other names.
_OWN: Final = {
    "lock", "reserve", "metadata.db", "metadata.db-wal", "metadata.db-shm", "grpc.sock",
    "staging", "layers", "tables", "snapshots", "m", "quarantine", "trash", "links",
}  # fmt: skip
_SETTLE_SECONDS: Final = 20.0


def rows(daemon: Daemon) -> tuple[list[Snapshot], list[Layer]]:
    return metastore.read(daemon.root / metastore.FILE_NAME)


def broken(daemon: Daemon, seconds: float = 0.0) -> list[str]:
    """Committed snapshots whose layers are not whole, block by block. `seconds`: for as long a start may mend them."""
    deadline = time.monotonic() + seconds
    while (found := _broken(daemon)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _broken(daemon: Daemon) -> list[str]:
    snapshots, layers = rows(daemon)
    by_id = {layer.id: layer for layer in layers}
    wrong: list[str] = []
    checked: dict[metastore.LayerID, str] = {}
    for snapshot in snapshots:
        if snapshot.kind is not Kind.COMMITTED:
            continue
        for layer_id in filter(None, (snapshot.layer_id, snapshot.parents_layer_id)):
            if layer_id not in checked:
                checked[layer_id] = unsound(daemon, by_id[layer_id]) if layer_id in by_id else "has no row"
            if checked[layer_id]:
                wrong.append(f"{snapshot.name}: layer {layer_id} {checked[layer_id]}")
    return wrong


def unsound(daemon: Daemon, layer: Layer) -> str:
    """Why a layer's file is not what its row says; "" where it is."""
    if layer.state is not LayerState.READY:
        return f"is {layer.state}"
    path = daemon.root / "layers" / layer.format / layer.diff_id.removeprefix("sha256:")
    geometry = FORMATS[layer.format].geometry(layer.data_size_bytes)
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        return str(error)
    try:
        if os.fstat(fd).st_size != layer.file_size_bytes:
            return f"has {os.fstat(fd).st_size} bytes"
        verify_all(lambda at, size: os.pread(fd, size, at), geometry, bytes.fromhex(layer.root_hash), threads=1)
    except VerityError as error:
        return str(error)
    finally:
        os.close(fd)
    return ""


def leftovers(daemon: Daemon, *, mended: bool = False, seconds: float = _SETTLE_SECONDS) -> list[str]:
    """Differences between the rows and all else, once what goes on behind the replies has ended. `mended`: of a root
    in which layers were broken; files that were put aside are none, nor is a mount of the new file over the old one's.
    """
    deadline = time.monotonic() + seconds
    pause = 0.01
    while found := _leftovers(daemon, mended=mended):
        if time.monotonic() > deadline:
            return found
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return []


def _leftovers(daemon: Daemon, *, mended: bool) -> list[str]:
    snapshots, layers = rows(daemon)
    ready = [layer for layer in layers if layer.state is LayerState.READY]
    root = daemon.root
    return [
        *(f"in the root: {name}" for name in sorted(set(os.listdir(root)) - _OWN)),
        *(f"staged: {name}" for name in os.listdir(root / "staging")),
        *_files(root, ready),
        *_links(root, snapshots),
        *(f"quarantined: {name}" for name in _names(root / "quarantine") if not mended),
        *(f"in the trash: {name}" for name in _names(root / "trash")),
        *_difference(
            "snapshot directory", {str(each.id) for each in snapshots if each.has_directory}, _names(root / "snapshots")
        ),
        *_mounts(root, snapshots, mended=mended),
        *_processes(daemon),
    ]


def _difference(what: str, wanted: Iterable[str], found: Iterable[str]) -> Iterator[str]:
    wanted, found = set(wanted), set(found)
    yield from (f"{what} without a row: {name}" for name in sorted(found - wanted))
    yield from (f"{what} is missing: {name}" for name in sorted(wanted - found))


def _names(directory: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(directory)
    return []


def _files(root: Path, ready: Iterable[Layer]) -> Iterator[str]:
    """Layer files and tables are the rows'; sidecars lie beside layer files."""
    wanted = {f"{layer.format}/{layer.diff_id.removeprefix('sha256:')}" for layer in ready}
    tables = {f"{layer.format}/{layer.diff_id.removeprefix('sha256:')}" for layer in ready if layer.has_table}
    for top, rows_of in (("layers", wanted), ("tables", tables)):
        found = {
            f"{directory.name}/{entry.name}"
            for directory in (root / top).iterdir()
            if directory.is_dir()
            for entry in directory.iterdir()
        }
        yield from _difference(top, rows_of, {name for name in found if layer_of_sidecar(name) == name})
        for name in found:
            if layer_of_sidecar(name) not in {name, *rows_of}:
                yield f"sidecar without a layer: {name}"


def _links(root: Path, snapshots: Iterable[Snapshot]) -> Iterator[str]:
    """Links directories below the root alone are looked at, which is where the tests have them."""
    wanted = {
        f"{snapshot.links}/{layer_name(snapshot.chain_id)}"
        for snapshot in snapshots
        if snapshot.links and snapshot.chain_id
    }
    directories = {root / "layers", *(root / "links").glob("*"), *(Path(name).parent for name in wanted)}
    found = {str(entry) for directory in directories for entry in directory.glob("*") if not entry.is_dir()}
    found |= {str(entry) for directory in directories for entry in directory.glob(".*") if not entry.is_dir()}
    yield from _difference("link", wanted, found)


def _mounts(root: Path, snapshots: Iterable[Snapshot], *, mended: bool) -> Iterator[str]:
    """Of the host contract: what containers stand on is mounted once, and nothing else is. A container whose mounts
    nobody has asked for since they were lost has none, so `missing` is said only of mount points."""
    by_id = {snapshot.id: snapshot for snapshot in snapshots}
    wanted: set[str] = set()
    for snapshot in snapshots:
        if snapshot.kind is Kind.COMMITTED or snapshot.extraction or snapshot.parent_id is None:
            continue
        above: Snapshot | None = by_id.get(snapshot.parent_id)
        if above is not None and above.parents_layer_id is not None:
            wanted.add(format(above.parents_layer_id, "x"))
        while above is not None:
            if above.layer_id is not None:
                wanted.add(format(above.layer_id, "x"))
            above = by_id.get(above.parent_id) if above.parent_id else None
    points = [Path(entry.mount_point) for entry in mounted_below(root)]
    shared = [point.name for point in points if point.parent == root / "m"]
    # The old file, the new one, and that once more where a kill came before its row: all go together.
    most = 3 if mended else 1
    yield from (f"mounted {shared.count(name)} times: m/{name}" for name in set(shared) if shared.count(name) > most)
    yield from (f"mounted for nobody: m/{name}" for name in set(shared) - wanted)
    yield from (f"mount point without a mount: m/{name}" for name in set(_names(root / "m")) - set(shared))
    directories = {str(each.id) for each in snapshots if each.has_directory}
    for point in points:
        if point.parent != root / "m" and point.relative_to(root).parts[1] not in directories:
            yield f"mounted for nobody: {point}"


def _processes(daemon: Daemon) -> Iterator[str]:
    """Workers of a build, and files that the daemon holds without a reason: staged ones, and what has no name."""
    pid = daemon.process.pid if daemon.process is not None else 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"blockdev.workers" in (process / "cmdline").read_bytes():
                yield f"process {process.name}: {(process / 'cmdline').read_bytes()[-200:]!r}"
    for fd in Path(f"/proc/{pid}/fd").glob("*") if pid else ():
        with contextlib.suppress(OSError):
            target = os.readlink(fd)
            below = target.startswith(f"{daemon.root}/")
            kept = target.removeprefix(f"{daemon.root}/").partition("/")[0] in _OWN - {"staging", "layers", "tables"}
            if "report" in target or (below and (not kept or target.endswith(" (deleted)"))):
                yield f"open: {target}"


def open_files(daemon: Daemon) -> int:
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
