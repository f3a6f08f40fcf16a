# SPDX-License-Identifier: Apache-2.0
"""What is asked of an agent, what a policy says of it, and that it allows that and nothing else."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policy.check import Verdict, check
from policy.hashed import HashedImage, HashedLayer
from policy.storages import DATA_ROOT, LAYERS, Storage, named_layers, of_policy, requested
from snapshotter.contracts import kata_tardev
from snapshotter.contracts.mount import Lower

CONTAINER = "c0ffee"


def an_image(letters: str) -> HashedImage:
    """One layer for each letter, the first one first."""
    layers = tuple(
        HashedLayer(f"sha256:{letter * 64}", "tarfs", f"{number:064x}", 4096 * (number + 1))
        for number, letter in enumerate(letters, 10)
    )
    return HashedImage("localhost/a:b", "sha256:" + "0" * 64, "", "linux/amd64", layers)


IMAGE = an_image("abc")


def data(*images: HashedImage) -> dict[str, Any]:
    return {"containers": [{"storages": [each.document() for each in of_policy(image)]} for image in images]}


def verdict(storages: list[Storage], *images: HashedImage) -> Verdict:
    return check(data(*(images or (IMAGE,))), storages, CONTAINER)


def test_they_are_what_the_snapshotter_answers() -> None:
    """The overlay's options are the mount's, verbatim."""
    layers = named_layers(IMAGE)
    lowers = [Lower(Path(f"{DATA_ROOT}/layers/{layer.name}"), "tarfs", layer.root_hash) for layer in layers]
    [mount] = kata_tardev.container_mounts(lowers, Path("/fs"), Path("/work"))
    *of_layers, overlay = requested(IMAGE, CONTAINER)
    assert (overlay.fstype, overlay.options) == (mount.type, mount.options)
    # And each layer is what the shim makes of its option.
    prefix = "io.katacontainers.fs-opt.layer="
    options = [option.removeprefix(prefix) for option in mount.options if option.startswith(prefix)]
    for storage, option in zip(of_layers, options, strict=True):
        source, fstype, *rest = base64.b64decode(option).decode().split(",")
        assert (storage.mount_point, storage.fstype, list(storage.options)) == (f"{LAYERS}/{source}", fstype, rest)


def test_policy_data_is_genpolicys() -> None:
    """microsoft/kata-containers 3.2.0.azl4: src/tools/genpolicy/src/policy.rs, in its words."""
    layers = named_layers(IMAGE)
    document = data(IMAGE)["containers"][0]["storages"]
    assert document[0] == {
        "driver": "blk", "driver_options": [], "source": "", "fstype": "tar", "options": ["$(hash0)"],
        "mount_point": "$(layer0)", "fs_group": None,
    }  # fmt: skip
    assert [each["mount_point"] for each in document[:-1]] == ["$(layer0)", "$(layer1)", "$(layer2)"]
    assert document[-1] == {
        "driver": "overlayfs", "driver_options": [], "source": "", "fstype": "fuse3.kata-overlay",
        "options": [":".join(layer.name for layer in layers), ":".join(layer.root_hash for layer in layers)],
        "mount_point": "$(cpath)/$(bundle-id)", "fs_group": None,
    }  # fmt: skip
    # The topmost first.
    assert [layer.root_hash for layer in layers] == [each.root_hash for each in reversed(IMAGE.layers)]


def test_the_documented_example() -> None:
    image = replace(IMAGE, layers=(HashedLayer("sha256:" + "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", "tar-index", "ab" * 32, 4096),))  # fmt: skip  # noqa: E501
    [layer] = named_layers(image)
    assert layer.name == "6d8171ef8774947e10b7e48737920a68387284de36e5f0a5d6c6b319837e49f3"
    assert layer.file_system == "erofs"
    assert (
        requested(image, "x")[-1]
        .options[1]
        .startswith(
            "io.katacontainers.fs-opt.layer=NmQ4MTcxZWY4Nzc0OTQ3ZTEwYjdlNDg3Mzc5MjBhNjgzODcyODRkZTM2ZTVmMGE1ZDZjNmIzMTk4MzdlNDlmMyxlcm9mcyxybyxpby5r"
        )
    )


@pytest.mark.parametrize("letters", ["a", "ab", "abc", "abcdefghijklmnopqrst"])
def test_an_image_is_allowed_by_its_policy(letters: str) -> None:
    image = an_image(letters)
    assert verdict(requested(image, CONTAINER), image) == Verdict(True)
    # Among others, too; and each of those has something against it.
    found = check(data(an_image("xy"), image), requested(image, CONTAINER), CONTAINER)
    assert found.allowed
    assert {reason.container for reason in found.reasons} == {0}


Change = Callable[[list[Storage]], list[Storage]]


def of_layer(**fields: Any) -> Change:
    return lambda storages: [replace(storages[0], **fields), *storages[1:]]


def of_overlay(**fields: Any) -> Change:
    return lambda storages: [*storages[:-1], replace(storages[-1], **fields)]


def options(storages: list[Storage], place: int, change: Callable[[list[str]], list[str]]) -> list[Storage]:
    storages[place] = replace(storages[place], options=tuple(change(list(storages[place].options))))
    return storages


def option(place: int, number: int, text: str) -> Change:
    return lambda storages: options(
        storages, place, lambda each: [text if at == number % len(each) else old for at, old in enumerate(each)]
    )


def other(text: str) -> str:
    """Another hexadecimal digit at the end."""
    return text[:-1] + ("0" if text[-1] != "0" else "1")


HASH = "io.katacontainers.fs-opt.root-hash="
LAYER = "io.katacontainers.fs-opt.layer="
TOP = requested(IMAGE, CONTAINER)[0]
OVERLAY = requested(IMAGE, CONTAINER)[-1]
CHANGES: dict[str, tuple[Change, str]] = {
    "a layer is missing": (lambda storages: storages[1:], "count"),
    "a layer is missing, and another comes twice": (lambda storages: [storages[1], *storages[1:]], "layers"),
    "a layer more": (lambda storages: [storages[0], *storages], "count"),
    "a foreign layer more": (lambda storages: [*requested(an_image("z"), CONTAINER)[:1], *storages], "count"),
    "two layers change places": (lambda storages: [storages[1], storages[0], *storages[2:]], "layers"),
    "the overlay comes twice": (lambda storages: [*storages, storages[-1]], "overlay"),
    "no overlay": (lambda storages: storages[:-1], "overlay"),
    "another root hash": (of_layer(options=(*TOP.options[:3], other(TOP.options[3]))), "layer"),
    "the root hash of another layer": (option(0, 3, f"{HASH}{IMAGE.layers[0].root_hash}"), "layer"),
    "no root hash": (of_layer(options=TOP.options[:3]), "layer"),
    "an empty root hash": (option(0, 3, HASH), "layer"),
    "written to": (option(0, 0, "rw"), "layer"),
    "options in another order": (of_layer(options=TOP.options[::-1]), "layer"),
    "an option more": (of_layer(options=(*TOP.options, "context=x")), "layer"),
    "an option less": (of_layer(options=TOP.options[1:]), "layer"),
    "another driver": (of_layer(driver="scsi"), "layer"),
    "options for the driver": (of_layer(driver_options=("x",)), "layer"),
    "another mount point": (of_layer(mount_point=f"{LAYERS}/{'0' * 64}"), "layers"),
    "a mount point above it": (of_layer(mount_point=f"{LAYERS}/../layers/{TOP.mount_point[-64:]}"), "layers"),
    "a layer that is none": (of_layer(driver="overlayfs"), "overlay"),
    "another prefix": (option(-1, 0, "io.katacontainers.fs-opt.layer-src-prefix=/tmp/layers"), "overlay"),
    "no prefix": (of_overlay(options=OVERLAY.options[1:]), "overlay"),
    "a layer's option in the plain encoding": (
        option(-1, 1, LAYER + base64.b64decode(OVERLAY.options[1].removeprefix(LAYER)).decode()), "overlay"),
    "a layer's option of another layer": (option(-1, 1, OVERLAY.options[2]), "overlay"),
    "a layer's option of another type": (
        option(-1, 1, LAYER + base64.b64encode(
            base64.b64decode(OVERLAY.options[1].removeprefix(LAYER)).replace(b",tar,", b",ext4,")).decode()),
        "overlay"),
    "layers of the overlay in another order": (
        option(-1, -1, "lowerdir=" + ":".join(reversed(OVERLAY.options[-1].removeprefix("lowerdir=").split(":")))),
        "overlay"),
    "a lower directory more": (option(-1, -1, f"{OVERLAY.options[-1]}:/tmp"), "overlay"),
    "no overlay-rw": (lambda storages: options(storages, -1, lambda each: [*each[:-2], each[-1]]), "overlay"),
    "an upper directory": (of_overlay(options=(*OVERLAY.options, "upperdir=/x")), "overlay"),
    "the root of another container": (of_overlay(mount_point="/run/kata-containers/shared/containers/x"), "overlay"),
    "a driver's option of the overlay": (of_overlay(driver_options=("x",)), "overlay"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_denied_and_named(what: str) -> None:
    change, rule = CHANGES[what]
    storages = requested(IMAGE, CONTAINER)
    changed = change(list(storages))
    assert changed != storages
    found = verdict(changed)
    assert not found.allowed
    assert rule in {reason.rule for reason in found.reasons}


def test_another_container_id_is_denied() -> None:
    assert not check(data(IMAGE), requested(IMAGE, "other"), CONTAINER).allowed


def test_what_policies_do_not_look_at_may_differ() -> None:
    """The place on a bus and the file system's name: as Microsoft's rules have it."""
    storages = [replace(each, source="0002:00:1f.0", fstype="x") for each in requested(IMAGE, CONTAINER)]
    assert verdict(storages).allowed


def test_fs_group() -> None:
    document = data(IMAGE)
    document["containers"][0]["storages"][0]["fs_group"] = {"group_id": 1}
    # The policy's own has none to compare with: a request with one is denied.
    storages = requested(IMAGE, CONTAINER)
    assert check(document, storages, CONTAINER).allowed


@pytest.mark.parametrize("document", [{}, {"containers": []}, {"containers": [{}]}, {"containers": [{"storages": []}]},
                                      {"containers": "x"}])  # fmt: skip
def test_a_policy_without_layers_allows_nothing(document: dict[str, Any]) -> None:
    assert not check(document, requested(IMAGE, CONTAINER), CONTAINER).allowed
    assert not check(document, [], CONTAINER).allowed
