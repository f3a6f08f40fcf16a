# SPDX-License-Identifier: Apache-2.0
"""The contract `kata-tardev`, to the byte, and what the peers make of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from policy.chain import ChainID, chain_id, layer_name
from snapshotter.contracts import Lower, Mount, kata_tardev
from snapshotter.contracts.kata_tardev import NamedLayer, named_layers
from tests import kata_peer
from tests.kata_peer import Refused

CHAIN = ChainID("sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb")
NAME = "6d8171ef8774947e10b7e48737920a68387284de36e5f0a5d6c6b319837e49f3"
ROOT_HASH = "ab" * 32
BASE64 = (
    "NmQ4MTcxZWY4Nzc0OTQ3ZTEwYjdlNDg3Mzc5MjBhNjgzODcyODRkZTM2ZTVmMGE1ZDZjNmIzMTk4MzdlNDlmMyxlcm9mcyxybyxp"
    "by5rYXRhY29udGFpbmVycy5mcy1vcHQuYmxvY2tfZGV2aWNlPWZpbGUsaW8ua2F0YWNvbnRhaW5lcnMuZnMtb3B0LmlzLWxheWVy"
    "LGlvLmthdGFjb250YWluZXJzLmZzLW9wdC5yb290LWhhc2g9YWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJh"
    "YmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYg=="
)
CONTAINER = "c" * 64
UPPER, WORK = Path("/r/snapshots/7/fs"), Path("/r/snapshots/7/work")
DIRECTORY = Path(kata_peer.POLICY_PREFIX)


def lowers(count: int, layer_format: str = "tarfs") -> list[Lower]:
    """Topmost first, as the names of a chain are; all of them different."""
    chain, found = None, []
    for number in range(count):
        chain = chain_id(chain, "sha256:" + hashlib.sha256(b"%d" % number).hexdigest())
        root_hash = hashlib.sha256(b"root %d" % number).hexdigest()
        found.append(Lower(DIRECTORY / layer_name(chain), layer_format, root_hash))
    return found[::-1]


def answer(stack: list[Lower], encoding: str = "base64") -> Mount:
    (mount,) = kata_tardev.container_mounts(stack, UPPER, WORK, encoding)
    return mount


def test_the_name_is_the_hash_of_the_chain_ids_text() -> None:
    assert layer_name(CHAIN) == NAME


def test_base64_to_the_byte() -> None:
    lower = Lower(DIRECTORY / NAME, "tar-index", ROOT_HASH)
    assert answer([lower]) == Mount(
        "fuse3.kata-overlay",
        "/",
        (
            "io.katacontainers.fs-opt.layer-src-prefix=/var/lib/containerd/io.containerd.snapshotter.v1.tardev/layers",
            f"io.katacontainers.fs-opt.layer={BASE64}",
            "io.katacontainers.fs-opt.overlay-rw",
            f"lowerdir={NAME}",
        ),
    )


def test_plain_to_the_byte() -> None:
    """No prefix: that shim does not know it, and the source is absolute."""
    below = replace(lowers(1)[0], path=Path("/l/b"), root_hash="0" * 64)
    assert answer([Lower(Path("/l/a"), "tarfs", ROOT_HASH), below], "plain") == Mount(
        "fuse3.kata-overlay",
        "/",
        (
            "io.katacontainers.fs-opt.layer=/l/a,tar,ro,io.katacontainers.fs-opt.block_device=file,"
            f"io.katacontainers.fs-opt.is-layer,io.katacontainers.fs-opt.root-hash={ROOT_HASH}",
            "io.katacontainers.fs-opt.layer=/l/b,tar,ro,io.katacontainers.fs-opt.block_device=file,"
            f"io.katacontainers.fs-opt.is-layer,io.katacontainers.fs-opt.root-hash={'0' * 64}",
            "io.katacontainers.fs-opt.overlay-rw",
            "lowerdir=a:b",
        ),
    )


@pytest.mark.parametrize("encoding", kata_tardev.ENCODINGS)
def test_a_view_is_told_the_same(encoding: str) -> None:
    stack = lowers(3)
    assert kata_tardev.container_mounts(stack, None, None, encoding) == [answer(stack, encoding)]


@pytest.mark.parametrize("encoding", kata_tardev.ENCODINGS)
@pytest.mark.parametrize(("layer_format", "file_system"), [("tarfs", "tar"), ("tar-index", "erofs")])
def test_the_guest_verifies_and_stacks_every_layer(layer_format: str, file_system: str, encoding: str) -> None:
    stack = lowers(7, layer_format)
    found = kata_peer.storages([answer(stack, encoding)], encoding, CONTAINER)
    verified, order = kata_peer.agent_mounts(found, CONTAINER)
    assert verified == {f"{kata_peer.LAYERS}/{each.path.name}": (file_system, each.root_hash) for each in stack}
    assert order == [each.path.name for each in stack]
    assert [each.source for each in kata_peer.shim_layers([answer(stack, encoding)], encoding)] == [
        str(each.path) for each in stack
    ]


@pytest.mark.parametrize(("encoding", "other"), [("base64", "plain"), ("plain", "base64")])
def test_a_shim_of_the_other_kind_refuses(encoding: str, other: str) -> None:
    """Why it is configured: nothing else tells them apart, and neither takes the other's."""
    with pytest.raises(Refused):
        kata_peer.shim_layers([answer(lowers(2), encoding)], other)


@pytest.mark.parametrize("count", [1, 2, 7, kata_tardev.MAX_LAYERS])
def test_microsofts_policy_allows_it(count: int) -> None:
    stack = lowers(count)
    found = kata_peer.storages([answer(stack)], "base64", CONTAINER)
    kata_peer.policy_allows(found, [each.path.name for each in stack], [each.root_hash for each in stack])


def test_microsofts_policy_denies_all_else() -> None:
    """Among it what the contract can say but that policy does not know: `erofs`, `plain`, another directory."""
    stack = lowers(3)
    names, hashes = [each.path.name for each in stack], [each.root_hash for each in stack]
    spoilt = {
        "erofs": (lowers(3, "tar-index"), "base64"),
        "plain": (stack, "plain"),
        "directory": ([replace(each, path=Path("/other", each.path.name)) for each in stack], "base64"),
        "order": (stack[::-1], "base64"),
        "one less": (stack[1:], "base64"),
        "one more": (lowers(4), "base64"),
        "root hash": ([replace(stack[0], root_hash="0" * 64), *stack[1:]], "base64"),
    }
    for layers, encoding in spoilt.values():
        found = kata_peer.storages([answer(layers, encoding)], encoding, CONTAINER)
        with pytest.raises(Refused):
            kata_peer.policy_allows(found, names, hashes)
    # What containerd appends where SELinux is on: an option more.
    labelled = replace(answer(stack), options=(*answer(stack).options, 'context="x"'))
    with pytest.raises(Refused):
        kata_peer.policy_allows(kata_peer.storages([labelled], "base64", CONTAINER), names, hashes)


@pytest.mark.parametrize("encoding", kata_tardev.ENCODINGS)
def test_as_many_layers_as_the_contract_takes_fit_the_agents_page_and_no_more(encoding: str) -> None:
    most = lowers(kata_tardev.MAX_LAYERS)
    kata_peer.agent_mounts(kata_peer.storages([answer(most, encoding)], encoding, CONTAINER), CONTAINER)
    more = lowers(kata_tardev.MAX_LAYERS + 1)
    with pytest.raises(Refused, match="over a page"):
        kata_peer.agent_mounts(kata_peer.storages([answer(more, encoding)], encoding, CONTAINER), CONTAINER)


def test_devices_go_to_the_segments_of_the_vm() -> None:
    devices = kata_peer.plugged(kata_peer.shim_layers([answer(lowers(kata_tardev.MAX_LAYERS))], "base64"))
    assert len(set(devices.values())) == len(devices) == kata_tardev.MAX_LAYERS
    addresses = list(devices.values())
    assert (addresses[0], addresses[31]) == ("0001:00:01.0", "0002:00:01.0")
    # Four containers of different images with the most layers are what a pod has place for.
    of_pod = kata_peer.shim_layers([answer(lowers(279))], "base64")
    assert len(kata_peer.plugged(of_pod)) == 279 >= 4 * kata_tardev.MAX_LAYERS
    with pytest.raises(Refused, match="segments"):
        kata_peer.plugged(kata_peer.shim_layers([answer(lowers(280))], "base64"))


def test_a_chain_with_one_layer_twice_has_two_names() -> None:
    """A name is a chain's, not a layer's: an overlay in the guest takes both."""
    diff_id = "sha256:" + "1" * 64
    one = chain_id(None, diff_id)
    assert layer_name(one) != layer_name(chain_id(one, diff_id))


# Read back, by the helper on the host


def read_back(mount: Mount, joined: bool) -> list[NamedLayer]:
    return named_layers([",".join(mount.options)] if joined else mount.options)


@pytest.mark.parametrize("encoding", kata_tardev.ENCODINGS)
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined by mount.fuse3"])
def test_layers_are_read_back_in_their_order(encoding: str, joined: bool) -> None:
    stack = lowers(5)
    for more in ((), ("ro", "dev", "suid"), ('context="a:b:c1,c2"',)):
        mount = answer(stack, encoding)
        found = read_back(replace(mount, options=(*mount.options, *more)), joined)
        assert found == [NamedLayer(each.path, "tar") for each in stack]


@pytest.mark.parametrize(
    "option",
    ["", "/l/a", "%%%", "bm90IGEgbGF5ZXI=", "L2wvLi4vYSx0YXI=", "/l/../a,tar", "YSx0YXI="],
    ids=["nothing", "no type", "no base64", "one field", "upwards", "upwards, plain", "no prefix"],
)
def test_what_names_no_layer_is_refused(option: str) -> None:
    with pytest.raises(ValueError):
        named_layers([f"{kata_peer.OPTION}layer={option}"])
