# SPDX-License-Identifier: Apache-2.0
"""The daemon is killed at every trace point of every journey, the first, a middle and the last time that it comes by.

After each kill: a new daemon serves; what was acknowledged is there and whole, block by block; nothing is there that no
row names; the journey, begun again, ends well; and once all is removed the root is as empty as at the beginning.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from tests.crash import oracle
from tests.crash.journeys import JOURNEYS, Journey, Stage, allocated_bytes, make_stage, until_dead
from tests.crash.report import say
from tests.harness import CHECKOUT, ProcessFailed

pytestmark = [pytest.mark.root, pytest.mark.erofs]

# What the journeys pass, which the long run holds them to: a point that is new goes here, and into a journey.
PASSED = {
    "activation": "made mapped mounted released renewed unmounted",
    "apply": "built recorded",
    "boot": "bound locked opened prepared reconciled resumed",
    "build": "built published recorded staged",
    "commit": "checked committed",
    "delete": "settled unlinked",
    "directory": "filled made owned removed unmounted whole",
    "links": "aside made made_again removed renewed stray_removed",
    "made": "built published staged",
    "prepare": "created discarded mounts",
    "publish": "in_transaction renamed settled staged synced table_linked table_renamed table_settled table_synced",
    "quarantine": "renamed",
    "reconcile": "action done marked",
    "remove": "begun removed",
    "sidecars": "renamed synced written",
    "staged": "discarded",
    "sweep": "deleted",
    "transaction": "committed ready",
    "trash": "put removed",
    "tree": "moved removed unlinked",
}
_MENDED_SECONDS = 20.0
# What only a containerd leads to: tests/integration/test_crash.py.
BY_CONTAINERD = {"ingest.written", "ingest.committed"}
# Before the first row: killed there, nothing was begun.
NEW_ROOT = {"boot.migrating"}
# In every run: what a start has to tell apart, a file without a row, a commit without its reply; and a start cut in its
# work.
IN_EVERY_RUN = {
    "pull": [("publish.renamed", 2), ("transaction.committed", 4)],
    "removal": [("sweep.deleted", 1)],
    "boot": [("reconcile.done", 2)],
}


@dataclass
class Outcome:
    passed: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    unreached: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def points_of_the_source() -> set[str]:
    found = set()
    for path in (CHECKOUT / "snapshotter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "trace":
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: not a name of its own"
                found.add(str(name.value))
    return found


def begin(stage: Stage, journey: Journey, salt: str) -> None:
    stage.new_image(salt)
    journey.set_up(stage)
    if journey.fresh:
        stage.start()
    if not journey.boot:
        stage.control.when_quiet()


def count(stage: Stage, journey: Journey) -> Counter[str]:
    """The points of one undisturbed run."""
    begin(stage, journey, f"{journey.name} counted")
    stage.control.arm()
    journey.act(stage)
    passed = stage.control.when_quiet()
    journey.check(stage)
    stage.clear()
    return passed


def picks(passed: Counter[str]) -> Iterator[tuple[str, int]]:
    for point, times in sorted(passed.items()):
        for number in sorted({1, (times + 1) // 2, times}):
            yield point, number


def kill_at(stage: Stage, journey: Journey, point: str, number: int, outcome: Outcome) -> None:
    what = f"{journey.name}, {point}:{number}"
    begin(stage, journey, what)
    stage.control.arm(point, number)
    with suppress(grpc.RpcError, ProcessFailed):
        journey.act(stage)
    if not until_dead(stage):
        outcome.unreached.append(what)
    outcome.kills += 1
    stage.control.arm()
    stage.start()
    outcome.lost += [f"{what}: {name}" for name in (*stage.lost(), *broken(stage, journey))]
    outcome.left += [f"{what}: {left}" for left in left_behind(stage, journey)]
    try:
        if not journey.boot:
            journey.act(stage)
        journey.check(stage)
    except Exception as error:
        outcome.failed.append(f"{what}: {type(error).__name__}: {error}")
    stage.collect()
    outcome.lost += [f"{what}, after the retry: {name}" for name in (*stage.lost(), *oracle.broken(stage.daemon))]
    outcome.left += [f"{what}, after the retry: {left}" for left in left_behind(stage, journey)]
    stage.clear()


def broken(stage: Stage, journey: Journey) -> list[str]:
    """A layer whose file was lost before the start is made again behind the answers."""
    return oracle.broken(stage.daemon, _MENDED_SECONDS if journey.mends else 0)


def left_behind(stage: Stage, journey: Journey) -> list[str]:
    # A damaged file is put aside for somebody to look at, when a start finds it.
    return oracle.leftovers(stage.daemon, mended=journey.mends)


def judge(stage: Stage, journey: Journey, outcome: Outcome) -> None:
    """With all removed, the root is empty again."""
    stage.start()
    stage.cleanup()
    outcome.left += [f"{journey.name}, at the end: {left}" for left in left_behind(stage, journey)]
    if stage.daemon.layers():
        outcome.left.append(f"{journey.name}, at the end: rows of {len(stage.daemon.layers())} layers")
    if allocated_bytes(stage.daemon.root) > 4096 and not journey.mends:
        outcome.left.append(f"{journey.name}, at the end: {allocated_bytes(stage.daemon.root)} bytes")
    assert not outcome.lost, "\n".join(outcome.lost)
    assert not outcome.left, "\n".join(outcome.left)
    assert not outcome.failed, "\n".join(outcome.failed)
    assert not outcome.unreached, "\n".join(outcome.unreached)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, Outcome]]:
    """Said at the end, whatever came of it."""
    made: dict[str, Outcome] = {}
    yield made
    lines = [f"{'journey':30} {'points':>6} {'kills':>6} {'lost':>5} {'left':>5} {'failed':>6} {'unreached':>9}"]
    for name, outcome in made.items():
        lines.append(
            f"{name:30} {len(outcome.passed):6} {outcome.kills:6} {len(outcome.lost):5} {len(outcome.left):5}"
            f" {len(outcome.failed):6} {len(outcome.unreached):9}"
        )
    points: set[str] = set().union(*(outcome.passed for outcome in made.values()))
    lines.append(f"{len(points)} points, {len(made)} journeys, {sum(each.kills for each in made.values())} kills")
    say(request, *lines)


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Stage, Journey]]:
    journey: Journey = request.param
    made = make_stage(tmp_path, journey)
    try:
        made.start()
        yield made, journey
    finally:
        made.close()


def of_every_run() -> list[Journey]:
    return [journey for journey in JOURNEYS if journey.name in IN_EVERY_RUN]


@pytest.mark.parametrize("stage", of_every_run(), ids=lambda journey: journey.name, indirect=True)
def test_killed_at_some_points(stage: tuple[Stage, Journey]) -> None:
    outcome = Outcome()
    for point, number in IN_EVERY_RUN[stage[1].name]:
        kill_at(*stage, point, number, outcome)
    judge(*stage, outcome)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", JOURNEYS, ids=lambda journey: journey.name, indirect=True)
def test_killed_at_every_point(stage: tuple[Stage, Journey], table: dict[str, Outcome]) -> None:
    made, journey = stage
    outcome = table[journey.name] = Outcome(count(made, journey))
    for point, number in picks(outcome.passed):
        kill_at(made, journey, point, number, outcome)
    judge(made, journey, outcome)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_journeys_pass_every_point(tmp_path: Path) -> None:
    passed: set[str] = set()
    for number, journey in enumerate(JOURNEYS):
        made = make_stage(tmp_path / str(number), journey)
        try:
            made.start()
            passed |= set(count(made, journey))
        finally:
            made.close()
    assert passed == points_passed()


def points_passed() -> set[str]:
    return {f"{step}.{point}" for step, points in PASSED.items() for point in points.split()}


def test_every_point_of_the_source_is_known_to_the_journeys() -> None:
    assert points_of_the_source() == points_passed() | BY_CONTAINERD | NEW_ROOT
    assert not {point for point, _ in itertools.chain.from_iterable(IN_EVERY_RUN.values())} - points_passed()
    assert not IN_EVERY_RUN.keys() - {journey.name for journey in JOURNEYS}


@pytest.mark.soak
def test_killed_in_the_first_start(tmp_path: Path) -> None:
    journey = JOURNEYS[0]
    stage = make_stage(tmp_path, journey)
    stage.control.arm("boot.migrating")
    try:
        with pytest.raises(ProcessFailed):
            stage.start()
        stage.control.arm()
        stage.start()
        begin(stage, journey, "new")
        journey.act(stage)
        assert oracle.leftovers(stage.daemon) == []
        assert oracle.broken(stage.daemon) == []
    finally:
        stage.close()
