# SPDX-License-Identifier: Apache-2.0
"""`tardev-snapshotter`: the parts wired together, started and stopped."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from blockdev.errors import BlockdevError
from snapshotter import VERSION, config, inventory, listener, log, metrics, reconcile
from snapshotter.activation import Activation
from snapshotter.api.proto import diff_pb2_grpc, maintenance_pb2_grpc, snapshots_pb2_grpc
from snapshotter.builder import Builder
from snapshotter.collector import Collector
from snapshotter.config import Config
from snapshotter.content import Content
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.directories import Directories
from snapshotter.errors import ConfigError, SnapshotterError, one_line
from snapshotter.fsck import Fsck
from snapshotter.interceptor import Interceptor
from snapshotter.inventory import Parts
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.metastore import FILE_NAME, Layer, Metastore
from snapshotter.repair import Repair
from snapshotter.reserve import Reserve
from snapshotter.service import DiffService, MaintenanceService, SnapshotsService
from snapshotter.snapshots import Named, Snapshots
from snapshotter.trace import trace
from snapshotter.trash import Trash
from verity.hasher import IMPLEMENTATION

_SERVICES: Final = ("", "containerd.services.snapshots.v1.Snapshots", "containerd.services.diff.v1.Diff")
_GRACE_SECONDS: Final = 5.0
_TIDY_SECONDS: Final = 3600.0


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


async def _tidy_now_and_then(node: Node) -> None:
    while True:
        await asyncio.sleep(_TIDY_SECONDS)
        try:
            await node.collector.collect()
            await node.fsck.tidy()
            await asyncio.to_thread(node.reserve.keep)
        except Exception as error:
            log.get_logger().error("collection failed", error=str(error))


async def _scrub(node: Node, interval_seconds: float, bytes_per_second: int) -> None:
    while True:
        try:
            await node.fsck.scrub(interval_seconds, bytes_per_second)
        except Exception as error:
            log.get_logger().error("scrub failed", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_TIDY_SECONDS)


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
                f"root {root} holds {' and '.join(there)} but no {FILE_NAME}: not ours, or its metadata was lost. Put"
                f" back a copy of {root / FILE_NAME}, or start with nothing: mv {shlex.quote(str(root))}"
                f" {shlex.quote(f'{root}.lost')}; then remove the images from containerd that were pulled through it"
                " (ctr -n NAMESPACE images rm --sync IMAGE), and pull them again"
            )


@dataclass(frozen=True, slots=True)
class Node:
    """Everything behind the services, put together; recovered from whatever was before."""

    root: Path
    parts: Parts
    snapshots: Snapshots
    collector: Collector
    fsck: Fsck
    reserve: Reserve


@asynccontextmanager
async def opened(
    settings: Config, *, bind: Callable[[], None] = lambda: None, recover: bool = True
) -> AsyncIterator[Node]:
    """The root directory locked, and all that works on it. `bind`: called as soon as it is certain that nobody else
    does. Without `recover` what was left behind stays. Raises ConfigError, OSError, SnapshotterError, KernelError."""
    root = real_path(settings.root)
    async with AsyncExitStack() as at_end:
        at_end.callback(os.close, open_root(root))
        check_root(root)
        trace("boot.locked")
        bind()
        trace("boot.bound")
        contracts = {name: CONTRACTS[chosen.contract] for name, chosen in settings.snapshotters.items()}
        unmounted = frozenset(name for name, contract in contracts.items() if contract.PLACE is not Place.MOUNTED)
        reserve = Reserve(root / "reserve")
        if not reserve.keep():
            log.get_logger().warning("no room for the reserve, from which a full disk is tidied up")
        metastore = Metastore(root / FILE_NAME, unmounted=unmounted, reserve=reserve)
        at_end.push_async_callback(metastore.close)
        trace("boot.opened")
        trash = Trash(
            root,
            bytes_per_second=config.parse_size(settings.cache.delete_rate),
            in_a_hurry=lambda: store.is_short_of_space(),
        )
        at_end.callback(trash.close)
        store = LayerStore(root, trash, reserve_bytes=config.parse_size(settings.builds.free_space_reserve))
        directories = Directories(root, trash)
        activation = Activation(
            root,
            store,
            always_loop=settings.host.mount_through == "loop",
            verity=settings.host.verity == "require",
        )
        links = Links(settings.links(), metastore, store)
        for part in (store, directories, activation, links):
            part.prepare()
            trace("boot.prepared")
        parts = Parts(metastore, store, directories, activation, links)
        if recover:
            await reconcile.apply(reconcile.plan(await inventory.take(parts)), parts)

        trace("boot.reconciled")

        async def renew(layer: Layer) -> None:
            await links.renew(layer)
            await activation.renew(layer)

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
            renew=renew,
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
        collector = Collector(
            metastore,
            store,
            builder,
            cache_bytes=config.parse_size(settings.cache.max_size),
            unused_seconds=settings.cache.max_age,
        )
        repair = Repair(metastore, store, content, builder)
        snapshots = Snapshots(
            names, metastore, store, directories, builder, content, activation, links, collector, repair
        )
        at_end.push_async_callback(snapshots.close)
        emptying = asyncio.create_task(trash.empty_as_it_comes())
        at_end.callback(emptying.cancel)
        yield Node(root, parts, snapshots, collector, Fsck(parts, builder, repair), reserve)


async def run(settings: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    logger = log.get_logger()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as at_end:
        sockets: list[listener.Bound] = []

        def bind() -> None:
            # From here on containerd's calls wait in the socket's queue instead of failing.
            sockets.append(listener.bind(Path(settings.address)))
            at_end.callback(sockets[0].release)

        node = await at_end.enter_async_context(opened(settings, bind=bind))
        [bound] = sockets
        snapshots = node.snapshots
        for name, chosen in settings.snapshotters.items():
            if chosen.skip_download:
                logger.warning(
                    "skip_download: blobs of layers that are stored are not fetched, so no other snapshotter can unpack"
                    " such an image until `ctr content fetch` has brought them",
                    snapshotter=name,
                )
        await snapshots.resume()
        trace("boot.resumed")

        inner = node.root / "grpc.sock"
        calls = Interceptor(settings.builds.timeout)
        server = grpc.aio.server(interceptors=[calls])
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(snapshots), server)  # type: ignore[no-untyped-call]
        diff_pb2_grpc.add_DiffServicer_to_server(DiffService(snapshots), server)  # type: ignore[no-untyped-call]
        maintenance_pb2_grpc.add_MaintenanceServicer_to_server(MaintenanceService(node.fsck, node.collector), server)  # type: ignore[no-untyped-call]
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
        tasks = [asyncio.create_task(public.serve()), asyncio.create_task(_tidy_now_and_then(node))]
        if settings.scrub.interval:
            rate = config.parse_size(settings.scrub.rate)
            tasks.append(asyncio.create_task(_scrub(node, settings.scrub.interval, rate)))
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
