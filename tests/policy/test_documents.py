# SPDX-License-Identifier: Apache-2.0
"""Documents of images that are refused, in words; the command ends with status 1 and prints no root hash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policy.documents import Platform
from policy.errors import ImageError
from policy.sources.reference import Reference
from snapshotter.cli.main import app
from tests.policy.layouts import AMD64, CONFIG, GZIP, INDEX, MANIFEST, Layout, digest_of, small_tar

ONE, TWO = small_tar("one"), small_tar("two")
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Layout(tmp_path / "layout")


def refused(reference: str, why: str, *arguments: str) -> None:
    result = CliRunner().invoke(app, ["image", "hash", "--json", reference, *arguments], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(why, result.stderr), result.stderr
    assert reference in result.stderr
    assert result.stderr.count("\n") == 1


def two(layout: Layout, **more: Any) -> str:
    """Layers whose second is `more`."""
    first, second = layout.layer(ONE), {**layout.layer(TWO), **more}
    return layout.index(layout.manifest([ONE, TWO], layers=[first, second]))


def twice(layout: Layout, **more: Any) -> str:
    first = layout.layer(ONE)
    return layout.index(layout.manifest([ONE, ONE], layers=[first, {**first, **more}]))


def of_config(layout: Layout, config: Any, media_type: str = CONFIG) -> str:
    manifest = {"schemaVersion": 2, "config": layout.put(config, media_type), "layers": [layout.layer(ONE)]}
    return layout.index(layout.put(manifest, MANIFEST))


def raw(layout: Layout, text: str, media_type: str = MANIFEST) -> str:
    return layout.index(layout.put(text.encode(), media_type))


def lost(layout: Layout, which: int) -> str:
    """A blob is not there: the layer's, or the manifest's."""
    descriptor = layout.layer(ONE) if which else layout.manifest([ONE])
    reference = layout.image([ONE])
    (layout.blobs / descriptor["digest"].removeprefix("sha256:")).unlink()
    return reference


def changed(layout: Layout, grown: bool) -> str:
    """A layer's bytes are others than its digest says."""
    path = layout.blobs / layout.layer(ONE)["digest"].removeprefix("sha256:")
    reference = layout.image([ONE])
    content = path.read_bytes()
    path.write_bytes(content + b"\0" if grown else content[:-1] + bytes([content[-1] ^ 1]))
    return reference


def changed_manifest(layout: Layout) -> str:
    manifest = layout.manifest([ONE])
    path = layout.blobs / manifest["digest"].removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b"layers", b"Layers"))
    return layout.index(manifest)


def elsewhere(layout: Layout) -> str:
    platform = {"os": "linux", "architecture": "s390x"}
    return layout.index(layout.put({"manifests": [{**layout.manifest([ONE]), "platform": platform}]}, INDEX))


def two_of_a_platform(layout: Layout) -> str:
    listed = [{**layout.manifest(tars), "platform": AMD64} for tars in ([ONE], [TWO])]
    return layout.index(layout.put({"manifests": listed}, INDEX))


def deep(layout: Layout) -> str:
    inner = layout.manifest([ONE])
    for _ in range(6):
        inner = layout.put({"manifests": [inner]}, INDEX)
    return layout.index(inner)


CONFIG_OF_ONE = {**AMD64, "rootfs": {"type": "layers", "diff_ids": [digest_of(ONE)]}}
LAYER_2 = "layer 2, sha256:[0-9a-f]{64}: "
BAD: dict[str, tuple[Callable[[Layout], str], str]] = {
    "unknown layer type": (lambda to: two(to, mediaType="application/x"), LAYER_2 + "its media type 'application/x'"),
    "no layer type": (lambda to: two(to, mediaType=""), LAYER_2 + "its media type ''"),
    "foreign": (lambda to: two(to, mediaType=FOREIGN), LAYER_2 + "is a foreign layer"),
    "nondistributable": (lambda to: two(to, mediaType=NONDISTRIBUTABLE), LAYER_2 + "is a foreign layer"),
    "urls": (lambda to: two(to, urls=["https://example.org/x"]), LAYER_2 + "is a foreign layer"),
    "encrypted": (lambda to: two(to, mediaType=f"{GZIP}+encrypted"), LAYER_2 + "is encrypted"),
    "another digest algorithm": (lambda to: two(to, digest="sha512:" + "0" * 128), "names no blob: 'sha512:"),
    "negative size": (lambda to: two(to, size=-1), "names no blob"),
    "twice with two sizes": (lambda to: twice(to, size=1), "is there twice, with different size"),
    "one blob, two diff IDs": (
        lambda to: to.index(to.manifest([ONE, TWO], layers=[to.layer(ONE)] * 2)), "is there twice, with different"
    ),
    "fewer layers": (lambda to: to.index(to.manifest([ONE, TWO], layers=[to.layer(ONE)])), "1 layers and 2 diff IDs"),
    "more layers": (
        lambda to: to.index(to.manifest([ONE], layers=[to.layer(ONE), to.layer(TWO)])), "2 layers and 1 diff IDs"
    ),
    "no layers": (lambda to: to.image([]), "0 layers and 0 diff IDs"),
    "other diff IDs": (
        lambda to: to.index(to.manifest([TWO], layers=[to.layer(ONE)])),
        f"layer sha256:.*unpacks to diff ID {digest_of(ONE)}, not {digest_of(TWO)}",
    ),
    "order of layers": (
        lambda to: to.index(to.manifest([ONE, TWO], layers=[to.layer(TWO), to.layer(ONE)])), "unpacks to diff ID"
    ),
    "gzip that is none": (
        lambda to: to.index(to.manifest([ONE], layers=[to.put(ONE, GZIP)])), "layer sha256:[0-9a-f]{64}: "
    ),
    "diff ID that is none": (
        lambda to: of_config(to, {**CONFIG_OF_ONE, "rootfs": {"type": "layers", "diff_ids": ["x"]}}), "no sha256 digest"
    ),
    "rootfs of another type": (
        lambda to: of_config(to, {"rootfs": {"type": "tars", "diff_ids": [digest_of(ONE)]}}), "the type 'tars'"
    ),
    "config without rootfs": (lambda to: of_config(to, {}), "config: .*rootfs"),
    "artifact": (lambda to: of_config(to, CONFIG_OF_ONE, "application/vnd.x+json"), "its config is of the media"),
    "config of another platform": (
        lambda to: of_config(to, {**CONFIG_OF_ONE, "architecture": "arm64"}), "it is for linux/arm64, not linux/amd64"
    ),
    "layer not there": (lambda to: lost(to, 1), "layer sha256:[0-9a-f]{64} is not there"),
    "manifest not there": (lambda to: lost(to, 0), "sha256:[0-9a-f]{64} is not there"),
    "other bytes": (lambda to: changed(to, False), "layer sha256:[0-9a-f]{64}: blob has digest"),
    "a byte more": (lambda to: changed(to, True), "layer sha256:[0-9a-f]{64}: blob is longer than"),
    "other manifest": (changed_manifest, "the bytes of sha256:[0-9a-f]{64} are others"),
    "other platform": (elsewhere, "none for linux/amd64; there is linux/s390x"),
    "two of a platform": (two_of_a_platform, "2 images are for"),
    "no index": (lambda to: f"oci:{to.directory}", "index.json is not there"),
    "deep": (deep, "indexes in indexes"),
    "schema 1": (lambda to: raw(to, '{"schemaVersion": 1}', SCHEMA_1), "schema 1"),
    "schema 1 under another name": (lambda to: raw(to, '{"schemaVersion": 1, "fsLayers": []}'), "schema 1"),
    "no JSON": (lambda to: raw(to, "{"), "manifest|truncated"),
    "deep JSON": (lambda to: raw(to, '{"layers":' + "[" * 100_000), "image oci:"),
    "neither": (lambda to: raw(to, "{}"), "neither a manifest nor an index"),
    "an index under a manifest's name": (lambda to: raw(to, '{"manifests": []}'), "and is named as"),
    "a key twice": (
        lambda to: raw(
            to, json.dumps({"config": to.config([ONE]), "layers": [to.layer(ONE)]})[:-1] + ', "layers": []}'
        ),
        "'layers' is there twice",
    ),
    "a key in another case": (lambda to: to.image([ONE], Layers=[]), "others read these names in any case"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name: str, layout: Layout) -> None:
    make, why = BAD[name]
    refused(make(layout), why, "--platform", "linux/amd64")


def test_the_platform_that_is_asked_for(layout: Layout, tmp_path: Path) -> None:
    arm = {"os": "linux", "architecture": "arm64"}
    theirs = layout.manifest([TWO], config=layout.config([TWO], **arm, variant="v8"))
    listed = [{**layout.manifest([ONE]), "platform": AMD64}, {**theirs, "platform": {**arm, "variant": "v8"}}]
    index = layout.put({"manifests": listed}, INDEX)
    reference = layout.index(index)
    for platform, tar in (("linux/amd64", ONE), ("linux/arm64", TWO), ("linux/arm64/v8", TWO)):
        result = CliRunner().invoke(app, ["image", "hash", "--json", "--platform", platform, reference])
        [image] = json.loads(result.stdout)
        assert image["layers"][0]["diff_id"] == digest_of(tar)
        assert image["index_digest"] == index["digest"]
    refused(reference, "none for linux/arm64/v9", "--platform", "linux/arm64/v9")


@pytest.mark.parametrize("text", ["linux", "linux/", "LINUX/amd64", "a/b/c/d", ""])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(ImageError, match="is no platform"):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("a/b", "docker.io/a/b:latest"),
        ("index.docker.io/b", "docker.io/library/b:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("ghcr.io/a/b/c", "ghcr.io/a/b/c:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("HOST/a", "HOST/a:latest"),
        (f"a@{digest_of(b'')}", f"docker.io/library/a@{digest_of(b'')}"),
        (f"x.y/a:t@{digest_of(b'')}", f"x.y/a:t@{digest_of(b'')}"),
    ],
)
def test_references(text: str, meant: str) -> None:
    assert str(Reference.parse(text)) == meant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a//b",
        "A",
        "a:",
        "a@sha256:1",
        "a@",
        "x.y/",
        "x.y/../a",
        "x.y/a?b",
        "x.y/a:b/c",
        "a b",
        "a" * 300,
        "x.y:z/a",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ImageError, match="image "):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost:5000", True), ("127.0.0.1:1", True), ("127.0.0.1", True), ("[::1]:5", True), ("127.evil.org", False),
     ("localhost.evil.org", False), ("x.y:1", False)],
)  # fmt: skip
def test_plain_http_is_for_this_machine(host: str, local: bool) -> None:
    assert Reference.parse(f"{host}/a").is_local is local
