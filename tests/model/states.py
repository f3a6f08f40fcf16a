# SPDX-License-Identifier: Apache-2.0
"""What the service may do, without files, threads or a database: a pure model of its snapshots.

A call is a few atomic steps. Calls that overlap may interleave theirs in any way; what was observed of them must be one
of these ways. A call of which nobody knows the end, since its caller or the daemon went away, may have ended after any
of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from policy.chain import ChainID, chain_id

Name: TypeAlias = tuple[str, str]  # snapshotter, key
Labels: TypeAlias = tuple[tuple[str, str], ...]

OK: Final = "ok"
UNKNOWN: Final = "unknown"  # nobody is left who could say
CANCELLED: Final = "cancelled"  # its caller went away


@dataclass(frozen=True, slots=True)
class Snap:
    """`maker`: number of the call that made it; `diff_id` of a layer that was applied or committed."""

    maker: int
    kind: str
    parent: str
    labels: Labels
    extraction: bool = False
    diff_id: str = ""
    chain: ChainID | None = None


State: TypeAlias = dict[Name, Snap]


@dataclass(frozen=True, slots=True)
class Call:
    """`of`: for an Apply the call that made the snapshot; `end`: OK, the name of an exception, UNKNOWN or CANCELLED;
    `answer` of a Stat or List. `begun`, `over`: ticks of the scheduler."""

    number: int
    what: str
    snapshotter: str
    key: str = ""
    parent: str = ""
    name: str = ""
    labels: Labels = ()
    diff_id: str = ""
    of: int = -1
    begun: int = 0
    over: int = 1 << 60
    end: str = UNKNOWN
    answer: object = None


# A step: (state, what the call has seen, the call) -> what may follow: (state, seen, end or "" to go on).
Seen: TypeAlias = tuple[object, ...]
Step: TypeAlias = Callable[[State, Seen, Call], list[tuple[State, Seen, str]]]


def _with(state: State, name: Name, snap: Snap | None) -> State:
    changed = dict(state)
    if snap is None:
        del changed[name]
    else:
        changed[name] = snap
    return changed


def _made_by(state: State, number: int) -> Name | None:
    return next((name for name, snap in state.items() if snap.maker == number), None)


def shown(name: str, snap: Snap) -> tuple[str, str, str, Labels]:
    return name, snap.kind, snap.parent, snap.labels


def _create(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    name = (call.snapshotter, call.key)
    if name in state:
        return [(state, seen, "AlreadyExists")]
    if call.parent:
        above = state.get((call.snapshotter, call.parent))
        if above is None:
            return [(state, seen, "NotFound")]
        if above.kind != "committed":
            return [(state, seen, "InvalidArgument")]
    kind = "view" if call.what == "view" else "active"
    made = Snap(call.number, kind, call.parent, call.labels, extraction=call.what == "unpack")
    return [(_with(state, name, made), seen, "")]


def _answer(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    there = _made_by(state, call.number)
    if call.end in (UNKNOWN, CANCELLED) and there is not None and state[there].kind != "committed":
        undone = (_with(state, there, None), seen, OK)
        return [undone] if call.end == CANCELLED else [(state, seen, OK), undone]
    # Removed or committed before it was answered for: told, or not.
    if there is not None and state[there].kind != "committed":
        return [(state, seen, OK)]
    return [(state, seen, OK), (state, seen, "NotFound")]


def _stat(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    snap = state.get((call.snapshotter, call.key))
    if snap is None:
        return [(state, seen, "NotFound")]
    if call.what == "stat" and call.end == OK and shown(call.key, snap) != call.answer:
        return [(state, seen, "something else")]
    return [(state, seen, OK)]


def _mounts(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    snap = state.get((call.snapshotter, call.key))
    if snap is None:
        return [(state, seen, "NotFound")]
    if snap.kind == "committed":
        return [(state, seen, "FailedPrecondition")]
    return [(state, (snap.maker,), "")]


def _mounts_answer(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    there = _made_by(state, seen[0])  # type: ignore[arg-type]
    return [(state, seen, OK)] if there is not None else [(state, seen, OK), (state, seen, "NotFound")]


def _list(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    all_of = frozenset(shown(key, snap) for (of, key), snap in state.items() if of == call.snapshotter)
    return [(state, seen, OK if call.end != OK or all_of == call.answer else "something else")]


def _update(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    name = (call.snapshotter, call.key)
    if name not in state:
        return [(state, seen, "NotFound")]
    return [(_with(state, name, replace(state[name], labels=call.labels)), seen, OK)]


def _remove(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    name = (call.snapshotter, call.key)
    if name not in state:
        return [(state, seen, "NotFound")]
    if any(snap.parent == call.key and of == call.snapshotter for (of, _), snap in state.items()):
        return [(state, seen, "FailedPrecondition")]
    return [(_with(state, name, None), seen, OK)]


def _nothing(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    return [(state, seen, OK)]


def _apply_look(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    there = _made_by(state, call.of)
    if there is None or state[there].kind != "active":
        return [(state, seen, "NotFound")]
    if state[there].diff_id not in ("", call.diff_id):
        return [(state, seen, "FailedPrecondition")]
    return [(state, seen, "")]


def _apply_set(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    there = _made_by(state, call.of)
    if there is None or state[there].kind != "active":
        return [(state, seen, "NotFound")]
    return [(_with(state, there, replace(state[there], diff_id=call.diff_id)), seen, OK)]


def _commit_name(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    return [(state, seen, "AlreadyExists" if (call.snapshotter, call.name) in state else "")]


def _commit_look(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    """`diff_id` of the call: what the blobs of the chain ID in its name give, where nothing was applied."""
    snap = state.get((call.snapshotter, call.key))
    if snap is None:
        return [(state, seen, "NotFound")]
    if snap.kind != "active":
        return [(state, seen, "FailedPrecondition")]
    diff_id = snap.diff_id or call.diff_id
    if not diff_id:
        return [(state, seen, "FailedPrecondition")]
    above = state.get((call.snapshotter, snap.parent))
    chain = chain_id(above.chain if above else None, diff_id)
    if chain != call.name.rpartition("/")[2]:
        return [(state, seen, "FailedPrecondition")]
    return [(state, (snap.maker, diff_id, chain), "")]


def _commit(state: State, seen: Seen, call: Call) -> list[tuple[State, Seen, str]]:
    maker, diff_id, chain = seen
    assert isinstance(diff_id, str)
    assert isinstance(chain, str)
    name = (call.snapshotter, call.name)
    if name in state:
        return [(state, seen, "AlreadyExists")]
    snap = state.get((call.snapshotter, call.key))
    if snap is None:
        return [(state, seen, "NotFound")]
    if snap.maker != maker or snap.kind != "active":
        return [(state, seen, "FailedPrecondition")]
    done = replace(snap, kind="committed", labels=call.labels, diff_id=diff_id, chain=ChainID(chain), extraction=False)
    return [(_with(_with(state, (call.snapshotter, call.key), None), name, done), seen, OK)]


STEPS: Final[dict[str, tuple[Step, ...]]] = {
    "prepare": (_create, _answer),
    "view": (_create, _answer),
    "unpack": (_create, _answer),
    "apply": (_apply_look, _apply_set),
    "commit": (_commit_name, _commit_look, _commit),
    "remove": (_remove,),
    "update": (_update,),
    "stat": (_stat,),
    "usage": (_stat,),
    "list": (_list,),
    "mounts": (_mounts, _mounts_answer),
    "cleanup": (_nothing,),
}

# What a cancelled one has made goes again.
_UNDONE: Final = frozenset({"prepare", "view", "unpack"})


def ends(state: State, calls: Sequence[Call]) -> Iterator[State]:
    """The states in which these calls, ended as they say, may have left the service."""
    start = (state, tuple((0, ()) for _ in calls))
    todo: list[tuple[State, tuple[tuple[int, Seen], ...]]] = [start]
    tried = set()
    while todo:
        now, at = todo.pop()
        key = (frozenset(now.items()), at)
        if key in tried:
            continue
        tried.add(key)
        waiting = [index for index, (step, _) in enumerate(at) if step >= 0]
        if not waiting:
            yield now
            continue
        # None begins a step before all that were over when its call began have made theirs.
        first = min(calls[index].over for index in waiting)
        for index in reversed(waiting):
            call, (step, seen) = calls[index], at[index]
            if call.begun > first:
                continue
            if call.end == UNKNOWN or (call.end == CANCELLED and not (step and call.what in _UNDONE)):
                todo.append((now, (*at[:index], (-1, ()), *at[index + 1 :])))
            for after, then, end in STEPS[call.what][step](now, seen, call):
                if not end:
                    todo.append((after, (*at[:index], (step + 1, then), *at[index + 1 :])))
                elif call.end in (end, UNKNOWN, CANCELLED):
                    todo.append((after, (*at[:index], (-1, ()), *at[index + 1 :])))
