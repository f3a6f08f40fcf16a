# SPDX-License-Identifier: Apache-2.0
"""OCI layouts of given layers, right or wrong on purpose."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
AMD64 = {"os": "linux", "architecture": "amd64"}


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def small_tar(text: str, name: str = "etc/file") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


class Layout:
    """`media_type`: of all layers; gzip is what those become."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs/sha256"
        self.blobs.mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(self, content: Any, media_type: str, **more: Any) -> dict[str, Any]:
        """Its descriptor."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        digest = digest_of(raw)
        (self.blobs / digest.removeprefix("sha256:")).write_bytes(raw)
        return {"mediaType": media_type, "digest": digest, "size": len(raw), **more}

    def config(self, tars: Sequence[bytes], **more: Any) -> dict[str, Any]:
        rootfs = {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]}
        return self.put({**AMD64, "config": {"Cmd": ["/x"]}, "rootfs": rootfs, **more}, CONFIG)

    def layer(self, tar: bytes, media_type: str = GZIP) -> dict[str, Any]:
        blob = gzip.compress(tar, 1, mtime=0) if media_type.endswith("+gzip") else tar
        return self.put(blob, media_type)

    def manifest(self, tars: Sequence[bytes], media_type: str = GZIP, **more: Any) -> dict[str, Any]:
        layers = [self.layer(tar, media_type) for tar in tars]
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": self.config(tars), "layers": layers}
        return self.put({**document, **more}, MANIFEST)

    def index(self, *listed: dict[str, Any]) -> str:
        """The reference."""
        (self.directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": listed}))
        return f"oci:{self.directory}"

    def image(self, tars: Sequence[bytes], media_type: str = GZIP, **more: Any) -> str:
        """The reference."""
        return self.index(self.manifest(tars, media_type, **more))
