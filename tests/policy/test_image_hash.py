# SPDX-License-Identifier: Apache-2.0
"""`tardevctl image hash` computes what the golden vectors, `layer build` and a node have."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockdev.formats.layer_file import of_chain
from policy import cache as caches
from policy.errors import ImageError
from policy.hashed import HashedImage
from policy.image_hash import hash_image
from policy.sources import opened
from snapshotter import metastore
from snapshotter.cli.main import app
from tests.conftest import IMAGES, in_every_run
from tests.golden.make_parents import VECTORS, tars_of
from tests.golden.make_vectors import known
from tests.golden.test_tar_index import CASES
from tests.harness import run
from tests.integration.conftest import a_node
from tests.policy.layouts import PLAIN, Layout, digest_of, small_tar

HERE = Path(__file__).parent.parent / "golden"
FORMATS = ("tar-index", "erofs-4k", "tarfs", "tarfs-genpolicy", "tarfs-genpolicy-upstream")
# Where a format's vectors are, and the name of the root hash in them.
GOLDEN = {
    "tar-index": (("tar-index.json", "tar-index-more.json"), "root_hash"),
    "erofs-4k": (("erofs-4k.json",), "root_hash"),
    "tarfs": (("tarfs.json", "tarfs-more.json"), "root_hash"),
    "tarfs-genpolicy": (("tarfs.json", "tarfs-more.json"), "root_hash_genpolicy"),
    "tarfs-genpolicy-upstream": (("tarfs.json", "tarfs-more.json"), "root_hash_genpolicy_upstream"),
}


def golden() -> dict[str, dict[str, tuple[str, int | None]]]:
    """By tar and format: the root hash and the size of the data; of formats that take the tar."""
    found: dict[str, dict[str, tuple[str, int | None]]] = {}
    for name, (files, key) in GOLDEN.items():
        for file in files:
            for vector in json.loads((HERE / file).read_text())["vectors"]:
                if "refused" not in vector:
                    size = vector["data_size"] if key == "root_hash" else None
                    found.setdefault(vector["name"], {})[name] = (vector[key], size)
    return found


VECTORS_BY_TAR = golden()
NAMES = sorted(VECTORS_BY_TAR)


def hashed(reference: str, *formats: str, cache: caches.Cache | None = None) -> dict[str, HashedImage]:
    with opened(reference) as source:
        return hash_image(source, formats, cache=cache)


def tardevctl(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["image", "hash", *map(str, arguments)], catch_exceptions=False)


def test_there_are_vectors_of_each_format() -> None:
    for name in FORMATS:
        assert sum(name in each for each in VECTORS_BY_TAR.values()) > 50, name


@pytest.mark.parametrize("names", in_every_run([NAMES[::12], NAMES], lambda names: names is not NAMES), ids=len)
def test_the_root_hashes_of_golden_tars(names: Sequence[str], tmp_path: Path) -> None:
    """Each an image of its own: a chain of such tars is not one that a parents layer can always be made for."""
    checked = 0
    for name in names:
        tar = bytes(CASES[name]())
        layout = Layout(tmp_path / name)
        expected = VECTORS_BY_TAR[name]
        found = hashed(layout.image([tar], PLAIN), *expected)
        for layer_format, (root_hash, size) in expected.items():
            [layer] = found[layer_format].layers
            assert (layer.diff_id, layer.root_hash) == (digest_of(tar), root_hash), (name, layer_format)
            assert size in (None, layer.data_size_bytes), (name, layer_format)
            checked += 1
    assert checked >= len(names)


CHAINS = [(of, name) for of, path in VECTORS.items() for name in known(path)]


@pytest.mark.parametrize(
    "case", in_every_run(CHAINS, lambda case: CHAINS.index(case) % 16 == 3), ids=lambda case: "-".join(case)
)
def test_the_parents_layers_of_golden_chains(case: tuple[str, str], tmp_path: Path) -> None:
    of, name = case
    vector = known(VECTORS[of])[name]
    on_top = hashed(Layout(tmp_path / "layout").image(tars_of(name), PLAIN), of)[of].on_top
    if vector.get("needs") == "none":
        assert on_top is None
        return
    assert on_top is not None
    assert on_top.diff_id == f"sha256:{vector['identity']}"
    assert (on_top.root_hash, on_top.data_size_bytes) == (vector["root_hash"], vector["data_size"])
    assert of_chain(on_top.format)


@pytest.mark.root
@pytest.mark.erofs
@pytest.mark.containerd
@pytest.mark.slow
@pytest.mark.parametrize(
    "layer_format", in_every_run(["tar-index", "erofs-4k", "tarfs"], lambda name: name == "tar-index")
)
def test_a_node_has_the_same_layers(layer_format: str, images: Path, tmp_path: Path) -> None:
    """Real layer files, made by the daemon for a real containerd; and containerd's directory as the image's place."""
    contract = "kata-tardev" if layer_format == "tarfs" else "host"
    extra = f'[snapshotters.tardev-host]\ncontract = "{contract}"\nformat = "{layer_format}"\n'
    names = IMAGES if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else ("layers-mixed", "dup")
    with a_node(tmp_path / "node", "later", "" if layer_format == "tar-index" else extra) as node:
        for name in names:
            node.containerd.import_image(images / f"{name}.tar")
        _, stored = metastore.read(Path(node.daemon.root) / metastore.FILE_NAME)
        have = {(layer.diff_id, layer.format): (layer.root_hash, layer.data_size_bytes) for layer in stored}
        found: set[tuple[str, str]] = set()
        for name in names:
            image = hashed(f"oci-archive:{images / f'{name}.tar'}", layer_format)[layer_format]
            content = node.containerd.directory / "root/io.containerd.content.v1.content"
            again = hashed(f"containerd:{content}@{image.digest}", layer_format)[layer_format]
            assert (again.layers, again.on_top) == (image.layers, image.on_top)
            for layer in (*image.layers, *((image.on_top,) if image.on_top else ())):
                found.add((layer.diff_id, layer.format))
                assert have[layer.diff_id, layer.format] == (layer.root_hash, layer.data_size_bytes), name
        assert found == set(have)


# --- places of images


@pytest.mark.tool
def test_every_place_gives_the_same(images: Path, tmp_path: Path) -> None:
    archive = images / "layers.tar"
    (tmp_path / "layout").mkdir()
    run("tar", "-C", tmp_path / "layout", "-xf", archive)
    saved = tmp_path / "saved.tar"
    run("skopeo", "copy", "-q", "--insecure-policy", f"oci-archive:{archive}", f"docker-archive:{saved}:t/l:1")
    expected = hashed(f"oci-archive:{archive}", "tar-index")["tar-index"]
    assert expected.on_top is not None
    assert hashed(f"oci:{tmp_path / 'layout'}", "tar-index")["tar-index"].layers == expected.layers
    for reference in (f"docker-archive:{saved}", f"docker-archive:{saved}:t/l:1"):
        found = hashed(reference, "tar-index")["tar-index"]
        assert [layer.root_hash for layer in found.layers] == [layer.root_hash for layer in expected.layers]
        assert found.on_top == expected.on_top


def docker_archive(path: Path, tars: Sequence[bytes], members: Sequence[str], *, tag: str = "a:1") -> str:
    """`docker save`'s. A member that is there already becomes a symlink to the first one, as old ones did."""
    config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": list(map(digest_of, tars))}}).encode()
    named = digest_of(config).removeprefix("sha256:")
    manifest = json.dumps([{"Config": f"{named}.json", "RepoTags": [tag], "Layers": list(members)}]).encode()
    staging = path.with_suffix(".d")
    with tarfile.open(path, "w") as tar:
        layers = dict(zip(members, tars, strict=True))
        for name, content in {f"{named}.json": config, "manifest.json": manifest, **layers}.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            if content in tars[:1] and name != members[0]:
                (staging / name).symlink_to(f"../{members[0]}")
            else:
                (staging / name).write_bytes(content)
            tar.add(staging / name, name)
    return f"docker-archive:{path}"


def test_both_forms_of_docker_save(tmp_path: Path) -> None:
    tars = [small_tar("one"), small_tar("two"), small_tar("one")]
    expected = hashed(Layout(tmp_path / "layout").image(tars), "tar-index")["tar-index"]
    old = docker_archive(tmp_path / "old.tar", tars, ["a/layer.tar", "b/layer.tar", "c/layer.tar"])
    new = docker_archive(tmp_path / "new.tar", tars[:2], [f"blobs/sha256/{digest_of(tar)[7:]}" for tar in tars[:2]])
    for reference, count in ((old, 3), (f"{old}:a:1", 3), (new, 2)):
        found = hashed(reference, "tar-index")["tar-index"]
        assert [layer.root_hash for layer in found.layers] == [each.root_hash for each in expected.layers[:count]]
    result = tardevctl(f"{old}:b")
    assert (result.exit_code, "not in the archive; there is a:1" in result.stderr) == (1, True)


# --- the command


def test_what_a_person_and_a_program_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reference = Layout(tmp_path / "layout").image([small_tar("one")])
    result = tardevctl(reference)
    assert result.exit_code == 0
    said = json.loads(tardevctl(reference, "--json", "--format", "tar-index", "--format", "tarfs").stdout)
    assert [image["layers"][0]["format"] for image in said] == ["tar-index", "tarfs"]
    assert said[0]["layers"][0]["root_hash"] in result.stdout
    assert [(image["layers"][0]["data_block_bytes"], image["parents_layer"]) for image in said] == [
        (512, None), (4096, None),
    ]  # fmt: skip


def test_where_genpolicy_computes_another_hash_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    differ = [
        name
        for name, each in VECTORS_BY_TAR.items()
        if "tarfs" in each and each["tarfs"][0] != each["tarfs-genpolicy"][0]
    ]
    vector = VECTORS_BY_TAR[differ[0]]
    reference = Layout(tmp_path / "layout").image([bytes(CASES[differ[0]]())])
    listed = tmp_path / "layers-cache.json"
    for variant, key in (("node", "tarfs"), ("genpolicy", "tarfs-genpolicy")):
        result = tardevctl(reference, "--format", "tarfs", "--json", "--variant", variant, "--cache-file", listed)
        assert json.loads(result.stdout)[0]["layers"][0]["root_hash"] == vector[key][0]
        assert "Microsoft's genpolicy computes" in result.stderr
        assert [each["verity_hash"] for each in json.loads(listed.read_text())] == [vector[key][0]]
    assert "written anew" in result.stderr
    listed.write_text("[{")
    result = tardevctl(reference, "--format", "tarfs", "--cache-file", listed)
    assert (result.exit_code, "is damaged, and made again" in result.stderr) == (0, True)
    assert len(json.loads(listed.read_text())) == 1


# --- the cache


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, warnings: list[str]) -> caches.Cache:
    return caches.Cache(tmp_path / "cache", warnings.append)


def chain(tmp_path: Path) -> str:
    """An image with a parents layer."""
    name = next(name for name, vector in known(VECTORS["tar-index"]).items() if "needs" not in vector)
    return Layout(tmp_path / "layout").image(tars_of(name))


def test_what_is_known_is_not_read_again(tmp_path: Path, cache: caches.Cache, warnings: list[str]) -> None:
    reference = chain(tmp_path)
    first = hashed(reference, "tar-index", "tarfs", cache=cache)
    assert first["tar-index"].on_top is not None
    config_and_manifest = {
        path for path in (tmp_path / "layout/blobs/sha256").iterdir() if path.read_bytes().startswith(b"{")
    }
    for path in (tmp_path / "layout/blobs/sha256").iterdir():
        if path not in config_and_manifest:
            path.unlink()
    assert hashed(reference, "tar-index", "tarfs", cache=cache) == first
    assert not warnings
    with pytest.raises(ImageError, match=r"image oci:.*: layer sha256:.* is not there"):
        hashed(reference, "erofs-4k", cache=cache)


@pytest.mark.parametrize(
    "damage",
    in_every_run([b"", b"{", b"[]", b"\xff\xfe", b"x" * 10_000, None, "other"], (b"{", None, "other").__contains__),
)
def test_a_damaged_entry_is_made_again(
    damage: bytes | str | None, tmp_path: Path, cache: caches.Cache, warnings: list[str]
) -> None:
    reference = chain(tmp_path)
    first = hashed(reference, "tar-index", cache=cache)
    entries = sorted((tmp_path / "cache").rglob("*.json"))
    whole = {path: path.read_bytes() for path in entries}
    assert len(entries) > 2
    for number, path in enumerate(entries):
        if damage is None:  # a digit of the root hash
            at = whole[path].index(b'"root_hash":"') + 13
            path.write_bytes(whole[path][:at] + (b"0" if whole[path][at] != 48 else b"1") + whole[path][at + 1 :])
        elif isinstance(damage, str):  # sound, but of something else
            path.write_bytes(whole[entries[number - 1]])
        else:
            path.write_bytes(damage)
    assert hashed(reference, "tar-index", cache=cache) == first
    assert warnings
    assert all("is damaged, and made again" in text for text in warnings)
    assert {path: path.read_bytes() for path in entries} == whole


def test_an_entry_for_a_layer_that_the_config_does_not_name_is_not_used(tmp_path: Path, cache: caches.Cache) -> None:
    """Poisoned: sound in itself, under the blob's digest, under the names of layers nearby."""
    tar = small_tar("one")
    layout = Layout(tmp_path / "layout")
    reference = layout.image([tar])
    blob = layout.layer(tar)["digest"]
    for name in (blob, digest_of(b"another"), digest_of(gzip.compress(tar))):
        cache.put_layer(name, "tar-index", root_hash="0" * 64, data_size_bytes=4096, made_directories=False)
    [layer] = hashed(reference, "tar-index", cache=cache)["tar-index"].layers
    assert layer.root_hash == hashed(reference, "tar-index")["tar-index"].layers[0].root_hash != "0" * 64


def test_a_layer_that_is_not_what_the_config_says_leaves_no_entry(tmp_path: Path, cache: caches.Cache) -> None:
    layout = Layout(tmp_path / "layout")
    victim, other = small_tar("victim"), small_tar("other")
    reference = layout.index(layout.manifest([victim], layers=[layout.layer(other)]))
    with pytest.raises(
        Exception, match=rf"image oci:.*: layer {layout.layer(other)['digest']}: .* not {digest_of(victim)}"
    ):
        hashed(reference, "tar-index", cache=cache)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_two_at_once_share_a_cache(tmp_path: Path, warnings: list[str]) -> None:
    """Real processes, on one directory."""
    reference = chain(tmp_path)
    results: list[str] = []
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def one() -> None:
        results.append(
            run(Path(sys.executable).with_name("tardevctl"), "image", "hash", "--json", reference, env=environment)
        )

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    own = caches.Cache(tmp_path / "cache/tardevctl", warnings.append)
    assert hashed(reference, "tar-index", cache=own)["tar-index"].on_top is not None
    assert not warnings
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "cache").write_text("")
    hashed(
        Layout(tmp_path / "layout").image([small_tar("one")]),
        "tarfs",
        cache=caches.Cache(tmp_path / "cache", warnings.append),
    )
    assert warnings
