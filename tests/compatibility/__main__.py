# SPDX-License-Identifier: Apache-2.0
"""`./dev compatibility`: check every cell with the containerd of its column, and write docs/compatibility.md anew."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

from tests.compatibility.bench import COLUMNS, bench
from tests.compatibility.rows import FAILURES, ROWS, meaning, verdict
from tests.compatibility.table import DOCUMENT, Table, Verdict, write


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("./dev compatibility: must run as root: containers and mounts need it")
    versions: dict[str, str] = {}
    cells: dict[tuple[str, str], Verdict] = {}
    for column in COLUMNS:
        with tempfile.TemporaryDirectory(prefix="tardev-compatibility-") as path, bench(Path(path), column) as made:
            versions[column] = made.node.containerd.release.full_version
            for title in ROWS:
                try:
                    cells[title, column] = verdict(title, made)
                except FAILURES:
                    traceback.print_exc()
                    cells[title, column] = Verdict.NO
                print(f"containerd {versions[column]}: {title}: {cells[title, column]}", flush=True)
    write(Table(versions, {title: meaning(title) for title in ROWS}, cells))
    print(f"written: {DOCUMENT}")
    if Verdict.NO in cells.values():
        sys.exit("./dev compatibility: something does not work")


if __name__ == "__main__":
    main()
