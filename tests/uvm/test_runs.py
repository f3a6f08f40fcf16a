# SPDX-License-Identifier: Apache-2.0
"""Images in a real guest: the tree that its kernel shows, and the process as the image asks for it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wait_for
from tests.images import mkimage
from tests.uvm.conftest import Guest, Layer, agreed, layers_of, machines, tree_of, write_layer
from uvm.errors import MachineError
from uvm.image import Image
from uvm.runner import Disk, run_policy

pytestmark = [pytest.mark.uvm, pytest.mark.slow]

# The last layer of this image adds to /tree/attrs without an entry for it. What its own index cannot know
# (docs/formats.md, E17), one more layer on top of all says.
PARENTS = [mkimage.D("tree"), mkimage.D("tree/attrs", 0o750, uid=6, gid=7, xattrs={"user.new": "2"})]


def assert_shows(guest: Guest, layers: list[Layer], listing: Layer, expected: dict[str, Any]) -> None:
    layers = [*layers, listing]
    result = guest(layers, "/.listing", "/")
    assert result.refused is None
    assert (result.exit_status, bytes(result.stderr)) == (0, b"")
    shown = tree_of(bytes(result.stdout))
    assert shown.pop(".listing")["size"] > 0
    assert mkimage.differences(expected, shown) == []
    assert [(status.name, status.verified, status.root_hash) for status in result.layers] == [
        (f"layer-{number}", True, layer.built.root_hash.hex()) for number, layer in enumerate(layers)
    ][::-1]


def test_the_guest_shows_the_merged_tree(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    parents = write_layer(mkimage.layer_tar(PARENTS), tmp_path / "parents.layer")
    assert_shows(guest, [*layers_of("layers", tmp_path), parents], listing_layer, expected_tree("layers"))


@pytest.mark.soak
def test_sixty_layers(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    layers = layers_of("many", tmp_path)
    assert len(layers) == 60
    assert_shows(guest, layers, listing_layer, expected_tree("many"))


@pytest.mark.soak
def test_one_layer_file_several_times_in_a_chain(
    guest: Guest, tmp_path: Path, listing_layer: Layer, expected_tree: Callable[[str], dict[str, Any]]
) -> None:
    layers = layers_of("dup", tmp_path)
    assert len({layer.path for layer in layers}) < len(layers)
    assert_shows(guest, layers, listing_layer, expected_tree("dup"))


USERS = [
    mkimage.F("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n"),
    mkimage.F("etc/group", "root:x:0:\nstaff:x:50:bob,ann\nann:x:1001:\naudio:x:29:ann,\nusers:x:100:anna\n"),
]
SEEN = "id -u; id -g; id -G; echo $HOME; pwd; echo $A; echo err >&2; umask; exit 7"


def test_the_process_is_as_the_image_says(guest: Guest, hello: Layer, tmp_path: Path) -> None:
    """A single layer with a second one for the users; status, both streams, user and groups, environment, directory."""
    busybox = [mkimage.L("bin/id", "busybox")]
    users = write_layer(mkimage.layer_tar([*busybox, *USERS]), tmp_path / "users.layer")
    result = guest(
        [hello, users], "sh", "-c", SEEN, env=["PATH=/bin", 'A=a "quoted"\n\\line é'], cwd="/new/dir", user="ann"
    )
    assert (result.refused, result.exit_status, bytes(result.stderr)) == (None, 7, b"err\n")
    assert result.stdout.decode().splitlines() == [
        "1000", "1001", "1001 29 50", "/home/ann", "/new/dir", 'a "quoted" \\line é', "0022",
    ]  # fmt: skip
    assert list(result.phases) == ["attached", "init", "policy", "disks", "mounted", "exited"]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", "0 0 0 /root"),
        ("1000", "1000 1001 1001 29 50 /home/ann"),
        ("4711", "4711 0 0 /"),
        ("4711:29", "4711 29 29 /"),
        ("ann:staff", "1000 50 50 29 /home/ann"),
    ],
)
def test_users(guest: Guest, hello: Layer, tmp_path: Path, user: str, ids: str) -> None:
    users = write_layer(mkimage.layer_tar([mkimage.L("bin/id", "busybox"), *USERS]), tmp_path / "users.layer")
    result = guest([hello, users], "sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME", user=user)
    assert result.stdout.decode().split() == ids.split()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("args", "options", "status", "said"),
    [
        (["/no/such"], {}, 127, "uvm: /no/such: No such file or directory\n"),
        (["/etc/hello"], {}, 126, "uvm: /etc/hello: Permission denied\n"),
        (["true"], {"user": "nobody"}, 126, "uvm: user nobody is not in the image's /etc/passwd\n"),
        (["true"], {"user": "0:wheel"}, 126, "uvm: group wheel is not in the image's /etc/group\n"),
        (["true"], {"cwd": "/etc/hello/x"}, 126, "uvm: /etc/hello/x: Not a directory\n"),
        (["sh", "-c", "kill -9 $$"], {}, 0, ""),  # pid 1 of its namespace: its own signals do not reach it
        (["sh", "-c", "sleep 1000 & sh -c 'kill -9 $$'; exit $?"], {}, 137, "Killed\n"),
    ],
)
def test_how_a_process_ends(
    guest: Guest, hello: Layer, args: list[str], options: dict[str, Any], status: int, said: str
) -> None:
    result = guest([hello], *args, **options)
    assert (result.refused, result.exit_status, result.stderr.decode()) == (None, status, said)


def test_the_process_reaches_no_disk(guest: Guest, hello: Layer, tmp_path: Path) -> None:
    """As root it has neither the guest's devices nor the right to make them, and what it writes is its own."""
    tools = write_layer(
        mkimage.layer_tar([mkimage.L(f"bin/{name}", "busybox") for name in ("mknod", "dd", "grep")]),
        tmp_path / "tools.layer",
    )
    script = """
        ls /dev
        cat /proc/partitions | grep -c vda
        for device in '254 0' '253 0' '1 1'; do mknod /tmp/disk b $device && echo made; done
        mount -t devtmpfs none /tmp && echo mounted
        echo changed >/etc/hello && cat /etc/hello
        dd if=/dev/zero bs=1000 count=2000 2>/dev/null
    """
    result = guest([hello, tools], "sh", "-c", script)
    assert result.exit_status == 0
    lines, _, zeros = bytes(result.stdout).partition(b"\0")
    assert lines.decode().split() == [
        "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero",
        "1", "changed",
    ]  # fmt: skip
    assert len(zeros) == 2_000_000 - 1
    assert result.stderr.decode().count("Operation not permitted") == 3
    assert all(status.verified for status in result.layers)


def test_a_guest_that_takes_too_long_is_ended(uvm_image: Image, hello: Layer) -> None:
    policy, disks = agreed([hello], "sleep", "1000")
    with pytest.raises(MachineError, match="not done after 2 s"):
        asyncio.run(run_policy(uvm_image, policy.text(), disks, timeout_s=2))
    assert machines() == []


@pytest.mark.parametrize(
    ("hot_plug", "reason"),
    [(True, r"disk0: .*No such file or directory"), (False, r"QEMU ended early .*No such file or directory")],
)
def test_a_disk_that_is_not_there_is_said(
    uvm_image: Image, hello: Layer, tmp_path: Path, hot_plug: bool, reason: str
) -> None:
    policy, _ = agreed([hello])
    with pytest.raises(MachineError, match=reason):
        asyncio.run(run_policy(uvm_image, policy.text(), [Disk("layer-0", tmp_path / "gone")], hot_plug=hot_plug))
    assert machines() == []


@pytest.mark.soak
def test_disks_that_are_there_from_the_start(guest: Guest, hello: Layer) -> None:
    policy, disks = agreed([hello], "cat", "/etc/hello")
    result = guest.boot(policy.text(), disks, hot_plug=False)
    assert (result.refused, bytes(result.stdout)) == (None, b"hello from a tar layer\n")


RUNNER = """
import asyncio, sys
from pathlib import Path
from uvm.image import Image
from uvm.runner import Disk, run_policy
policy, *disk = map(Path, sys.argv[2:])
asyncio.run(run_policy(Image(Path(sys.argv[1])), policy.read_bytes(), [Disk("layer-0", *disk)], timeout_s=300))
"""


@pytest.fixture
def start_runner(uvm_image: Image, hello: Layer, tmp_path: Path) -> Callable[[], subprocess.Popen[bytes]]:
    """One in a process of its own; what it may leave in a directory for temporary files is in /scratch."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "policy").write_bytes(agreed([hello], "sleep", "100")[0].text())
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    arguments = [uvm_image.directory, tmp_path / "policy", hello.path]
    return lambda: subprocess.Popen([sys.executable, "-c", RUNNER, *map(str, arguments)], env=environment)


def test_a_killed_runner_takes_its_guest_along(
    start_runner: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    runner = start_runner()
    try:
        wait_for("QEMU", machines)
    finally:
        runner.kill()
        runner.wait()
    wait_for("the end of QEMU", lambda: not machines())
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.soak
def test_nothing_is_left_of_many_that_were_killed(
    start_runner: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    moments = random.Random(6)
    for number in range(25):
        runner = start_runner()
        try:
            time.sleep(moments.uniform(0.1, 12))
        finally:
            runner.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3])
            runner.wait()
    wait_for("the end of QEMU", lambda: not machines())
    assert not list((tmp_path / "scratch").iterdir())
