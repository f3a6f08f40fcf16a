# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics; label values come from closed sets, never from a caller."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge for each counter, which nobody asks for

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BYTES: Final = tuple(float(1 << shift) for shift in range(24, 30))

RPC_SECONDS: Final = Histogram("tardev_rpc_seconds", "Time of one call", ["method", "code"], buckets=_SECONDS)
RPC_RUNNING: Final = Gauge("tardev_rpc_running", "Calls under way", ["method"])
RPC_LEFT: Final = Gauge("tardev_rpc_left", "Steps that go on though their call was answered or its caller has gone")
BUILDS: Final = Counter("tardev_builds", "Builds that ended", ["format", "result"])
BUILD_SECONDS: Final = Histogram("tardev_build_seconds", "Time of one build", ["format", "result"], buckets=_SECONDS)
BUILD_BLOB_BYTES: Final = Counter("tardev_build_blob_bytes", "Bytes of blobs that layers were built from", ["format"])
BUILD_BYTES: Final = Counter("tardev_build_tar_bytes", "Uncompressed bytes of built layers", ["format"])
BUILD_FILE_BYTES: Final = Counter("tardev_build_file_bytes", "Bytes of layer files that were built", ["format"])
WORKER_CPU_SECONDS: Final = Counter("tardev_worker_cpu_seconds", "Processor time of build processes", ["process"])
WORKER_PEAK_BYTES: Final = Histogram(
    "tardev_worker_peak_bytes", "Most memory that a build process had resident", ["process"], buckets=_BYTES
)
BUILDS_RUNNING: Final = Gauge("tardev_builds_running", "Builds under way")
BUILDS_JOINED: Final = Counter("tardev_builds_joined", "Requests that joined a build under way")
BUILDS_CACHED: Final = Counter("tardev_builds_cached", "Requests that a stored layer answered")
DOWNLOADS_SKIPPED: Final = Counter("tardev_downloads_skipped", "Layers that a stored one spared containerd to fetch")
LAYERS_REPAIRED: Final = Counter("tardev_layers_repaired", "Broken layers that were made again in their place")
LAYERS_DELETED: Final = Counter("tardev_layers_deleted", "Layer files that nothing referred to any more")
LAYERS_DELETED_BYTES: Final = Counter("tardev_layers_deleted_bytes", "Bytes of them")
RECONCILED: Final = Counter(
    "tardev_reconcile_actions", "What a start, fsck or the hourly pass found wrong and mended", ["action", "result"]
)
BUILD_INFO: Final = Gauge("tardev_build_info", "1; what serves here", ["version", "hashing", "python"])
START_SECONDS: Final = Gauge("tardev_start_seconds", "From the socket to the end of the recovery, at the last start")
SCRAPES_FAILED: Final = Counter("tardev_scrapes_failed", "Scrapes without the gauges of what is there")
