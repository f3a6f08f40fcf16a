# SPDX-License-Identifier: Apache-2.0
"""What clients do, as containerd does it: pulls, containers, removals, and single calls in any order."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from tests.model.states import OK
from tests.model.world import COMPLETES, IMAGES, NAMES, World, blob_of, chains_of

Play: TypeAlias = Callable[[World], Coroutine[Any, Any, None]]

_NAMES: Final = tuple(NAMES)
_SPACES: Final = ("a", "b")
KINDS: Final = 12
PULL, DROP = 0, 5
REMOVE, UNPACK = 3, 7  # of a single call
_SECOND_SPACE: Final = 54  # of the 64 values of a number


def name_of(space: str, chain: str) -> str:
    return f"{space}/1/{chain}" if chain else ""


def unpack_key(space: str, chain: str, attempt: int) -> str:
    return f"{space}/2/extract-{attempt} {chain}"


def container_key(space: str, number: int) -> str:
    return f"{space}/3/container-{number}"


def pull(snapshotter: str, image: int, space: str, attempt: int, *, applies: bool) -> Play:
    """As containerd's unpacker; of 1.6 and its walking differ, without `applies`."""

    async def play(world: World) -> None:
        below = ""
        for which, chain in zip(IMAGES[image], chains_of(image), strict=True):
            name, key = name_of(space, chain), unpack_key(space, chain, attempt)
            end, _ = await world.call("stat", snapshotter, key=name)
            if end != OK:
                end, mounts = await world.call("unpack", snapshotter, key=key, parent=below)
                if end != OK:
                    return
                if applies:
                    fields = {"of": world.makers[world.owner(mounts)], "diff_id": COMPLETES[chain]}
                    end, _ = await world.call("apply", snapshotter, blob=blob_of(which), mounts=mounts, **fields)
                    if end != OK:
                        return
                labels = (("root", "1"),)
                end, _ = await world.call(
                    "commit", snapshotter, key=key, name=name, diff_id=COMPLETES[chain], labels=labels
                )
                if end == "AlreadyExists":
                    await world.call("remove", snapshotter, key=key)
                elif end != OK:
                    return
            below = name

    return play


def container(snapshotter: str, space: str, which: int, number: int, *, stays: bool, view: bool) -> Play:
    """On any image that is there."""

    async def play(world: World) -> None:
        # Layers of the host contract would be mounted: that is for tests that run containers.
        parent = "" if snapshotter == "tardev-host" else _any_image(world, snapshotter, space, which)
        key = container_key(space, number)
        end, mounts = await world.call("view" if view else "prepare", snapshotter, key=key, parent=parent)
        if end != OK:
            return
        end, again = await world.call("mounts", snapshotter, key=key)
        if end == OK and not world.overlaps(snapshotter, key):
            assert mounts == again
            world.check_named(snapshotter, mounts)
        await world.call("usage", snapshotter, key=key)
        if not stays:
            await world.call("remove", snapshotter, key=key)

    return play


def _any_image(world: World, snapshotter: str, space: str, which: int) -> str:
    found = sorted(
        key
        for (of, key), snap in world.state.items()
        if of == snapshotter and snap.kind == "committed" and key.startswith(space)
    )
    return found[which % len(found)] if found else name_of(space, chains_of(0)[-1])


def drop_image(snapshotter: str, image: int, space: str) -> Play:
    """As containerd's garbage collector, which goes on over FAILED_PRECONDITION and NOT_FOUND."""

    async def play(world: World) -> None:
        for chain in reversed(chains_of(image)):
            await world.call("remove", snapshotter, key=name_of(space, chain))
        await world.call("cleanup", snapshotter)

    return play


def clear(snapshotter: str, space: str) -> Play:
    """Whatever is active goes: retries that gave up, containers that ended."""

    async def play(world: World) -> None:
        for name, snap in list(world.state.items()):
            if name[0] == snapshotter and name[1].startswith(space) and snap.kind != "committed":
                await world.call("remove", snapshotter, key=name[1])
        await world.call("cleanup", snapshotter)

    return play


def again(snapshotter: str, image: int, space: str, depth: int, number: int, which: int) -> Play:
    """What was prepared is removed and prepared again, and has one layer applied to it and then another."""
    chains = chains_of(image)
    chain, other = chains[depth % len(chains)], chains[which % len(chains)]
    below = name_of(space, chains[depth % len(chains) - 1]) if depth % len(chains) else ""

    async def play(world: World) -> None:
        key = unpack_key(space, chain, number)
        await world.call("remove", snapshotter, key=key)
        end, mounts = await world.call("unpack", snapshotter, key=key, parent=below)
        if end == OK and which % 2:
            of = world.makers[world.owner(mounts)]
            for each in (chain, other):
                fields = {"of": of, "diff_id": COMPLETES[each]}
                blob = blob_of(IMAGES[image][chains.index(each)])
                await world.call("apply", snapshotter, blob=blob, mounts=mounts, **fields)

    return play


def single(what: int, snapshotter: str, image: int, space: str, depth: int, number: int) -> Play:
    """One call about something that others may be at."""
    chain = chains_of(image)[depth % len(IMAGES[image])]
    other = chains_of(1 - image)[-1]
    below = name_of(space, chains_of(image)[depth % len(IMAGES[image]) - 1]) if depth % len(IMAGES[image]) else ""
    key = unpack_key(space, chain, number)
    name = name_of(space, chain)
    any_key = (key, name, container_key(space, number))[depth % 3]
    labels = (("label", str(number)),)

    async def play(world: World) -> None:
        match what % 11:
            case 0:
                await world.call("stat", snapshotter, key=any_key)
            case 1:
                await world.call("list", snapshotter)
            case 2:
                await world.call("update", snapshotter, key=any_key, labels=labels)
            case 3:
                await world.call("remove", snapshotter, key=any_key)
            case 4:
                await world.call("cleanup", snapshotter)
            case 5:
                await world.call("commit", snapshotter, key=key, name=name, diff_id=COMPLETES[chain], labels=labels)
            case 6:
                # Under the name of another chain, or of no unpack.
                another = name_of(space, other)
                await world.call("commit", snapshotter, key=any_key, name=another, diff_id=COMPLETES[other])
            case 7:
                await world.call("unpack", snapshotter, key=key, parent=below, labels=labels)
            case 8:
                # What somebody prepared, with the layer that belongs there or with another.
                end, mounts = await world.call("mounts", snapshotter, key=key)
                of = world.makers.get(world.owner(mounts)) if end == OK else None
                if of is not None:
                    which = IMAGES[image][(depth + number) % len(IMAGES[image])]
                    diff_id = COMPLETES[chains_of(image)[(depth + number) % len(IMAGES[image])]]
                    fields = {"of": of, "diff_id": diff_id}
                    await world.call("apply", snapshotter, blob=blob_of(which), mounts=mounts, **fields)
            case 9:
                await world.call("mounts", snapshotter, key=any_key)
            case 10:
                parent = "" if snapshotter == "tardev-host" else key
                await world.call("prepare", snapshotter, key=container_key(space, number), parent=parent)

    return play


def client(kind: int, a: int, b: int, c: int, *, applies: bool) -> Play:
    """Of four numbers. Mostly they meet in one namespace."""
    snapshotter, image, space = _NAMES[a // 4 % len(_NAMES)], a // 12 % 2, _SPACES[a >= _SECOND_SPACE]
    match kind % KINDS:
        case 0 | 1 | 2:
            return pull(snapshotter, image, space, c % 2, applies=applies)
        case 3 | 4:
            return container(snapshotter, space, b // 4, c % 2, stays=b % 2 == 0, view=b % 4 > 1)
        case 5:
            return drop_image(snapshotter, image, space)
        case 6 if b % 3:
            return again(snapshotter, image, space, c % 3, (c // 3) % 2, b)
        case 6:
            return clear(snapshotter, space)
        case _:
            return single(b, snapshotter, image, space, c % 3, (c // 3) % 2)
