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
# Cases that no exception lists: here the rule is broken.
FINDINGS: Final[dict[str, str]] = {}


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

differ(
    "E1", "e-01-gnu-prefix",
    {(b"", "nlink"): (3, 2), (b"name", "there"): ONLY_OURS, (b"pre", "there"): ONLY_THEIRS,
     (b"pre/fix", "there"): ONLY_THEIRS, (b"pre/fix/name", "there"): ONLY_THEIRS},
)  # fmt: skip
they_refuse("E2", "invalid tar header", "e-02-star-atime", "e-02-star-ctime")
they_refuse("E3", "invalid tar header", "e-03-checksum")
they_refuse("E4", "invalid tar header", "e-04-negative-size")
we_refuse("E5", "type NUL with data", "e-05-directory-with-data")
we_refuse(
    "E6", "^UnsupportedError: .*type b'[7Z]'", "e-06-unsupported-root", "e-06-unsupported-whiteout",
    "e-06-unsupported-opaque",
)  # fmt: skip
we_refuse("E7", "pax record without a length", "e-07-plus")
they_refuse("E8", "invalid tar header", "e-08-atime", "e-08-ctime")
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
they_refuse("E13", 'for key "": numerical result out of range', "e-13-no-name", "xattr-name-00")
they_refuse("E13", 'for key "user.": invalid argument', "e-13-user", "xattr-name-01")
they_refuse("E13", 'for key "security.": invalid argument', "e-13-security", "xattr-name-02")
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
_ACLS: Final = ("empty", "no-entries", "version", "junk", "ids-not-blank", "cut", "bad-tag", "no-id")
KERNEL_JUDGES: Final = frozenset({
    "e-14-acl", "e-14-acl-of-symlink", "posix-acl-of-symlink", "posix-acl-default-of-symlink", "e-14-capability",
    "file-capability-junk-of-directory", "xattr-name-08", "xattr-name-10",
    *(f"file-capability-{value}" for value in _CAPABILITIES),
    *(f"posix-acl-{kind}-{value}" for kind in ("access", "default") for value in _ACLS),
})  # fmt: skip


# --- findings


def found(reason: str, *names: str) -> None:
    FINDINGS.update(dict.fromkeys(names, reason))


_OTHERS: Final = ("file", "symlink", "symlink-to-directory", "hardlink", "char", "block", "fifo")
found(
    "containerd sets the times of directories at the end, by their names: of whatever stands there then; and it"
    " refuses where nothing does",
    *(f"over-{kind}-by-{other}{below}" for kind in ("directory", "full-directory") for other in _OTHERS
      for below in ("", "-below") if (kind, other, below) != ("directory", "symlink-to-directory", "")),
    *(f"late-time-{case}" for case in (
        "of-a-file", "of-a-fifo", "of-a-symlink-to-a-file", "of-a-symlink-to-nothing", "of-a-symlink-loop",
        "of-a-hardlink", "below-a-file", "below-a-new-directory", "of-a-made-directory")),
)  # fmt: skip
found(
    "containerd follows a symlink at the end of a hardlink's target where `/` or `/.` stands behind it",
    "hardlink-through-a-symlink-with-slash", "hardlink-through-a-symlink-with-dot",
)  # fmt: skip
found("containerd links a whiteout that came before", "hardlink-to-a-whiteout")
found(
    "containerd takes a `..` behind a symlink to a symlink, or behind a file, off the text and not off the place",
    "through-two-symlinks-dot-dot", "through-file-dot-dot",
)  # fmt: skip
found(
    "containerd refuses a member below a name that was whited out before",
    "whiteout-then-made-directory", "whiteout-then-opaque", "whiteout-then-parent-of-a-mark",
    "whiteout-then-opaque-of-its-name",
)  # fmt: skip
found(
    "a made parent has the group of the set-group-ID directory that it is in",
    "made-directory-below-a-setgid-one", "file-as-parent-directory-of-directory",
)  # fmt: skip
found(
    "what is made in a directory with a default ACL inherits it",
    "posix-acl-default-inherited", "posix-acl-default-then-below", "posix-acl-default-inherited-by-made",
)  # fmt: skip
found("containerd refuses a path over 4095 bytes, counted with that of its snapshot", "too-long-path")
found(
    "containerd refuses xattr names over 255 bytes with their prefix, but for trusted.*",
    "xattr-name-08", "xattr-name-09", "xattr-name-10",
)  # fmt: skip
found(
    "containerd drops an ACL that is empty, says no more than the mode or has another version",
    "posix-acl-minimal-contradicts-mode", "posix-acl-access-minimal",
    *(f"posix-acl-{kind}-{value}" for kind in ("access", "default")
      for value in ("empty", "no-entries", "version", "junk")),
)  # fmt: skip

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

assert not EXPECTED.keys() & FINDINGS.keys()
