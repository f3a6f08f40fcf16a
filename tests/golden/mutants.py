# SPDX-License-Identifier: Apache-2.0
"""Each rule of the format is held by a golden vector: small changes of the source, each of which one must notice.

usage: python -m tests.golden.mutants [RULE]   -> prints the changes that no vector notices; status 1 if there are some

A change is found by its text, which must stand in the module exactly once: where it does not, the list
here has to follow the code. Each runs in a process of its own, which imports the changed module in
place of the real one and builds layers until the first vector fails.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from tests.golden import make_parents, make_tars, make_vectors, more_tars

HERE: Final = Path(__file__).parent
CHECKOUT: Final = HERE.parent.parent
SECONDS_PER_MUTANT: Final = 60


@dataclass(frozen=True)
class Mutant:
    """`rule`: words of docs/formats.md; `module`: its full name."""

    rule: str
    module: str
    old: str
    new: str

    def text(self) -> str:
        """The changed module. Raises LookupError where the text is not, or not only, where it was."""
        source = (CHECKOUT / f"{self.module.replace('.', '/')}.py").read_text()
        count = source.count(self.old)
        if count != 1:
            raise LookupError(f"{self.rule}: {self.module} has {self.old!r} {count} times, not once")
        return source.replace(self.old, self.new)


def mutants(module: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(rule, module, old, new) for rule, old, new in changes]


MUTANTS: Final = [
    *mutants(
        "blockdev.formats.layer_file",
        ("file map: the tar at 4096", "HEAD_BYTES: Final = 4096", "HEAD_BYTES: Final = 8192"),
        ("identity: magic", 'b"TARINDEX"', 'b"TARINDEy"'),
        (
            "identity: version",
            "self.MAGICS[self.format_name], 1, 0, self.data_offset_bytes",
            "self.MAGICS[self.format_name], 2, 0, self.data_offset_bytes",
        ),
        (
            "identity: flags",
            "self.MAGICS[self.format_name], 1, 0, self.data_offset_bytes",
            "self.MAGICS[self.format_name], 1, 1, self.data_offset_bytes",
        ),
        ("parents: magic of the identity record", 'b"TARPARNT"', 'b"TARPARNS"'),
        (
            "parents: the format's name",
            'seed = b"tar-index:v1:" + format_name.encode',
            "seed = b\"tar-index:v1:\" + format_name.removesuffix('s').encode",
        ),
        ("uuid: the words in front", 'b"tar-index:v1:"', 'b"tar-index:v2:"'),
        ("uuid: the format's name", 'format_name.encode("ascii") + b":"', 'b""'),
        ("uuid: version 8", "uuid[6] & 0x0F | 0x80", "uuid[6] & 0x0F | 0x40"),
        ("uuid: variant", "uuid[8] & 0x3F | 0x80", "uuid[8] & 0x3F | 0xC0"),
        ("trailer: magic", 'b"TARIDXTR"', 'b"TARIDXTS"'),
        (
            "trailer: version, hash algorithm",
            "self.MAGIC, 1, 1, params.data_block_bytes",
            "self.MAGIC, 1, 2, params.data_block_bytes",
        ),
        (
            "trailer: data_size",
            "self.data_size_bytes, self.tree_size_bytes, self.levels",
            "self.data_blocks, self.tree_size_bytes, self.levels",
        ),
        ("trailer: checksum", "hashlib.sha256(head).digest()", "bytes(32)"),
    ),
    *mutants(
        "blockdev.formats.erofs",
        ("superblock: magic", "0xE0F5E1E2", "0xE0F5E1E3"),
        (
            "superblock: feature_compat",
            "COMPAT_SB_CHKSUM | COMPAT_MTIME, self.block_bits",
            "COMPAT_SB_CHKSUM, self.block_bits",
        ),
        ("superblock: checksum's polynomial", "0x82F63B78", "0xEDB88320"),
        ("superblock: checksum's start", "crc = 0xFFFFFFFF", "crc = 0"),
        ("superblock: no inversion at the end", "    return crc\n", "    return crc ^ 0xFFFFFFFF\n"),
        ("device numbers: low bits of the minor", "(minor & 0xFF)", "(minor & 0x7F)"),
        ("device numbers: high bits of the minor", "<< 12)", "<< 11)"),
        ("device numbers: major", "(major << 8)", "(major << 16)"),
        ("dirent: file type", "    0o060000: 4,", "    0o060000: 3,"),
        ("dirent: type of a fifo", "    0o010000: 5,", "    0o010000: 6,"),
        ("dirent: type of a symlink", "    0o120000: 7,", "    0o120000: 1,"),
        ("xattrs: index of user.", 'b"user": 1', 'b"user": 2'),
        ("xattrs: index of trusted.", 'b"trusted": 4', 'b"trusted": 5'),
        ("xattrs: index of security.", 'b"security": 6', 'b"security": 7'),
        ("xattrs: access ACL", 'b"system.posix_acl_access": 2', 'b"system.posix_acl_access": 3'),
        ("xattrs: default ACL", 'b"system.posix_acl_default": 3', 'b"system.posix_acl_default": 2'),
        ("xattrs: header of 12 bytes", "XATTR_HEADER_BYTES: Final = 12", "XATTR_HEADER_BYTES: Final = 16"),
        ("xattrs: sorted", "in sorted(entries):", "in entries:"),
        ("xattrs: sorted by index first", "in sorted(entries):", "in sorted(entries, key=lambda e: (e[1], e[0])):"),
        ("xattrs: entries at multiples of 4", "    return bytes(out)\n", "    return bytes(out) + bytes(4)\n"),
        (
            "xattrs: nothing behind the prefix has no index",
            "index is not None and rest else None",
            "index is not None else None",
        ),
        (
            "limits: xattr value of 65535 bytes",
            "XATTR_VALUE_BYTES_MAX: Final = 0xFFFF",
            "XATTR_VALUE_BYTES_MAX: Final = 0xFFFE",
        ),
        (
            "limits: xattr value of 65536 bytes",
            "XATTR_VALUE_BYTES_MAX: Final = 0xFFFF",
            "XATTR_VALUE_BYTES_MAX: Final = 0x10000",
        ),
    ),
    *mutants(
        "blockdev.formats.erofs_writer",
        ("metadata: 64 zero bytes first", "_RESERVED_BYTES: Final = 64", "_RESERVED_BYTES: Final = 128"),
        (
            "inlined: a directory's last block",
            "if base + used <= block:\n                    tail",
            "if base + used < block:\n                    tail",
        ),
        (
            "inlined: a symlink's target",
            "base + len(node.link) <= block:\n                    tail",
            "base + len(node.link) < block:\n                    tail",
        ),
        (
            "inlined: a directory's other blocks are block data",
            "node.size_bytes = full * block + used",
            "node.size_bytes = (full + 1) * block",
        ),
        (
            "placement: multiples of 64",
            "            tail = 0\n            position += -position % erofs.INODE_BYTES",
            "            tail = 0\n            position += -position % 32",
        ),
        (
            "placement: a tail does not cross a block",
            "if position // block != (position + base + tail - 1) // block:",
            "if False:",
        ),
        (
            "placement: to its last byte",
            "if position // block != (position + base + tail - 1) // block:",
            "if position // block != (position + base + tail) // block:",
        ),
        ("placement: a body alone may cross", "if tail and base + tail <= block:", "if base + tail <= block:"),
        (
            "block data: in canonical order",
            "        for number, blocks in outside:",
            "        for number, blocks in reversed(outside):",
        ),
        (
            "block data: at a multiple of 512",
            "        position += -position % block\n        for",
            "        position += -position % (2 * block)\n        for",
        ),
        ("inode: i_format", "1 | layout << 1,", "1 | layout << 2,"),
        ("inode: i_xattr_icount", "// 4 + 1 if body else 0,", "// 4 if body else 0,"),
        ("inode: i_ino from 1", "number + 1,", "number,"),
        (
            "inode: i_u of a file",
            "(self.offset_bytes + node.tar_offset_bytes) // self._block",
            "node.tar_offset_bytes // self._block",
        ),
        ("inode: i_u of an empty file is 0", "                if node.size_bytes:\n", "                if True:\n"),
        (
            "inode: i_u of block data counts from the file's start",
            "(area_offset_bytes + placed[number]) // block",
            "placed[number] // block",
        ),
        (
            "inode: i_uid, i_gid",
            "                node.uid,\n                node.gid,",
            "                node.gid,\n                node.uid,",
        ),
        ("inode: i_mtime", "node.mtime[0],", "0,"),
        ("inode: i_mtime_nsec", "node.mtime[1],", "0,"),
        ("inode: i_nlink", "                node.nlink,\n", "                1,\n"),
        (
            "directories: . and .. are stored",
            'sorted([b".", b"..", *node.children])',
            'sorted([b"..", *node.children])',
        ),
        (
            "directories: . and .. are sorted with the others",
            'sorted([b".", b"..", *node.children])',
            '[b".", b"..", *sorted(node.children)]',
        ),
        (
            "directories: filled greedily",
            "need = erofs.DIRENT.size + len(name)\n            if used + need > block:\n                full",
            "need = erofs.DIRENT.size + len(name)\n            if used + need >= block:\n                full",
        ),
        (
            "directories: names behind the records",
            "offset = erofs.DIRENT.size * len(names)",
            "offset = erofs.DIRENT.size * len(names) + 1",
        ),
    ),
    *mutants(
        "blockdev.formats.file_tree",
        ("limits: component of 255 bytes", "NAME_BYTES_MAX: Final = 255", "NAME_BYTES_MAX: Final = 254"),
        ("limits: component of 256 bytes", "NAME_BYTES_MAX: Final = 255", "NAME_BYTES_MAX: Final = 256"),
        (
            "limits: symlink target of 4095 bytes",
            "LINK_TEXT_BYTES_MAX: Final = 4095",
            "LINK_TEXT_BYTES_MAX: Final = 4094",
        ),
        (
            "limits: symlink target of 4096 bytes",
            "LINK_TEXT_BYTES_MAX: Final = 4095",
            "LINK_TEXT_BYTES_MAX: Final = 4096",
        ),
        ("limits: symlink target of 1 byte", "if not 1 <= len(member.link)", "if not 0 <= len(member.link)"),
        ("limits: major of 4095", "MAJORS: Final = 1 << 12", "MAJORS: Final = 4095"),
        ("limits: major of 4096", "MAJORS: Final = 1 << 12", "MAJORS: Final = 4097"),
        ("limits: minor of 1048575", "MINORS: Final = 1 << 20", "MINORS: Final = (1 << 20) - 1"),
        ("limits: minor of 1048576", "MINORS: Final = 1 << 20", "MINORS: Final = (1 << 20) + 1"),
        (
            "limits: device numbers are not negative",
            "if not 0 <= member.major < MAJORS",
            "if not member.major < MAJORS",
        ),
        ("names: 255 symlinks for one name", "_HOPS_MAX: Final = 255", "_HOPS_MAX: Final = 254"),
        ("names: 256 symlinks for one name", "_HOPS_MAX: Final = 255", "_HOPS_MAX: Final = 256"),
        (
            "names: empty components and . drop out",
            'path.split(b"/") if part and part != b"."]',
            'path.split(b"/") if part]',
        ),
        (
            "names: a followed component has 255 bytes",
            "                if len(name) > NAME_BYTES_MAX:\n                    raise",
            "                if len(name) > NAME_BYTES_MAX + 9:\n                    raise",
        ),
        (
            "names: made parents have mode 0755",
            "super().__init__(S_IFDIR | 0o755)",
            "super().__init__(S_IFDIR | 0o700)",
        ),
        (
            "names: an absolute target starts at the root",
            '                if child.link.startswith(b"/"):\n',
            "                if False:\n",
        ),
        (
            "names: .. in a target goes up",
            "                if len(stack) > 1:\n                    stack.pop()",
            "                pass",
        ),
        (
            "names: .. does not go above the root",
            "                if len(stack) > 1:\n                    stack.pop()",
            "                stack.pop()",
        ),
        (
            "names: a missing part of a target is made",
            "                if not make:\n                    return None",
            "                if not make or hops:\n                    return None",
        ),
        ("names: a target's rest comes after the link", "todo += parts", "todo[:0] = parts"),
        (
            "names: a parent that is no directory",
            'raise FormatError(f"parent is not a directory: {name!r}")',
            "return stack[-1]",
        ),
        (
            "names: the root changes nothing",
            "            if not parts:\n                return\n",
            '            if not parts:\n                raise FormatError("the root")\n',
        ),
        (
            "entries: a directory's mode is replaced",
            "        node.mode = S_IFDIR | member.mode\n",
            "        node.mode = node.mode if node.explicit else S_IFDIR | member.mode\n",
        ),
        (
            "entries: a directory's owner and mtime are replaced",
            "        node.uid, node.gid, node.mtime = member.uid, member.gid, member.mtime\n",
            "        if not node.explicit:\n"
            "            node.uid, node.gid, node.mtime = member.uid, member.gid, member.mtime\n",
        ),
        (
            "entries: the last entry of a name counts",
            "            parent.children[base] = node\n\n    def _join",
            "            parent.children.setdefault(base, node)\n\n    def _join",
        ),
        (
            "hardlink: what stands under the name goes first",
            "        if base in parent.children:\n            self._replace(parent, base, None)\n",
            "",
        ),
        (
            "hardlink: parents of the target are followed",
            "holder = self._walk(parts[:-1], make=False)",
            "holder = self.root if not parts[:-1] else None",
        ),
        (
            "hardlink: nothing is made for a target",
            "holder = self._walk(parts[:-1], make=False)",
            "holder = self._walk(parts[:-1], make=True)",
        ),
        (
            "hardlink: to a directory",
            "        if isinstance(target, Directory):\n            raise",
            "        if False:\n            raise",
        ),
        (
            "hardlink: owner and mtime",
            "        target.uid, target.gid, target.mtime = member.uid, member.gid, member.mtime\n",
            "",
        ),
        ("hardlink: mode", "target.mode = (target.mode & 0o170000) | member.mode", "pass"),
        ("hardlink: not the mode of a symlink", "        if not target.link:\n", "        if True:\n"),
        ("hardlink: the capability goes", "            self._set_xattr(target, _CAPABILITY, None)", "            pass"),
        ("hardlink: its own xattrs are joined", "        self._join_xattrs(target, member.xattrs)\n", ""),
        ("symlink: mode 0777", "node.mode = S_IFLNK | 0o777", "pass"),
        (
            "values: xattrs trusted.* are dropped",
            '    if name.startswith(b"trusted."):\n        return False',
            '    if name.startswith(b"trusted.overlay."):\n        return False',
        ),
        (
            "values: xattrs trusted.overlay.* are dropped",
            '    if name.startswith(b"trusted."):\n',
            '    if name.startswith(b"trusted.") and b"overlay" not in name:\n',
        ),
        (
            "values: user.* on others is dropped",
            "mode & 0o170000 not in (S_IFREG, S_IFDIR)",
            "mode & 0o170000 not in (S_IFREG, S_IFDIR, S_IFLNK)",
        ),
        (
            "values: user.* on directories stays",
            "mode & 0o170000 not in (S_IFREG, S_IFDIR)",
            "mode & 0o170000 not in (S_IFREG,)",
        ),
        (
            "values: the later xattr counts",
            "        node.xattrs[name] = value\n",
            "        node.xattrs[name] = old if old is not None else value\n",
        ),
        ("whiteouts: the opaque mark", "            parent.opaque = True\n", "            pass\n"),
        ("whiteouts: opaque is y", 'b"trusted.overlay.opaque": b"y"', 'b"trusted.overlay.opaque": b"x"'),
        ("whiteouts: .wh..wh. and anything else is nothing", "elif not base.startswith(_WHITEOUT_META):", "else:"),
        ("whiteouts: of no name", 'if name in (b"", b".", b".."):', 'if name in (b"", b"."):'),
        ("whiteouts: of nothing at all", 'if name in (b"", b".", b".."):', 'if name in (b".", b".."):'),
        ("whiteouts: of .", 'if name in (b"", b".", b".."):', 'if name in (b"", b".."):'),
        (
            "whiteouts: a character device 0:0",
            "node.children[name] = Inode(S_IFCHR)",
            "node.children[name] = Inode(S_IFCHR | 0o644)",
        ),
        (
            "whiteouts: the name stays",
            "                if existing is None:\n                    node",
            "                if not isinstance(existing, Directory):\n                    node",
        ),
        (
            "whiteouts: a directory of the name becomes opaque",
            "                    existing.opaque = True",
            "                    pass",
        ),
        ("nlink: directories begin with 2", "            node.nlink = 2\n", "            node.nlink = 1\n"),
        ("nlink: subdirectories count", "                    node.nlink += 1\n", "                    pass\n"),
        ("nlink: names count", "                    child.nlink += 1\n", "                    child.nlink = 1\n"),
        ("canonical order: by the bytes of names", "for name in sorted(children):", "for name in children:"),
        (
            "canonical order: breadth first",
            "                    order.append(child)\n",
            "                    order.insert(1, child)\n",
        ),
    ),
    *mutants(
        "blockdev.formats.tar",
        ("headers: any version of ustar", 'ustar = magic[:6] == b"ustar\\0"', 'ustar = magic == b"ustar\\x0000"'),
        ("headers: v7 has no prefix", 'ustar = magic[:6] == b"ustar\\0"', "ustar = True"),
        ("headers: GNU has no prefix", 'ustar = magic[:6] == b"ustar\\0"', 'ustar = magic[:5] == b"ustar"'),
        ("headers: GNU has device numbers", 'if ustar or magic == b"ustar  \\0":', "if ustar:"),
        ("headers: v7 has no device numbers", 'if ustar or magic == b"ustar  \\0":', "if True:"),
        ("headers: prefix, / and name", 'name = prefix + b"/" + name', "name = prefix + name"),
        (
            "headers: text ends at the first NUL",
            '    return field.split(b"\\0", 1)[0]\n',
            '    return field.rstrip(b"\\0")\n',
        ),
        ("numbers: base-256", "    if first & 0x80:\n", "    if first == 0x80:\n"),
        ("numbers: bit 6 is the sign", "        if first & 0x40:\n", "        if False:\n"),
        ("numbers: base-256 without its marker", "value &= (1 << (bits - 1)) - 1", "pass"),
        ("numbers: base-256 has 64 bits", "return value if -_MAX_64 <= value < _MAX_64 else None", "return value"),
        ("numbers: blanks and NULs at both ends", 'field.strip(b" \\0")', 'field.rstrip(b" \\0")'),
        ("numbers: cut at the first NUL", 'text = cut(field.strip(b" \\0"))', 'text = field.strip(b" \\0")'),
        ("numbers: empty is 0", "    if not text:\n        return 0\n", "    if not text:\n        return None\n"),
        (
            "numbers: octal digits only",
            '_OCTAL: Final = re.compile(rb"[0-7]+\\Z")',
            '_OCTAL: Final = re.compile(rb"[0-7]+")',
        ),
        ("checksum: is looked at", 'raise FormatError("bad header checksum")', "pass"),
        ("types: NUL", "    0x00: MemberType.FILE,\n", ""),
        ("types: NUL with a / is a directory", 'if typeflag == 0 and name.endswith(b"/"):', "if False:"),
        ("types: 0 with a / is a file", 'if typeflag == 0 and name.endswith(b"/"):', 'if name.endswith(b"/"):'),
        (
            "types: 7 is refused",
            "    0x30: MemberType.FILE,\n",
            "    0x30: MemberType.FILE,\n    0x37: MemberType.FILE,\n",
        ),
        (
            "types: S is refused",
            "    0x30: MemberType.FILE,\n",
            "    0x30: MemberType.FILE,\n    0x53: MemberType.FILE,\n",
        ),
        ("types: 3", "    0x33: MemberType.CHAR,\n", "    0x33: MemberType.BLOCK,\n"),
        ("types: 4", "    0x34: MemberType.BLOCK,\n", "    0x34: MemberType.CHAR,\n"),
        ("types: 6", "    0x36: MemberType.FIFO,\n", "    0x36: MemberType.CHAR,\n"),
        ("data length: of types 1 to 6 it is 0", "            follows = size = 0\n", "            follows = size\n"),
        (
            "data length: negative",
            "        if typeflag in (0x30, 0x00):\n            if size < 0:\n",
            "        if typeflag in (0x30, 0x00):\n            if size < -5:\n",
        ),
        (
            "data length: a directory of type NUL with data",
            "if size and member_type is MemberType.DIRECTORY:",
            "if False:",
        ),
        ("end: at a header", "            self._ended = self._zero_records == 2\n", "            self._ended = True\n"),
        (
            "end: two zero blocks, then opaque",
            "            self._ended = self._zero_records == 2\n",
            "            self._ended = False\n",
        ),
        ("end: one zero block and then anything else", "        if self._zero_records:\n", "        if False:\n"),
        (
            "end: a part of a header",
            "        if self._partial:\n            raise",
            "        if False:\n            raise",
        ),
        ("end: data cut short", "        if self._skip > self._padding:\n", "        if False:\n"),
        ("end: in the padding", "        if self._skip > self._padding:\n", "        if self._skip:\n"),
        ("extended: of 1 MiB at the most", "if size > self._limits.extended_header_bytes:", "if False:"),
        (
            "extended: of a whole MiB",
            "if size > self._limits.extended_header_bytes:",
            "if size >= self._limits.extended_header_bytes:",
        ),
        ("extended: L", '0x4C: "L", ', ""),
        ("extended: K", ', 0x4B: "K"', ""),
        ("extended: L up to the first NUL", "self._long_name = cut(body)", 'self._long_name = body.rstrip(b"\\0")'),
        ("extended: K up to the first NUL", "self._long_link = cut(body)", 'self._long_link = body.rstrip(b"\\0")'),
        ("extended: an empty L has no effect", "        if long_name:\n", "        if long_name is not None:\n"),
        ("extended: an empty K has no effect", "        if long_link:\n", "        if long_link is not None:\n"),
        (
            "extended: L goes before pax",
            "        if long_name:\n            name",
            "        if long_name and b'path' not in pax:\n            name",
        ),
        (
            "extended: K goes before pax",
            "        if long_link:\n            link",
            "        if long_link and b'linkpath' not in pax:\n            link",
        ),
        ("pax: length of 5 is enough", "length < 5 or", "length < 6 or"),
        ("pax: length exactly that of the record", 'stop > end or body[stop - 1 : stop] != b"\\n" or', ""),
        ("pax: a key is not empty", "if not equals or not key or", "if not equals or"),
        ("pax: an equals sign", "if not equals or not key or", "if not key or"),
        ("pax: no NUL in a key", 'or b"\\0" in key or', "or"),
        ("pax: no NUL in path", 'frozenset((b"path", ', "frozenset(("),
        ("pax: no NUL in linkpath", 'b"linkpath", b"uname"', 'b"uname"'),
        ("pax: no NUL in uname", 'b"linkpath", b"uname"', 'b"linkpath"'),
        ("pax: no NUL in gname", ', b"gname"))', "))"),
        ("pax: NULs in other values", '(key in _PLAIN_TEXT_KEYS and b"\\0" in value)', 'b"\\0" in value'),
        (
            "pax: the last record of a key counts",
            "        records[key] = value\n",
            "        records.setdefault(key, value)\n",
        ),
        (
            "pax: a second x replaces the first",
            "            self._pax = parse_pax(body)\n",
            "            self._pax = {**(self._pax or {}), **parse_pax(body)}\n",
        ),
        ("pax: an x is for one member", "pax, self._pax = self._pax or {}, None", "pax = self._pax or {}"),
        ("pax: g must be well formed", "            parse_pax(body)  # malformed", "            # malformed"),
        (
            "pax: g drops a pending x",
            "self._pax = self._long_name = self._long_link = None\n        elif",
            "self._long_name = self._long_link = None\n        elif",
        ),
        (
            "pax: g drops a pending L",
            "self._pax = self._long_name = self._long_link = None\n        elif",
            "self._pax = self._long_link = None\n        elif",
        ),
        (
            "pax: g drops a pending K",
            "self._pax = self._long_name = self._long_link = None\n        elif",
            "self._pax = self._long_name = None\n        elif",
        ),
        (
            "pax: g has no effect of its own",
            "            parse_pax(body)  # malformed ones are refused; well formed ones change nothing\n"
            "            self._pax = self._long_name",
            "            self._pax = parse_pax(body)\n            self._long_name",
        ),
        (
            "pax: an empty value leaves the header's field",
            "            elif not value:\n                continue\n",
            "            elif not value and key != b'path':\n                continue\n",
        ),
        (
            "pax: an empty number leaves the header's field",
            "            elif not value:\n                continue\n",
            "            elif not value and key in (b'path', b'linkpath'):\n                continue\n",
        ),
        ("pax: path", "                name = value\n", "                pass\n"),
        ("pax: linkpath", "                link = value\n", "                pass\n"),
        ("pax: size", 'size = _pax_number(value, "size")', '_pax_number(value, "size")'),
        ("pax: uid", 'uid = _pax_number(value, "uid")', '_pax_number(value, "uid")'),
        ("pax: gid", 'gid = _pax_number(value, "gid")', '_pax_number(value, "gid")'),
        ("pax: numbers have an optional sign", 'rb"([+-]?)(?=[0-9])0*([0-9]*)\\Z"', 'rb"(-?)(?=[0-9])0*([0-9]*)\\Z"'),
        ("pax: anything else is no number", 'rb"([+-]?)(?=[0-9])0*([0-9]*)\\Z"', 'rb"([+-]?) ?0*([0-9]*)"'),
        ("pax: numbers have 64 bits", "if len(digits) > 20 or not -_MAX_64 <= number < _MAX_64:", "if False:"),
        ("pax: a time may end in a point", r'(?:\.([0-9]*))?\Z"', r'(?:\.([0-9]+))?\Z"'),
        ("pax: nothing behind a time", r'(?:\.([0-9]*))?\Z"', r'(?:\.([0-9]*))?"'),
        ("pax: nine digits of a fraction", '(match[2] or b"0")[:9]', '(match[2] or b"0")[:6]'),
        ("pax: digits from the left", '.ljust(9, b"0")', '.rjust(9, b"0")'),
        ("pax: SCHILY.xattr", 'b"SCHILY.xattr."', 'b"LIBARCHIVE.xattr."'),
        (
            "pax: an empty xattr is one",
            "            if key.startswith(_XATTR_PREFIX):\n",
            "            if key.startswith(_XATTR_PREFIX) and value:\n",
        ),
        ("pax: GNU.sparse.* is refused", 'if key.startswith(b"GNU.sparse."):', 'if key.startswith(b"GNU.sparse.m"):'),
        (
            "pax: GNU.sparse.* in any x",
            'if key.startswith(b"GNU.sparse."):',
            'if key.startswith(b"GNU.sparse.") and b"GNU.sparse.major" in self._pax:',
        ),
        ("values: the lower 12 bits of mode", "mode & 0o7777, uid, gid, (mtime", "mode & 0o777, uid, gid, (mtime"),
        ("values: no more than 12 bits of mode", "mode & 0o7777, uid, gid, (mtime", "mode & 0o17777, uid, gid, (mtime"),
        ("values: uid of 2^32 - 2", "if not 0 <= uid <= 0xFFFFFFFE or", "if not 0 <= uid <= 0xFFFFFFFD or"),
        ("values: uid of 2^32 - 1", "if not 0 <= uid <= 0xFFFFFFFE or", "if not 0 <= uid <= 0xFFFFFFFF or"),
        (
            "values: uid is not negative",
            "if not 0 <= uid <= 0xFFFFFFFE or",
            "uid = max(uid, 0)\n        if not 0 <= uid <= 0xFFFFFFFE or",
        ),
        ("values: gid of 2^32 - 1", "not 0 <= gid <= 0xFFFFFFFE:", "not 0 <= gid <= 0xFFFFFFFF:"),
        ("values: gid of 2^32 - 2", "not 0 <= gid <= 0xFFFFFFFE:", "not 0 <= gid <= 0xFFFFFFFD:"),
        ("values: gid is not negative", "not 0 <= gid <= 0xFFFFFFFE:", "not gid <= 0xFFFFFFFE:"),
        (
            "values: the last time",
            "_LAST_TIME: Final = (9223372036, 854775807)",
            "_LAST_TIME: Final = (9223372036, 854775806)",
        ),
        (
            "values: past the last time",
            "_LAST_TIME: Final = (9223372036, 854775807)",
            "_LAST_TIME: Final = (9223372036, 854775808)",
        ),
    ),
    *mutants(
        "verity.params",
        ("verity: data blocks of 512, hash blocks of 4096", "Params(512, 4096)", "Params(512, 2048)"),
        (
            "erofs-4k: verity with data blocks of 4096",
            '"erofs-4k": Params(4096, 4096)',
            '"erofs-4k": Params(2048, 4096)',
        ),
        ("verity: a salt of 32 zero bytes", "salt: bytes = bytes(32)", 'salt: bytes = b""'),
    ),
    *mutants(
        "verity.tree",
        ("verity: the top level comes first", "for level in reversed(upper):", "for level in upper:"),
        (
            "verity: zeros fill the last hash block",
            "digests + bytes(-len(digests) % size)",
            'digests.ljust(-(-len(digests) // size) * size, b"x")',
        ),
    ),
    *mutants(
        "verity.trailer",
        ("trailer: the record at 3584", 'struct.Struct("<IIQ")', 'struct.Struct(">IIQ")'),
    ),
    *mutants(
        "blockdev.formats.layer_writer",
        (
            "file map: meta_off",
            "        writer.pad(ALIGNMENT_BYTES)\n        offset",
            "        writer.pad(512)\n        offset",
        ),
        (
            "file map: data_size",
            "        writer.pad(ALIGNMENT_BYTES)\n        self._check_size",
            "        writer.write(b'\\0')\n        writer.pad(ALIGNMENT_BYTES)\n        self._check_size",
        ),
        ("identity: tar_off", "identity = Identity(HEAD_BYTES,", "identity = Identity(0,"),
        (
            "identity: meta_off",
            "identity = Identity(HEAD_BYTES, tar_size_bytes, area.offset_bytes,",
            "identity = Identity(HEAD_BYTES, tar_size_bytes, area.offset_bytes + 512,",
        ),
        ("superblock: blkszbits", "block_bits=block.bit_length() - 1", "block_bits=block.bit_length()"),
        ("superblock: root_nid", "root_nid=area.root_nid,", "root_nid=2,"),
        ("superblock: inos", "inodes=area.inodes,", "inodes=area.inodes + 1,"),
        ("superblock: blocks", "blocks=data_size_bytes // block,", "blocks=data_size_bytes // block - 1,"),
        ("superblock: meta_blkaddr", "meta_block=identity.metadata_offset_bytes // block,", "meta_block=0,"),
        ("superblock: checksum", "erofs.crc32c(covered)", "0"),
        (
            "superblock: checksum over one block",
            "superblock.ljust(erofs.checksummed_bytes(block),",
            "superblock.ljust(4 * erofs.checksummed_bytes(block),",
        ),
        ("identity: tar_len", "Identity(HEAD_BYTES, tar_size_bytes,", "Identity(HEAD_BYTES, tar_size_bytes + 1,"),
        (
            "identity: diff ID",
            "Identity(HEAD_BYTES, tar_size_bytes, area.offset_bytes, diff_id,",
            "Identity(HEAD_BYTES, tar_size_bytes, area.offset_bytes, bytes(32),",
        ),
        ("superblock: uuid", "uuid=layer_uuid(self._format.name, identity.diff_id)", "uuid=bytes(16)"),
        ("trailer: tree length", "params, data_size, geometry.tree_size_bytes, len", "params, data_size, 4096, len"),
        (
            "trailer: levels",
            "geometry.tree_size_bytes, len(geometry.levels), root_hash",
            "geometry.tree_size_bytes, 1, root_hash",
        ),
        ("trailer: root hash", "len(geometry.levels), root_hash, diff_id", "len(geometry.levels), bytes(32), diff_id"),
        ("trailer: diff ID", "len(geometry.levels), root_hash, diff_id", "len(geometry.levels), root_hash, bytes(32)"),
        ("verity: digest of the head", "self._tree.replace(0, leaf_digests(index.head, params))", "pass"),
    ),
    *mutants(
        "blockdev.formats.tar",
        (
            "headers: prefix of 155 bytes",
            "    if ustar:\n        return cut(record[345:500])",
            "    if ustar:\n        return cut(record[345:476])",
        ),
        ("headers: star's prefix", "return cut(record[345:476])", "return cut(record[345:500])"),
        (
            "headers: star's times",
            "if _value(record[476:488]) is None or _value(record[488:500]) is None:",
            "if False:",
        ),
        ("headers: GNU's prefix of old", "(_bad_time(record[345:357]) or _bad_time(record[357:369]))", "False"),
        ("headers: GNU's prefix is ASCII", 'return prefix if prefix.isascii() else b""', "return prefix"),
        (
            "numbers: mode, uid and gid",
            "        if fields is None or size is None or mtime is None:",
            "        fields = fields or (0o644, 0, 0)\n        if fields is None or size is None or mtime is None:",
        ),
        (
            "numbers: size",
            "size, mtime = _value(record[124:136]), _value(record[136:148])",
            "size, mtime = _value(record[124:136]) or 0, _value(record[136:148])",
        ),
        (
            "numbers: mtime",
            "size, mtime = _value(record[124:136]), _value(record[136:148])",
            "size, mtime = _value(record[124:136]), _value(record[136:148]) or 0",
        ),
        (
            "numbers: device numbers",
            "            if devices is None:\n",
            "            devices = devices or (0, 0)\n            if devices is None:\n",
        ),
        ("checksum: may be the sum of signed bytes", "if expected != record_sum(record) - 256 * negative:", "if True:"),
        ("checksum: octal only", "stored = None if field[0] & 0x80 else _value(field)", "stored = _value(field)"),
        (
            "data length: padding to 512",
            "self._padding = -size_bytes % RECORD_BYTES",
            "self._padding = -size_bytes % 1024",
        ),
        ("data length: negative whatever pax says", "if size < 0 and typeflag in (0x30, 0x00):", "if False:"),
        (
            "end: in an extended header",
            "        if self._wanted is not None:\n            raise",
            "        if False:\n            raise",
        ),
        ("pax: length with a plus", 'digits.removeprefix(b"+").isdigit()', "digits.isdigit()"),
        ("pax: times that are not used", "_pax_time(value, key.decode())  # not", "pass  # not"),
        ("pax: seconds of 64 bits", "seconds = _pax_number(match[1], key)", "seconds = int(match[1])"),
        (
            "values: a negative time is 0",
            "if not 0 <= mtime < _LAST_TIME[0] and not (0, 0) <= (mtime, nanoseconds) <= _LAST_TIME:",
            "if not (mtime, nanoseconds) <= _LAST_TIME:",
        ),
    ),
    *mutants(
        "blockdev.formats.file_tree",
        (
            "names: .. is refused",
            '        if b".." in parts:\n            raise FormatError("\'..\' in a path")\n        return parts',
            '        return [part for part in parts if part != b".."]',
        ),
        ("names: .wh. of the last component is not counted", "(len(_WHITEOUT) if whiteout else 0)", "0"),
        (
            "names: nor of one that ends in a dot",
            "for part in parts[:-1] if last_may_be_mark else parts:",
            "for part in parts:",
        ),
        (
            "entries: a directory keeps its children",
            "        if not isinstance(node, Directory):\n            node = self._new",
            "        if True:\n            node = self._new",
        ),
        (
            "entries: a directory's xattrs are joined",
            "        self._join_xattrs(node, member.xattrs)\n\n    def _add_hardlink",
            "        node.xattrs = None\n        self._join_xattrs(node, member.xattrs)\n\n    def _add_hardlink",
        ),
        (
            "whiteouts: a mark whatever its type",
            "        if whiteout:\n            self._whiteout",
            "        if whiteout and member.type is MemberType.FILE:\n            self._whiteout",
        ),
        (
            "whiteouts: marks go with their directory",
            "            node = self._new_directory(parent, base)\n",
            '            node = self._new_directory(parent, base)\n            node.opaque = base == b"d"\n',
        ),
        (
            "entries: times of directories at the end, by name",
            "        self._directory_times.append((member.name, member.mtime))\n",
            "",
        ),
        (
            "entries: what is gone has no time",
            "                if found is None:\n                    raise FormatError(",
            "                if False:\n                    raise FormatError(",
        ),
        ("hardlinks: a slash follows a symlink", 'if member.link.endswith((b"/", b"/.")):', "if False:"),
        ("parents: the group of a set-group-ID directory", "if stack[-1].mode & _SETGID:", "if False:"),
        ("xattrs: an empty name is refused", "if name in _NAMELESS or (", "if ("),
        ("xattrs: names of 255 bytes", "len(name) > NAME_BYTES_MAX and not name", "len(name) > 300 and not name"),
        ("xattrs: ACLs that say nothing", "or _says_nothing(name, value):", "or False:"),
    ),
    *mutants(
        "blockdev.formats.layer_file",
        (
            "trailer: record at 3584",
            "head.ljust(TRAILER_BYTES - verity_trailer.FROM_END_BYTES",
            "head.ljust(TRAILER_BYTES - 1024",
        ),
    ),
    *mutants(
        "blockdev.formats.erofs_writer",
        (
            "directories: .. of a directory",
            'node.number if name == b"." else self._parents[node.number], node.mode',
            'node.number if name == b"." else 0, node.mode',
        ),
    ),
    *mutants(
        "blockdev.formats.directory_table",
        ("parents: magic of the table", 'b"PARENTS\\0"', 'b"PARENTS1"'),
        (
            "parents: layout of a record",
            "self.depth, self.flags, attributes.mode,",
            "self.depth, attributes.mode, self.flags,",
        ),
        ("parents: the flag of what differs", "DIFFERS: Final = 0x10", "DIFFERS: Final = 0x20"),
        ("parents: owners differ", "return self.mode, self.uid, self.gid, self", "return self.mode, 0, self.gid, self"),
        ("parents: groups differ", "return self.mode, self.uid, self.gid, self", "return self.mode, self.uid, 0, self"),
        ("parents: modes differ", "return self.mode, self.uid, self.gid, self", "return 0, self.uid, self.gid, self"),
        ("parents: xattrs differ", "self.gid, self.xattrs\n", "self.gid, {}\n"),
        ("parents: an entry that came later", "ENTRY * node.explicit", "0"),
    ),
    *mutants(
        "blockdev.formats.parents",
        ("parents: an opaque directory hides", "if carried is not None and not opaque else {}", "if carried else {}"),
        (
            "parents: nothing is below an opaque one",
            "                bare or opaque,\n",
            "                bare,\n",
        ),
        ("parents: a mark of the root hides nothing", "(last.opaque and len(way) > 1)", "last.opaque"),
        (
            "parents: an opaque directory below hides",
            "hidden = last.below_opaque or (last.opaque and len(way) > 1)",
            "hidden = False",
        ),
        (
            "parents: another file in between",
            "if seen.what is What.OTHER or seen.below_opaque:",
            "if seen.below_opaque:",
        ),
        ("parents: xattrs are joined", "xattrs={**base.xattrs, **own.xattrs}", "xattrs=own.xattrs"),
        ("parents: own xattrs win", "xattrs={**base.xattrs, **own.xattrs}", "xattrs={**own.xattrs, **base.xattrs}"),
        ("parents: the time is the layer's", "true = replace(base, mtime=own.mtime)", "true = base"),
        ("parents: the group of a lower directory", "true = replace(own, gid=above.copied.gid)", "pass"),
        (
            "parents: only with the set-group-ID bit",
            "above.copied and above.copied.mode & _SETGID:",
            "above.copied:",
        ),
        (
            "parents: only where that was made",
            "elif record.flags & directory_table.IN_MADE and above.copied",
            "elif above.copied",
        ),
        (
            "parents: what is covered by an entry goes",
            "work.append((Carried(attributes), iter(node.children.items())))",
            "work.append((Carried(node.attributes, node.differs), iter(node.children.items())))",
        ),
        ("parents: what is whited out goes", "if seen.what is What.ABSENT:", "if seen.what is not What.DIRECTORY:"),
        (
            "parents: an opaque mark below an entry",
            "if seen.what is What.DIRECTORY and node.children and not seen.opaque:",
            "if seen.what is What.DIRECTORY and node.children:",
        ),
        (
            "parents: nothing that is not on the way",
            "if frame.out.differs or frame.out.children:",
            "if True:",
        ),
    ),
    *mutants(
        "blockdev.formats.layer_file",
        ("erofs-4k: magic", 'b"EROFS-4K"', 'b"EROFS-4L"'),
        ("erofs-4k: magic of parents layers", 'b"EROFS4KP"', 'b"EROFS4KQ"'),
        (
            "erofs-4k: blocks of the index",
            '"erofs", 4096, HEAD_BYTES, split=True',
            '"erofs", 2048, HEAD_BYTES, split=True',
        ),
        ("erofs-4k: identity record, L", "split.lost_bytes, split.tails, split.instr", "0, split.tails, split.instr"),
        (
            "erofs-4k: identity record, n",
            "split.lost_bytes, split.tails, split.instr",
            "split.lost_bytes, 0, split.instr",
        ),
        ("erofs-4k: identity record, keep_off", "self.SPLIT.pack(split.offset_bytes,", "self.SPLIT.pack(0,"),
        ("erofs-4k: identity record, S", "split.tails, split.instruction_bytes)\n", "split.tails, 0)\n"),
    ),
    *mutants(
        "blockdev.formats.erofs",
        (
            "erofs-4k: the checksum ends with a block",
            "block_bytes - SUPERBLOCK_OFFSET_BYTES if block_bytes > SUPERBLOCK_OFFSET_BYTES else block_bytes",
            "min(block_bytes, SUPERBLOCK_OFFSET_BYTES)",
        ),
    ),
    *mutants(
        "blockdev.formats.erofs_writer",
        (
            "erofs-4k: a tail behind large xattrs does not cross",
            "elif tail and (position + base) // block != (position + base + tail - 1) // block:",
            "elif False:",
        ),
        (
            "erofs-4k: to its last byte behind large xattrs",
            "elif tail and (position + base) // block != (position + base + tail - 1) // block:",
            "elif tail and (position + base) // block != (position + base + tail) // block:",
        ),
        (
            "erofs-4k: the next multiple of 64 behind large xattrs",
            "                position += -behind % block\n                position += -position % erofs.INODE_BYTES",
            "                position += -behind % block\n                position += -position % block",
        ),
        (
            "erofs-4k: a record that fits does not cross",
            "if tail and base + tail <= block:",
            "if tail and base + tail < block - 4:",
        ),
    ),
    *mutants(
        "blockdev.formats.tar_split",
        ("erofs-4k: tails of 4032 bytes", "TAIL_BYTES_MAX: Final = BLOCK_BYTES - 64", "TAIL_BYTES_MAX: Final = 4031"),
        ("erofs-4k: longer ones are in the body", "return tail if tail <= TAIL_BYTES_MAX else 0", "return tail % 4033"),
        ("erofs-4k: runs of eight zeros", "{8,}", "{9,}"),
        ("erofs-4k: nor of seven", "(\\0{8,})", "(\\0{7,})"),
        ("erofs-4k: pieces end at multiples of 512", "RECORD_BYTES - offset % RECORD_BYTES", "RECORD_BYTES"),
        (
            "erofs-4k: operations",
            "_LITERAL, _ZEROS, _BLOCKS, _TAIL = range(4)",
            "_LITERAL, _ZEROS, _TAIL, _BLOCKS = range(4)",
        ),
        (
            "erofs-4k: the lowest bits",
            "value, out = size << _OPERATION_BITS | operation",
            "value, out = operation << 20 | size",
        ),
        (
            "erofs-4k: numbers, the lowest bits first",
            "out.append(value & 0x7F | 0x80)",
            "out.insert(0, value & 0x7F | 0x80)",
        ),
        ("erofs-4k: a body ends with a block", "self._place += blocks + self._fill", "self._place += blocks"),
        ("erofs-4k: zeros behind a body", "blocks.append(bytes(self._fill))", 'blocks.append(b"x" * self._fill)'),
        ("erofs-4k: places of lost tails", "place = offset_bytes + lost", "place = offset_bytes"),
        ("erofs-4k: lost tails are kept", "                write(tail)\n", ""),
        (
            "erofs-4k: places count from the start",
            "self._tail_places[file] = tail_offset_bytes",
            "self._tail_places[file] = tail_offset_bytes - 4096",
        ),
        ("erofs-4k: i_u without a body", "// BLOCK_BYTES if node.size_bytes > tail else 0", "// BLOCK_BYTES"),
        ("erofs-4k: the end of the tar is kept", "        self._say(self._record)\n", ""),
    ),
]


# --- in the process of one mutant


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a text."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._text, f"<mutant of {self._name}>", "exec"), module.__dict__)


Vectors = list[tuple[str, bytes, dict[str, Any]]]


def vectors() -> Vectors:
    """(format, tar, what is known of it), small ones first."""
    cases = make_tars.CASES | more_tars.CASES
    found = []
    for layer_format in ("tar-index", "erofs-4k"):
        for path in sorted(HERE.glob(f"{layer_format}*.json")):
            for vector in json.loads(path.read_text())["vectors"]:
                found.append((layer_format, bytes(cases[vector["name"]]()), vector))
    return sorted(found, key=lambda known: len(known[1]))


def chains() -> list[tuple[str, list[bytes], dict[str, Any]]]:
    return [
        (of, make_parents.tars_of(vector["name"]), vector)
        for of, path in make_parents.VECTORS.items()
        for vector in make_vectors.known(path).values()
    ]


def chain_fails(of: str, tars: list[bytes], vector: dict[str, Any]) -> bool:
    """As tests/golden/test_parents.py has it."""
    from tests.chains import make, parents_layer

    layer = parents_layer([make(tar, of) for tar in tars])
    if layer is None:
        return "needs" not in vector
    return "needs" in vector or hashlib.sha256(layer.file).hexdigest() != vector["file_sha256"]


def fails(layer_format: str, tar: bytes, vector: dict[str, Any]) -> bool:
    """As tests/golden/test_tar_index.py and test_erofs_4k.py have it."""
    from blockdev.errors import BlockdevError
    from tests.chains import make

    try:
        made = make(tar, layer_format)
    except BlockdevError:
        return "refused" not in vector
    return (
        "refused" in vector
        or made.built.root_hash.hex() != vector["root_hash"]
        or hashlib.sha256(made.file).hexdigest() != vector["file_sha256"]
    )


def _child(mutant: Mutant, known: Vectors) -> int:
    """0: no vector fails; 1: one does; 2: the text is not there, or is no program any more."""
    signal.alarm(SECONDS_PER_MUTANT)  # a loop without an end is noticed, too
    try:
        text = mutant.text()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    sys.meta_path.insert(0, Finder(mutant.module, text))
    try:
        importlib.import_module(mutant.module)
    except Exception as error:
        print(f"{mutant.rule}: not even imported: {error}", file=sys.stderr)
        return 2
    try:
        # A rule of tar-index is held by vectors of its own.
        held_by = "erofs-4k" if mutant.rule.startswith("erofs-4k: ") else "tar-index"
        tars = [one for one in known if one[0] == held_by]
        of_chains = [one for one in chains() if one[0] == held_by]
        if mutant.rule.startswith("parents: "):
            return any(chain_fails(*chain) for chain in of_chains) or any(fails(*one) for one in tars)
        return any(fails(*one) for one in tars) or any(chain_fails(*chain) for chain in of_chains)
    except Exception as error:
        if os.environ.get("MUTANTS_SHOW"):
            print(f"{mutant.rule}: {error!r}", file=sys.stderr)
        return 1


def survivors(chosen: Iterable[Mutant]) -> list[str]:
    """What no vector notices, or what is not where it was."""
    assert not any(name.startswith(("blockdev", "verity")) for name in sys.modules), (
        "imported before it could be changed"
    )
    known, found = vectors(), []
    for mutant in chosen:
        pid = os.fork()
        if not pid:
            os._exit(_child(mutant, known))
        status = os.waitpid(pid, 0)[1]
        if not status:
            found.append(f"no vector notices: {mutant.rule}: {mutant.module}, {mutant.old.strip()!r}")
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
            found.append(f"not where it was: {mutant.rule}: {mutant.module}, {mutant.old.strip()!r}")
    return found


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.rule for word in sys.argv[1:])]
    found = survivors(chosen)
    print("\n".join([*found, f"{len(chosen)} changes, {len(found)} not noticed"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
