# SPDX-License-Identifier: Apache-2.0
"""Clients that interleave at every step, callers that go away, crashes at every step: what comes of it is what the
model allows, and nothing else is left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SOAK
from tests.model.clients import DROP, KINDS, PULL, REMOVE, UNPACK, client, single
from tests.model.world import Client, World, write_content

# A round is one interleaving of its clients; an example has several.
_EXAMPLES: Final = 4000 if SOAK else 100
_ROUNDS_MIN: Final = 10_000 if SOAK else 200

_numbers = st.integers(0, 63)
_clients = st.tuples(
    st.integers(0, KINDS - 1), _numbers, _numbers, _numbers, st.one_of(st.just(0), st.just(0), st.integers(1, 80))
)
_rounds = st.tuples(
    st.lists(_clients, min_size=1, max_size=4),
    st.binary(max_size=80),
    st.one_of(st.just(0), st.integers(1, 150)),
    st.booleans(),
)

counts: Counter[str] = Counter()


@pytest.fixture(scope="module")
def content() -> Iterator[Path]:
    """Of containerd; and on a file system that syncs at once, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        write_content(Path(directory, "content"))
        yield Path(directory, "content")


def set_scene(world: World, focus: int, *, applies: bool) -> None:
    """Nothing; an image; one whose layers nobody needs any more; one that was pulled long ago."""
    scene = focus % 4
    if scene:
        world.round([Client(client(PULL, focus, 0, focus, applies=applies))], b"")
    if scene == 2:
        world.round([Client(client(DROP, focus, 1, focus, applies=applies))], b"")
    if scene > 1:
        world.later()


def play(content: Path, rounds: list[Any], focus: int, *, applies: bool) -> None:
    """`focus`: what most clients are about, so that they meet. Raises AssertionError for whatever no order of the calls
    explains."""
    root = Path(tempfile.mkdtemp(dir=content.parent))
    world = World(root / "root", content)
    world.root.mkdir()
    try:
        with world.in_place():
            world.boot(b"")
            set_scene(world, focus, applies=applies)
            for clients, choices, crash_at, later in rounds:
                if later:
                    world.later()
                world.round(
                    [
                        Client(
                            client(kind, focus if a % 4 else a, b, focus if c % 2 else c, applies=applies), cancelled_at
                        )
                        for kind, a, b, c, cancelled_at in clients
                    ],
                    choices,
                    crash_at,
                )
            world.restart(b"")
    finally:
        counts.update(world.counts)
        counts.update({f"{what} {end}": count for (what, end), count in world.ends.items()})
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("prepares_first", [True, False])
def test_a_removal_at_every_step_of_a_prepare_leaves_nothing(content: Path, prepares_first: bool) -> None:
    """What is removed while it is prepared has no directory afterwards, and no build waits for its blob."""
    for step in range(30):
        world = World(Path(tempfile.mkdtemp(dir=content.parent)) / "root", content)
        world.root.mkdir()
        # The clients' priorities, and the step at which the other one comes first.
        choices = bytes([255, 0, *((9, 8) if prepares_first else (8, 9)), 0, 0, 0, 0, 0, *[step] * 4])
        with world.in_place():
            world.boot(b"")
            world.round([Client(single(number, "tardev", 0, "a", 0, 0)) for number in (UNPACK, REMOVE)], choices)
        shutil.rmtree(world.root.parent)


@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)
@given(st.lists(_rounds, min_size=3, max_size=8), _numbers, st.booleans())
def explore(content: Path, rounds: list[Any], focus: int, applies: bool) -> None:
    play(content, rounds, focus, applies=applies)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_the_order_the_model_explains_what_is_there(
    content: Path, record_property: Callable[[str, object], None]
) -> None:
    counts.clear()
    explore(content)
    for name, count in counts.items():
        record_property(name, count)
    print(dict(counts))
    assert counts["rounds"] >= _ROUNDS_MIN
    assert counts["crashes"] > _ROUNDS_MIN // 20
    assert counts["cancelled"] > _ROUNDS_MIN // 20
