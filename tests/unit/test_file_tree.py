# SPDX-License-Identifier: Apache-2.0
"""What members leave behind: names, entries over entries, hardlinks, whiteouts, attributes, order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from blockdev.errors import BlockdevError, FormatError, LimitExceeded
from blockdev.formats.file_tree import Directory, FileTree, Inode, sorted_children
from blockdev.formats.limits import Limits
from blockdev.formats.tar import Member, MemberType

FILE, DIRECTORY, SYMLINK, HARDLINK = MemberType.FILE, MemberType.DIRECTORY, MemberType.SYMLINK, MemberType.HARDLINK
CAPABILITY = b"security.capability"
OPAQUE = {b"trusted.overlay.opaque": b"y"}


def member(kind: MemberType, name: bytes, link: bytes = b"", **fields: Any) -> Member:
    return Member(
        kind, name, link, fields.pop("mode", 0o644), fields.pop("uid", 0), fields.pop("gid", 0),
        fields.pop("mtime", (0, 0)), fields.pop("major", 0), fields.pop("minor", 0), fields.pop("size", 0),
        fields.pop("offset", 0), fields.pop("xattrs", {}),
    )  # fmt: skip


def file(name: bytes, offset: int = 512, **fields: Any) -> Member:
    """Files of different offsets are different files."""
    return member(FILE, name, size=1, offset=offset, **fields)


def directory(name: bytes, **fields: Any) -> Member:
    return member(DIRECTORY, name, **{"mode": 0o755, **fields})


def symlink(name: bytes, text: bytes, **fields: Any) -> Member:
    return member(SYMLINK, name, text, **fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> Member:
    return member(HARDLINK, name, target, **fields)


def built(*members: Member, limits: Limits | None = None) -> tuple[FileTree, list[Inode]]:
    tree = FileTree(limits or Limits())
    for each in members:
        tree.add(each)
    return tree, tree.finish()


def names(*members: Member) -> dict[bytes, Inode]:
    """Every path of the finished tree, the root's b"" first."""
    found: dict[bytes, Inode] = {}

    def collect(path: bytes, node: Inode) -> None:
        found[path] = node
        if isinstance(node, Directory):
            for name, child in sorted_children(node):
                collect(path + b"/" + name if path else name, child)

    collect(b"", built(*members)[0].root)
    return found


def refused(
    *members: Member, match: str, error: type[BlockdevError] = FormatError, limits: Limits | None = None
) -> None:
    """The last of the members is the one that is refused, and it is named."""
    tree = FileTree(limits or Limits())
    for each in members[:-1]:
        tree.add(each)
    with pytest.raises(error, match=match) as caught:
        tree.add(members[-1])
    if error is FormatError:
        assert repr(members[-1].name[:200]) in str(caught.value)


def attributes(node: Inode) -> tuple[int, int, int, tuple[int, int]]:
    return node.mode, node.uid, node.gid, node.mtime


def is_whiteout(node: Inode) -> bool:
    return attributes(node) == (0o020000, 0, 0, (0, 0)) and node.rdev == (0, 0) and not node.xattrs


# --- names


@pytest.mark.parametrize(
    "name", [b"a/b", b"/a/b", b"./a/b", b"a//b", b"a/./b", b".//a/././/b", b"a/b/", b"a/b//", b"a/b/.", b"///a/b/./"]
)
def test_empty_and_dot_components_drop_out(name: bytes) -> None:
    assert list(names(file(name))) == [b"", b"a", b"a/b"]
    assert list(names(directory(name))) == [b"", b"a", b"a/b"]


@pytest.mark.parametrize(
    "name", [b"..", b"../a", b"a/..", b"a/../", b"a/../b", b"/..", b"./../a", b"a/b/../..", b"a/.././b", b"a/../."]
)
def test_dot_dot_is_refused(name: bytes) -> None:
    refused(file(name), match=r"'\.\.' in a path")
    refused(directory(name), match=r"'\.\.' in a path")
    refused(file(b"a"), hardlink(b"b", name), match=r"'\.\.' in a path")


def test_names_are_bytes() -> None:
    odd = [b"\xff\xfe", b"...", b"..a", b"a..", b" ", b"\n", b"\\", b"-", "é".encode(), b"\x01"]
    assert sorted(names(*(file(name) for name in odd))) == sorted([b"", *odd])


def test_a_component_has_255_bytes_at_most() -> None:
    long = b"n" * 255
    assert set(names(file(long + b"/" + long))) == {b"", long, long + b"/" + long}
    for name in (b"n" * 256, b"n" * 256 + b"/a", b"a/" + b"n" * 256 + b"/", b"a/" + b"n" * 256 + b"/."):
        refused(file(name), match="component of 256 bytes")
    refused(file(b"a"), hardlink(b"b", b"n" * 256), match="component of 256 bytes")


@pytest.mark.parametrize("name", [b"", b"/", b".", b"./", b"//", b"/.", b"././/"])
@pytest.mark.parametrize("kind", list(MemberType))
def test_an_entry_for_the_root_changes_nothing(name: bytes, kind: MemberType) -> None:
    tree, order = built(member(kind, name, b"t", mode=0o700, uid=3, gid=4, mtime=(5, 6), xattrs={b"user.a": b"1"}))
    assert attributes(tree.root) == (0o040755, 0, 0, (0, 0))
    assert (tree.root.xattrs, tree.root.explicit, order) == (None, False, [tree.root])


def test_an_entry_for_the_root_keeps_what_is_there() -> None:
    assert list(names(file(b"a"), directory(b"./"), file(b"b"))) == [b"", b"a", b"b"]


def test_a_missing_parent_is_made_and_remembered_as_made() -> None:
    tree, order = built(file(b"a/b/c", uid=7, mtime=(9, 9)), directory(b"a", mode=0o700))
    a, b, _ = order[1:]
    assert attributes(b) == (0o040755, 0, 0, (0, 0))
    assert attributes(a) == (0o040700, 0, 0, (0, 0))
    assert isinstance(a, Directory)
    assert isinstance(b, Directory)
    assert (a.explicit, b.explicit, tree.invented_directories) == (True, False, 2)


@pytest.mark.parametrize("kind", [FILE, MemberType.CHAR, MemberType.BLOCK, MemberType.FIFO])
def test_a_parent_that_is_neither_directory_nor_symlink_is_refused(kind: MemberType) -> None:
    refused(member(kind, b"p"), file(b"p/x"), match=r"parent is not a directory: b'p'")
    refused(member(kind, b"p"), directory(b"p/x"), match="parent is not a directory")
    refused(member(kind, b"p"), file(b"p/.wh.x"), match="parent is not a directory")
    refused(member(kind, b"p"), symlink(b"l", b"p"), file(b"l/x"), match="parent is not a directory")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"real", b"d/real"),
        (b"./real", b"d/real"),
        (b"real/", b"d/real"),
        (b"real/sub", b"d/real/sub"),
        (b"../real", b"real"),
        (b"../../real", b"real"),
        (b"../../../../real", b"real"),
        (b"/real", b"real"),
        (b"//real//.", b"real"),
        (b"/../real", b"real"),
        (b"/d/../real", b"real"),
        (b"/new/../real", b"real"),
        (b"..", b""),
        (b".", b"d"),
        (b"/", b""),
        (b"/..", b""),
    ],
)
def test_a_parent_that_is_a_symlink_is_followed_inside_the_root(text: bytes, where: bytes) -> None:
    found = names(symlink(b"d/l", text), file(b"d/l/x"))
    assert (where + b"/x").lstrip(b"/") in found
    assert found[b"d/l"].link == text
    # A directory made on the way is a directory like any made parent.
    assert all(attributes(n) == (0o040755, 0, 0, (0, 0)) for n in found.values() if isinstance(n, Directory))
    assert (b"new" in found) == (b"new" in text)


def test_a_symlink_that_leads_to_a_symlink_is_followed_too() -> None:
    found = names(directory(b"a/b"), symlink(b"m", b"a"), symlink(b"l", b"m/b"), file(b"l/x"), file(b"m/y"))
    assert {b"a/b/x", b"a/y"} < set(found)


def test_the_last_component_is_not_followed() -> None:
    found = names(directory(b"d"), symlink(b"l", b"d"), file(b"l", offset=9))
    assert found[b"l"].tar_offset_bytes == 9
    found = names(directory(b"d"), symlink(b"l", b"d"), directory(b"l"), file(b"l/x"))
    assert b"l/x" in found
    assert b"d/x" not in found


def test_dot_dot_in_a_link_text_goes_up_from_where_the_links_led() -> None:
    found = names(directory(b"a/b/c"), symlink(b"s", b"a/b/c"), symlink(b"l", b"s/../x"), file(b"l/y"))
    assert b"a/b/x/y" in found


def test_a_symlink_seen_through_a_made_directory_is_of_this_layer() -> None:
    assert b"p/q/x" in names(file(b"p/a"), symlink(b"p/l", b"q"), file(b"p/l/x"))


@pytest.mark.parametrize("texts", [(b"l0",), (b"l1", b"l0"), (b"l1", b"l2", b"/l0/."), (b"l0/x",), (b"./l0/../l0",)])
def test_symlink_loops_are_refused(texts: tuple[bytes, ...]) -> None:
    links = [symlink(b"l%d" % number, text) for number, text in enumerate(texts)]
    refused(*links, file(b"l0/x"), match="too many symlinks")
    refused(*links, file(b"f"), hardlink(b"h", b"l0/f"), match="too many symlinks")


def test_255_symlinks_are_followed_and_256_are_not() -> None:
    chain = [symlink(b"l%d" % number, b"l%d" % (number + 1)) for number in range(256)]
    found = names(*chain, directory(b"l256"), file(b"l1/x"))
    assert b"l256/x" in found
    refused(*chain, directory(b"l256"), file(b"l0/x"), match="too many symlinks")


def test_a_component_of_a_link_text_has_255_bytes_at_most() -> None:
    assert b"n" * 255 + b"/x" in names(symlink(b"l", b"n" * 255), file(b"l/x"))
    refused(symlink(b"l", b"n" * 256), file(b"l/x"), match="component of 256 bytes")


def test_parents_are_looked_up_again_after_each_change() -> None:
    """The tree remembers the last parent; whatever could lead elsewhere must make it forget."""
    changes: dict[str, tuple[list[Member], bytes]] = {
        "symlink moved": ([symlink(b"l", b"e")], b"e/y"),
        "symlink to directory": ([directory(b"l")], b"l/y"),
        "symlink gone for a file and back": ([file(b"l"), symlink(b"l", b"e")], b"e/y"),
        "symlink to hardlinked symlink": ([symlink(b"m", b"e"), hardlink(b"l", b"m")], b"e/y"),
        "end of the symlink replaced": ([file(b"d"), directory(b"d")], b"d/y"),
        "end of the symlink is a symlink": ([symlink(b"d", b"e")], b"e/y"),
    }
    for what, (change, expected) in changes.items():
        found = names(directory(b"e"), directory(b"d"), symlink(b"l", b"d"), file(b"l/x"), *change, file(b"l/y"))
        assert expected in found, what


def test_a_replaced_ancestor_takes_the_remembered_parent_along() -> None:
    found = names(file(b"a/b/x"), symlink(b"a", b"c"), file(b"a/b/y"))
    assert set(found) == {b"", b"a", b"c", b"c/b", b"c/b/y"}
    refused(file(b"a/b/x"), file(b"a"), file(b"a/b/y"), match="parent is not a directory")


# --- entries over entries


def test_a_directory_over_a_directory_replaces_attributes_and_keeps_children() -> None:
    found = names(
        directory(b"d", mode=0o700, uid=1, gid=2, mtime=(3, 4), xattrs={b"user.a": b"1", b"user.b": b"1"}),
        file(b"d/x"),
        directory(b"d", mode=0o1711, uid=5, gid=6, mtime=(7, 8), xattrs={b"user.b": b"2", b"user.c": b"3"}),
    )
    assert attributes(found[b"d"]) == (0o041711, 5, 6, (7, 8))
    assert found[b"d"].xattrs == {b"user.a": b"1", b"user.b": b"2", b"user.c": b"3"}
    assert b"d/x" in found


OTHERS = {
    "file": file(b"n", offset=77, uid=9),
    "symlink": symlink(b"n", b"t", uid=9),
    "char": member(MemberType.CHAR, b"n", major=1, minor=3, uid=9),
    "block": member(MemberType.BLOCK, b"n", major=7, minor=300, uid=9),
    "fifo": member(MemberType.FIFO, b"n", uid=9),
    "directory": directory(b"n", uid=9),
}


@pytest.mark.parametrize(("old", "new"), [p for p in itertools.product(OTHERS, OTHERS) if p != ("directory",) * 2])
def test_anything_else_replaces_the_old_entry_and_makes_a_new_inode(old: str, new: str) -> None:
    first = OTHERS[old]
    first = member(first.type, first.name, first.link, mode=0o600, uid=1, xattrs={b"security.a": b"1"})
    members = first, *([file(b"n/below")] if old == "directory" else []), OTHERS[new]
    if (old, new) == ("directory", "symlink"):
        with pytest.raises(FormatError, match="b'n' is gone when its time is set"):
            built(*members)
        return
    found = names(*members)
    assert list(found) == [b"", b"n"]
    expected = attributes(names(OTHERS[new])[b"n"])
    assert attributes(found[b"n"]) == ((*expected[:3], first.mtime) if old == "directory" else expected)
    assert found[b"n"].xattrs is None
    assert found[b"n"].rdev == (OTHERS[new].major, OTHERS[new].minor)


def test_other_hardlinks_of_a_replaced_entry_live_on() -> None:
    found = names(file(b"a", offset=1), hardlink(b"b", b"a"), hardlink(b"c", b"a"), file(b"a", offset=2))
    assert found[b"b"] is found[b"c"]
    assert (found[b"a"].tar_offset_bytes, found[b"b"].tar_offset_bytes) == (2, 1)
    assert (found[b"a"].nlink, found[b"b"].nlink) == (1, 2)


def test_a_hardlink_out_of_a_replaced_directory_lives_on() -> None:
    found = names(file(b"d/x", offset=5), hardlink(b"h", b"d/x"), file(b"d"))
    assert (found[b"h"].tar_offset_bytes, found[b"h"].nlink) == (5, 1)


@pytest.mark.parametrize("kind", [FILE, SYMLINK, MemberType.CHAR, MemberType.BLOCK, MemberType.FIFO])
def test_a_hardlink_shares_any_inode_but_a_directorys(kind: MemberType) -> None:
    found = names(member(kind, b"a", b"t", major=1, minor=2), hardlink(b"d/b", b"a"))
    assert found[b"a"] is found[b"d/b"]
    assert found[b"a"].nlink == 2


@pytest.mark.parametrize("target", [b"d/x", b"/d/x", b"./d//x", b"d/x/", b"l/x", b"up/d/x", b"abs/x", b"/l/./x"])
def test_the_parents_of_a_hardlinks_target_are_followed(target: bytes) -> None:
    base = [file(b"d/x"), symlink(b"l", b"d"), symlink(b"up", b"../.."), symlink(b"abs", b"/d")]
    found = names(*base, hardlink(b"h", target))
    assert found[b"h"] is found[b"d/x"]


def test_a_link_to_a_symlink_links_the_symlink() -> None:
    found = names(file(b"f"), symlink(b"s", b"f"), hardlink(b"h", b"s"))
    assert found[b"h"] is found[b"s"]
    assert found[b"h"].link == b"f"
    assert found[b"f"].nlink == 1


@pytest.mark.parametrize(
    ("before", "link"),
    [
        ([], hardlink(b"h", b"nowhere")),
        ([], hardlink(b"h", b"no/where")),
        ([], hardlink(b"h", b"h")),
        ([file(b"h")], hardlink(b"h", b"h")),
        ([file(b"a")], hardlink(b"h", b"")),
        ([file(b"d/x")], hardlink(b"d", b"d/x")),
        ([symlink(b"l", b"new")], hardlink(b"h", b"l/x")),
    ],
    ids=["missing", "missing parent", "itself", "itself again", "empty", "below itself", "dangling"],
)
def test_a_hardlink_needs_a_target_that_is_here_by_now(before: list[Member], link: Member) -> None:
    refused(*before, link, match="hardlink target not earlier in this layer")


def test_the_target_of_a_hardlink_is_no_directory() -> None:
    refused(directory(b"d"), hardlink(b"h", b"d"), match="hardlink to a directory: b'd'")
    refused(file(b"d/x"), hardlink(b"h", b"d"), match="hardlink to a directory")
    for root in (b"/", b"./", b"/."):
        refused(file(b"a"), hardlink(b"h", root), match="hardlink to a directory")


@pytest.mark.parametrize("end", [b"/", b"/."])
def test_a_slash_behind_the_target_of_a_hardlink_follows_a_symlink(end: bytes) -> None:
    found = names(file(b"f"), symlink(b"s", b"f"), hardlink(b"h", b"s" + end))
    assert found[b"h"] is found[b"f"]
    refused(symlink(b"s", b"gone"), hardlink(b"h", b"s" + end), match="hardlink target not earlier")


def test_times_of_directories_are_set_at_the_end_by_name() -> None:
    found = names(directory(b"d", mtime=(7, 8)), file(b"d", offset=5))
    assert (found[b"d"].mtime, found[b"d"].tar_offset_bytes) == ((7, 8), 5)
    found = names(directory(b"d", mtime=(7, 8)), symlink(b"d", b"e"), file(b"e"))
    assert (found[b"d"].mtime, found[b"e"].mtime) == (attributes(names(symlink(b"d", b"e"))[b"d"])[3], (7, 8))
    with pytest.raises(FormatError, match="b'd/e' is gone when its time is set"):
        built(directory(b"d/e"), file(b"d"))


def test_a_made_parent_has_the_group_of_a_setgid_directory() -> None:
    found = names(directory(b"d", mode=0o2755, gid=5), file(b"d/made/f"), directory(b"e", gid=5), file(b"e/made/f"))
    assert (found[b"d/made"].gid, found[b"e/made"].gid) == (5, 0)
    assert found[b"d/made"].mode == 0o040755


def test_a_whiteout_is_no_target_of_a_hardlink() -> None:
    refused(file(b".wh.x"), hardlink(b"h", b"x"), match="hardlink target not earlier")
    refused(file(b".wh.x"), hardlink(b"h", b".wh.x"), match="hardlink target not earlier")


def test_a_file_is_no_parent_of_a_target() -> None:
    refused(file(b"f"), hardlink(b"h", b"f/x"), match="parent is not a directory")


def test_the_parents_of_a_hardlink_are_made_before_its_target_is_looked_up() -> None:
    # The target's way leads through a directory that only the link's own name makes.
    found = names(file(b"x"), symlink(b"l", b"new/deep/../.."), hardlink(b"new/deep/h", b"l/x"))
    assert found[b"new/deep/h"] is found[b"x"]


def test_a_hardlink_replaces_what_stands_under_its_name() -> None:
    found = names(file(b"a", offset=1), directory(b"h"), file(b"h/x"), hardlink(b"h", b"a"))
    assert set(found) == {b"", b"a", b"h"}
    found = names(file(b"a", offset=1), hardlink(b"h", b"a"), hardlink(b"h", b"a"))
    assert found[b"a"].nlink == 2
    found = names(file(b"a", offset=1), file(b"b", offset=2), hardlink(b"c", b"b"), hardlink(b"b", b"a"))
    assert found[b"b"] is found[b"a"]
    assert (found[b"c"].tar_offset_bytes, found[b"c"].nlink) == (2, 1)


def test_the_links_own_header_sets_the_shared_attributes() -> None:
    found = names(
        file(b"a", mode=0o4755, uid=1, gid=2, mtime=(3, 4)),
        hardlink(b"b", b"a", mode=0o640, uid=5, gid=6, mtime=(7, 8)),
    )
    assert attributes(found[b"a"]) == (0o100640, 5, 6, (7, 8))
    assert found[b"a"].size_bytes == 1


def test_a_link_to_a_symlink_does_not_set_its_mode() -> None:
    found = names(symlink(b"s", b"t", uid=1), hardlink(b"h", b"s", mode=0o600, uid=5, gid=6, mtime=(7, 8)))
    assert attributes(found[b"s"]) == (0o120777, 5, 6, (7, 8))
    assert found[b"s"].link == b"t"


def test_a_hardlink_removes_the_capability_and_joins_its_xattrs() -> None:
    first = file(b"a", xattrs={CAPABILITY: b"cap", b"user.a": b"1", b"user.b": b"1"})
    found = names(first, hardlink(b"b", b"a", xattrs={b"user.b": b"2", b"user.c": b"3"}))
    assert found[b"a"].xattrs == {b"user.a": b"1", b"user.b": b"2", b"user.c": b"3"}
    found = names(first, hardlink(b"b", b"a", xattrs={CAPABILITY: b"new"}))
    assert found[b"a"].xattrs == {CAPABILITY: b"new", b"user.a": b"1", b"user.b": b"1"}
    assert not names(file(b"a", xattrs={CAPABILITY: b"cap"}), hardlink(b"b", b"a"))[b"a"].xattrs


@pytest.mark.parametrize("length", [1, 100, 4095])
def test_a_symlink_has_mode_0777(length: int) -> None:
    node = names(symlink(b"l", b"t" * length, mode=0o600, uid=4))[b"l"]
    assert attributes(node) == (0o120777, 4, 0, (0, 0))
    assert node.link == b"t" * length


@pytest.mark.parametrize("length", [0, 4096])
def test_a_symlink_text_has_1_to_4095_bytes(length: int) -> None:
    refused(symlink(b"l", b"t" * length), match=f"symlink text of {length} bytes")


def test_device_numbers_have_12_and_20_bits() -> None:
    for kind, bits in ((MemberType.CHAR, 0o020000), (MemberType.BLOCK, 0o060000)):
        node = names(member(kind, b"d", major=4095, minor=(1 << 20) - 1, mode=0o660))[b"d"]
        assert (node.mode, node.rdev) == (bits | 0o660, (4095, (1 << 20) - 1))
        for major, minor in ((4096, 0), (0, 1 << 20), (-1, 0), (0, -1)):
            refused(member(kind, b"d", major=major, minor=minor), match=f"out of range: {major}:{minor}")
    # A FIFO's are not looked at.
    assert names(member(MemberType.FIFO, b"d", major=-1, minor=1 << 40))[b"d"].rdev == (0, 0)


def test_a_file_is_where_its_data_is() -> None:
    node = names(member(FILE, b"f", size=5, offset=1024))[b"f"]
    assert (node.size_bytes, node.tar_offset_bytes) == (5, 1024)


# --- attributes


ACL = b"\2\0\0\0" + b"entries of eight bytes"


@pytest.mark.parametrize("name", [b"", b"user.", b"security."])
def test_an_xattr_needs_a_name(name: bytes) -> None:
    refused(file(b"f", xattrs={name: b"1"}), match="xattr name of")


@pytest.mark.parametrize(
    "value", [b"", b"\2\0\0\0", b"\1\0\0\0" + bytes(24), bytes(28),
              b"\2\0\0\0" + b"".join(bytes((tag, 0, 6, 0)) + b"\xff" * 4 for tag in (1, 4, 32))],
)  # fmt: skip
def test_an_acl_that_says_nothing_is_dropped(value: bytes) -> None:
    tree, order = built(file(b"f", xattrs={b"system.posix_acl_access": value}))
    assert (order[1].xattrs, tree.dropped_xattrs) == (None, 1)
    default = {b"system.posix_acl_default": value}
    tree, order = built(directory(b"d", xattrs=default))
    assert order[1].xattrs == (default if len(value) == 28 and value[0] == 2 else None)


def test_xattrs_that_cannot_be_shown_are_dropped_and_counted() -> None:
    xattrs = {
        b"user.a": b"1", b"user.empty": b"", b"security.selinux": b"ctx", b"system.posix_acl_access": ACL,
        b"system.posix_acl_default": ACL,
    }  # fmt: skip
    dropped = {
        b"trusted.a": b"1", b"trusted.overlay.opaque": b"y", b"trusted.overlay.redirect": b"/x", b"system.other": b"1",
        b"system.posix_acl_access.x": b"1", b"nonsense": b"1", b"nonsense.a": b"1", b".a": b"1",
        b"User.a": b"1", b"btrfs.compression": b"zstd",
    }  # fmt: skip
    tree, order = built(file(b"f", xattrs={**xattrs, **dropped}), directory(b"d", xattrs={**xattrs, **dropped}))
    assert [node.xattrs for node in order] == [None, xattrs, xattrs]
    assert tree.dropped_xattrs == 2 * len(dropped)


@pytest.mark.parametrize("kind", [SYMLINK, MemberType.CHAR, MemberType.BLOCK, MemberType.FIFO])
def test_user_xattrs_belong_to_files_and_directories(kind: MemberType) -> None:
    tree, order = built(member(kind, b"n", b"t", xattrs={b"user.a": b"1", b"security.b": b"2"}))
    assert order[1].xattrs == {b"security.b": b"2"}
    assert tree.dropped_xattrs == 1


def test_user_xattrs_of_a_link_go_by_the_inode_that_it_links() -> None:
    tree, order = built(symlink(b"s", b"t"), hardlink(b"h", b"s", xattrs={b"user.a": b"1", b"security.b": b"2"}))
    assert order[1].xattrs == {b"security.b": b"2"}
    assert tree.dropped_xattrs == 1


def test_no_xattrs_at_all_is_none_or_empty() -> None:
    assert names(file(b"f", xattrs={b"trusted.a": b"1"}))[b"f"].xattrs is None


def test_xattr_names_and_values_have_limits() -> None:
    good = {b"user." + b"n" * 250: b"v" * 65535, b"security." + b"n" * 246: b""}
    assert names(file(b"f", xattrs=good))[b"f"].xattrs == good
    refused(file(b"f", xattrs={b"user." + b"n" * 251: b""}), match="xattr name of 256 bytes")
    refused(file(b"f", xattrs={b"user.n": b"v" * 65536}), match="65536 bytes is over the format's limit")
    refused(file(b"g"), hardlink(b"f", b"g", xattrs={b"user.n": b"v" * 65536}), match="over the format's limit")
    # What is dropped has none.
    assert names(file(b"f", xattrs={b"trusted." + b"n" * 300: b"v" * 65536}))[b"f"].xattrs is None


def test_the_xattrs_of_one_inode_are_limited_by_what_the_index_can_hold() -> None:
    def xattrs(last: int) -> dict[bytes, bytes]:
        return {b"user.%c" % letter: b"v" * 65535 for letter in b"abc"} | {b"user.d": b"v" * last}

    # 12 bytes of header, and for each entry 4, its name without the prefix, and the value, to a multiple of 4
    room = 262_148 - 12 - 3 * (4 + 1 + 65535) - (4 + 1)
    assert names(file(b"f", xattrs=xattrs(room)))[b"f"].xattrs == xattrs(room)
    refused(file(b"f", xattrs=xattrs(room + 1)), match="exceed 262148 bytes", error=LimitExceeded)
    # Whether one member brings them or several.
    parts = [directory(b"d", xattrs={name: value}) for name, value in xattrs(room + 1).items()]
    refused(*parts, match="exceed 262148 bytes", error=LimitExceeded)
    parts = [file(b"f", xattrs=xattrs(room)), hardlink(b"g", b"f", xattrs={b"user.d": b"v" * room, b"user.e": b""})]
    refused(*parts, match="exceed 262148 bytes", error=LimitExceeded)


def test_a_lower_limit_of_xattrs_is_exact() -> None:
    limits = Limits(xattr_bytes=100)
    built(file(b"f", xattrs={b"user.a": b"v" * 83}), limits=limits)
    refused(file(b"f", xattrs={b"user.a": b"v" * 84}), match="exceed 100", error=LimitExceeded, limits=limits)


# --- whiteouts


def test_a_name_of_any_length_can_be_whited_out() -> None:
    name = b"n" * 255
    assert is_whiteout(names(file(b"d/.wh." + name))[b"d/" + name])
    refused(file(b"d/.wh.n" + name), match="component of 260 bytes")


def test_a_whiteout_becomes_a_device_0_0() -> None:
    found = names(directory(b"d"), file(b"d/.wh.gone", uid=5, mtime=(1, 2), xattrs={b"user.a": b"1"}))
    assert set(found) == {b"", b"d", b"d/gone"}
    assert is_whiteout(found[b"d/gone"])
    assert found[b"d/gone"].nlink == 1


@pytest.mark.parametrize(
    "marker",
    [
        symlink(b"d/.wh.x", b""),
        hardlink(b"d/.wh.x", b"nowhere"),
        directory(b"d/.wh.x/"),
        member(MemberType.CHAR, b"d/.wh.x", major=-1),
        member(MemberType.FIFO, b"d/.wh.x"),
        file(b"d/.wh.x", xattrs={b"user.a": b"v" * 70_000}),
    ],
    ids=lambda marker: str(marker.type.value),
)
def test_a_whiteout_may_be_of_any_type_and_its_attributes_are_not_used(marker: Member) -> None:
    found = names(marker)
    assert set(found) == {b"", b"d", b"d/x"}
    assert is_whiteout(found[b"d/x"])


def test_a_whiteout_of_the_root_directory() -> None:
    assert is_whiteout(names(file(b".wh.x"))[b"x"])
    assert is_whiteout(names(file(b"./.wh.x"))[b"x"])


def test_names_that_look_like_markers() -> None:
    assert is_whiteout(names(file(b".wh.....x"))[b"....x"])
    assert is_whiteout(names(file(b".wh.wh."))[b"wh."])
    assert is_whiteout(names(file(b".wh..x"))[b".x"])
    assert is_whiteout(names(file(b".wh." + b"n" * 251))[b"n" * 251])
    assert list(names(file(b".wh"), file(b"a.wh.b"), file(b".WH.c"))) == [b"", b".WH.c", b".wh", b"a.wh.b"]


def test_two_whiteouts_of_one_name_are_one() -> None:
    assert list(names(file(b".wh.x"), directory(b".wh.x"))) == [b"", b"x"]


def test_a_marker_that_is_not_the_last_component_is_an_ordinary_name() -> None:
    found = names(file(b".wh.foo/bar"), file(b"o/.wh..wh..opq/x"))
    assert set(found) == {b"", b".wh.foo", b".wh.foo/bar", b"o", b"o/.wh..wh..opq", b"o/.wh..wh..opq/x"}
    assert found[b"o"].xattrs is None


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b"d/.wh.", b"d/.wh../", b"./.wh..."])
def test_a_whiteout_of_no_name_is_refused(name: bytes) -> None:
    refused(file(name), match="whiteout of no name")


@pytest.mark.parametrize("name", [b".wh..wh.", b".wh..wh.plnk", b".wh..wh.aufs", b".wh..wh..opqx", b".wh..wh..wh..opq"])
def test_other_aufs_names_are_nothing(name: bytes) -> None:
    found = names(file(b"d/" + name))
    assert set(found) == {b"", b"d"}
    assert found[b"d"].xattrs is None


@pytest.mark.parametrize("kind", list(MemberType))
def test_an_opaque_marker_of_any_type_marks_the_directory_that_holds_it(kind: MemberType) -> None:
    found = names(member(kind, b"d/.wh..wh..opq", b"nowhere", xattrs={b"user.a": b"1"}))
    assert set(found) == {b"", b"d"}
    assert found[b"d"].xattrs == OPAQUE
    assert found[b""].xattrs is None


def test_the_root_may_be_opaque() -> None:
    assert names(file(b".wh..wh..opq"))[b""].xattrs == OPAQUE


def test_an_opaque_directory_keeps_its_own_children_and_xattrs() -> None:
    members = [directory(b"d", xattrs={b"user.a": b"1"}), file(b"d/.wh..wh..opq"), file(b"d/x")]
    for order in itertools.permutations(members):
        found = names(*order)
        assert set(found) == {b"", b"d", b"d/x"}
        assert found[b"d"].xattrs == {b"user.a": b"1", **OPAQUE}


NAMED = {
    "file": ([file(b"d/x", offset=7)], False),
    "symlink": ([symlink(b"d/x", b"t")], False),
    "device": ([member(MemberType.CHAR, b"d/x", major=1, minor=3)], False),
    "hardlink": ([file(b"a"), hardlink(b"d/x", b"a")], False),
    "directory": ([directory(b"d/x"), file(b"d/x/y")], True),
    "made directory": ([file(b"d/x/y")], True),
}


@pytest.mark.parametrize("what", NAMED)
def test_a_name_of_this_layer_stays_whichever_comes_first(what: str) -> None:
    members, is_directory = NAMED[what]
    for number in range(len(members) + 1):
        found = names(*members[:number], file(b"d/.wh.x"), *members[number:])
        assert set(found) == set(names(*members)), number
        plain = names(*members)[b"d/x"]
        assert attributes(found[b"d/x"]) == attributes(plain)
        assert found[b"d/x"].xattrs == (OPAQUE if is_directory else None)
        assert found[b"d/x"].nlink == plain.nlink


def test_a_whiteout_speaks_at_the_end() -> None:
    # The name that was here is a whiteout's own again once nothing holds it.
    found = names(file(b".wh.d"), directory(b"d"), file(b"d/x"), file(b"d", offset=5))
    assert found[b"d"].tar_offset_bytes == 5
    found = names(file(b".wh.d"), file(b"d"), directory(b"d"))
    assert found[b"d"].xattrs == OPAQUE


def test_a_directory_that_is_replaced_loses_its_marks() -> None:
    marks = [directory(b"d"), file(b"d/.wh.x"), file(b"d/.wh..wh..opq")]
    kept = names(*marks, directory(b"d"))
    assert set(kept) == {b"", b"d", b"d/x"}
    assert kept[b"d"].xattrs == OPAQUE
    found = names(*marks, file(b"d"), directory(b"d"))
    assert set(found) == {b"", b"d"}
    assert found[b"d"].xattrs is None
    found = names(file(b"a"), *marks, hardlink(b"d", b"a"), file(b"e"), directory(b"d"))
    assert found[b"d"].xattrs is None


def test_markers_follow_symlinked_parents() -> None:
    found = names(directory(b"d"), symlink(b"l", b"d"), file(b"l/.wh.x"), file(b"l/.wh..wh..opq"))
    assert is_whiteout(found[b"d/x"])
    assert found[b"d"].xattrs == OPAQUE
    assert found[b"l"].link == b"d"


def test_a_whiteout_of_a_symlink_is_of_the_symlink_itself() -> None:
    found = names(directory(b"d"), symlink(b"l", b"d"), file(b".wh.l"))
    assert found[b"l"].link == b"d"
    assert found[b"d"].xattrs is None


def test_an_opaque_attribute_that_a_tar_brings_does_not_count() -> None:
    assert names(directory(b"d", xattrs=OPAQUE))[b"d"].xattrs is None


# --- order and counts


def test_the_order_is_breadth_first_by_name() -> None:
    members = [file(b"b/x"), file(b"a/z"), file(b"a/y"), file(b"c"), file(b"a/d/deep"), file(b"B"), file(b"a!")]
    expected = [b"", b"B", b"a", b"a!", b"b", b"c", b"a/d", b"a/y", b"a/z", b"b/x", b"a/d/deep"]
    for order in (members, members[::-1]):
        tree, nodes = built(*order)
        found = names(*order)
        assert sorted(found, key=lambda path: found[path].number) == expected
        assert [node.number for node in nodes] == list(range(len(nodes)))
        assert nodes[0] is tree.root


def test_names_are_ordered_by_unsigned_bytes_and_length() -> None:
    odd = [b"\x80", b"\xff", b"a", b"a\x01", b"aa", b"b", b"A", b"-", b".a", b"...", b"~"]
    _, order = built(*(file(name, offset=number) for number, name in enumerate(odd)))
    assert [odd[node.tar_offset_bytes] for node in order[1:]] == sorted(odd)


def test_a_hardlinked_inode_is_numbered_at_its_first_name() -> None:
    found = names(file(b"z"), hardlink(b"m/a", b"z"), hardlink(b"b", b"m/a"), file(b"c"))
    assert found[b"b"].number == 1
    assert (found[b"c"].number, found[b"m"].number) == (2, 3)
    assert found[b"z"].nlink == 3
    assert len({node.number for node in found.values()}) == 4


def test_links_are_counted_at_the_end() -> None:
    found = names(
        directory(b"d"), directory(b"d/e"), directory(b"d/f"), file(b"d/x"), symlink(b"l", b"d"), file(b"d/f")
    )
    assert (found[b""].nlink, found[b"d"].nlink, found[b"d/e"].nlink) == (3, 3, 2)
    assert (found[b"d/x"].nlink, found[b"l"].nlink, found[b"d/f"].nlink) == (1, 1, 1)


def test_an_empty_layer_is_its_root() -> None:
    tree, order = built()
    assert order == [tree.root]
    assert (attributes(tree.root), tree.root.nlink) == ((0o040755, 0, 0, (0, 0)), 2)


def test_depth_has_no_limit_of_its_own() -> None:
    path = b"/".join([b"d"] * 3000)
    _, order = built(file(path))
    assert len(order) == 3001


def test_the_bytes_of_names_and_attributes_are_limited() -> None:
    # of what the tree takes in memory: an inode costs about 320 bytes beside its texts
    limits = Limits(metadata_bytes=2000)
    built(file(b"n" * 200), file(b"o" * 200), file(b"p" * 200), limits=limits)
    refused(file(b"n" * 200), file(b"o" * 200), file(b"p" * 200), file(b"q" * 200), match="2000", error=LimitExceeded,
            limits=limits)  # fmt: skip
    refused(symlink(b"l", b"t" * 1500), file(b"f"), match="2000", error=LimitExceeded, limits=limits)
    refused(file(b"f", xattrs={b"user.a": b"v" * 1300}), file(b"g"), match="2000", error=LimitExceeded, limits=limits)
    refused(file(b"a/b/c/d/e"), match="2000", error=LimitExceeded, limits=limits)


def test_following_symlinks_has_a_bound_over_all_members() -> None:
    """Each of a few members could be sent through half a million components of link texts."""
    chain = [symlink(b"l%d" % n, b"x/../" * 800 + b"l%d" % (n + 1)) for n in range(250)]
    through = [file(b"l0/d%d/f" % n) for n in range(3)]
    refused(directory(b"x"), *chain, directory(b"l250"), *through, match="too many symlinks", error=LimitExceeded)


def test_directories_without_entries_are_limited() -> None:
    refused(file(b"a/b/c/d"), match="more than 2 directories", error=LimitExceeded, limits=Limits(entries=2))
    assert len(built(file(b"a/b/c"), limits=Limits(entries=2))[1]) == 4
