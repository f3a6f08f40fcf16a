# SPDX-License-Identifier: Apache-2.0
"""Images in OCI layouts and archives: which one is meant, and what is none."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policy.documents import host_platform
from snapshotter import images
from snapshotter.content import Content
from snapshotter.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, SnapshotterError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
HERE = {"os": "linux", "architecture": host_platform().architecture}
ELSEWHERE = {"os": "linux", "architecture": "s390x"}


class Layout:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs/sha256"
        self.blobs.mkdir(parents=True)

    def put(self, document: Any, media_type: str = MANIFEST, **more: Any) -> dict[str, Any]:
        """Its descriptor."""
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        name = hashlib.sha256(text).hexdigest()
        (self.blobs / name).write_bytes(text)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(text), **more}

    def image(self, layers: int = 1, diff_ids: int | None = None, **config: Any) -> dict[str, Any]:
        """A manifest's descriptor. Its layers need not be there."""
        ids = ["sha256:" + hashlib.sha256(b"%d" % number).hexdigest() for number in range(diff_ids or layers)]
        described = self.put({"rootfs": {"type": "layers", "diff_ids": ids}, **config}, "config")
        blobs = [{"mediaType": LAYER, "digest": digest, "size": 10} for digest in ids[:layers]]
        return self.put({"schemaVersion": 2, "config": described, "layers": blobs})

    def index(self, *listed: dict[str, Any]) -> None:
        (self.directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": listed}))

    def find(self, tag: str = "") -> images.Image:
        return asyncio.run(images.from_layout(Content(self.directory, ""), self.directory, tag))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def named(descriptor: dict[str, Any], name: str) -> dict[str, Any]:
    return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}}


def test_what_an_image_says(layout: Layout) -> None:
    process = {"Entrypoint": ["/e"], "Cmd": ["a", "b"], "Env": ["A=1"], "WorkingDir": "/w", "User": "u:g"}
    layout.index(layout.image(2, config={**process, "Labels": {"x": "y"}}, architecture="amd64"))
    image = layout.find()
    assert [layer.digest for layer in image.layers] == list(image.diff_ids)
    assert image.layers[0].media_type == LAYER
    assert image.process.arguments(()) == ["/e", "a", "b"]
    assert image.process.arguments(["c"]) == ["/e", "c"]
    assert (image.process.env, image.process.working_dir, image.process.user) == (["A=1"], "/w", "u:g")
    both = " ".join(image.diff_ids).encode()
    assert image.chain_id() == "sha256:" + hashlib.sha256(both).hexdigest()


@pytest.mark.parametrize("config", [{}, {"config": None}, {"config": {"Entrypoint": None, "Cmd": None, "Env": None}}])
def test_an_image_need_not_say_what_it_runs(layout: Layout, config: dict[str, Any]) -> None:
    layout.index(layout.image(**config))
    assert layout.find().process.arguments(["sh"]) == ["sh"]
    assert layout.find().process.arguments(()) == []


@pytest.mark.parametrize(("kind", "listing"), [(MANIFEST, INDEX), (DOCKER_MANIFEST, DOCKER_LIST)])
def test_an_index_lists_images_of_several_platforms(layout: Layout, kind: str, listing: str) -> None:
    ours, theirs = layout.image(1), layout.image(2)
    inner = layout.put(
        {
            "manifests": [
                {**theirs, "mediaType": kind, "platform": ELSEWHERE},
                {**ours, "mediaType": kind, "platform": HERE | {"variant": "v8"}},
                # What builders say of an image, beside it.
                {**layout.image(3), "platform": {"os": "unknown", "architecture": "unknown"}},
            ]
        },
        listing,
    )
    layout.index(inner)
    assert len(layout.find().layers) == 1


def test_a_tag_says_which(layout: Layout) -> None:
    layout.index(named(layout.image(1), "one"), named(layout.image(2), "two"))
    assert len(layout.find("two").layers) == 2
    with pytest.raises(FailedPrecondition, match=r"2 images are for this machine: give one of one, two"):
        layout.find()
    with pytest.raises(NotFound, match=r"none for linux/.*; there is none at all"):
        layout.find("three")


def test_one_image_under_two_names_is_one(layout: Layout) -> None:
    image = layout.image()
    layout.index(named(image, "one"), named(image, "two"))
    assert len(layout.find().layers) == 1


BAD: dict[str, tuple[Callable[[Layout], object], type[SnapshotterError], str]] = {
    "no index": (lambda layout: None, NotFound, "is no OCI image layout"),
    "not JSON": (lambda layout: (layout.directory / "index.json").write_text("{"), InvalidArgument, "truncated"),
    "deep": (lambda layout: (layout.directory / "index.json").write_text("[" * 100000), InvalidArgument, "index.json"),
    "too long": (
        lambda layout: (layout.directory / "index.json").write_bytes(b" " * ((8 << 20) + 1)),
        InvalidArgument, "over 8388608 bytes",
    ),
    "empty index": (lambda layout: layout.index(), NotFound, "there is none at all"),
    "of another machine": (
        lambda layout: layout.index({**layout.image(), "platform": ELSEWHERE}), NotFound, "there is linux/s390x",
    ),
    "no blob": (
        lambda layout: layout.index({"mediaType": MANIFEST, "digest": "sha256:" + "0" * 64, "size": 5}),
        NotFound, "blob sha256:0000",
    ),
    "another digest": (
        lambda layout: layout.index({"mediaType": MANIFEST, "digest": "sha512:00", "size": 5}),
        InvalidArgument, "a descriptor names no blob: 'sha512:00'",
    ),
    "a path for a digest": (
        lambda layout: layout.index({"mediaType": MANIFEST, "digest": "sha256:../../etc/passwd", "size": 5}),
        InvalidArgument, "names no blob",
    ),
    "another size": (lambda layout: layout.index({**layout.image(), "size": 5}), DataLoss, "are others"),
    "a huge size": (lambda layout: layout.index({**layout.image(), "size": 1 << 40}), InvalidArgument, "over 8388608"),
    "a size that is no number": (
        lambda layout: layout.index({**layout.image(), "size": "5"}), InvalidArgument, "Expected `int`",
    ),
    "a manifest without a config": (
        lambda layout: layout.index(layout.put({"layers": []})), InvalidArgument, "missing required field `config`",
    ),
    "without layers": (lambda layout: layout.index(layout.image(0, 1)), InvalidArgument, "0 layers and 1 diff IDs"),
    "fewer layers": (lambda layout: layout.index(layout.image(2, 3)), InvalidArgument, "2 layers and 3 diff IDs"),
    "too many layers": (lambda layout: layout.index(layout.image(1001)), InvalidArgument, "1001 layers"),
    "a diff ID that is none": (
        lambda layout: layout.index(
            layout.put(
                {"config": layout.put({"rootfs": {"diff_ids": ["x"]}}), "layers": [layout.put(b"layer", LAYER)]}
            )
        ),
        InvalidArgument, "a diff ID that is no sha256 digest",
    ),
    "an entrypoint that is text": (
        lambda layout: layout.index(layout.image(config={"Entrypoint": "/bin/sh"})), InvalidArgument, "Expected `array",
    ),
    "another media type": (
        lambda layout: layout.index(layout.put({}, "text/plain")), NotFound, "there is none at all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_says_why(layout: Layout, case: str) -> None:
    make, kind, reason = BAD[case]
    make(layout)
    with pytest.raises(kind, match=reason) as caught:
        layout.find()
    assert str(layout.directory) in str(caught.value)


def test_a_blob_with_other_bytes(layout: Layout) -> None:
    manifest = layout.image()
    layout.index(manifest)
    path = layout.blobs / manifest["digest"].removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b"schemaVersion", b"SchemaVersion"))
    with pytest.raises(DataLoss, match=r"the bytes of sha256:.* are others"):
        layout.find()


def test_indexes_in_indexes_end(layout: Layout) -> None:
    inner = layout.image()
    for _ in range(3):
        inner = layout.put({"manifests": [inner]}, INDEX)
    layout.index(inner)
    assert len(layout.find().layers) == 1
    layout.index(layout.put({"manifests": [inner]}, INDEX))
    with pytest.raises(InvalidArgument, match="indexes in indexes, over 4"):
        layout.find()


def archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
    return info, b"" if kind != tarfile.REGTYPE else data


def test_only_what_belongs_to_a_layout_leaves_an_archive(tmp_path: Path) -> None:
    blob = "blobs/sha256/" + "a" * 64
    members = [
        member("./oci-layout"), member("index.json", b"{}"), member(blob, b"blob"),
        member("../index.json"), member("/index.json"), member("/etc/x"), member("blobs/sha256/../../up"),
        member("blobs/sha256/" + "b" * 64, kind=tarfile.SYMTYPE), member("manifest.json"),
        member("blobs/sha256/" + "c" * 64, kind=tarfile.LNKTYPE),
        member("blobs/sha256/" + "d" * 64, kind=tarfile.FIFOTYPE),
    ]  # fmt: skip
    images.unpack_archive(archive(tmp_path / "a.tar", members), tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if not path.is_dir()}
    assert found == {"oci-layout", "index.json", blob}
    assert (tmp_path / "out" / blob).read_bytes() == b"blob"
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "out"}


def test_a_sparse_member_fills_no_disk(tmp_path: Path) -> None:
    info, data = member("blobs/sha256/" + "a" * 64)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    data = b"1\n1099511627775\n1\n".ljust(512, b"\0") + b"x"
    path = archive(tmp_path / "a.tar", [(info, data), member("index.json", b"{}")])
    images.unpack_archive(path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["index.json"]


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b" + b"\0" * 600])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InvalidArgument, match=r"a\.tar is no OCI archive"):
        images.unpack_archive(tmp_path / "a.tar", tmp_path / "out")
