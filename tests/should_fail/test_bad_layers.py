# SPDX-License-Identifier: Apache-2.0
"""Bad layers through the daemon's socket: the right code, the layer and the reason in the text, nothing kept."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode as Code

from snapshotter.api.proto import diff_pb2, snapshots_pb2, types_pb2
from tests.harness import SNAPSHOTTER, Client, Daemon

pytestmark = [pytest.mark.root, pytest.mark.tool]

OCI = "application/vnd.oci.image.layer.v1.tar"
_keys = itertools.count()


def good_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 70_000
            tar.addfile(member, io.BytesIO(hashlib.shake_128(name.encode()).digest(member.size)))
    return out.getvalue()


TAR = good_tar()
GZIP = gzip.compress(TAR)
ZSTD = subprocess.run(["zstd", "-q", "-c"], input=TAR, capture_output=True, check=False).stdout


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def bad_checksum() -> bytes:
    return flipped(TAR, 0)


def renamed(name: bytes) -> bytes:
    """The first member gets a name that a header of its own brings."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name.decode("utf-8", "surrogateescape")))
    return out.getvalue()


BAD: dict[str, tuple[bytes, str, Code, str]] = {
    "gzip-truncated": (GZIP[: len(GZIP) // 2], "+gzip", Code.INVALID_ARGUMENT, "gzip stream is truncated"),
    "gzip-corrupt": (flipped(GZIP, len(GZIP) // 2), "+gzip", Code.INVALID_ARGUMENT, "gzip stream is corrupt"),
    "gzip-bad-crc": (flipped(GZIP, len(GZIP) - 6), "+gzip", Code.INVALID_ARGUMENT, "gzip stream is corrupt"),
    "gzip-empty": (b"\x00", "+gzip", Code.INVALID_ARGUMENT, "gzip"),
    "gzip-junk-behind": (GZIP + b"junk", "+gzip", Code.INVALID_ARGUMENT, "after the last gzip member"),
    "gzip-zeros-then-junk": (GZIP + bytes(9) + b"j", "+gzip", Code.INVALID_ARGUMENT, "after the last gzip member"),
    "zstd-truncated": (ZSTD[: len(ZSTD) // 2], "+zstd", Code.INVALID_ARGUMENT, "zstd stream is truncated"),
    "zstd-corrupt": (flipped(ZSTD, len(ZSTD) - 2), "+zstd", Code.INVALID_ARGUMENT, "zstd stream is corrupt"),
    "zstd-junk-behind": (ZSTD + b"junk", "+zstd", Code.INVALID_ARGUMENT, "zstd frames"),
    "tar-cut-in-header": (TAR[:300], "", Code.INVALID_ARGUMENT, "ends inside a header"),
    "tar-cut-in-data": (TAR[:2000], "", Code.INVALID_ARGUMENT, "ends inside a member's data"),
    "tar-bad-checksum": (bad_checksum(), "", Code.INVALID_ARGUMENT, "bad header checksum"),
    "tar-in-gzip-cut": (gzip.compress(TAR[:2000]), "+gzip", Code.INVALID_ARGUMENT, "ends inside a member's data"),
    "tar-dot-dot": (renamed(b"a/../../etc/x"), "", Code.INVALID_ARGUMENT, "'..' in a path"),
    "tar-not-utf8": (renamed(b"../\xff\xfe" + b"x" * 200), "", Code.INVALID_ARGUMENT, "'..' in a path"),
    "gzip-as-plain": (GZIP, "", Code.INVALID_ARGUMENT, "tar"),
    "media-type": (TAR, "+brotli", Code.INVALID_ARGUMENT, "media type"),
    "encrypted": (TAR, "+gzip+encrypted", Code.INVALID_ARGUMENT, "media type"),
}


def put(daemon: Daemon, data: bytes, digest: str | None = None) -> types_pb2.Descriptor:
    """Into the content directory, under its digest or another."""
    digest = digest or "sha256:" + hashlib.sha256(data).hexdigest()
    blobs = daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs/sha256"
    (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    return types_pb2.Descriptor(digest=digest, size=len(data))


def prepare(
    client: Client, chain_id: str = "sha256:" + "0" * 64, parent: str = ""
) -> tuple[str, list[types_pb2.Mount]]:
    key = f"default/{next(_keys)}/extract-1-x {chain_id}"
    reply = client.snapshots.Prepare(
        snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=key, parent=parent), timeout=30
    )
    return key, list(reply.mounts)


def apply(client: Client, descriptor: types_pb2.Descriptor, media_type: str, mounts: list[types_pb2.Mount]) -> str:
    descriptor.media_type = media_type
    reply = client.diff.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=mounts), timeout=60)
    return str(reply.applied.digest)


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    text = caught.value.details()
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 4096
    return caught.value


def assert_nothing_kept(daemon: Daemon) -> None:
    assert not daemon.staged()
    assert not daemon.layer_files()
    assert daemon.layers() == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_layer_is_refused_and_a_good_one_then_taken(daemon: Daemon, name: str) -> None:
    data, suffix, code, reason = BAD[name]
    with daemon.client() as client:
        key, mounts = prepare(client)
        descriptor = put(daemon, data)
        error = refused(lambda: apply(client, descriptor, OCI + suffix, mounts))
        assert error.code() is code
        assert reason in error.details()
        assert descriptor.digest in error.details()
        assert_nothing_kept(daemon)
        commit = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name="default/9/x", key=key)
        assert refused(lambda: client.snapshots.Commit(commit, timeout=30)).code() is Code.FAILED_PRECONDITION

        # the same call, with good bytes
        assert apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts) == "sha256:" + hashlib.sha256(TAR).hexdigest()
        client.snapshots.Commit(commit, timeout=30)
    assert len(daemon.layer_files()) == 1


@pytest.mark.parametrize("rotten", ["flipped", "short", "long", "empty"])
def test_a_rotten_blob_is_data_loss(daemon: Daemon, rotten: str) -> None:
    digest = "sha256:" + hashlib.sha256(GZIP).hexdigest()
    bad = {"flipped": flipped(GZIP, 5), "short": GZIP[:-100], "long": GZIP + GZIP, "empty": b""}[rotten]
    with daemon.client() as client:
        _, mounts = prepare(client)
        put(daemon, bad, digest)
        descriptor = types_pb2.Descriptor(digest=digest, size=len(GZIP))
        error = refused(lambda: apply(client, descriptor, f"{OCI}+gzip", mounts))
        assert error.code() is Code.DATA_LOSS, error.details()
        assert digest in error.details()
        assert_nothing_kept(daemon)
        assert apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts) == "sha256:" + hashlib.sha256(TAR).hexdigest()


def test_a_wrong_size_in_the_descriptor_is_data_loss_before_and_after_a_build(daemon: Daemon) -> None:
    with daemon.client() as client:
        _, mounts = prepare(client)
        put(daemon, GZIP)
        digest = "sha256:" + hashlib.sha256(GZIP).hexdigest()

        def wrong() -> object:
            return apply(client, types_pb2.Descriptor(digest=digest, size=len(GZIP) + 1), f"{OCI}+gzip", mounts)

        assert refused(wrong).code() is Code.DATA_LOSS
        apply(client, types_pb2.Descriptor(digest=digest, size=len(GZIP)), f"{OCI}+gzip", mounts)
        assert refused(wrong).code() is Code.DATA_LOSS


def test_a_stored_layer_is_not_found_under_another_compression(daemon: Daemon) -> None:
    with daemon.client() as client:
        _, mounts = prepare(client)
        apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts)
        _, more = prepare(client)
        assert refused(lambda: apply(client, put(daemon, GZIP), OCI, more)).code() is Code.INVALID_ARGUMENT


def test_a_blob_that_is_nowhere(daemon: Daemon) -> None:
    with daemon.client() as client:
        _, mounts = prepare(client)
        descriptor = types_pb2.Descriptor(digest="sha256:" + "ab" * 32, size=5)
        error = refused(lambda: apply(client, descriptor, OCI, mounts))
        assert error.code() in (Code.UNAVAILABLE, Code.NOT_FOUND)
        assert descriptor.digest in error.details()


def test_a_digest_that_is_none(daemon: Daemon) -> None:
    digests = ["", "sha256:", "sha256:xyz", "../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32]
    with daemon.client() as client:
        _, mounts = prepare(client)
        for digest in digests:
            descriptor = types_pb2.Descriptor(digest=digest, size=5)
            error = refused(lambda: apply(client, descriptor, OCI, mounts))  # noqa: B023
            assert error.code() is Code.INVALID_ARGUMENT, digest


def test_mounts_of_others_are_unimplemented_before_anything_else(daemon: Daemon, tmp_path: Path) -> None:
    root = daemon.root
    foreign = [
        [],
        [types_pb2.Mount(type="bind", source=str(tmp_path), options=["rw"])],
        [types_pb2.Mount(type="overlay", source="overlay", options=["lowerdir=/a", "upperdir=/b/1/fs", "workdir=/w"])],
        [types_pb2.Mount(type="bind", source=f"{root}/snapshots/x/fs")],
        [types_pb2.Mount(type="bind", source=f"{root}/snapshots/1/work")],
        [types_pb2.Mount(type="bind", source=f"{root}/snapshots/1/fs/../../../../etc")],
        [types_pb2.Mount(type="ext4", source="/dev/sda")],
        [types_pb2.Mount(type="bind", source=str(tmp_path)), types_pb2.Mount(type="bind", source=str(tmp_path))],
    ]
    with daemon.client() as client:
        for mounts in foreign:
            nonsense = types_pb2.Descriptor(digest="nonsense", size=-1)
            assert refused(lambda: apply(client, nonsense, "no/type", mounts)).code() is Code.UNIMPLEMENTED  # noqa: B023


def test_unknown_parents_and_wrong_chains(daemon: Daemon) -> None:
    with daemon.client() as client:
        error = refused(lambda: prepare(client, parent="default/1/nobody"))
        assert error.code() is Code.NOT_FOUND
        key, mounts = prepare(client)
        assert refused(lambda: prepare(client, parent=key)).code() is Code.INVALID_ARGUMENT  # not committed

        diff_id = apply(client, put(daemon, GZIP), f"{OCI}+gzip", mounts)
        wrong = snapshots_pb2.CommitSnapshotRequest(
            snapshotter=SNAPSHOTTER, name="default/5/sha256:" + "1" * 64, key=key
        )
        error = refused(lambda: client.snapshots.Commit(wrong, timeout=30))
        assert error.code() is Code.FAILED_PRECONDITION
        assert diff_id in error.details()
        right = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name=f"default/5/{diff_id}", key=key)
        client.snapshots.Commit(right, timeout=30)


def test_another_snapshotters_name(daemon: Daemon) -> None:
    with daemon.client() as client:
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="k")
        assert refused(lambda: client.snapshots.Prepare(request, timeout=30)).code() is Code.INVALID_ARGUMENT
