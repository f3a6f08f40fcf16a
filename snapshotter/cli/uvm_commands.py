# SPDX-License-Identifier: Apache-2.0
"""`tardevctl uvm`: what a person types and sees."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

import uvm as package
from snapshotter import config, log
from snapshotter.cli.output import AsJSON, ConfigFile, reported, rows, show_json
from snapshotter.errors import one_line
from uvm.frames import Kind
from uvm.image import Image
from uvm.runner import MEMORY_MIB

app = typer.Typer(no_args_is_help=True, help="The reference UVM: run an image on verified layers.")

NOT_RUN: Final = 125  # as other programs that run containers say it
_INSTALLED: Final = Path("/usr/share/tardev-snapshotter/uvm")
_BUILT: Final = Path(package.__file__).parents[1] / ".cache/uvm"  # by ./dev in a checkout
_COLUMNS: Final = ("device", "layer", "root_hash", "verified")


@app.callback()
def _nouns() -> None:
    """A command stands behind the noun, even while there is only one."""


@app.command()
@reported(trouble=NOT_RUN)
def run(
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="A reference in containerd; oci:DIRECTORY[:TAG]; oci-archive:FILE[:TAG]."),
    ],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- CMD...]", help="In the place of the image's own.")
    ] = None,
    snapshotter: Annotated[
        str, typer.Option(help="Whose layer files of an image in containerd; by default those for VMs.")
    ] = "",
    namespace: Annotated[str, typer.Option(help="containerd's.", envvar="CONTAINERD_NAMESPACE")] = "default",
    format: Annotated[str, typer.Option(help="Of the layers of an OCI layout or archive.")] = "tar-index",
    tamper: Annotated[
        bool, typer.Option("--tamper", help="Change a bit of the topmost layer, to see the guest refuse it.")
    ] = False,
    memory: Annotated[int, typer.Option(min=64, help="Of the guest, in MiB.")] = MEMORY_MIB,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds; by default none.")] = None,
    guest: Annotated[
        Path | None, typer.Option("--uvm", help="Where the guest's kernel and initramfs are.", envvar="TARDEV_UVM")
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJSON = False,
) -> None:
    """Run an image's command in a VM that sees its layers as block devices and verifies every block.

    Output and exit status are the command's; what the layers were goes to standard error. Status 125: it was not run.
    """
    # Here, for it brings the daemon's builder along, by which all other commands would start later.
    from snapshotter.cli import uvm

    request = uvm.Request(
        image=image,
        command=command or (),
        guest=Image(guest or (_BUILT if _BUILT.is_dir() else _INSTALLED)),
        settings=config.of_the_node(config_file),
        snapshotter=snapshotter,
        namespace=namespace,
        format=format,
        tamper=tamper,
        memory_mib=memory,
        timeout_s=timeout,
    )
    log.set_up("error")  # standard output is the command's
    outcome = asyncio.run(uvm.run(request, None if as_json else _write))
    result = outcome.result
    if as_json:
        show_json(
            {
                "exit_status": result.exit_status,
                "refused": result.refused,
                "stdout": result.stdout.decode(errors="backslashreplace"),
                "stderr": result.stderr.decode(errors="backslashreplace"),
                "layers": outcome.layers,
                "phases_seconds": {name: round(seconds, 3) for name, seconds in result.phases.items()},
                "accelerator": result.accelerator,
            }
        )
    else:
        rows(outcome.layers, _COLUMNS, as_json=False, aside=True)
    if result.refused is not None:
        sys.stderr.write(f"tardevctl: the guest refuses: {one_line(result.refused)}\n")
        raise typer.Exit(NOT_RUN)
    raise typer.Exit(result.exit_status or 0)


def _write(kind: Kind, piece: bytes) -> None:
    fd = 1 if kind is Kind.STDOUT else 2
    while piece:
        piece = piece[os.write(fd, piece) :]
