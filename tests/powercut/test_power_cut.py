# SPDX-License-Identifier: Apache-2.0
"""Power cuts at each barrier of a recorded journey: what was acknowledged is there and whole, nothing else is left.

In every run a recording that is kept here (`python -m tests.powercut.cuts direct ext4 --save`), at some barriers:
today's daemon on disks as a power cut left them, not the order of today's writes. That is `./dev soak`'s, with fresh
recordings. Those need a guest, for dm-log-writes; the disks are recovered and looked at by this machine's kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import SNAPSHOTTER
from tests.nodes.conftest import Boot
from tests.powercut.cuts import FILE_SYSTEMS, Figures, check, load, record, summary

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]
in_a_guest = [pytest.mark.guest, pytest.mark.containerd, pytest.mark.soak, pytest.mark.timeout(7200)]
RECORDED = Path(__file__).with_name("direct-ext4.zst")


def assert_nothing_lost(figures: Figures) -> None:
    print(summary(figures))
    assert (figures.lost, figures.left, figures.failed) == ([], [], [])


def test_a_daemon_starts_on_recorded_power_cuts(tmp_path: Path) -> None:
    figures = check(load(RECORDED, tmp_path), "direct", "ext4", tmp_path, every=31)
    assert_nothing_lost(figures)
    assert figures.acknowledged > figures.points > 3


def test_a_disk_that_lies_is_seen(tmp_path: Path) -> None:
    """Large writes, a layer's, are lost behind the back of the file system: what has no other fault than that."""
    figures = check(
        load(RECORDED, tmp_path), "direct", "ext4", tmp_path, every=130, drops=lambda entry: entry.size >= 64 << 10
    )
    print(summary(figures))
    assert figures.lost
    assert any("quarantine" in name for name in figures.left)


@pytest.mark.parametrize(
    ("journey", "kind"),
    [pytest.param(journey, kind, marks=in_a_guest) for journey in ("direct", SNAPSHOTTER) for kind in FILE_SYSTEMS],
)
def test_nothing_acknowledged_is_lost_and_nothing_is_left(
    boot: Boot, images: Path, tmp_path: Path, journey: str, kind: str
) -> None:
    figures = check(record(boot, tmp_path, images, journey, kind), journey, kind, tmp_path)
    assert_nothing_lost(figures)
    assert figures.points > 50
    assert figures.acknowledged > figures.points
    assert figures.retried


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=in_a_guest) for kind in FILE_SYSTEMS])
def test_the_same_eyes_see_what_containerds_own_snapshotter_loses(
    boot: Boot, images: Path, tmp_path: Path, kind: str
) -> None:
    """Beside ours, and the proof that this would see a loss: overlayfs syncs no file that it unpacks."""
    figures = check(record(boot, tmp_path, images, "overlayfs", kind), "overlayfs", kind, tmp_path, every=3)
    print(summary(figures))
    assert figures.acknowledged
    assert figures.lost
