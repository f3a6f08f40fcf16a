# SPDX-License-Identifier: Apache-2.0
"""The model notices faults that are seeded: what it says of the program without them would else mean nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import in_every_run
from tests.golden.mutants import CHECKOUT, Mutant
from tests.model.mutants import MUTANTS

# Noticed by one of the first examples.
_QUICK = ("a cancelled prepare stays", "a directory stays with its commit")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.replace(" ", "-"))
def test_the_text_of_each_fault_is_where_it_was(mutant: Mutant) -> None:
    assert mutant.text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rules", in_every_run([_QUICK, ()], bool), ids=["some", "all"])
def test_the_model_notices_every_fault(rules: tuple[str, ...]) -> None:
    """In processes that have not imported what is to be changed."""
    command = [sys.executable, "-m", "tests.model.mutants", *rules]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
