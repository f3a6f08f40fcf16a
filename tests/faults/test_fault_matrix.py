# SPDX-License-Identifier: Apache-2.0
"""One call of the C library, of the daemon or of its workers, fails: each kind of call, on each kind of file, each way.

The call of the daemon's that meets it ends with the fitting status, or does without; the daemon lives and goes on; what
was acknowledged stays; nothing is left; and the same journey, begun again, ends well.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from tests.crash import oracle
from tests.crash.journeys import JOURNEYS, Journey, Stage, make_stage
from tests.crash.report import say
from tests.crash.test_kill_matrix import begin, broken
from tests.faults.shim import Call, Shim, build
from tests.harness import ProcessFailed

pytestmark = [pytest.mark.root, pytest.mark.erofs]

Code = grpc.StatusCode
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAYS = {
    ("write", "pwrite64", "ftruncate64", "fsync", "fdatasync"): (*_FULL, errno.EIO),
    ("create",): (*_FULL, errno.EMFILE, errno.ENOMEM, errno.EIO),
    ("rename", "renameat", "link", "linkat", "mkdir", "mkdirat"): (*_FULL, errno.ENOMEM, errno.EIO),
    ("open64", "openat64"): (errno.EMFILE, errno.ENOMEM, errno.EIO),
    ("opendir", "fdopendir"): (errno.EMFILE, errno.ENOMEM, errno.EIO),
    ("mount",): (errno.ENOSPC, errno.ENOMEM, errno.EIO),
    ("memfd_create", "pipe2"): (errno.EMFILE, errno.ENOMEM),
    ("mmap64",): (errno.ENOMEM,),
    ("unlink", "unlinkat", "rmdir", "umount2", "fchmod", "chmod", "chown", "lchown", "read", "pread64", "statvfs64",
     "stat64", "lstat64", "fstat64"): (errno.ENOMEM, errno.EIO),
}  # fmt: skip
WAYS = {function: ways for group, ways in _WAYS.items() for function in group}
# In every run: (journey, function, place, error), where they first meet.
IN_EVERY_RUN = {
    "pull": [
        ("pwrite64", "worker: staging/*", errno.ENOSPC),
        ("fdatasync", "metadata.db-wal", errno.ENOSPC),
        ("fsync", "layers/tar-index", errno.EIO),
        ("memfd_create", "ring", errno.EMFILE),
    ],
    "start": [("mount", "m/*", errno.ENOMEM)],
}
_STARTS_EVERY = 10


@dataclass
class Outcome:
    steps: int = 0
    cases: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # status, or dead
    lost: list[str] = field(default_factory=list)
    until_cleanup: list[str] = field(default_factory=list)
    until_start: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass
class Scene:
    stage: Stage
    journey: Journey
    shim: Shim
    outcome: Outcome = field(default_factory=Outcome)


def fitting(error: int) -> set[grpc.StatusCode]:
    if error == errno.EIO:
        return {Code.INTERNAL, Code.DATA_LOSS, Code.UNAVAILABLE}
    return {Code.RESOURCE_EXHAUSTED}


def calls_of(scene: Scene) -> list[Call]:
    """Of one undisturbed run."""
    begin(scene.stage, scene.journey, "counted")
    scene.shim.arm()
    scene.journey.act(scene.stage)
    scene.stage.control.when_quiet()
    calls = scene.shim.calls()
    scene.journey.check(scene.stage)
    scene.stage.clear()
    return calls


def picks(calls: list[Call]) -> Iterator[tuple[str, int, int, str]]:
    """(function, which call of it, error, place): the first of each place, each way, and the last."""
    numbers: Counter[str] = Counter()
    places: dict[tuple[str, str], list[int]] = {}
    for call in calls:
        numbers[call.function] += 1
        places.setdefault((call.function, call.place), []).append(numbers[call.function])
    for (function, place), found in sorted(places.items()):
        for error in WAYS[function]:
            yield function, found[0], error, place
        if found[-1] != found[0]:
            yield function, found[-1], WAYS[function][0], place


def fail(scene: Scene, function: str, number: int, error: int, place: str) -> None:
    stage, journey, outcome = scene.stage, scene.journey, scene.outcome
    what = f"{journey.name}, {function}:{number} {errno.errorcode[error]} {place}"
    begin(stage, journey, what)
    outcome.cases += 1
    # What is full stays so until somebody makes room.
    scene.shim.arm(function, number, error, lasting=error in _FULL)
    code = ""
    try:
        journey.act(stage)
    except grpc.RpcError as refused:
        code = refused.code().name
        if refused.code() not in fitting(error):
            outcome.wrong.append(f"{what}: {code}: {refused.details()}")
    except ProcessFailed as died:
        code = "no start"
        log = stage.daemon.log.read_text().rpartition("reset")[2]
        if not journey.boot or "Traceback" in log or "tardev-snapshotter: " not in log:
            outcome.wrong.append(f"{what}: {died}")
    stage.control.when_quiet()
    scene.shim.disarm()
    outcome.codes[code or "done without"] += 1
    if not scene.shim.fired:
        outcome.unreached.append(what)
    elif scene.shim.failed()[0].place != place:
        what += f" (met {scene.shim.failed()[0].place})"
    if code == "no start":
        stage.start()
    elif not stage.daemon.alive():
        outcome.wrong.append(f"{what}: it died: {stage.daemon.log.read_text()[-1000:]}")
        stage.start()
    left = oracle.leftovers(stage.daemon, mended=journey.mends, seconds=0.5)
    if left:
        outcome.until_cleanup += [f"{what}: {each}" for each in left]
        stage.cleanup()
        left = oracle.leftovers(stage.daemon, mended=journey.mends, seconds=1)
    outcome.until_start += [f"{what}: {each}" for each in left]
    outcome.lost += [f"{what}: {name}" for name in (*stage.lost(), *broken(stage, journey))]
    try:
        if not journey.boot:
            journey.act(stage)
        journey.check(stage)
    except Exception as again:
        outcome.failed.append(f"{what}: {type(again).__name__}: {again}")
    # What was acknowledged after a sync that failed for another must be there after a start, too.
    if left or outcome.cases % _STARTS_EVERY == 0 or function in ("fsync", "fdatasync"):
        stage.start()
    stage.collect()
    outcome.lost += [f"{what}, after the retry: {name}" for name in (*stage.lost(), *oracle.broken(stage.daemon))]
    left = oracle.leftovers(stage.daemon, mended=journey.mends)
    outcome.left += [f"{what}, after the retry: {each}" for each in left]
    stage.clear()


def judge(scene: Scene) -> None:
    scene.stage.start()
    scene.stage.cleanup()
    outcome = scene.outcome
    outcome.left += [f"at the end: {left}" for left in oracle.leftovers(scene.stage.daemon, mended=scene.journey.mends)]
    assert not scene.stage.daemon.layers()
    for found in (outcome.lost, outcome.wrong, outcome.left, outcome.failed):
        assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, Outcome]]:
    """Said at the end, whatever came of it."""
    made: dict[str, Outcome] = {}
    yield made
    heads = ("steps", "cases", "refused", "wrong", "lost", "cleanup", "start", "left", "failed", "unreached")
    lines = [f"{'journey':30}" + "".join(f"{head:>10}" for head in heads)]
    for name, outcome in made.items():
        refused = outcome.cases - outcome.codes["done without"]
        left = (outcome.until_cleanup, outcome.until_start, outcome.left)
        lists = (outcome.wrong, outcome.lost, *left, outcome.failed, outcome.unreached)
        numbers = (outcome.steps, outcome.cases, refused, *map(len, lists))
        lines.append(f"{name:30}" + "".join(f"{number:10}" for number in numbers))
    lines.append(
        f"{sum(each.steps for each in made.values())} steps, {sum(each.cases for each in made.values())} cases"
    )
    codes: Counter[str] = sum((each.codes for each in made.values()), Counter())
    lines.append(", ".join(f"{code}: {number}" for code, number in codes.most_common()))
    lines += [f"until the next start: {what}" for outcome in made.values() for what in outcome.until_start]
    lines += [f"not reached: {what}" for outcome in made.values() for what in outcome.unreached]
    say(request, *lines)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path, library: Path) -> Iterator[Scene]:
    journey: Journey = request.param
    stage = make_stage(tmp_path, journey)
    shim = Shim(library, tmp_path / "faults", stage.daemon.root)
    stage.env = shim.env
    try:
        stage.start()
        yield Scene(stage, journey, shim)
    finally:
        stage.close()


def of_every_run() -> list[Journey]:
    return [journey for journey in JOURNEYS if journey.name in IN_EVERY_RUN]


@pytest.mark.parametrize("scene", of_every_run(), ids=lambda journey: journey.name, indirect=True)
def test_some_calls_fail(scene: Scene) -> None:
    calls = list(picks(calls_of(scene)))
    for wanted in IN_EVERY_RUN[scene.journey.name]:
        case = next(each for each in calls if (each[0], each[3], each[2]) == wanted)
        fail(scene, *case)
    assert not scene.outcome.unreached
    judge(scene)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scene", JOURNEYS, ids=lambda journey: journey.name, indirect=True)
def test_every_call_fails(scene: Scene, table: dict[str, Outcome]) -> None:
    table[scene.journey.name] = scene.outcome
    calls = calls_of(scene)
    scene.outcome.steps = len({(call.function, call.place) for call in calls})
    for case in picks(calls):
        fail(scene, *case)
    judge(scene)
