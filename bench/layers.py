# SPDX-License-Identifier: Apache-2.0
"""The layers that are measured, made once and kept in .cache/bench."""

from __future__ import annotations

import io
import os
import random
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KINDS: Final = ("gzip", "zstd", "plain")
_COMPRESSORS: Final = {"gzip": ("gzip", "-6", "-n"), "zstd": ("zstd", "-q", "-3")}
MEDIA_TYPES: Final = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "plain": "application/vnd.oci.image.layer.v1.tar",
}


Writer = Callable[[tarfile.TarFile], None]


@dataclass(frozen=True)
class Layer:
    """One tar in each compression."""

    name: str
    files: dict[str, Path]

    @property
    def tar(self) -> Path:
        return self.files["plain"]


def usr(directory: Path, size_bytes: int) -> Layer:
    """The machine's own /usr, file by file in the order of names, until the tar has `size_bytes`."""

    def write(tar: tarfile.TarFile) -> None:
        for path, status in _below("/usr"):
            if tar.offset >= size_bytes:
                break
            member = tar.gettarinfo(path, arcname=path.lstrip("/"))
            if member is None:
                continue
            if stat.S_ISREG(status.st_mode) and member.isreg():
                with open(path, "rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)

    return _layer(directory, f"usr-{size_bytes}", write)


def many(directory: Path, entries: int) -> Layer:
    """Small files, twenty to a directory: what the work for each entry costs."""

    def write(tar: tarfile.TarFile) -> None:
        for number in range(entries):
            if number % 20 == 0:
                parent = tarfile.TarInfo(f"d{number // 2000}/e{number // 20}")
                parent.type, parent.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(parent)
            member = tarfile.TarInfo(f"d{number // 2000}/e{number // 20}/file-{number}.py")
            member.size = number % 700
            tar.addfile(member, io.BytesIO(b"%06d " % number * 100))

    return _layer(directory, f"many-{entries}", write)


PYTHON_SCRIPT: Final = "import json, subprocess"
BIG_FILE: Final = "data/big"  # bench/guest.c reads it
_PYTHON: Final = "/usr/bin/python3"


def python(directory: Path, big_bytes: int) -> Path:
    """A tar of the machine's own Python as an image has it, busybox as its shell, and one file of noise."""

    def write(tar: tarfile.TarFile) -> None:
        program = os.path.realpath(_PYTHON)
        library = f"/usr/lib/{os.path.basename(program)}"
        below = [path for path, _ in _below(library) if "/config-" not in path]  # of the package for programmers
        extensions = [path for path in below if path.endswith(".so") and "/lib-dynload/" in path]
        files = {program, library, *below, *_shared_libraries([program, *extensions]), "/bin/busybox"}
        members = {path.lstrip("/"): path for path in files}
        for parent in {str(parent) for name in members for parent in Path(name).parents} - {".", *members}:
            members[parent] = ""
        for name, source in sorted(members.items()):
            add(tar, name, os.path.realpath(source) if source else "")
        for name, target in ((_PYTHON.lstrip("/"), os.path.basename(program)), ("bin/sh", "busybox")):
            link(tar, name, target)
        noise(tar, BIG_FILE, big_bytes)

    return one_tar(directory, f"python-{big_bytes}", write)


def noise(tar: tarfile.TarFile, name: str, size_bytes: int) -> None:
    """A file that nothing compresses and that has no two equal blocks; the same bytes for the same name."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    tar.addfile(member, io.BytesIO(random.Random(name).randbytes(size_bytes)))


def add(tar: tarfile.TarFile, name: str, source: str) -> None:
    """A file or directory under another name; a directory without a source. Owned by root, times as they are, by
    which Python knows that its compiled files are not stale."""
    member = tarfile.TarInfo(name)
    if not source or os.path.isdir(source):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
        return
    status = os.stat(source)
    member.size, member.mode, member.mtime = status.st_size, stat.S_IMODE(status.st_mode), int(status.st_mtime)
    with open(source, "rb") as file:
        tar.addfile(member, file)


def link(tar: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    tar.addfile(member)


def _shared_libraries(programs: Sequence[str]) -> set[str]:
    """What the dynamic loader opens for them, and the loader itself."""
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True)
    return set(re.findall(r"(/\S+) \(0x", done.stdout))


def _below(top: str) -> Iterator[tuple[str, os.stat_result]]:
    for parent, directories, files in os.walk(top):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(parent, name)
            yield path, os.lstat(path)


def one_tar(directory: Path, name: str, write: Writer) -> Path:
    """Written once, and kept."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.tar"
    if not path.exists():
        draft = directory / f".{name}"
        with (
            draft.open("wb", buffering=1 << 20) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            write(tar)
        draft.rename(path)
    return path


def _layer(directory: Path, name: str, write: Writer) -> Layer:
    plain = one_tar(directory, name, write)
    files = {kind: plain if kind == "plain" else plain.with_name(f"{plain.name}.{kind}") for kind in KINDS}
    for kind, command in _COMPRESSORS.items():
        if not files[kind].exists():
            draft = directory / f".{name}.{kind}"
            with plain.open("rb") as source, draft.open("wb") as target:
                subprocess.run([*command, "-c"], stdin=source, stdout=target, check=True)
            draft.rename(files[kind])
    return Layer(name, files)
