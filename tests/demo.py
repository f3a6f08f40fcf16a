# SPDX-License-Identifier: Apache-2.0
"""`./dev demo`: the main job with real parts. Two images that share layers go from a registry through containerd
and us into containers, on the host and in a virtual machine that verifies every block; the tables show what was built
and what the guest says of it. Nothing of it is left on the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blockdev.formats.layer_file import of_chain
from snapshotter.cli import uvm_commands
from tests.harness import (
    BIN,
    SNAPSHOTTER,
    Containerd,
    Daemon,
    ProcessFailed,
    Registry,
    Release,
    host_state,
    make_images,
    releases,
    remove_container_state,
    wait_for,
)

# The name whose layers are for VMs; SNAPSHOTTER's are for runc. Both have the same layer files.
FOR_VMS = "tardev"
NAMES = "".join(
    f'[snapshotters.{name}]\ncontract = "{contract}"\nformat = "tar-index"\n'
    for name, contract in ((SNAPSHOTTER, "host"), (FOR_VMS, "kata-tardev"))
)
# What /etc/hello holds in each; both stand on the same base layer.
IMAGES = {"hello": "hello from a tar layer", "layers": "hello from layer 7"}
UVM_SECONDS = 300  # where no processor helps, and others are busy
# A pipe has no width: nothing may be cut there.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


class DemoFailed(Exception):
    pass


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"• {text}", end="")
    try:
        yield
    except BaseException:
        console.print("  [red]failed[/red]")
        raise
    console.print(f"  [dim]{time.monotonic() - started:.1f} s[/dim]")


def built(daemon: Daemon) -> int:
    return int(daemon.metric("tardev_builds_total", result="ok"))


def table(layers: list[dict[str, Any]], users: dict[str, list[str]]) -> Table:
    """`users`: the images that have a diff ID. Two of one namespace share its snapshot too, so we count one.

    A parents layer is of no image by itself.
    """
    shown = Table("DIFF ID", "ROOT HASH", box=None, pad_edge=False)
    for name in ("TAR", "FILE", "SECONDS"):
        shown.add_column(name, justify="right")
    shown.add_column("SHARED BY")
    shown.add_column("VERITYSETUP")
    for layer in layers:
        shown.add_row(
            layer["diff_id"][:19], layer["root_hash"], f"{layer['tar_size_bytes']:,}", f"{layer['file_size_bytes']:,}",
            f"{layer['build_seconds']:.2f}", ", ".join(users.get(layer["diff_id"], ["a chain of layers"])), "accepts",
        )  # fmt: skip
    return shown


def main_job(directory: Path, release: Release, stack: contextlib.ExitStack) -> None:
    with step("makes two images that share their base layer: hello, 1 layer; layers, 8 layers"):
        images = make_images(directory / "images", *IMAGES)
    with step("starts a registry, containerd and tardev-snapshotter, all with private directories and sockets"):
        registry = Registry(directory / "registry")
        stack.callback(registry.stop)
        registry.start()
        root = directory / "containerd"
        daemon = Daemon(directory / "daemon", root / "root", NAMES, containerd_socket=str(root / "c.sock"))
        stack.callback(daemon.clean_up)
        daemon.start()
        # Of its own, so that what runc keeps under /run/containerd can be told from others' and removed.
        namespace = f"tardev-demo-{os.getpid()}"
        containerd = Containerd(release, root, daemon.address, namespace, snapshotters=(SNAPSHOTTER, FOR_VMS))
        stack.callback(remove_container_state, namespace)
        stack.callback(containerd.clean_up)
        containerd.start()
    with step("pushes both images with skopeo"):
        references = {name: registry.push(images / f"{name}.tar", f"{name}:demo") for name in IMAGES}
    for reference in references.values():
        before = built(daemon)
        with step(f"pulls {reference}"):
            containerd.pull(reference)
        console.print(f"  layers built: {built(daemon) - before}; layer files in all: {len(daemon.layer_files())}")
    for name, reference in references.items():
        with step(f"runs a container of {name}: cat /etc/hello"):
            said = containerd.cat(reference, f"demo-{name}", "/etc/hello").strip()
        console.print(f"  {said}")
        if said != IMAGES[name]:
            raise DemoFailed(f"expected {IMAGES[name]!r}")
    before = built(daemon)
    with step("pulls hello under another tag: its layer is here"):
        containerd.pull(registry.push(images / "hello.tar", "hello:again"))
    if built(daemon) != before:
        raise DemoFailed("a stored layer was built again")
    console.print("  layers built: 0")

    users: dict[str, list[str]] = {}
    for name in IMAGES:
        for diff_id in json.loads((images / f"{name}.json").read_text())["diff_ids"]:
            users.setdefault(diff_id, []).append(name)
    layers: list[dict[str, Any]] = daemon.tardevctl("layers")
    with step("asks veritysetup about every layer file"):
        for layer in layers:
            daemon.verify_layer(layer)
    console.print()
    console.print(table(layers, users))
    console.print()
    if {layer["diff_id"] for layer in layers if not of_chain(layer["format"])} != set(users):
        raise DemoFailed("the layers are not those that the images promise")

    if platform.machine() == "x86_64":
        in_a_vm(daemon, containerd, references["layers"])
    else:
        console.print("• the virtual machine is left out: the reference UVM is for x86_64")

    with step("removes the images: snapshots and mounts go"):
        for image in containerd.ctr("images", "list", "-q").split():
            containerd.ctr("images", "rm", "--sync", image)
        containerd.collect_until("every snapshot is removed", lambda: not daemon.snapshots())
        wait_for("every mount is released", lambda: not daemon.mounts())


def in_a_vm(daemon: Daemon, containerd: Containerd, reference: str) -> None:
    before = built(daemon)
    with step(f"pulls {reference} for virtual machines: its layer files are here"):
        containerd.pull(reference, snapshotter=FOR_VMS)
    if built(daemon) != before:
        raise DemoFailed("a stored layer was built again")
    command = (reference, "--", "cat", "/etc/hello")
    with step("boots a virtual machine, plugs each layer file as a read-only disk, runs cat /etc/hello there"):
        status, said, aside = uvm_run(daemon, containerd, *command)
    console.print(f"  {said.strip()}\n\n{aside}", soft_wrap=True)
    if (status, said.strip()) != (0, IMAGES["layers"]):
        raise DemoFailed(f"expected {IMAGES['layers']!r} and status 0, not {status}")
    with step("the same with one bit of the topmost layer changed"):
        status, said, aside = uvm_run(daemon, containerd, "--tamper", *command)
    console.print(f"  {aside.splitlines()[-1]}; exit status {status}", soft_wrap=True)
    if status != uvm_commands.NOT_RUN or said:
        raise DemoFailed("the guest did not refuse a changed layer")


def uvm_run(daemon: Daemon, containerd: Containerd, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [BIN / "tardevctl", "uvm", "run", "--config", daemon.config, "--namespace", containerd.namespace, *arguments],
        capture_output=True, text=True, timeout=UVM_SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    found = releases()
    parser.add_argument(
        "--containerd", choices=("later", "system"), default="later",
        help="of a later Debian suite, with our diff plugin (default), or this Debian's own",
    )  # fmt: skip
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("./dev demo: must run as root: containers and mounts need it")
    release = found[options.containerd]
    console.print(f"containerd {'.'.join(map(str, release.version))} and runc, {SNAPSHOTTER} through one unix socket")
    before = host_state()
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="tardev-demo-") as path, contextlib.ExitStack() as stack:
            main_job(Path(path), release, stack)
    except (DemoFailed, ProcessFailed, TimeoutError) as error:
        sys.exit(f"./dev demo: {error}")
    left = host_state() - before
    if left:
        sys.exit("./dev demo: left behind: " + "; ".join(sorted(left)))
    console.print("• nothing is left: no mount, loop device, process or file")
    console.print(f"[green]done[/green] in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
