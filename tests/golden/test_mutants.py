# SPDX-License-Identifier: Apache-2.0
"""Each rule of docs/formats.md is held by a golden vector: a small change of the engine makes one fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.replace(" ", "-"))
def test_the_text_of_each_change_is_where_it_was(mutant: object) -> None:
    assert mutant.text()  # type: ignore[attr-defined]


def test_every_rule_has_a_change_of_its_own() -> None:
    rules = [mutant.rule for mutant in MUTANTS]
    assert len(rules) == len(set(rules))


@pytest.mark.slow
def test_a_vector_notices_every_change() -> None:
    """In a process that has not imported what is to be changed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.mutants"],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
