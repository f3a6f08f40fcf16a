# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics; label values come from closed sets, never from a caller."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from snapshotter.errors import ConfigError

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

RPC_SECONDS: Final = Histogram("tardev_rpc_seconds", "Time of one call", ["method", "code"], buckets=_SECONDS)
RPC_RUNNING: Final = Gauge("tardev_rpc_running", "Calls under way", ["method"])
RPC_LEFT: Final = Gauge("tardev_rpc_left", "Steps that go on though their call was answered or its caller has gone")
BUILDS: Final = Counter("tardev_builds", "Builds that ended", ["format", "result"])
BUILD_SECONDS: Final = Histogram("tardev_build_seconds", "Time of one successful build", ["format"], buckets=_SECONDS)
BUILD_BYTES: Final = Counter("tardev_build_tar_bytes", "Uncompressed bytes of built layers", ["format"])
BUILDS_RUNNING: Final = Gauge("tardev_builds_running", "Builds under way")
BUILDS_JOINED: Final = Counter("tardev_builds_joined", "Requests that joined a build under way")
BUILDS_CACHED: Final = Counter("tardev_builds_cached", "Requests that a stored layer answered")
DOWNLOADS_SKIPPED: Final = Counter("tardev_downloads_skipped", "Layers that a stored one spared containerd to fetch")
LAYERS_REPAIRED: Final = Counter("tardev_layers_repaired", "Broken layers that were made again in their place")
LAYERS_DELETED: Final = Counter("tardev_layers_deleted", "Layer files that nothing referred to any more")


def serve(address: str) -> None:
    """Raises ConfigError."""
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host.strip("[]"))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"metrics.address {address!r}: {error}") from None
