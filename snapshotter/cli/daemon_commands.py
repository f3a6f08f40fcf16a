# SPDX-License-Identifier: Apache-2.0
"""`tardevctl status` and `log-level`: the daemon that serves now."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from snapshotter import config
from snapshotter.cli.output import AsJSON, ConfigFile, printable, reported, show_json


@reported()
def status(config_file: ConfigFile = None, as_json: AsJSON = False) -> None:
    """What the daemon is at, what it holds, and what troubles it. Exit status 1 where no daemon serves, or one has a
    problem."""
    from snapshotter import maintenance

    found = asyncio.run(maintenance.status(config.of_the_node(config_file)))
    if as_json:
        show_json(found)
    else:
        sys.stdout.write("".join(f"{printable(line)}\n" for line in _lines(found)))
    if found.get("problems"):
        raise typer.Exit(1)


@reported()
def log_level(
    level: Annotated[str, typer.Argument(help="debug, info, warning or error; until the next start.")],
    config_file: ConfigFile = None,
) -> None:
    """Set the level of the daemon's log, without a restart; prints the one before."""
    from snapshotter import maintenance

    before = asyncio.run(maintenance.set_log_level(config.of_the_node(config_file), level))
    sys.stdout.write(f"{before}\n")


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{found['state']}: version {found['version']}, process {found['pid']:.0f}, root {found['root']}"]
    if "layers" not in found:
        return lines
    for name, each in found["snapshotters"].items():
        kinds = [f"{each[kind]:.0f} {kind}" for kind in ("active", "view", "committed", "unknown") if kind in each]
        counted = ", ".join(kinds) or "no snapshots"
        lines.append(f"snapshotter {name} ({each['contract']}, {each['format']}): {counted}")
    for each in found["layers"]:
        of = f"{each['count']:.0f} {each['state']} layers of {each['format']}"
        lines.append(f"{of}, {decimal(int(each['size_bytes']))}")
    unused = found["unused_layers"]
    lines.append(f"{unused['count']:.0f} of them unused, {decimal(int(unused['size_bytes']))}")
    lines.append(f"{decimal(int(found['free_bytes']))} free, {found['mounts_held']:.0f} mounts held")
    for build in found["builds"]:
        size = f" of {decimal(int(build['size_bytes']))}" if build["size_bytes"] else ""
        state = "waits" if build["is_waiting"] else f"{decimal(int(build['read_bytes']))}{size}"
        lines.append(f"build of {build['what']} ({build['format']}): {state}, {build['seconds']:.0f} s")
    lines += [f"problem: {each['what']}: {each['advice']}" for each in found["problems"]]
    return lines
