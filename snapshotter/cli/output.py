# SPDX-License-Identifier: Apache-2.0
"""What all commands share: errors in one line, JSON, tables, progress, names that a terminal can take."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec, TextIO, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from blockdev.errors import BlockdevError
from policy.errors import PolicyError
from snapshotter.errors import ConfigError, SnapshotterError, one_line
from uvm.errors import UVMError
from verity.errors import VerityError

_P = ParamSpec("_P")
_T = TypeVar("_T")

AsJSON = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The daemon's configuration file.")]
BROKEN_PIPE_STATUS: Final = 128 + 13
ProgressBytes = Callable[[int, int | None], None]  # (done, of how many in all, if known)
_PIPE_WIDTH: Final = 1000  # a pipe has none: nothing may be cut there


def reported(trouble: int = 1) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Errors on purpose in one line and as exit status `trouble`; anything else is a defect and shows its trace."""

    def decorate(command: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(command)
        def wrapper(*arguments: _P.args, **named: _P.kwargs) -> _T:
            try:
                result = command(*arguments, **named)
                sys.stdout.flush()
                return result
            except BrokenPipeError:
                # Who reads has seen enough, as `head` has; the interpreter would complain when it flushes at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(BROKEN_PIPE_STATUS) from None
            except (BlockdevError, VerityError, SnapshotterError, ConfigError, UVMError, PolicyError, OSError) as error:
                sys.stderr.write(f"tardevctl: {one_line(str(error))}\n")
                raise typer.Exit(trouble) from None

        return wrapper

    return decorate


def warn(text: str) -> None:
    sys.stderr.write(f"tardevctl: warning: {one_line(text)}\n")


def text_of(raw: bytes) -> str:
    """A name for JSON: UTF-8, other bytes as \\xNN, and so a backslash as two."""
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """Control characters, and whatever else a terminal may act on, escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def stream_json(values: Iterable[Any]) -> None:
    """A list, one by one: a small layer can have gigabytes of path names."""
    separator = "[\n"
    for value in values:
        sys.stdout.write(separator + json.dumps(value))
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def show(value: Mapping[str, Any], as_json: bool) -> None:
    """Keys and values, one a line; a mapping among the values in one line."""
    if as_json:
        show_json(value)
        return
    width = max(map(len, value))
    for key, item in value.items():
        if isinstance(item, dict):
            item = ", ".join(f"{name} {count}" for name, count in item.items()) or "none"
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {printable(str(item))}\n")


def rows(found: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool, *, aside: bool = False) -> None:
    """`aside`: a table on standard error, where standard output is somebody else's."""
    if as_json:
        show_json(found)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " ").upper(), overflow="fold")
    for row in found:
        table.add_row(*(Text(printable(str(row[column]))) for column in columns))
    _console(sys.stderr if aside else sys.stdout).print(table)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


@contextmanager
def progress(what: str) -> Iterator[ProgressBytes]:
    """A bar on standard error while the block runs, where that is a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
