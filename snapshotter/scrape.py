# SPDX-License-Identifier: Apache-2.0
"""The gauges of what a node holds, for whoever scrapes; label values come from closed sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from blockdev.formats.layer_file import FORMATS
from snapshotter import metrics
from snapshotter.figures import Figures
from snapshotter.log import get_logger

_OTHER: Final = "other"  # what only a spoilt row, or another configuration, has


class OfNow:
    """What is there when somebody asks: `figures` is called by the thread that answers. Without an answer the gauges
    are missing, and a counter goes up."""

    def __init__(self, figures: Callable[[], Figures], names: Collection[str]) -> None:
        """`names`: of the snapshotters that are configured."""
        self._figures, self._names = figures, names

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is asked for that

    def collect(self) -> Iterable[Metric]:
        try:
            figures = self._figures()
        except Exception as error:
            metrics.SCRAPES_FAILED.inc()
            get_logger().warning("figures for metrics are missing", error=f"{type(error).__name__}: {error}")
            return
        totals = figures.totals
        layers = GaugeMetricFamily("tardev_layers", "Layers in the metadata", labels=["format", "state"])
        layer_bytes = GaugeMetricFamily("tardev_layer_bytes", "Bytes of layer files", labels=["format", "state"])
        by_state: Counter[tuple[str, str]] = Counter()
        bytes_by_state: Counter[tuple[str, str]] = Counter()
        for (layer_format, state), (count, size_bytes) in totals.layers.items():
            labels = (_known(layer_format, FORMATS), state)
            by_state[labels] += count
            bytes_by_state[labels] += size_bytes
        for labels, count in by_state.items():
            layers.add_metric(labels, count)
            layer_bytes.add_metric(labels, bytes_by_state[labels])
        snapshots = GaugeMetricFamily("tardev_snapshots", "Snapshots", labels=["snapshotter", "kind"])
        by_kind: Counter[tuple[str, str]] = Counter()
        for (name, kind), count in totals.snapshots.items():
            by_kind[_known(name, self._names), kind] += count
        for labels, count in by_kind.items():
            snapshots.add_metric(labels, count)
        areas = GaugeMetricFamily("tardev_area_entries", "Entries of a directory below the root", labels=["area"])
        area_bytes = GaugeMetricFamily("tardev_area_bytes", "Bytes on the disk of its files", labels=["area"])
        for area, amount in figures.areas.items():
            areas.add_metric([area], amount.count)
            area_bytes.add_metric([area], amount.size_bytes)
        yield from (layers, layer_bytes, snapshots, areas, area_bytes)
        waiting = sum(build.is_waiting for build in figures.builds)
        for name, text, value in (
            ("tardev_layers_unused", "Layers that no snapshot refers to", totals.unused[0]),
            ("tardev_layers_unused_bytes", "Bytes of them", totals.unused[1]),
            ("tardev_oldest_check_timestamp_seconds", "When the longest unchecked layer was checked",
             totals.oldest_check_ns / 1e9),
            ("tardev_mounts_held", "Mounts of layers that containers use", figures.mounts),
            ("tardev_devices_held", "Block devices below them", figures.devices),
            ("tardev_builds_waiting", "Builds that wait for their turn", waiting),
            ("tardev_free_bytes", "Free on the file system of the root", figures.free_bytes),
            ("tardev_reserve_kept", "1 while there is room set aside for removals on a full disk",
             figures.has_reserve),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, text, value=float(value))


def _known(value: str, known: Collection[str]) -> str:
    return value if value in known else _OTHER
