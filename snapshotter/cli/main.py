# SPDX-License-Identifier: Apache-2.0
"""`tardevctl`. Exit status: 0 done; 1 refused or failed, the reason on standard error; 2 wrong usage.

`fsck` and `scrub` end with 1 where something is wrong and was not repaired. `layer diff` has those of diff(1): 0 equal,
1 different, 2 trouble. `uvm run` has those of the command, and 125 where it was not run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from snapshotter import config, metastore
from snapshotter.cli import (
    config_commands,
    daemon_commands,
    image_commands,
    layer_commands,
    sign_commands,
    store_commands,
    uvm_commands,
)
from snapshotter.cli.output import AsJSON, ConfigFile, reported, rows
from snapshotter.metastore import Layer, Snapshot

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(image_commands.app, name="image")
app.add_typer(layer_commands.app, name="layer")
app.add_typer(uvm_commands.app, name="uvm")
app.add_typer(config_commands.app, name="config")
app.command()(daemon_commands.status)
app.command("log-level")(daemon_commands.log_level)
app.command()(store_commands.fsck)
app.command()(store_commands.scrub)
app.command()(store_commands.gc)
app.command()(sign_commands.sign)
app.command()(sign_commands.verify)


def _database(path: Path | None) -> Path:
    return Path(config.of_the_node(path).root) / metastore.FILE_NAME


@app.command()
@reported()
def snapshots(config_file: ConfigFile = None, as_json: AsJSON = False) -> None:
    """All snapshots, parents first."""
    found, layers = metastore.read(_database(config_file))
    by_id = {layer.id: layer for layer in layers}

    def row(snapshot: Snapshot) -> dict[str, Any]:
        layer = by_id.get(snapshot.layer_id) if snapshot.layer_id else None
        on_top = by_id.get(snapshot.parents_layer_id) if snapshot.parents_layer_id else None
        return {
            "snapshotter": snapshot.snapshotter,
            "kind": snapshot.kind.value,
            "name": snapshot.name,
            "parent": snapshot.parent,
            "diff_id": layer.diff_id if layer else "",
            "parents_layer": on_top.diff_id if on_top else "",
            "labels": snapshot.labels,
            "created_ns": snapshot.created_ns,
        }

    rows([row(snapshot) for snapshot in found], ("snapshotter", "kind", "name", "parent"), as_json)


@app.command()
@reported()
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
            "verified_ns": layer.verified_ns,
        }

    _, found = metastore.read(_database(config_file))
    columns = ("diff_id", "format", "root_hash", "file_size_bytes", "build_seconds", "shared_by", "state")
    rows([row(layer) for layer in found], columns, as_json)


def main() -> None:
    # Without standard streams a file that is opened would take their numbers, and a worker put its own there.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # As an exception, so that what is half done is cleaned up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()
