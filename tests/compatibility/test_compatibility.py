# SPDX-License-Identifier: Apache-2.0
"""Every cell of the table in docs/compatibility.md, with the containerd of its column."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compatibility.bench import COLUMNS, Bench, bench
from tests.compatibility.rows import FAILURES, ROWS, meaning, verdict
from tests.compatibility.table import DOCUMENT, Table, Verdict, committed, parse, split
from tests.conftest import in_every_run


# In ./dev test the newest; the integration tests have much of the rest.
@pytest.fixture(scope="module", params=in_every_run(COLUMNS, lambda name: name == COLUMNS[-1]))
def on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Bench]]:
    with bench(tmp_path_factory.mktemp("bench"), request.param) as made:
        yield request.param, made


def test_the_table_is_that_of_these_rows() -> None:
    table = committed(COLUMNS)
    assert dict(table.meaning) == {title: meaning(title) for title in ROWS}
    assert table.text() == split(DOCUMENT.read_text())[1], "run ./dev compatibility"


def test_a_table_comes_back_as_it_was_written() -> None:
    cells = {("a", "1.6"): Verdict.YES, ("a", "later"): Verdict.NOT_THERE}
    table = Table({"1.6": "1.6.20", "later": "2.1.9"}, {"a": "something"}, cells)
    assert parse(table.text(), ("1.6", "later")) == table


@pytest.mark.root
@pytest.mark.erofs
@pytest.mark.containerd
@pytest.mark.tool
@pytest.mark.slow
# test_cri.py has more of the same.
@pytest.mark.parametrize("title", in_every_run(ROWS, lambda title: not title.startswith("CRI ")))
def test_the_table_is_true(on: tuple[str, Bench], title: str) -> None:
    column, made = on
    table = committed(COLUMNS)
    says = table.cells[title, column]
    if says is Verdict.NO:
        with pytest.raises(FAILURES):  # else it works now: run ./dev compatibility
            verdict(title, made)
        return
    found = verdict(title, made)
    # Another version of the suite may have what that of the table had not.
    moved_on = made.node.containerd.release.full_version != table.versions[column]
    assert found is says or (moved_on and found is Verdict.YES), "run ./dev compatibility"
