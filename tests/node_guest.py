# SPDX-License-Identifier: Apache-2.0
"""A node in a guest: our daemon, containerd and runc under Debian's cloud kernel, which has device-mapper.

    python -m tests.node_guest           build the image in .cache/node, where it is not up to date
    python -m tests.node_guest COMMAND   the same, then a shell's line in such a guest, and what it says

The image is a layer file of ours: this machine's Python, the packages of .venv, the later containerd, a few programs.
It holds nothing of this checkout but that: the checkout comes with each guest, as a tar on a disk of its own, and so
does a scratch disk at /tmp. There is no network but the loopback.
"""

from __future__ import annotations

import compileall
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests import guest
from tests.harness import BIN, CACHE, CHECKOUT, run
from uvm import cpio
from uvm.image import with_dependencies

IMAGE: Final = CACHE / "node"
ROOT_NAME: Final = "root.erofs"
INITRAMFS_NAME: Final = "initramfs"
HERE: Final = Path("/node")  # the checkout, in the guest
# Before them: the root, the checkout and the scratch disk.
FIRST_DISK: Final = "/dev/vdd"
_MEMORY_MIB: Final = 1536
_SCRATCH_BYTES: Final = 4 << 30
_MODULES: Final = (
    "virtio_blk", "erofs", "overlay", "loop", "sha256_ssse3?", "crc32c_intel?", "dm_mod", "dm_verity", "dm_log_writes",
    "xfs",
)  # fmt: skip
_PROGRAMS: Final = (
    "busybox", "mount", "umount", "losetup", "runc", "dmsetup", "veritysetup", "mkfs.ext4", "mkfs.xfs", "strace",
)  # fmt: skip
# Of .venv: what only checks, draws or installs.
_LEFT_OUT: Final = re.compile(
    r"PIL|_pytest|.*__mypyc.*|ast_serialize|contourpy|fontTools|grpc_tools|hypothesis|kiwisolver|librt|matplotlib|mpl_.*"
    r"|mypy.*|numpy.*|pillow.*|pip|pip-.*|pkg_resources|pylab.*|pytest.*|ruff.*|setuptools.*|tzdata.*|__editable__.*"
    r"|_distutils.*|distutils.*|__pycache__|regopy.*|ruamel.*|oras.*|requests.*|jsonschema.*|rpds.*|referencing.*"
)
_LEFT_OUT_OF_PYTHON: Final = frozenset(
    {"test", "idlelib", "lib2to3", "tkinter", "ensurepip", "turtledemo", "dist-packages", "pydoc_data"}
)
_PACKAGES: Final = ("verity", "blockdev", "policy", "uvm", "snapshotter", "tests")
_BOOT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
while read -r name; do
    insmod "/modules/${name#\\?}" 2>/dev/null || echo "module $name: refused" >/dev/ttyS0
done </modules/order
mkdir /lower /upper /new
mount -t erofs -o ro /dev/vda /lower
mount -t tmpfs -o size=1g none /upper
mkdir /upper/fs /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/fs,workdir=/upper/work none /new
for name in dev proc sys; do mkdir -p /new/$name; mount --move /$name /new/$name; done
exec switch_root /new /usr/sbin/init
"""
_INIT: Final = """#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
/usr/bin/busybox --install -s /usr/bin 2>/dev/null
mkdir -p /dev/pts /dev/shm /run /tmp /root /var/lib
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mount -t cgroup2 none /sys/fs/cgroup
for controller in cpu io memory pids; do echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control; done 2>/dev/null
mount /dev/vdc /tmp
chmod 1777 /tmp
ifconfig lo 127.0.0.1 up
tar x -C @HERE@ </dev/vdb
cd @HERE@
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
status=0
while echo "<$status>" && read -r line; do
    sh -c "$line" </dev/null
    status=$?
done
"""


def build() -> Path:
    """The directory of the image, which is made where what it is made of has changed. Needs .venv and .cache."""
    files = dict(_files())
    stamp = hashlib.sha256(Path(__file__).read_bytes() + guest.kernel_image().name.encode())
    for name, source in sorted(files.items()):
        about = source.stat() if isinstance(source, Path) else None
        stamp.update(f"{name} {(about.st_size, about.st_mtime_ns) if about else source!r}\n".encode())
    wanted = stamp.hexdigest()
    recorded = IMAGE / "stamp"
    if not recorded.exists() or recorded.read_text() != wanted:
        IMAGE.mkdir(parents=True, exist_ok=True)
        recorded.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=IMAGE) as scratch:
            tar, root = Path(scratch) / "tar", Path(scratch) / ROOT_NAME
            with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as out:
                _write(out, files)
            run(BIN / "tardevctl", "layer", "build", "--format", "erofs-4k", "--output", root, tar)
            root.rename(IMAGE / ROOT_NAME)
            initramfs = Path(scratch) / INITRAMFS_NAME
            initramfs.write_bytes(_initramfs())
            initramfs.rename(IMAGE / INITRAMFS_NAME)
        recorded.write_text(wanted)
    return IMAGE


def _initramfs() -> bytes:
    (modules,) = guest.KERNEL.glob("usr/lib/modules/*")
    loaded = list(with_dependencies(modules, _MODULES))
    order = "".join(f"{name}\n" for name, _ in loaded).encode()
    return cpio.archive(
        [
            *(cpio.Member(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "proc", "sys")),
            cpio.Member("bin/busybox", stat.S_IFREG | 0o755, guest.BUSYBOX.read_bytes()),
            cpio.Member("init", stat.S_IFREG | 0o755, _BOOT.encode()),
            cpio.Member("modules/order", stat.S_IFREG | 0o644, order),
            *(cpio.Member(f"modules/{name.lstrip('?')}", stat.S_IFREG | 0o644, code) for name, code in loaded),
        ]
    )


def _files() -> Iterator[tuple[str, Path | str | bytes]]:
    """Path in the image, without a slash in front, and its file here, the target of its symlink, or its bytes."""
    for name in ("bin", "sbin", "lib", "lib64"):
        yield name, f"usr/{name}"
    yield "usr/sbin/init", _INIT.replace("@HERE@", str(HERE)).encode()
    yield "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"
    yield "etc/group", b"root:x:0:\n"
    yield "etc/hosts", b"127.0.0.1 localhost\n"
    python = Path(sys.executable).resolve()
    programs = [python]
    for name in _PROGRAMS:
        found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not found:
            raise RuntimeError(f"{name} is not installed; ./dev setup does")
        programs.append(Path(found))
    library = Path(f"/usr/lib/{python.name}")
    packages = next((CHECKOUT / ".venv/lib").glob("python3*/site-packages"))
    venv = HERE.relative_to("/") / ".venv"
    yield f"{venv}/pyvenv.cfg", f"home = {python.parent}\ninclude-system-site-packages = false\n".encode()
    yield f"{venv}/bin/python", str(python)
    for name, module in (("tardev-snapshotter", "snapshotter.daemon"), ("tardevctl", "snapshotter.cli.main")):
        yield f"{venv}/bin/{name}", f"#!{HERE}/.venv/bin/python\nfrom {module} import main\nmain()\n".encode()
    in_guest = venv / packages.relative_to(CHECKOUT / ".venv")
    yield f"{in_guest}/checkout.pth", f"{HERE}\n".encode()
    found_files: dict[str, Path] = {}
    for top in sorted(library.iterdir()):
        if top.name not in _LEFT_OUT_OF_PYTHON and not top.name.startswith("config-"):
            found_files |= dict(_below(top, Path("usr/lib") / library.name / top.name))
    for top in sorted(packages.iterdir()):
        if not _LEFT_OUT.fullmatch(top.name):
            found_files |= dict(_below(top, in_guest / top.name))
    suite = CACHE / "forky" / "root"
    for program in sorted((suite / "usr/bin").iterdir()):
        found_files[str(HERE.relative_to("/") / ".cache/forky/root/usr/bin" / program.name)] = program
        programs.append(program)
    yield from found_files.items()
    for program in programs:
        if CACHE not in program.parents:
            yield _in_usr(program), program
    linked = [path for path in found_files.values() if path.suffix == ".so" or ".so." in path.name]
    for shared in sorted(_libraries([*programs, *linked])):
        yield _in_usr(Path(shared)), Path(shared)


def _below(top: Path, name: Path) -> Iterator[tuple[str, Path]]:
    for path in [top] if top.is_file() else sorted(top.rglob("*")):
        if path.is_file():
            yield str(name / path.relative_to(top)) if path != top else str(name), path


def _in_usr(path: Path) -> str:
    parts = path.parts[1:]
    return "/".join(parts if parts[0] == "usr" else ("usr", *parts))


def _libraries(programs: Iterable[Path]) -> set[str]:
    """Paths of what the dynamic linker loads for them, and of the linker."""
    found: set[str] = set()
    done = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        match = re.match(r"\t(?:\S+ => )?(/\S+) \(0x", line)
        if match and not match[1].startswith(str(CHECKOUT)):
            found.add(match[1])
    return found


def _write(out: tarfile.TarFile, files: dict[str, Path | str | bytes]) -> None:
    made: set[str] = set()
    links = {name for name, source in files.items() if isinstance(source, str)}
    for name, source in files.items():
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in made | links:
                made.add(str(parent))
                directory = tarfile.TarInfo(str(parent))
                directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                out.addfile(directory)
        member = tarfile.TarInfo(name)
        if isinstance(source, str):
            member.type, member.linkname = tarfile.SYMTYPE, source
            out.addfile(member)
            continue
        if isinstance(source, bytes):
            member.mode, member.size = 0o755, len(source)
            out.addfile(member, io.BytesIO(source))
            continue
        about = source.stat()
        # The time counts: of a module's source it vouches for what was compiled of it.
        member.mode, member.size, member.mtime = stat.S_IMODE(about.st_mode), about.st_size, int(about.st_mtime)
        with source.open("rb") as file:
            out.addfile(member, file)


def checkout_tar(target: Path, more: dict[str, Path] | None = None) -> None:
    """Our packages as they are now, compiled, and `more` files by their paths below the checkout in the guest."""
    files: dict[str, Path | str | bytes] = {}
    for package in _PACKAGES:
        compileall.compile_dir(CHECKOUT / package, quiet=2)  # the guest takes twenty times as long
        for path in sorted((CHECKOUT / package).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".pyc", ".so", ".toml", ".pyi"):
                files[str(path.relative_to(CHECKOUT))] = path
    files |= more or {}
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as out:
        _write(out, files)
    # What a disk can have: whole sectors, and a tar's end is zeros.
    os.truncate(target, -(-target.stat().st_size // 4096) * 4096)


class NodeGuest(guest.Guest):
    """Its `run` starts in the checkout; .venv/bin/python there knows our packages and tests.harness."""

    def __init__(self, directory: Path, disks: Sequence[Path] = (), more: dict[str, Path] | None = None) -> None:
        """`disks`: raw, to be written, from FIRST_DISK on."""
        image = build()
        directory.mkdir(parents=True, exist_ok=True)
        checkout, scratch = directory / "checkout.tar", directory / "scratch"
        checkout_tar(checkout, more)
        scratch.touch()
        os.truncate(scratch, _SCRATCH_BYTES)
        run("mkfs.ext4", "-q", "-F", scratch, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
        # One processor: with two, QEMU's software emulation may show one of them a breakpoint that the other has taken
        # out of the kernel's code again ("Oops: int3").
        arguments = ["-m", str(_MEMORY_MIB)]
        for path, read_only in (
            (image / ROOT_NAME, True), (checkout, True), (scratch, False), *((disk, False) for disk in disks)
        ):  # fmt: skip
            arguments += [
                "-drive", f"if=virtio,format=raw,file={path},read-only={'on' if read_only else 'off'},file.locking=off",
            ]  # fmt: skip
        super().__init__(directory, arguments, image / INITRAMFS_NAME)

    def python(self, module: str, *arguments: str, seconds: float = 600.0) -> str:
        """What `python -m MODULE` says in the guest. Raises RuntimeError where it fails."""
        return self.run(" ".join((".venv/bin/python -m", module, *arguments)), seconds)


def main() -> None:
    started = time.monotonic()
    image = build()
    print(f"{image / ROOT_NAME}: {(image / ROOT_NAME).stat().st_size >> 20} MiB, {time.monotonic() - started:.1f} s")
    if sys.argv[1:]:
        with tempfile.TemporaryDirectory() as directory:
            started = time.monotonic()
            node = NodeGuest(Path(directory))
            print(f"booted in {time.monotonic() - started:.1f} s")
            try:
                for command in sys.argv[1:]:
                    started = time.monotonic()
                    print(node.run(command, 600), f"-- {time.monotonic() - started:.1f} s")
            finally:
                node.stop()


if __name__ == "__main__":
    main()
