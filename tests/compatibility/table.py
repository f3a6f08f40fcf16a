# SPDX-License-Identifier: Apache-2.0
"""The table of docs/compatibility.md: written by `./dev compatibility`, held by test_compatibility.py. Pure but for the
file itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.harness import CHECKOUT

DOCUMENT: Final = CHECKOUT / "docs" / "compatibility.md"
_BEGIN: Final = "<!-- written by ./dev compatibility -->\n"
_END: Final = "<!-- end -->\n"


class Verdict(enum.StrEnum):
    YES = "yes"
    NO = "no"
    NOT_THERE = "n/a"  # this containerd has no such thing


@dataclass(frozen=True)
class Table:
    """`versions`: whole ones, by column. `cells`: by title of the row and column; `meaning` by title."""

    versions: Mapping[str, str]
    meaning: Mapping[str, str]
    cells: Mapping[tuple[str, str], Verdict]

    def text(self) -> str:
        lines = [("", *(f"containerd {version}" for version in self.versions.values()), "what is checked")]
        lines.append(tuple("---" for _ in lines[0]))
        for title, meaning in self.meaning.items():
            lines.append((title, *(self.cells[title, column] for column in self.versions), meaning))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def split(document: str) -> tuple[str, str, str]:
    """What stands before the table, the table, what follows. Raises ValueError where there is none."""
    before, begin, rest = document.partition(_BEGIN)
    table, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} has no table")
    return before + begin, table, end + after


def parse(text: str, columns: Sequence[str]) -> Table:
    """Raises ValueError for what `Table.text` does not write."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    versions = dict(zip(columns, (cell.removeprefix("containerd ") for cell in header[1:-1]), strict=True))
    return Table(
        versions,
        {row[0]: row[-1] for row in rows},
        {(row[0], column): Verdict(cell) for row in rows for column, cell in zip(columns, row[1:-1], strict=True)},
    )


def committed(columns: Sequence[str]) -> Table:
    return parse(split(DOCUMENT.read_text())[1], columns)


def write(table: Table) -> None:
    before, _, after = split(DOCUMENT.read_text())
    DOCUMENT.write_text(before + table.text() + after)
