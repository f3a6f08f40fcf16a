# SPDX-License-Identifier: Apache-2.0
"""The layers that are measured, made once and kept in .cache/bench."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
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


def _below(top: str) -> Iterator[tuple[str, os.stat_result]]:
    for parent, directories, files in os.walk(top):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(parent, name)
            yield path, os.lstat(path)


def _layer(directory: Path, name: str, write: Callable[[tarfile.TarFile], None]) -> Layer:
    directory.mkdir(parents=True, exist_ok=True)
    files = {kind: directory / f"{name}.tar{'' if kind == 'plain' else f'.{kind}'}" for kind in KINDS}
    plain = files["plain"]
    if not plain.exists():
        draft = directory / f".{name}"
        with (
            draft.open("wb", buffering=1 << 20) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            write(tar)
        draft.rename(plain)
    for kind, command in _COMPRESSORS.items():
        if not files[kind].exists():
            draft = directory / f".{name}.{kind}"
            with plain.open("rb") as source, draft.open("wb") as target:
                subprocess.run([*command, "-c"], stdin=source, stdout=target, check=True)
            draft.rename(files[kind])
    return Layer(name, files)
