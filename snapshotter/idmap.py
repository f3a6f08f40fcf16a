# SPDX-License-Identifier: Apache-2.0
"""ID mappings of a container's user namespace, as containerd's clients hand them on in labels of its snapshot.

A snapshotter with the capability `remap-ids` shows its layers under the mapped IDs; for others containerd copies the
image and changes every owner (containerd: docs/user-namespaces). The labels hold CONTAINER:HOST:LENGTH, several
joined by commas; containerd before 2.1 sends a single range that begins at 0.
Labels are anybody's: annotations of a pod become labels of its sandbox's snapshot.

containerd's own overlayfs leaves the mapping to containerd's mounts, by the options uidmap and gidmap. That cannot
serve layers that are mounts themselves: from 2.1 on it maps, once, the directory that all lower directories share,
and that shows none of what is mounted in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from snapshotter.errors import InvalidArgument

UID_LABEL: Final = "containerd.io/snapshot/uidmapping"
GID_LABEL: Final = "containerd.io/snapshot/gidmapping"
# man 7 user_namespaces: so many lines may be written to /proc/PID/uid_map.
_RANGES_MAX: Final = 340
# The last number is no ID: it means "none" (man 2 chown).
_IDS: Final = (1 << 32) - 1
_RANGE: Final = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Range:
    """`length` IDs, from `container` on inside of the user namespace, from `host` on outside."""

    container: int
    host: int
    length: int


@dataclass(frozen=True, slots=True)
class IDMapping:
    uids: tuple[Range, ...]
    gids: tuple[Range, ...]

    @property
    def root(self) -> tuple[int, int]:
        """User and group on the host of the container's root."""
        return _host_of_root(self.uids), _host_of_root(self.gids)

    @property
    def maps(self) -> tuple[str, str]:
        """What is written to uid_map and gid_map of a user namespace (man 7 user_namespaces)."""
        return _lines(self.uids), _lines(self.gids)

    @property
    def inverse(self) -> IDMapping:
        """From what the host sees to what the container does."""
        return IDMapping(*(tuple(Range(each.host, each.container, each.length) for each in ranges)
                           for ranges in (self.uids, self.gids)))  # fmt: skip


def mapping_of(labels: Mapping[str, str]) -> IDMapping | None:
    """None where neither label is there. Raises InvalidArgument: one without the other; not of that form; what the
    kernel would refuse (empty, overlapping or too many ranges, IDs that do not exist); no root."""
    uids, gids = labels.get(UID_LABEL), labels.get(GID_LABEL)
    if uids is None and gids is None:
        return None
    if uids is None or gids is None:
        raise InvalidArgument(f"of the labels {UID_LABEL} and {GID_LABEL} one is missing: they go together")
    return IDMapping(_parse(UID_LABEL, uids), _parse(GID_LABEL, gids))


def keeping(change: Callable[[dict[str, str]], Mapping[str, str]]) -> Callable[[dict[str, str]], Mapping[str, str]]:
    """The same change of labels, but for the mapping: a container's files carry its IDs already.

    Who replaces all labels may not know of it, and it stays; who names another is refused with InvalidArgument.
    """

    def changed(old: dict[str, str]) -> dict[str, str]:
        before = {label: old[label] for label in (UID_LABEL, GID_LABEL) if label in old}
        new = dict(change(old))
        for label, value in before.items():
            if new.get(label) not in (None, "", value):
                raise InvalidArgument(f"label {label} is {value!r} and cannot change: files were written under it")
        return new | before

    return changed


def _parse(label: str, text: str) -> tuple[Range, ...]:
    parts = text.split(",", _RANGES_MAX)
    if len(parts) > _RANGES_MAX:
        raise InvalidArgument(f"label {label} has over {_RANGES_MAX} ranges, which is the most that Linux takes")
    ranges = tuple(_range(label, part) for part in parts)
    for what, starts in (
        ("container", [(entry.container, entry.length) for entry in ranges]),
        ("host", [(entry.host, entry.length) for entry in ranges]),
    ):
        if _overlap(starts):
            raise InvalidArgument(f"label {label} maps {what} IDs twice: {_quoted(text)}")
    if not any(entry.container == 0 for entry in ranges):
        raise InvalidArgument(f"label {label} does not map the container's root: {_quoted(text)}")
    return ranges


def _range(label: str, text: str) -> Range:
    match = _RANGE.fullmatch(text)
    if not match:
        raise InvalidArgument(f"label {label}: {_quoted(text)} is not CONTAINER:HOST:LENGTH, three whole numbers")
    found = Range(*map(int, match.groups()))
    if not found.length or found.container + found.length > _IDS or found.host + found.length > _IDS:
        raise InvalidArgument(f"label {label}: {_quoted(text)} is empty or goes beyond the IDs that there are")
    return found


def _overlap(starts: Iterable[tuple[int, int]]) -> bool:
    """`starts`: (first, length)."""
    end = 0
    for first, length in sorted(starts):
        if first < end:
            return True
        end = first + length
    return False


def _host_of_root(ranges: tuple[Range, ...]) -> int:
    return next(entry.host for entry in ranges if entry.container == 0)


def _lines(ranges: tuple[Range, ...]) -> str:
    return "".join(f"{entry.container} {entry.host} {entry.length}\n" for entry in ranges)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
