# SPDX-License-Identifier: Apache-2.0
"""The archive of an initramfs: cpio's "newc" (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).

The same members give the same bytes: owner, times and devices are zero, inode numbers count up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_ALIGNMENT: Final = 4
_TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Member:
    """`mode` with the type bits; `rdev`: major and minor of a device."""

    name: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def archive(members: Iterable[Member]) -> bytes:
    """In the order given: a directory stands before what it holds."""
    out = bytearray()
    for number, member in enumerate([*members, Member(_TRAILER, 0)]):
        name = member.name.encode("ascii") + b"\0"
        inode, links = (number + 1, 1) if member.name != _TRAILER else (0, 1)
        fields = (
            inode, member.mode, 0, 0, links, 0, len(member.data), 0, 0, *member.rdev, len(name), 0,
        )  # fmt: skip
        out += b"070701" + b"".join(b"%08X" % field for field in fields)
        out += name + bytes(-(len(out) + len(name)) % _ALIGNMENT)
        out += member.data + bytes(-len(member.data) % _ALIGNMENT)
    return bytes(out)
