# SPDX-License-Identifier: Apache-2.0
"""`tardev-snapshotter`: the parts wired together, started and stopped."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from blockdev.errors import BlockdevError
from snapshotter import VERSION, config, inventory, listener, log, metrics, reconcile
from snapshotter.activation import Activation
from snapshotter.api.proto import diff_pb2_grpc, snapshots_pb2_grpc
from snapshotter.builder import Builder
from snapshotter.config import Config
from snapshotter.content import Content
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.directories import Directories
from snapshotter.errors import ConfigError, SnapshotterError, one_line
from snapshotter.interceptor import Interceptor
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.metastore import FILE_NAME, Metastore
from snapshotter.service import DiffService, SnapshotsService
from snapshotter.snapshots import Named, Snapshots
from snapshotter.trace import trace
from verity.hasher import IMPLEMENTATION

_SERVICES: Final = ("", "containerd.services.snapshots.v1.Snapshots", "containerd.services.diff.v1.Diff")
_GRACE_SECONDS: Final = 5.0
_SWEEP_SECONDS: Final = 3600.0


def open_root(root: Path) -> int:
    """Make the root directory ours alone; the descriptor holds its lock. Raises ConfigError."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
        fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 20).decode("ascii", "replace").strip()
            os.close(fd)
            raise ConfigError(f"root {root} is locked by another daemon, process {holder or 'unknown'}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise ConfigError(f"root {root}: {error}") from None
    return fd


def notify(state: str) -> None:
    """Tell systemd, where it listens (man 3 sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender, suppress(OSError):
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.sendall(state.encode())


async def _sweep_now_and_then(snapshots: Snapshots) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        try:
            await snapshots.sweep()
        except Exception as error:
            log.get_logger().error("sweep failed", error=str(error))


def real_path(path: str) -> Path:
    """Without symlinks, as the kernel's mount table has it."""
    return Path(os.path.realpath(path))


def check_root(root: Path) -> None:
    """Raises ConfigError for a directory that is somebody else's, or whose metadata was lost: all in it would
    count as left over."""
    if not (root / FILE_NAME).exists():
        there = [name for name in ("layers", "snapshots") if (root / name).exists()]
        if there:
            raise ConfigError(
                f"root {root} holds {' and '.join(there)} but no {FILE_NAME}: not ours, or damaged; move it away"
            )


async def run(settings: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    logger = log.get_logger()
    root = real_path(settings.root)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as at_end:
        at_end.callback(os.close, open_root(root))
        check_root(root)
        trace("boot.locked")
        # From here on containerd's calls wait in the socket's queue instead of failing.
        bound = listener.bind(Path(settings.address))
        at_end.callback(bound.release)
        trace("boot.bound")
        contracts = {name: CONTRACTS[chosen.contract] for name, chosen in settings.snapshotters.items()}
        unmounted = frozenset(name for name, contract in contracts.items() if contract.PLACE is not Place.MOUNTED)
        metastore = Metastore(root / FILE_NAME, unmounted=unmounted)
        at_end.push_async_callback(metastore.close)
        trace("boot.opened")
        store = LayerStore(root, reserve_bytes=config.parse_size(settings.builds.free_space_reserve))
        directories = Directories(root)
        at_end.callback(directories.close)
        activation = Activation(root, store, always_loop=settings.host.mount_through == "loop")
        links = Links(settings.links(), metastore, store)
        for part in (store, directories, activation, links):
            part.prepare()
            trace("boot.prepared")
        actions = reconcile.plan(await inventory.take(metastore, store, directories, activation, links))
        await reconcile.apply(actions, metastore, store, directories, activation, links)
        trace("boot.reconciled")

        content = Content(Path(settings.containerd.content), settings.containerd.address)
        at_end.push_async_callback(content.close)
        builder = Builder(
            metastore,
            store,
            content,
            workers=settings.builds.workers,
            limits=settings.builds.limits(),
            timeout_seconds=settings.builds.timeout,
            per_namespace=settings.builds.sharing == "namespace",
            renew=links.renew,
        )
        at_end.push_async_callback(builder.close)
        names = {
            name: Named(
                chosen.contract,
                chosen.format,
                chosen.max_layers,
                remap_ids=chosen.remap_ids,
                skip_download=chosen.skip_download,
                encoding=chosen.encoding,
                writable_bytes=config.parse_size(chosen.writable_size),
            )
            for name, chosen in settings.snapshotters.items()
        }
        for name, chosen in names.items():
            if chosen.skip_download:
                logger.warning(
                    "skip_download: blobs of layers that are stored are not fetched, so no other snapshotter can unpack"
                    " such an image until `ctr content fetch` has brought them",
                    snapshotter=name,
                )
        snapshots = Snapshots(
            names, metastore, store, directories, builder, content, activation, links,
            cache_bytes=config.parse_size(settings.cache.max_size),
        )  # fmt: skip
        at_end.push_async_callback(snapshots.close)
        await snapshots.resume()
        trace("boot.resumed")

        inner = root / "grpc.sock"
        calls = Interceptor(settings.builds.timeout)
        server = grpc.aio.server(interceptors=[calls])
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(snapshots), server)  # type: ignore[no-untyped-call]
        diff_pb2_grpc.add_DiffServicer_to_server(DiffService(snapshots), server)  # type: ignore[no-untyped-call]
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        with suppress(FileNotFoundError):
            inner.unlink()
        server.add_insecure_port(f"unix:{inner}")
        await server.start()
        public = listener.Listener(bound.socket, inner)
        at_end.push_async_callback(public.close)
        at_end.push_async_callback(calls.drain)
        at_end.push_async_callback(server.stop, _GRACE_SECONDS)
        for service in _SERVICES:
            await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
        tasks = [asyncio.create_task(public.serve()), asyncio.create_task(_sweep_now_and_then(snapshots))]
        for task in tasks:
            at_end.callback(task.cancel)
        if settings.metrics.address:
            metrics.serve(settings.metrics.address)
        logger.info("serving", address=settings.address, version=VERSION, hashing=IMPLEMENTATION, pid=os.getpid())
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        logger.info("stopping")
        await healthy.enter_graceful_shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tardev-snapshotter", description="containerd proxy snapshotter daemon")
    parser.add_argument("--config", type=Path, help=f"TOML file (default: {config.DEFAULT_PATH}, where it exists)")
    parser.add_argument("--version", action="version", version=VERSION)
    options = parser.parse_args(arguments)
    try:
        settings = config.of_the_node(options.config)
        log.set_up(settings.log.level)
        if os.geteuid() != 0:
            raise ConfigError("must run as root: it mounts layers and serves containerd")
        asyncio.run(run(settings))
    except (ConfigError, SnapshotterError, BlockdevError, OSError) as error:
        sys.stderr.write(f"tardev-snapshotter: {one_line(str(error))}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
