# SPDX-License-Identifier: Apache-2.0
"""`tardevctl config`: what has to stand in whose file."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from policy.documents import host_platform
from snapshotter import config, fragments
from snapshotter.cli.output import ConfigFile, reported
from snapshotter.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Configuration: the daemon's, and what containerd needs of it.")


@app.command()
@reported()
def containerd(
    version: Annotated[
        str, typer.Option("--version", help="Of containerd, as 1.7 or 2.1.9; without, that of the one in PATH.")
    ] = "",
    on: Annotated[str, typer.Option("--platform", help="Of the node; without, this machine's.")] = "",
    config_file: ConfigFile = None,
) -> None:
    """Print what to merge into containerd's configuration, for the snapshotters that the daemon has."""
    settings = config.of_the_node(config_file)
    wanted = fragments.version_of(version or _installed())
    sys.stdout.write(fragments.fragment(wanted, settings, on or str(host_platform())))


def _installed() -> str:
    """Raises ConfigError."""
    try:
        done = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.split()[2].partition("~")[0]  # "containerd NAME VERSION COMMIT"; Debian's has a suffix
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(f"which containerd is installed cannot be told, give its --version: {error}") from None
