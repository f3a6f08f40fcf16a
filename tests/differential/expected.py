# SPDX-License-Identifier: Apache-2.0
"""Which layers do not come out as containerd unpacks them, and how: the exceptions of docs/formats.md.

A layer that is not named here comes out the same. What is here says exactly what differs, so that a difference
that goes away or grows is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tests.differential.shapes import ACL, DEFAULT_ACL, GOOD_ACL, KINDS, NO_ID, acl
from tests.differential.trees import Differences


@dataclass(frozen=True)
class Expected:
    """`refused_by` one side with an error that matches `because`; else the trees differ in `differs`."""

    exception: str
    refused_by: Literal["", "containerd", "us"] = ""
    because: str = ""
    # Where we refuse: what containerd shows.
    shows: dict[tuple[bytes, str], Any] = field(default_factory=dict)
    differs: Differences = field(default_factory=dict)


EXPECTED: Final[dict[str, Expected]] = {}


def they_refuse(exception: str, because: str, *names: str) -> None:
    EXPECTED.update(dict.fromkeys(names, Expected(exception, "containerd", because)))


def we_refuse(exception: str, because: str, *names: str, **shows: Any) -> None:
    """`shows` of the member f, or else of c."""
    seen = {(b"c" if key == "rdev" else b"f", key): value for key, value in shows.items()}
    EXPECTED.update(dict.fromkeys(names, Expected(exception, "us", because, seen)))


def differ(exception: str, name: str, differences: Differences) -> None:
    EXPECTED[name] = Expected(exception, differs=differences)


ONLY_THEIRS: Final = (True, False)
ONLY_OURS: Final = (False, True)

we_refuse("E5", "type NUL with data", "e-05-directory-with-data")
we_refuse(
    "E6", "^UnsupportedError: .*type b'[7Z]'", "e-06-unsupported-root", "e-06-unsupported-whiteout",
    "e-06-unsupported-opaque",
)  # fmt: skip
we_refuse("E9", "pax sparse member", "e-09-sparse-unknown", content=b"")
we_refuse("E9", "pax sparse member", "e-09-sparse-without-effect", "e-09-sparse-dangling", "golden-pax-sparse-1-0")
EXPECTED["e-09-sparse-0"] = Expected(
    "E9", "us", "pax sparse member", {(b"g", "content"): b"\0\0abc\0\0\0\0", (b"g", "nlink"): 1}
)
differ("E10", "e-10-global-makes-parents", {(b"", "nlink"): (3, 2), (b"made", "there"): ONLY_THEIRS})
differ("E10", "e-10-global-removes", {(b"n", "there"): ONLY_OURS})
differ("E10", "e-10-global-whiteout", {(b"w", "there"): ONLY_THEIRS})
for name, links in {
    "golden-pax-odd": 2, "golden-ti-global-pax": 2, "pax-global": 3,
    **{f"pax-record-global-{record}": 2 for record in ("empty", "five", "zeros", "two-blanks", "nul-other")},
}.items():  # fmt: skip
    differ("E10", name, {(b"", "nlink"): (links + 1, links), (b"PaxHeaders", "there"): ONLY_THEIRS})
we_refuse("E11", "id out of range", "e-11-uid", uid=5)
we_refuse("E11", "id out of range", "e-11-gid-minus-two", gid=2**32 - 2)
we_refuse("E11", "id out of range", "e-11-uid-minus-one", "pax-number-uid-minus", uid=0)
we_refuse(
    "E11", "id out of range", "golden-odd-ids", "golden-ti-id-negative", "number-uid-b256-wide",
    "number-uid-b256-minus-one", "number-uid-high-bit",
)  # fmt: skip
we_refuse("E12", "device number out of range", "e-12-major", rdev=(5, 1))
we_refuse("E12", "device number out of range", "e-12-minor", rdev=(5, 1))
we_refuse("E12", "device number out of range", "golden-dev-big")
they_refuse(
    "E14", "security.capability\": invalid argument", "e-14-capability", "file-capability-junk-of-directory",
    *(f"file-capability-{value}"
      for value in ("v1", "v2-short", "v2-long", "v3-short", "v3-root-none", "v4", "junk", "flags")),
)  # fmt: skip
BAD_ACLS: Final = ("cut", "no-other", "no-user", "twice", "no-mask", "order", "bad-tag", "bad-permissions", "no-id")
they_refuse(
    "E14", "posix_acl_(access|default)\": invalid argument", "e-14-acl",
    *(f"posix-acl-{kind}-{value}" for kind in ("access", "default") for value in BAD_ACLS),
)  # fmt: skip
they_refuse("E14", "permission denied", "e-14-default-acl-of-file", "posix-acl-default-of-file")
# What the kernel says of an ACL of a symlink on our mount; erofs_reader shows it.
NOT_SUPPORTED: Final = b"error: Operation not supported"
for name, key in (("e-14-acl-of-symlink", ACL), ("posix-acl-of-symlink", ACL),
                  ("posix-acl-default-of-symlink", DEFAULT_ACL)):  # fmt: skip
    differ("E14", name, {(b"s", "xattrs"): (frozenset(), frozenset({(key, NOT_SUPPORTED)}))})
REWRITTEN: Final = acl((1, 7, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 7, NO_ID), (32, 7, NO_ID))
for name, members in {
    "e-14-acl-and-mode": b"f", "posix-acl-contradicts-mode": b"f", "posix-acl-and-chmod-by-hardlink": b"fh",
    "posix-acl-and-second-directory": b"d",
}.items():  # fmt: skip
    pair = frozenset({(ACL, REWRITTEN)}), frozenset({(ACL, GOOD_ACL)})
    differ("E14", name, {(bytes((member,)), "xattrs"): pair for member in members})
we_refuse("E15", "'..' in a path", "e-15-name", "e-15-above", "e-15-link", "golden-paths")
for name in ("e-16-missing", "through-missing-dot-dot"):
    differ("E16", name, {(b"", "nlink"): (3, 4), (b"missing", "there"): ONLY_OURS})
differ("E18", "e-18-whiteout", {(b"w", "uid"): (5, 0), (b"w", "gid"): (6, 0)})
differ("E18", "whiteout-owner-and-time", {(b"n", "uid"): (5, 0), (b"n", "gid"): (6, 0)})
for name, extra in {
    "e-19-meta": [b"d/.wh.plnk"], "golden-opaque": [b".wh.plnk"], "golden-ti-whiteout-types": [b"d/.wh.plnk"],
    "whiteout-of-a-mark": [b".wh.x"], "whiteout-meta": [b"a/.wh.plnk", b".wh.aufs"], "whiteout-meta-alone": [b".wh."],
}.items():  # fmt: skip
    differ("E19", name, {(path, "there"): ONLY_THEIRS for path in extra})
EXISTS: Final = "^failed to convert whiteout file .*: file exists$"
they_refuse(
    "E20", EXISTS, "e-20-file", "e-20-made", "golden-whiteouts", "golden-hardlink-shared-change",
    "golden-ti-whiteout-and-name", "golden-ti-whiteout-synthesised", "whiteout-twice-with-name-between",
    *(f"whiteout-after-{kind}" for kind in KINDS),
)  # fmt: skip
for name in ("e-21-directory", "whiteout-then-directory", "whiteout-then-full-directory"):
    differ("E21", name, {(b"n", "xattrs"): (frozenset(), frozenset({(b"trusted.overlay.opaque", b"y")}))})
INHERITED: Final = acl((1, 6, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 4, NO_ID), (32, 4, NO_ID))
INHERITED_X: Final = acl((1, 7, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 5, NO_ID), (32, 5, NO_ID))
ITSELF: Final = acl((1, 6, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 4, NO_ID), (32, 0, NO_ID))
_OF_A_FILE: Final = frozenset({(ACL, INHERITED)}), frozenset[tuple[bytes, bytes]]()
_OF_A_DIRECTORY: Final = frozenset({(ACL, INHERITED_X), (DEFAULT_ACL, ITSELF)}), frozenset[tuple[bytes, bytes]]()
differ("E14", "posix-acl-default-inherited", {(b"d/f", "xattrs"): _OF_A_FILE})
differ("E14", "posix-acl-default-then-below", {(b"d/e", "xattrs"): _OF_A_DIRECTORY})
differ(
    "E16", "through-two-symlinks-dot-dot",
    {(b"", "nlink"): (4, 3), (b"u/x/f", "there"): ONLY_OURS, (b"x", "there"): ONLY_THEIRS,
     (b"x/f", "there"): ONLY_THEIRS},
)  # fmt: skip
we_refuse("E16", "parent is not a directory", "through-file-dot-dot")
they_refuse(
    "E21", "^mkparent .*/n: not a directory$", "whiteout-then-made-directory", "whiteout-then-opaque",
    "whiteout-then-parent-of-a-mark", "whiteout-then-opaque-of-its-name",
)  # fmt: skip
we_refuse("E23", "hardlink target not earlier", "hardlink-to-a-whiteout")
they_refuse("E24", "failed to get root path: lstat .*: file name too long$", "too-long-path")
they_refuse("E22", EXISTS, "e-22-twice", "whiteout-twice", "whiteout-twice-as-paths", "whiteout-meta-twice")

# With these the kernel shows on our mount something else than what is stored: it judges a capability or an ACL when it
# is asked for it, hands out a capability of user namespace 0 in its older form, and no name over 255 bytes.
_CAPABILITIES: Final = (
    "v1",
    "v2-short",
    "v2-long",
    "v3-short",
    "v3-root-none",
    "v3-root-0",
    "v4",
    "junk",
    "flags",
    "empty",
)
_ACLS: Final = ("ids-not-blank", "cut", "bad-tag", "no-id")
KERNEL_JUDGES: Final = frozenset({
    "e-14-acl", "e-14-acl-of-symlink", "posix-acl-of-symlink", "posix-acl-default-of-symlink", "e-14-capability",
    "file-capability-junk-of-directory",
    *(f"file-capability-{value}" for value in _CAPABILITIES),
    *(f"posix-acl-{kind}-{value}" for kind in ("access", "default") for value in _ACLS),
})  # fmt: skip


# --- the first layer of an image

# Without an overlay, containerd takes a mark for an order to remove what its own layer has put there so far; here a
# mark speaks of lower layers only, of which there are none. What is gone there, and with it links and subdirectories:
REMOVED_BY_A_MARK: Final[dict[str, list[bytes]]] = {
    "golden-whiteouts": [b"usr/x"], "golden-hardlink-shared-change": [b"c"],
    "golden-ti-whiteout-synthesised": [b"p", b"p/q", b"p/q/r", b"s", b"s/t", b"s/t/u"],
    "whiteout-after-made-directory": [b"n", b"n/made-child"], "whiteout-twice-with-name-between": [b"n"],
    "whiteout-after-opaque": [b"n"], "whiteout-opaque-then-opaque": [b"d/n"],
    "whiteout-made-directory-then-opaque": [b"d/n", b"d/n/made-child"],
    **{f"whiteout-after-{kind}": [b"n"]
       for kind in ("file", "symlink", "symlink-to-directory", "hardlink", "char", "block", "fifo")},
    "e-20-file": [b"n"], "e-20-made": [b"n", b"n/x"],
}  # fmt: skip
REFUSED_AFTER_A_MARK: Final = (
    "golden-ti-whiteout-and-name",
    "whiteout-after-directory",
    "whiteout-after-full-directory",
)
