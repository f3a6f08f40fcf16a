# SPDX-License-Identifier: Apache-2.0
"""What a daemon is at and what troubles it, in words: `tardevctl status` and the status page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from snapshotter.config import Config, parse_size
from snapshotter.figures import Figures

_LATE: Final = 2  # intervals of the scrub, after which a layer should have been read long ago


@dataclass(frozen=True, slots=True)
class Problem:
    """`advice`: the command or line that mends it, or what will happen."""

    what: str
    advice: str


def status(figures: Figures, settings: Config) -> dict[str, Any]:
    """A document of plain values; sizes in bytes, times in seconds."""
    totals = figures.totals
    return {
        "snapshotters": {
            name: {
                "contract": chosen.contract,
                "format": chosen.format,
                **{kind: count for (each, kind), count in sorted(totals.snapshots.items()) if each == name},
            }
            for name, chosen in settings.snapshotters.items()
        },
        "layers": [
            {"format": layer_format, "state": state, "count": count, "size_bytes": size_bytes}
            for (layer_format, state), (count, size_bytes) in sorted(totals.layers.items())
        ],
        "unused_layers": {"count": totals.unused[0], "size_bytes": totals.unused[1]},
        "areas": {name: asdict(amount) for name, amount in figures.areas.items()},
        "mounts_held": figures.mounts,
        "devices_held": figures.devices,
        "free_bytes": figures.free_bytes,
        "builds": [asdict(build) for build in figures.builds],
        "problems": [asdict(problem) for problem in problems(figures, settings)],
    }


def problems(figures: Figures, settings: Config) -> Iterator[Problem]:
    broken = sum(count for (_, state), (count, _) in figures.totals.layers.items() if state == "broken")
    if broken:
        yield Problem(
            f"{broken} layers are broken and not handed out",
            "tardevctl fsck --repair builds them again, or names the image that has to be fetched",
        )
    if quarantined := figures.areas["quarantine"].count:
        yield Problem(
            f"{quarantined} damaged layer files were put aside in {settings.root}/quarantine",
            "look at the disk; they are deleted after a week",
        )
    reserve = parse_size(settings.builds.free_space_reserve)
    if figures.free_bytes < reserve:
        yield Problem(
            f"{figures.free_bytes} bytes are free below {settings.root}, less than builds.free_space_reserve",
            "no build is started: remove images, or tardevctl gc --all",
        )
    if not figures.has_reserve:
        yield Problem(
            "there is no room set aside for removals on a full disk",
            "it is made again within the hour once there is room",
        )
    checked_ns, interval = figures.totals.oldest_check_ns, settings.scrub.interval
    if checked_ns and interval and time.time() - checked_ns / 1e9 > _LATE * interval:
        days = (time.time() - checked_ns / 1e9) / 86400
        yield Problem(
            f"a layer was last read to its end {days:.0f} days ago",
            "scrub.rate is too low for what is stored; tardevctl scrub does it now",
        )
    if not Path(settings.containerd.content).is_dir():
        yield Problem(
            f"containerd's content store is not at {settings.containerd.content}",
            "set containerd.content to ROOT/io.containerd.content.v1.content; until then blobs are asked of containerd",
        )
