# SPDX-License-Identifier: Apache-2.0
"""containerd's own snapshotter suite (snapshots/testsuite), driven over gRPC against the socket of a real daemon.

README.md says what each subtest asks for. They run at the same time against one daemon, as the suite marks them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests import harness
from tests.conftest import SOAK, in_every_run
from tests.harness import SNAPSHOTTER, Daemon, Server, wait_for

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.unpacker, pytest.mark.slow]

SUBTESTS: Final = {
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove", "Walk",
    "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "ViewReadonly",
    "StatInWalk", "CloseTwice", "RootPermission", "128LayersMount", "Rename",
}  # fmt: skip
SKIPPED: Final = {"1.6": {"Rename"}, "1.7": set[str]()}  # by the suite itself, whatever the snapshotter
# Two thirds of the time of a run; in every run test_host_runs.py has as many layers.
LEFT_OUT: Final = "" if SOAK else "128LayersMount"
_VERDICT: Final = re.compile(r"^ +--- (PASS|FAIL|SKIP): TestConformance/([^/ ]+) \(", re.M)


@dataclass(frozen=True)
class Outcome:
    """Names of subtests by their verdict; `status` is that of the program, `log` what it said."""

    version: str
    status: int
    log: str

    def named(self, verdict: str) -> set[str]:
        return {name for said, name in _VERDICT.findall(self.log) if said == verdict}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """In the checkout: the suite mounts overlays over what lies there, so that may not be on one itself."""
    with tempfile.TemporaryDirectory(dir=harness.CACHE.resolve(), prefix="conformance-") as directory:
        yield Path(directory)
        harness.unmount_below(Path(directory))  # of a run that failed


def run_suite(version: str, address: Path, name: str, scratch: Path) -> Outcome:
    """With the suite of that containerd."""
    skip = ["-test.skip", f"^TestConformance$/^{LEFT_OUT}$"] if LEFT_OUT else []
    done = subprocess.run(
        [harness.CONFORMANCE[version], "-test.v", "-test.timeout", "9m", *skip],
        env={**os.environ, "SNAPSHOTTER_SOCKET": str(address), "SNAPSHOTTER_NAME": name, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False, timeout=570,
    )  # fmt: skip
    return Outcome(version, done.returncode, done.stdout)


def assert_conforms(outcome: Outcome) -> None:
    assert not outcome.named("FAIL"), outcome.log
    # Exactly these: a panic or a time-out takes subtests down without a verdict.
    assert outcome.named("SKIP") == SKIPPED[outcome.version], outcome.log
    assert outcome.named("PASS") == SUBTESTS - SKIPPED[outcome.version] - {LEFT_OUT}, outcome.log
    assert outcome.status == 0, outcome.log


class Reference(Server):
    """containerd's own overlay snapshotter, served as a proxy plugin."""

    name = "reference"

    def start(self) -> None:
        self.address = self.directory / "s.sock"
        self._start([harness.CONFORMANCE_REFERENCE, self.address, self.directory / "state"])
        self.wait_until("listens", self.address.is_socket)


# The suite of 1.6 has nothing that that of 1.7 has not.
each_version = pytest.mark.parametrize("version", in_every_run(harness.CONFORMANCE, harness.LATER_CONFORMANCE.__eq__))


@each_version
def test_containerds_own_snapshotter_passes(scratch: Path, version: str) -> None:
    """What fails here is a fault of the machine or of the driver, not of a snapshotter."""
    server = Reference(scratch / "reference")
    server.start()
    try:
        assert_conforms(run_suite(version, server.address, "overlayfs", scratch))
    finally:
        server.stop()


@each_version
def test_ours_passes_again_and_again(daemon: Daemon, scratch: Path, version: str) -> None:
    """The second run gives the same names again: whatever the first left behind would be in its way."""
    for _ in range(2):
        assert_conforms(run_suite(version, daemon.address, SNAPSHOTTER, scratch))
        wait_for("every snapshot is removed", lambda: not daemon.snapshots())
        wait_for("every mount is released", lambda: not daemon.mounts())
        wait_for("every directory is removed", lambda: not list((daemon.root / "snapshots").iterdir()))
        assert not daemon.staged()
