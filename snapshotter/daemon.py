# SPDX-License-Identifier: Apache-2.0
"""`tardev-snapshotter`: a node served, from start to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from blockdev.errors import BlockdevError
from snapshotter import VERSION, config, listener, log, metrics
from snapshotter.api.proto import diff_pb2_grpc, maintenance_pb2_grpc, snapshots_pb2_grpc
from snapshotter.config import Config
from snapshotter.errors import ConfigError, SnapshotterError, one_line
from snapshotter.figures import Figures
from snapshotter.interceptor import Interceptor
from snapshotter.node import Node, opened, real_path
from snapshotter.scrape import OfNow
from snapshotter.service import DiffService, MaintenanceService, SnapshotsService, Waiting
from snapshotter.web import Page, Web
from verity.hasher import IMPLEMENTATION

_SERVICES: Final = ("", "containerd.services.snapshots.v1.Snapshots", "containerd.services.diff.v1.Diff")
_GRACE_SECONDS: Final = 5.0
_TIDY_SECONDS: Final = 3600.0
_FIGURES_SECONDS: Final = 5.0


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


async def run(settings: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    logger = log.get_logger()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _other_level, settings.log.level)
    waiting = Waiting(real_path(settings.root))
    serving = AsyncExitStack()
    healthy = health.aio.HealthServicer()

    async def bind() -> None:
        # From here on calls wait for the recovery instead of failing; those that are none of ours do not even wait.
        bound = listener.bind(Path(settings.address))
        serving.callback(bound.release)
        await _serve(serving, bound, waiting, healthy, settings.builds.timeout)
        if settings.metrics.address:
            pages = {"/metrics": _metrics_page(waiting, settings)}
            serving.callback(Web(settings.metrics.address, pages).close)

    started = time.monotonic()
    try:
        async with opened(settings, bind=bind) as node, serving:
            for name, chosen in settings.snapshotters.items():
                if chosen.skip_download:
                    logger.warning(
                        "skip_download: blobs of layers that are stored are not fetched, so no other snapshotter can"
                        " unpack such an image until `ctr content fetch` has brought them",
                        snapshotter=name,
                    )
            waiting.over(node)
            metrics.START_SECONDS.set(time.monotonic() - started)
            tasks = [asyncio.create_task(_tidy_now_and_then(node))]
            if settings.scrub.interval:
                rate = config.parse_size(settings.scrub.rate)
                tasks.append(asyncio.create_task(_scrub(node, settings.scrub.interval, rate)))
            for task in tasks:
                serving.callback(task.cancel)
            for service in _SERVICES:
                await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
            logger.info("serving", address=settings.address, version=VERSION, hashing=IMPLEMENTATION, pid=os.getpid())
            notify("READY=1")
            await stop.wait()
            notify("STOPPING=1")
            logger.info("stopping")
            await healthy.enter_graceful_shutdown()
    except Exception as error:
        waiting.failed(error)
        raise
    finally:
        await serving.aclose()


def _other_level(configured: str) -> None:
    """At SIGHUP: debug, and at the next the configured level again."""
    wanted = configured if log.level() == "debug" else "debug"
    log.set_level(wanted)
    log.get_logger().warning("log level", now=wanted)


def _metrics_page(waiting: Waiting, settings: Config) -> Page:
    """For Prometheus: what was counted, and what the node holds now."""
    metrics.BUILD_INFO.labels(VERSION, IMPLEMENTATION, platform.python_version()).set(1)
    loop = asyncio.get_running_loop()

    def figures() -> Figures:
        return asyncio.run_coroutine_threadsafe(waiting.figures(), loop).result(_FIGURES_SECONDS)

    registry = CollectorRegistry()
    registry.register(OfNow(figures, frozenset(settings.snapshotters)))

    def page() -> tuple[str, bytes]:
        return CONTENT_TYPE_LATEST, generate_latest(REGISTRY) + generate_latest(registry)

    return page


async def _serve(
    at_end: AsyncExitStack,
    bound: listener.Bound,
    waiting: Waiting,
    healthy: health.aio.HealthServicer,
    build_seconds: float,
) -> None:
    inner = waiting.root / "grpc.sock"
    calls = Interceptor(build_seconds)
    server = grpc.aio.server(interceptors=[calls])
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(waiting), server)  # type: ignore[no-untyped-call]
    diff_pb2_grpc.add_DiffServicer_to_server(DiffService(waiting), server)  # type: ignore[no-untyped-call]
    maintenance_pb2_grpc.add_MaintenanceServicer_to_server(MaintenanceService(waiting), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for service in _SERVICES:
        await healthy.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
    with suppress(FileNotFoundError):
        inner.unlink()
    server.add_insecure_port(f"unix:{inner}")
    await server.start()
    public = listener.Listener(bound.socket, inner)
    at_end.push_async_callback(public.close)
    at_end.push_async_callback(calls.drain)
    at_end.push_async_callback(server.stop, _GRACE_SECONDS)
    accepting = asyncio.create_task(public.serve())
    at_end.callback(accepting.cancel)


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
