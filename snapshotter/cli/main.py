# SPDX-License-Identifier: Apache-2.0
"""`tardevctl`. Exit status: 0 done; 1 refused or failed, the reason on standard error; 2 wrong usage."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from blockdev.errors import BlockdevError
from snapshotter import config, metastore
from snapshotter.cli import layer
from snapshotter.errors import ConfigError, SnapshotterError, one_line
from snapshotter.metastore import Layer, Snapshot
from verity.errors import VerityError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
layer_app = typer.Typer(no_args_is_help=True, help="Layer files: build, verify, look into.")
app.add_typer(layer_app, name="layer")

_P = ParamSpec("_P")
_T = TypeVar("_T")

AsJSON = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The daemon's configuration file.")]
LayerFile = Annotated[Path, typer.Argument(help="A layer file.", exists=True, dir_okay=False)]
# A pipe has no width: nothing may be cut there.
_out: Final = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def _reported(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """Errors on purpose in one line; anything else is a defect and shows its trace."""

    @wraps(command)
    def wrapper(*arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return command(*arguments, **named)
        except (BlockdevError, VerityError, SnapshotterError, ConfigError, OSError) as error:
            sys.stderr.write(f"tardevctl: {one_line(str(error))}\n")
            raise typer.Exit(1) from None

    return wrapper


def _show(value: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    width = max(map(len, value))
    for key, item in value.items():
        if isinstance(item, dict):
            item = ", ".join(f"{name} {count}" for name, count in item.items()) or "none"
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {item}\n")


def _rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " ").upper(), overflow="fold")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    _out.print(table)


@layer_app.command()
@_reported
def build(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A layer: tar, plain, gzip or zstd.", exists=True)],
    output: Annotated[Path, typer.Option(help="Where the layer file goes; replaced in one step.")],
    format: Annotated[str, typer.Option(help="The layer file's format.")] = "tar-index",
    as_json: AsJSON = False,
) -> None:
    """Build the layer file of a layer, byte for byte what a node builds, and print its root hash."""
    with Console(stderr=True).status(f"building {output}"):
        record = layer.build(source, output, format)
    _show(record, as_json)


@layer_app.command()
@_reported
def verify(
    file: LayerFile,
    root_hash: Annotated[str, typer.Option(help="64 hexadecimal digits.")],
    as_json: AsJSON = False,
) -> None:
    """Check every block of a layer file against a root hash, as dm-verity in a guest would."""
    with Console(stderr=True).status(f"verifying {file}"):
        result = layer.verify(file, root_hash)
    _show(result, as_json)


@layer_app.command()
@_reported
def inspect(file: LayerFile, as_json: AsJSON = False) -> None:
    """What a layer file says of itself. Nothing of it is verified: see `layer verify`."""
    _show(layer.inspect(file), as_json)


@layer_app.command()
@_reported
def ls(file: LayerFile, as_json: AsJSON = False) -> None:
    """The files in a layer, as its index has them."""
    if as_json:
        # One by one: a small layer can have gigabytes of path names.
        separator = "[\n"
        for entry in layer.entries(file):
            sys.stdout.write(separator + json.dumps(entry))
            separator = ",\n"
        sys.stdout.write("\n]\n")
        return
    for entry in layer.entries(file):
        sys.stdout.write(layer.long_line(entry) + "\n")


def _database(path: Path | None) -> Path:
    chosen = path or (config.DEFAULT_PATH if config.DEFAULT_PATH.exists() else None)
    settings = config.load(chosen) if chosen else config.Config()
    return Path(settings.root) / metastore.FILE_NAME


@app.command()
@_reported
def snapshots(config_file: ConfigFile = None, as_json: AsJSON = False) -> None:
    """All snapshots, parents first."""
    found, layers = metastore.read(_database(config_file))
    by_id = {layer.id: layer for layer in layers}

    def row(snapshot: Snapshot) -> dict[str, Any]:
        layer = by_id.get(snapshot.layer_id) if snapshot.layer_id else None
        return {
            "snapshotter": snapshot.snapshotter,
            "kind": snapshot.kind.value,
            "name": snapshot.name,
            "parent": snapshot.parent,
            "diff_id": layer.diff_id if layer else "",
            "labels": snapshot.labels,
            "created_ns": snapshot.created_ns,
        }

    _rows([row(snapshot) for snapshot in found], ("snapshotter", "kind", "name", "parent"), as_json)


@app.command()
@_reported
def layers(config_file: ConfigFile = None, as_json: AsJSON = False) -> None:
    """All layer files, with how many committed snapshots share each."""

    def row(layer: Layer) -> dict[str, Any]:
        return {
            "diff_id": layer.diff_id,
            "format": layer.format,
            "root_hash": layer.root_hash,
            "tar_size_bytes": layer.tar_size_bytes,
            "data_size_bytes": layer.data_size_bytes,
            "tree_size_bytes": layer.tree_size_bytes,
            "file_size_bytes": layer.file_size_bytes,
            "entries": layer.entries,
            "state": layer.state.value,
            "build_seconds": round(layer.build_seconds, 3),
            "shared_by": layer.shared_by,
            "warnings": layer.warnings,
        }

    _, found = metastore.read(_database(config_file))
    columns = ("diff_id", "root_hash", "file_size_bytes", "build_seconds", "shared_by", "state")
    _rows([row(layer) for layer in found], columns, as_json)


def main() -> None:
    # Without standard streams a file that is opened would take their numbers, and a worker put its own there.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # As an exception, so that what is half done is cleaned up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()
