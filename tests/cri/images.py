# SPDX-License-Identifier: Apache-2.0
"""Images for pods: a pause image, and one with a user's name, a volume and a file of its own."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tests.harness import Registry, oci_archive

_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_PROGRAMS: Final = ("sh", "cat", "sleep", "id", "dd", "ls", "stat", "touch", "sync", "ip")
UID, GID, EXTRA_GID = 1234, 2345, 3456
SEED = "copied into the volume\n"


@dataclass(frozen=True)
class Image:
    reference: str
    blobs: tuple[str, ...]
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]


@cache
def _busybox() -> bytes:
    """The static one of Debian's busybox-static."""
    return Path(shutil.which("busybox") or "/bin/busybox").read_bytes()


def _entry(
    name: str, data: bytes | None = None, mode: int = 0o755, uid: int = 0, gid: int = 0, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid, member.mtime = mode, uid, gid, 1_700_000_000
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    elif data is None:
        member.type = tarfile.DIRTYPE
    else:
        member.size = len(data)
    return member, data or b""


def _tar(entries: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in entries:
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _image(directory: Path, registry: Registry, name: str, tars: list[bytes], config: dict[str, object]) -> Image:
    blobs = [gzip.compress(tar, 1, mtime=0) for tar in tars]
    diff_ids = [_digest(tar) for tar in tars]
    chain_ids: list[str] = []
    for diff_id in diff_ids:
        chain_ids.append(_digest(f"{chain_ids[-1]} {diff_id}".encode()) if chain_ids else diff_id)
    archive = directory / f"{name}.tar"
    oci_archive(archive, f"localhost/{name}:1", blobs, _GZIP, diff_ids, config)
    reference = registry.push(archive, f"{name}:1")
    return Image(reference, tuple(map(_digest, blobs)), tuple(diff_ids), tuple(chain_ids))


def pause(directory: Path, registry: Registry) -> Image:
    """What holds a pod's namespaces: one layer of its own."""
    layer = _tar([_entry("bin"), _entry("bin/pause", _busybox()), _entry("bin/sleep", link="pause")])
    return _image(directory, registry, "pause", [layer], {"Entrypoint": ["/bin/sleep", "1000000"]})


def app(directory: Path, registry: Registry, name: str) -> Image:
    """Two layers, nothing shared with one of another name; /etc/hello holds the name."""
    base = _tar([
        _entry("bin"), _entry("etc"), _entry("tmp", mode=0o1777),
        _entry("etc/passwd", f"root:x:0:0::/:/bin/sh\napp:x:{UID}:{GID}::/:/bin/sh\n".encode(), 0o644),
        _entry("etc/group", f"root:x:0:\napp:x:{GID}:\nextra:x:{EXTRA_GID}:app\n".encode(), 0o644),
        _entry("etc/base", name.encode(), 0o644),
        _entry("bin/busybox", _busybox()),
        *(_entry(f"bin/{program}", link="busybox") for program in _PROGRAMS),
    ])  # fmt: skip
    top = _tar([
        _entry("etc"), _entry("etc/hello", name.encode(), 0o644),
        _entry("data", mode=0o750, uid=UID, gid=GID), _entry("data/seed", SEED.encode(), 0o640, UID, GID),
    ])  # fmt: skip
    config: dict[str, object] = {
        "Entrypoint": ["/bin/sleep", "1000000"],
        "Env": ["PATH=/bin"],
        "User": "app",
        "Volumes": {"/data": {}},
    }
    return _image(directory, registry, name, [base, top], config)
