# SPDX-License-Identifier: Apache-2.0
"""Containers that run on the contract `host`: deep images, user namespaces, set-user-ID programs and device nodes."""

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev.kernel.mounts import parse_mountinfo
from tests.conftest import in_every_run
from tests.harness import SNAPSHOTTER, Containerd, Daemon, oci_archive, releases, wait_for
from tests.integration.conftest import Node, a_node

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

PLAIN = "application/vnd.oci.image.layer.v1.tar"
REMAP = '[snapshotters.tardev-host]\ncontract = "host"\nformat = "tar-index"\nremap_ids = true\n'
USER = 77


@dataclass(frozen=True)
class Entry:
    name: str
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, tarfile.DIRTYPE, 0o755)


def tar(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for entry in entries:
            member = tarfile.TarInfo(entry.name)
            member.type, member.mode, member.size = entry.type, entry.mode, len(entry.data)
            member.uid, member.gid = entry.owner
            member.devmajor, member.devminor = entry.device
            file.addfile(member, io.BytesIO(entry.data))
    return out.getvalue()


def base() -> list[Entry]:
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    return [directory("bin"), Entry("bin/busybox", mode=0o755, data=busybox), Entry("bin/sh", mode=0o755, data=busybox)]


def import_image(containerd: Containerd, name: str, layers: Sequence[bytes], scratch: Path, snapshotter: str) -> str:
    reference = f"localhost/{name}:1"
    archive = scratch / f"{name}.tar"
    oci_archive(archive, reference, layers, PLAIN, ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers])
    containerd.ctr("images", "import", "--snapshotter", snapshotter, archive)
    return reference


def run_in(containerd: Containerd, reference: str, name: str, script: str, *flags: str, snapshotter: str) -> str:
    return containerd.says(
        "run", "--rm", "--snapshotter", snapshotter, *flags, reference, name, "/bin/sh", "-c",
        f"PATH=/bin; b() {{ busybox \"$@\"; }}; {script}",
    )  # fmt: skip


@pytest.mark.parametrize("depths", in_every_run([(1, 128), (60, 127)], (1, 128).__eq__), ids=str)
def test_images_of_1_to_128_layers_run_with_1_6_and_with_2_1_after_an_upgrade(
    tmp_path: Path, depths: tuple[int, ...]
) -> None:
    layers = [tar(*base(), directory("d"))]
    layers += [tar(directory("d"), Entry(f"d/{n}"), Entry("d/top", data=b"%d" % n)) for n in range(1, 128)]
    script = "b ls d | b wc -l; b cat d/top"
    with a_node(tmp_path, "system") as node:
        images = {n: import_image(node.containerd, f"deep{n}", layers[:n], tmp_path, SNAPSHOTTER) for n in depths}

        def runs(label: str) -> None:
            for n, image in images.items():
                said = run_in(
                    node.containerd, image, f"{label}-{n}", f"b touch d/top; {script}", snapshotter=SNAPSHOTTER
                )
                assert said.split() == ([str(n), str(n - 1)] if n > 1 else ["1"])
            node.containerd.collect_until("every mount is released", lambda: not node.daemon.mounts())

        runs("system")
        node.containerd.stop()
        node.containerd = Containerd(releases()["later"], node.containerd.directory, node.daemon.address)
        node.containerd.start()
        runs("later")


# The numbers of geteuid and exit, and a program that ends with its effective user as status.
_PROGRAM = b"\xb8\x6b\0\0\0\x0f\x05\x89\xc7\xb8\x3c\0\0\0\x0f\x05"


def says_its_effective_user() -> bytes:
    """An ELF file for x86_64 (man 5 elf): the header, one loaded segment, the program."""
    base_address, header_bytes = 0x400000, 64 + 56
    size = header_bytes + len(_PROGRAM)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base_address + header_bytes, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base_address, base_address, size, size, 0x1000)
    return header + segment + _PROGRAM


CHECK = (
    "PATH=/bin; for p in plain suid suid-of-5; do /$p; echo $p $?; done;"
    " busybox stat -c '%n %F %u %g %a %t %T' /suid /suid-of-5 /nodes/* /replaced/*; busybox ls / /nodes /replaced;"
    " echo x >/nodes/null && echo written; busybox head -c 3 /nodes/zero | busybox wc -c; busybox id -u"
)


def privileged_layers() -> list[bytes]:
    program = says_its_effective_user()
    return [
        tar(
            *base(),
            directory("etc"),
            Entry("etc/passwd", data=f"root:x:0:0::/:/bin/sh\nuser:x:{USER}:{USER}::/:/bin/sh\n".encode()),
            Entry("check", mode=0o755, data=f"#!/bin/sh\n{CHECK}\n".encode()),
            Entry("suid", mode=0o4755, data=program),
            Entry("suid-of-5", mode=0o4755, owner=(5, 5), data=program),
            Entry("plain", mode=0o755, data=program),
            directory("nodes"),
            Entry("nodes/null", tarfile.CHRTYPE, 0o666, device=(1, 3)),
            Entry("nodes/zero", tarfile.CHRTYPE, 0o666, device=(1, 5)),
            Entry("nodes/gone", tarfile.CHRTYPE, 0o666, device=(1, 3)),
            Entry("deleted"),
            directory("replaced"),
            Entry("replaced/old"),
        ),
        tar(
            directory("nodes"),
            Entry("nodes/.wh.gone"),
            Entry(".wh.deleted"),
            directory("replaced"),
            Entry("replaced/.wh..wh..opq"),
            Entry("replaced/new"),
        ),
    ]


AS_USER = "b su user -c /check"
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "user": (AS_USER, ()),
    "user-new-privileges": (AS_USER, ("--allow-new-privs",)),
    "user-read-only": (AS_USER, ("--allow-new-privs", "--read-only")),
    "root": ("/check", ()),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its programs are for x86_64")
def test_set_user_id_programs_and_devices_work_as_with_overlayfs(node: Node, tmp_path: Path) -> None:
    """Our mounts of layers are nosuid and nodev; the overlay above them is what counts, and is not."""
    layers, said = privileged_layers(), {}
    for snapshotter in ("overlayfs", SNAPSHOTTER):
        for name, image_layers in (("one", layers[:1]), ("two", layers)):
            image = import_image(node.containerd, f"privileged-{name}", image_layers, tmp_path, snapshotter)
            for kind, (script, flags) in RUNS.items():
                said[snapshotter, name, kind] = run_in(
                    node.containerd, image, f"{name}-{kind}", script, *flags, snapshotter=snapshotter
                )
    for (_, name, kind), output in list(said.items()):
        assert output == said["overlayfs", name, kind]
    ours = said[SNAPSHOTTER, "two", "user-new-privileges"]
    assert ours.startswith(f"plain {USER}\nsuid 0\nsuid-of-5 5\n")
    assert "written\n3\n" in ours
    assert "deleted" not in ours
    assert said[SNAPSHOTTER, "two", "user"].startswith(f"plain {USER}\nsuid {USER}\n")


def test_a_view_of_one_layer_is_not_left_without_its_set_user_id_programs(later_node: Node, tmp_path: Path) -> None:
    """It is a bind mount of ours, which is nosuid and nodev; containerd's remount to read-only takes that off."""
    containerd = later_node.containerd
    image = import_image(containerd, "privileged-one", privileged_layers()[:1], tmp_path, SNAPSHOTTER)
    target = tmp_path / "rootfs"
    target.mkdir()
    containerd.ctr("images", "mount", "--snapshotter", SNAPSHOTTER, image, target)
    try:
        (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {target} " in line]
        assert parse_mountinfo(line)[0].fs_type == "erofs"
        options = line.split()[5].split(",")
        assert "ro" in options
        assert not {"nosuid", "nodev", "noexec"} & set(options)
    finally:
        containerd.ctr("images", "unmount", "--rm", "--snapshotter", SNAPSHOTTER, target)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Where users of a container may walk through, as they may through containerd's own directories."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


def test_containerd_1_6_maps_nothing_itself_and_need_not(open_directory: Path) -> None:
    """Its ctr passes the labels on; its own overlayfs ignores them, and such a container cannot start there."""
    place = open_directory
    daemon = Daemon(place / "daemon", place / "containerd/root", REMAP, str(place / "containerd/c.sock"))
    containerd = Containerd(releases()["system"], place / "containerd", daemon.address)
    daemon.start()
    try:
        containerd.start()
        image = import_image(containerd, "mapped", privileged_layers(), place, SNAPSHOTTER)
        said = run_in(
            containerd, image, "mapped", "b touch /new && b stat -c '%n %u %g' / /bin /new", "--remap-labels",
            "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", snapshotter=SNAPSHOTTER,
        )  # fmt: skip
        assert said == "/ 0 0\n/bin 0 0\n/new 0 0\n"
        containerd.collect_until("every mount is released", lambda: not daemon.mounts())
    finally:
        containerd.clean_up()
        daemon.clean_up()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its programs are for x86_64")
def test_a_container_in_a_user_namespace_owns_its_image(open_directory: Path) -> None:
    place = open_directory
    daemon = Daemon(place / "daemon", place / "containerd/root", REMAP, str(place / "containerd/c.sock"))
    containerd = Containerd(releases()["later"], place / "containerd", daemon.address)
    text = containerd.config.read_text()
    containerd.config.write_text(
        text.replace("type = 'snapshot'\n", "type = 'snapshot'\ncapabilities = ['remap-ids']\n")
    )
    daemon.start()
    try:
        containerd.start()
        said = {}
        for snapshotter in ("overlayfs", SNAPSHOTTER):
            image = import_image(containerd, "mapped", privileged_layers(), place, snapshotter)
            for name, maps in (
                ("one", ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")),
                ("two", ("--uidmap", "0:300000:10", "--uidmap", "10:400000:1000", "--gidmap", "0:200000:65536")),
            ):
                flags = (*maps, "--remap-labels", "--allow-new-privs")
                script = (
                    "b stat -c '%n %u %g %a' / /bin /suid /suid-of-5 /replaced; b cat /proc/self/uid_map;"
                    " b touch /new && b chown 5:6 /new && b chmod 600 /suid-of-5 && b mkdir /d && b rm /plain;"
                    " b stat -c '%n %u %g %a' /new /suid-of-5 /d /; b ls /"
                )
                said[snapshotter, name] = run_in(
                    containerd, image, f"{name}-{snapshotter}", script, *flags, snapshotter=snapshotter
                )
                said[snapshotter, name + " user"] = run_in(
                    containerd, image, f"{name}-user-{snapshotter}", AS_USER, *flags, snapshotter=snapshotter
                )
        for (_, name), output in said.items():
            assert output == said["overlayfs", name]
        assert said[SNAPSHOTTER, "one"].startswith("/ 0 0 755\n/bin 0 0 755\n/suid 0 0 4755\n/suid-of-5 5 5 4755\n")
        assert f"plain {USER}\nsuid 0\nsuid-of-5 5\n" in said[SNAPSHOTTER, "two user"]

        # What it writes has, on the host, the owners that the mapping gives.
        mapped = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--remap-labels")
        containerd.ctr(
            "run", "--detach", "--snapshotter", SNAPSHOTTER, *mapped, image, "stays", "/bin/sh", "-c",
            "cd /; busybox touch new; busybox chown 5:6 new; busybox chmod 600 /suid-of-5; busybox sleep 1000",
        )  # fmt: skip
        uppers = (daemon.root / "snapshots").glob
        wait_for("the collector has taken those of the containers before it", lambda: len(list(uppers("*/fs"))) == 1)
        (upper,) = uppers("*/fs")
        wait_for("it has written", lambda: (upper / "suid-of-5").exists())
        found = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in (upper, *upper.iterdir())}
        assert found["fs"] == (100000, 200000)
        assert found["new"] == (100005, 200006)
        assert found["suid-of-5"] == (100005, 200005)
        daemon.kill()
        daemon.restart()
        containerd.ctr("tasks", "kill", "--signal", "SIGKILL", "stays")
        wait_for("it has ended", lambda: "STOPPED" in containerd.ctr("tasks", "list"))
        containerd.ctr("tasks", "delete", "stays")
        containerd.retry("containers", "delete", "stays")
        containerd.collect_until("every mount is released", lambda: not daemon.mounts())
        wait_for("every directory is gone", lambda: not list((daemon.root / "snapshots").iterdir()))
    finally:
        containerd.clean_up()
        daemon.clean_up()
