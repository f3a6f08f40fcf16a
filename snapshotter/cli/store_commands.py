# SPDX-License-Identifier: Apache-2.0
"""`tardevctl fsck`, `scrub` and `gc`: what a person types and sees."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from snapshotter import config, log
from snapshotter.cli.output import AsJSON, ConfigFile, ProgressBytes, printable, progress, reported, show, show_json
from snapshotter.config import parse_size

_RATE: Final = typer.Option(metavar="SIZE", help="Bytes that are read a second at the most, as 32MiB; 0: no limit.")


@reported()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend it, broken layers from their blobs.")] = False,
    rate: Annotated[str, _RATE] = "0",
    config_file: ConfigFile = None,
    as_json: AsJSON = False,
) -> None:
    """Check everything that is stored, every block of every layer: nothing is changed without --repair.

    Beside a daemon that serves, or without one.
    """
    _check("checking", config_file, as_json, repair=repair, rate=rate, blocks_only=False)


@reported()
def scrub(rate: Annotated[str | None, _RATE] = None, config_file: ConfigFile = None, as_json: AsJSON = False) -> None:
    """Read every block of every layer now, as the daemon does now and then, and repair what is bad."""
    _check("scrubbing", config_file, as_json, repair=True, rate=rate, blocks_only=True)


@reported()
def gc(
    everything: Annotated[bool, typer.Option("--all", help="Keep nothing for the next pull.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJSON = False,
) -> None:
    """Delete layers that no snapshot refers to, as far as the configured cache may not keep them."""
    from snapshotter import maintenance  # the daemon's parts take their time to load

    log.set_up("error")
    done = asyncio.run(maintenance.collect(config.of_the_node(config_file), everything=everything))
    show({"layers": done.layers, "size_bytes": done.size_bytes}, as_json)


def _check(
    what: str, config_file: Path | None, as_json: bool, *, repair: bool, rate: str | None, blocks_only: bool
) -> None:
    log.set_up("error")  # what is done here instead of in a daemon is told as findings
    settings = config.of_the_node(config_file)
    bytes_per_second = parse_size(settings.scrub.rate if rate is None else rate)
    with progress(what) as report:
        findings = asyncio.run(_findings(settings, report, as_json, repair, bytes_per_second, blocks_only))
    if as_json:
        show_json(findings)
    elif not findings:
        sys.stdout.write("nothing is wrong\n")
    if any(finding["outcome"] != "repaired" for finding in findings):
        raise typer.Exit(1)


async def _findings(
    settings: config.Config,
    report: ProgressBytes,
    as_json: bool,
    repair: bool,
    bytes_per_second: int,
    blocks_only: bool,
) -> list[dict[str, Any]]:
    """As they come they are shown."""
    from snapshotter import maintenance
    from snapshotter.fsck import Checked

    findings = []
    async for event in maintenance.check(
        settings, repair=repair, bytes_per_second=bytes_per_second, blocks_only=blocks_only
    ):
        if isinstance(event, Checked):
            report(event.done_bytes, event.total_bytes)
            continue
        findings.append(asdict(event))
        if not as_json:
            advice = f": {event.advice}" if event.advice else ""
            sys.stdout.write(printable(f"{event.outcome}: {event.what}: {event.problem}{advice}") + "\n")
            sys.stdout.flush()
    return findings
