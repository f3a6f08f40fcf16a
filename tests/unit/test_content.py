# SPDX-License-Identifier: Apache-2.0
"""Over a directory laid out as containerd's content store: blobs/sha256/HEX."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from policy.chain import ChainID, chain_id
from policy.documents import DOCUMENT_BYTES_MAX, LAYERS_MAX
from snapshotter import content
from snapshotter.content import Blob, Caller, ChainIndex, Content

OCI = {
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
}
DOCKER = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}


def digest_of(data: bytes | str) -> str:
    return "sha256:" + hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def diff_ids_of(*names: str) -> list[str]:
    return [digest_of(f"diff {name}") for name in names]


def chain_of(diff_ids: Sequence[str]) -> ChainID:
    chain: ChainID | None = None
    for diff_id in diff_ids:
        chain = chain_id(chain, diff_id)
    assert chain is not None
    return chain


def layer(name: str, size: int = 10, media_type: str = OCI["layer"]) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(f"blob {name}"), "size": size}


def config_text(diff_ids: Sequence[object], **more: object) -> bytes:
    # As every real one: its own "config" is no descriptor.
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [{"created_by": "x"}],
    }
    return json.dumps(document | more).encode()


def manifest_text(config_digest: str, layers: Sequence[object], types: dict[str, str] = OCI, **more: object) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": {"mediaType": types["config"], "digest": config_digest, "size": 5},
        "layers": list(layers),
        "annotations": {"a": "b"},
    }
    return json.dumps(document | more).encode()


class Store:
    """The blobs directory and its index."""

    def __init__(self, directory: Path) -> None:
        self.blobs = directory / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        self.index = ChainIndex(self.blobs)

    def path(self, digest: str) -> Path:
        return self.blobs / digest.removeprefix("sha256:")

    def put(self, data: bytes) -> str:
        self.path(digest_of(data)).write_bytes(data)
        return digest_of(data)

    def image(self, diff_ids: Sequence[object], layers: Sequence[object], types: dict[str, str] = OCI) -> None:
        self.put(manifest_text(self.put(config_text(diff_ids)), layers, types))

    def candidates(self, diff_ids: Sequence[str]) -> tuple[Blob, ...]:
        self.index.refresh()
        return self.index.blobs(chain_of(diff_ids))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


IDS = diff_ids_of("1", "2", "3")
LAYERS = [layer("1"), layer("2", 20), layer("3", 30)]


@pytest.mark.parametrize("types", [OCI, DOCKER], ids=["oci", "docker"])
def test_every_layer_of_an_image_is_found_by_its_chain_id(store: Store, types: dict[str, str]) -> None:
    store.image(IDS, [layer(str(i + 1), 10 * (i + 1), types["layer"]) for i in range(3)], types)
    for count in (1, 2, 3):
        expected = Blob(digest_of(f"blob {count}"), 10 * count, types["layer"])
        assert store.candidates(IDS[:count]) == (expected,)


def test_a_chain_id_says_which_diff_id_completes_it(store: Store) -> None:
    store.image(IDS, LAYERS)
    # Whatever other blobs another image lists for it.
    store.image([IDS[0], IDS[1]], [layer("1"), layer("evil 2")])
    store.index.refresh()
    for count in (1, 2, 3):
        assert store.index.diff_id(chain_of(IDS[:count])) == IDS[count - 1]
    assert store.index.diff_id(chain_of(IDS[1:])) is None
    for path in store.blobs.iterdir():
        path.unlink()
    store.index.refresh()
    assert store.index.diff_id(chain_of(IDS)) is None


def test_who_asks_again_and_again_reads_nothing_while_nothing_comes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_TICK_NS", 10**18)
    scans: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))  # type: ignore[func-returns-value]
    store.image(IDS, LAYERS)
    for _ in range(3):
        store.candidates(IDS)
    assert len(scans) == 3  # what came within the same tick would have left no trace
    time.sleep(0.1)
    monkeypatch.setattr(content, "_TICK_NS", 0)
    store.candidates(IDS)
    before = len(scans)
    for _ in range(3):
        assert len(store.candidates(IDS)) == 1
    assert len(scans) == before
    store.image(IDS[:1], [layer("other")])
    assert len(store.candidates(IDS[:1])) == 2


def test_nothing_is_found_for_what_no_image_has(store: Store) -> None:
    store.image(IDS, LAYERS)
    assert store.candidates(IDS[1:]) == ()
    assert store.candidates(IDS[::-1]) == ()


@pytest.mark.parametrize("first", ["manifest", "config", "both"])
def test_manifest_and_config_come_in_any_order(store: Store, first: str) -> None:
    config = config_text(IDS)
    manifest = manifest_text(digest_of(config), LAYERS)
    if first == "both":
        store.put(manifest)
        store.put(config)
    else:
        store.put(manifest if first == "manifest" else config)
        assert store.candidates(IDS) == ()
        store.put(config if first == "manifest" else manifest)
    assert len(store.candidates(IDS)) == 1


def test_two_manifests_may_wait_for_one_config(store: Store) -> None:
    config = config_text(IDS[:1])
    store.put(manifest_text(digest_of(config), [layer("1")]))
    store.put(manifest_text(digest_of(config), [layer("zstd", media_type="x")]))
    assert store.candidates(IDS[:1]) == ()
    store.put(config)
    assert {blob.digest for blob in store.candidates(IDS[:1])} == {digest_of("blob 1"), digest_of("blob zstd")}


def test_a_directory_that_is_not_there_yet_holds_nothing(tmp_path: Path) -> None:
    index = ChainIndex(tmp_path / "blobs" / "sha256")
    index.refresh()
    assert index.blobs(ChainID(IDS[0])) == ()


def test_another_images_diff_ids_beside_other_blobs_only_add_candidates(store: Store) -> None:
    """What a blob really is its build finds out: the forger is struck out there, the victim found."""
    store.image(IDS, LAYERS)
    true = {blob.digest for blob in store.candidates(IDS)}
    store.image(IDS, [layer("evil 1"), layer("evil 2"), layer("evil 3")])
    store.image(IDS, [layer("1"), layer("evil 2"), layer("3", 31)])
    assert true < {blob.digest for blob in store.candidates(IDS)} | {digest_of("blob evil 3")}
    assert {blob.digest for blob in store.candidates(IDS[:2])} == {digest_of("blob 2"), digest_of("blob evil 2")}
    # Same blob, other words about it: both are kept, for one of them is right.
    sizes = [blob.size_bytes for blob in store.candidates(IDS) if blob.digest == digest_of("blob 3")]
    assert sorted(sizes) == [30, 31]


def test_many_images_that_agree_give_one_candidate(store: Store) -> None:
    for number in range(5):
        store.put(manifest_text(store.put(config_text(IDS, author=str(number))), LAYERS))
    assert len(store.candidates(IDS)) == 1


@pytest.mark.parametrize(("ids", "layers"), [(3, 2), (2, 3), (0, 1), (1, 0), (3, 0)])
def test_mismatched_counts_claim_nothing(store: Store, ids: int, layers: int) -> None:
    store.image(IDS[:ids], LAYERS[:layers])
    for count in (1, 2, 3):
        assert store.candidates(IDS[:count]) == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"digest": 5},
        {"digest": None},
        {"digest": "sha512:" + "a" * 128},
        {"digest": "sha256:../../../../etc/passwd"},
        {"digest": "\ud800"},
        {"size": "10"},
        {"size": 1.5},
        {"size": None},
        {"size": -1},
        {"size": 0},
        {"mediaType": 7},
        {"mediaType": ["x"]},
    ],
    ids=str,
)
def test_a_descriptor_of_wrong_type_or_value_gives_no_candidate(store: Store, bad: dict[str, Any]) -> None:
    store.image(IDS[:1], [layer("1") | bad])
    assert store.candidates(IDS[:1]) == ()
    store.image(IDS[:1], [layer("1")])
    assert len(store.candidates(IDS[:1])) == 1


@pytest.mark.parametrize(
    "diff_ids",
    [
        "sha256:" + "a" * 64,
        [5],
        [None],
        [["x"]],
        ["sha256:" + "A" * 64],
        [IDS[0] + "\n"],
        ["x y"],
        ["ü" * 64],
        {},
    ],
    ids=str,
)
def test_a_config_of_wrong_type_or_value_claims_nothing(store: Store, diff_ids: Any) -> None:
    config = json.dumps({"rootfs": {"diff_ids": diff_ids}}).encode()
    store.put(manifest_text(store.put(config), [layer("1")]))
    assert store.candidates(IDS[:1]) == ()


NO_DOCUMENTS = {
    "empty": b"",
    "brace": b"{",
    "nothing": b"{}",
    "null": b"null",
    "list": b"[]",
    "cut": config_text(IDS)[:-1],
    "more behind": config_text(IDS) + b"{}",
    "not utf-8": b'{"rootfs": {"diff_ids": ["\xff"]}}',
    "surrogate": b'{"rootfs": {"diff_ids": ["\\ud800"]}}',
    "endless number": b'{"config": {"digest": "x", "size": ' + b"9" * 100_000 + b'}, "layers": []}',
    "layers of wrong type": b'{"config": {"digest": "x", "size": 1}, "layers": {}}',
    "config of wrong type": b'{"config": [], "layers": []}',
    "no layers": b'{"config": {"digest": "x", "size": 1}}',
    "deep list": b'{"rootfs": ' + b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "deep and whole": b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b', "rootfs": {"diff_ids": []}}',
    "image index": b'{"manifests": [{"digest": "sha256:00", "size": 5, "mediaType": "x"}]}',
    "gzip": b"\x1f\x8b\x08" + bytes(1000),
    "tar": b"{name" + bytes(2000),
    "noise": random.Random(1).randbytes(5000),
}


@pytest.mark.parametrize("data", NO_DOCUMENTS.values(), ids=NO_DOCUMENTS)
def test_what_is_no_document_is_passed_over(store: Store, data: bytes) -> None:
    store.put(data)
    assert store.candidates(IDS) == ()
    store.image(IDS, LAYERS)
    assert len(store.candidates(IDS)) == 1


@pytest.mark.parametrize("over", [False, True])
def test_a_document_is_read_up_to_containerds_own_bound(store: Store, over: bool) -> None:
    config = config_text(IDS)
    config += b" " * (DOCUMENT_BYTES_MAX - len(config) + over)
    store.put(manifest_text(store.put(config), LAYERS))
    assert len(store.candidates(IDS)) == (0 if over else 1)


@pytest.mark.parametrize("over", [False, True])
def test_an_image_has_no_more_than_a_thousand_layers(store: Store, over: bool) -> None:
    count = LAYERS_MAX + over
    ids = diff_ids_of(*map(str, range(count)))
    store.image(ids, [layer(str(i)) for i in range(count)])
    assert len(store.candidates(ids)) == (0 if over else 1)


def test_past_its_bound_the_index_leaves_out_what_it_saw_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # an image of one layer has two documents
    monkeypatch.setattr(content, "_INDEX_BYTES_MAX", 10 * 2 * content._size_of(("one",)))
    for number in range(30):
        store.image(diff_ids_of(str(number)), [layer(str(number))])
        store.index.refresh()

    def known() -> list[int]:
        return [number for number in range(30) if store.candidates(diff_ids_of(str(number)))]

    assert known() == list(range(20, 30))
    # Room again: what was left out is read after all.
    for number in range(15, 30):
        config = config_text(diff_ids_of(str(number)))
        store.path(digest_of(config)).unlink()
        store.path(digest_of(manifest_text(digest_of(config), [layer(str(number))]))).unlink()
    store.index.refresh()
    assert known()
    assert set(known()) <= set(range(15))


def test_manifests_that_wait_for_a_config_are_bounded_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_INDEX_BYTES_MAX", 10 * content._size_of(("one",)))
    config = config_text(IDS[:1])
    for number in range(30):
        store.put(manifest_text(digest_of(config), [layer(str(number))]))
    store.index.refresh()
    store.put(config)
    assert 1 <= len(store.candidates(IDS[:1])) < 10


def test_what_is_gone_from_the_store_is_gone_from_the_index(store: Store) -> None:
    store.image(IDS, LAYERS)
    assert store.candidates(IDS)
    for path in list(store.blobs.iterdir()):
        path.unlink()
    assert store.candidates(IDS) == ()
    assert store.index._size_bytes == 0
    assert not store.index._chains
    assert not store.index._by_config


@pytest.mark.timeout(1)
@pytest.mark.parametrize("call", ["open", "scandir"])
def test_what_could_not_be_read_for_want_of_descriptors_is_read_the_next_time(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.image(IDS, LAYERS)
    old = time.time_ns() - 10**10
    os.utime(store.blobs, ns=(old, old))  # nothing else says that there is more to read
    real = getattr(os, call)
    times = iter([False, True] if call == "open" else [True])

    def fails(*arguments: Any, **named: Any) -> Any:
        if next(times, False):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*arguments, **named)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Too many"):
        store.index.refresh()
    assert len(store.candidates(IDS)) == 1


def test_a_fifo_among_the_blobs_holds_nobody_up(store: Store) -> None:
    os.mkfifo(store.blobs / ("f" * 64))
    store.image(IDS, LAYERS)
    assert len(store.candidates(IDS)) == 1


def test_a_directory_among_the_blobs_is_passed_over_and_leaves_no_descriptor(store: Store) -> None:
    (store.blobs / ("d" * 64)).mkdir()
    store.image(IDS, LAYERS)
    before = os.listdir("/proc/self/fd")
    assert len(store.candidates(IDS)) == 1
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_symlinks_are_not_followed(store: Store, tmp_path: Path) -> None:
    config = config_text(IDS)
    (tmp_path / "outside").write_bytes(config)
    store.path(digest_of(config)).symlink_to(tmp_path / "outside")
    store.put(manifest_text(digest_of(config), LAYERS))
    assert store.candidates(IDS) == ()


def test_nothing_in_the_blobs_directory_is_changed(store: Store) -> None:
    store.image(IDS, LAYERS)
    for data in NO_DOCUMENTS.values():
        store.put(data)
    before = {path.name: path.stat().st_mtime_ns for path in store.blobs.iterdir()}
    store.index.refresh()
    assert {path.name: path.stat().st_mtime_ns for path in store.blobs.iterdir()} == before


def test_documents_that_went_and_came_again_are_read_again(store: Store) -> None:
    config = config_text(IDS)
    manifest = manifest_text(digest_of(config), LAYERS)
    store.put(b"{}")
    store.put(manifest)
    store.index.refresh()
    store.path(digest_of(manifest)).unlink()
    store.index.refresh()
    store.put(config)
    store.put(manifest)
    assert len(store.candidates(IDS)) == 1


# Content: which of the candidates are there


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Store, Content]:
    return Store(tmp_path), Content(tmp_path, "/nonexistent")


async def test_only_blobs_that_are_complete_are_candidates(whole: tuple[Store, Content]) -> None:
    store, there = whole
    data = b"x" * 100
    chain = ChainID(IDS[0])
    store.image(IDS[:1], [{"mediaType": OCI["layer"], "digest": digest_of(data), "size": 100}])
    assert await there.candidates(chain) == (IDS[0], ())
    path = store.path(digest_of(data))
    for part in (b"", data[:99], data + b"x"):
        path.write_bytes(part)
        assert await there.candidates(chain) == (IDS[0], ())
    path.write_bytes(data)
    assert await there.candidates(chain) == (IDS[0], (Blob(digest_of(data), 100, OCI["layer"]),))
    path.unlink()
    assert await there.candidates(chain) == (IDS[0], ())
    await there.close()


async def test_a_blob_is_found_again_after_containerd_collected_and_fetched_it(whole: tuple[Store, Content]) -> None:
    store, there = whole
    chain = ChainID(IDS[0])
    for _ in range(3):
        store.image(IDS[:1], [{"mediaType": OCI["layer"], "digest": store.put(b"x" * 50), "size": 50}])
        assert len((await there.candidates(chain))[1]) == 1
        for path in store.blobs.iterdir():
            path.unlink()
        assert await there.candidates(chain) == (None, ())
    await there.close()


async def test_a_forged_size_does_not_hide_the_true_one(whole: tuple[Store, Content]) -> None:
    store, there = whole
    digest = store.put(b"x" * 50)
    for size in (49, 50, 51, 10**15, 10**400):
        store.image(IDS[:1], [{"mediaType": OCI["layer"], "digest": digest, "size": size}])
    assert [blob.size_bytes for blob in (await there.candidates(ChainID(IDS[0])))[1]] == [50]
    await there.close()


async def test_a_blob_in_the_directory_is_read_from_it(whole: tuple[Store, Content]) -> None:
    store, there = whole
    digest = store.put(b"some bytes")
    async with there.open(Blob(digest, 10, OCI["layer"]), Caller("default")) as fd:
        assert os.read(fd, 100) == b"some bytes"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    await there.close()


@pytest.mark.parametrize(
    ("metadata", "key", "caller"),
    [
        ({"containerd-namespace": "k8s.io", "containerd-lease": "l"}, "default/1/x", Caller("k8s.io", "l")),
        ({}, "default/1/x", Caller("default")),
        # Any text can be a key; what is no namespace is none.
        ({}, "odd\nname/1/x", Caller("")),
        ({}, "k" * 5000, Caller("")),
        ({"containerd-namespace": ""}, "moby/1/x", Caller("moby")),
        ({}, "", Caller("")),
    ],
)
def test_a_caller_is_known_by_metadata_else_by_the_key(metadata: dict[str, str], key: str, caller: Caller) -> None:
    assert Caller.of(metadata, key) == caller
    sent = dict(caller.metadata())
    assert sent["containerd-namespace"] == (caller.namespace or "default")
    assert sent.get("containerd-lease", "") == caller.lease
