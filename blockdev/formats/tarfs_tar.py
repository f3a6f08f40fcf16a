# SPDX-License-Identifier: Apache-2.0
"""A tar as Microsoft's tools for tarfs read it: by the rules of the `tar` crate that they are built with.

Other rules than tar.py's, on purpose: the root hash of a tarfs layer must be theirs. docs/formats.md,
"tarfs: reading the tar stream".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats.limits import Limits
from blockdev.formats.tar import RECORD_BYTES, RecordStream, record_sum

_ZERO_RECORD: Final = bytes(RECORD_BYTES)
_U64: Final = 1 << 64
# White space as Unicode has it (property White_Space), which is not quite what Python strips.
_BLANKS: Final = (
    "\t\n\v\f\r \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_LINK_FIELD_OFFSET_BYTES: Final = 157  # in a header; its length is 100


class Dialect(enum.Enum):
    """Which of Microsoft's tools: they were built with different versions of the crate."""

    SNAPSHOTTER = "snapshotter"
    GENPOLICY = "genpolicy"  # pax uid and gid count
    GENPOLICY_UPSTREAM = "genpolicy-upstream"  # and symlinks whose text is not the header's are dropped

    @property
    def pax_ids(self) -> bool:
        return self is not Dialect.SNAPSHOTTER

    @property
    def special_links(self) -> bool:
        return self is not Dialect.GENPOLICY_UPSTREAM


@dataclass(slots=True)
class TarfsMember:
    """One member. None where its header's field makes no sense; offsets from the start of the tar."""

    type: int
    name: bytes
    link: bytes | None
    link_offset_bytes: int | None  # of the text in the header's field, where it stands there
    mode: int | None
    uid: int
    gid: int
    mtime: int
    device: tuple[int, int] | None
    size_bytes: int
    data_offset_bytes: int
    xattrs: int  # how many its pax header has; tarfs drops them


def _cut(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


@lru_cache(maxsize=1 << 12)
def _octal(field: bytes) -> int | None:
    try:
        text = _cut(field).decode().strip(_BLANKS)
    except UnicodeDecodeError:
        return None
    digits = text.removeprefix("+")
    if not digits or digits.strip("01234567"):
        return None
    value = int(digits, 8)
    return value if value < _U64 else None


@lru_cache(maxsize=1 << 12)
def _number(field: bytes) -> int | None:
    if not field[0] & 0x80:
        return _octal(field)
    if len(field) == 8:
        return int.from_bytes(field, "big") & ~(1 << 63)
    return int.from_bytes(field[-8:], "big")


def _decimal(text: bytes) -> int | None:
    digits = text.removeprefix(b"+")
    # Twenty digits are the most that 64 bits need, but zeros in front may be any number.
    digits = digits.lstrip(b"0") or digits[-1:]
    if not digits.isdigit() or len(digits) > 20:
        return None
    value = int(digits)
    return value if value < _U64 else None


class _Pax:
    """The records of one extended header: lines, an empty one ending them, the first of a repeated key counting.

    A line that is no record hides the numbers behind it, not the texts.
    """

    def __init__(self, body: bytes) -> None:
        self.path: bytes | None = None
        self.linkpath: bytes | None = None
        self.xattrs = 0
        self._numbers: dict[bytes, int | None] = {}
        good = True
        for line in body.split(b"\n"):
            if not line:
                break
            length, blank, record = line.partition(b" ")
            key, equals, value = record.partition(b"=")
            if not blank or not equals or _decimal(length) != len(line) + 1:
                good = False
                continue
            if key == b"path" and self.path is None:
                self.path = value
            elif key == b"linkpath" and self.linkpath is None:
                self.linkpath = value
            elif key.startswith(b"SCHILY.xattr."):
                self.xattrs += 1
            elif key in (b"size", b"uid", b"gid"):
                self._numbers.setdefault(key, _decimal(value) if good else None)

    def number(self, key: bytes) -> int | None:
        return self._numbers.get(key)


class _SparseMap:
    """An old GNU sparse member's map (GNU tar manual, "Basic Tar Format"), checked as it comes, block by block."""

    def __init__(self, header: bytes, size_bytes: int) -> None:
        self._size = self._left = size_bytes
        self._at = 0
        real_size = _octal(header[483:495])
        if real_size is None:
            raise FormatError("sparse member without a real size")
        self._real_size = real_size
        self._blocks(header[386:482])
        self.goes_on = header[482] == 1

    def extend(self, record: bytes) -> None:
        self._blocks(record[:504])
        self.goes_on = record[504] == 1

    def _blocks(self, area: bytes) -> None:
        for at in range(0, len(area), 24):
            block = area[at : at + 24]
            if not block[0] or not block[12]:
                continue
            offset, length = _octal(block[:12]), _octal(block[12:])
            if offset is None or length is None:
                raise FormatError("sparse map with a field that is no number")
            if (length and (self._size - self._left) % RECORD_BYTES) or offset < self._at or length > self._left:
                raise FormatError("sparse map that contradicts itself")
            self._at = offset + length
            self._left -= length

    def finish(self) -> None:
        if self._left or self._at != self._real_size:
            raise FormatError("sparse map that contradicts the member's sizes")


class TarfsScanner(RecordStream):
    """Push parser: `feed` it the stream, then `close` it. `on_member` gets each member, unsupported types too.

    Raises FormatError where Microsoft's tools fail, and LimitExceeded.
    """

    def __init__(self, on_member: Callable[[TarfsMember], None], limits: Limits, dialect: Dialect) -> None:
        super().__init__()
        self._on_member, self._limits, self._dialect = on_member, limits, dialect
        self._extension = 0
        self._pax: _Pax | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._sparse: tuple[_SparseMap, int] | None = None  # with the size of what follows
        self._members = 0

    def _pending(self) -> bool:
        return self._pax is not None or self._long_name is not None or self._long_link is not None

    def close(self) -> None:
        if not self._ended:
            if self._sparse is not None:
                raise FormatError(f"tar ends inside a sparse map, at byte {self._offset}")
            super().close()
            if self._skip:
                raise FormatError(f"tar ends inside the padding of a member, at byte {self._offset}")
            self._end()

    def _end(self) -> None:
        if self._pending():
            raise FormatError("tar ends with an extended header that no member follows")
        self._ended = True

    def _record(self, record: bytes, end_offset: int) -> None:
        try:
            if self._sparse is not None:
                self._extend_sparse(record)
            elif record == _ZERO_RECORD:
                self._end()
            else:
                self._header(record, end_offset)
        except (FormatError, LimitExceeded) as error:
            at = end_offset - RECORD_BYTES
            raise type(error)(f"tar header at byte {at} ({_cut(record[:100])[:60]!r}): {error}") from None

    def _extend_sparse(self, record: bytes) -> None:
        assert self._sparse is not None
        sparse, size = self._sparse
        sparse.extend(record)
        if not sparse.goes_on:
            sparse.finish()
            self._sparse = None
            self._skip_data(size)

    def _header(self, record: bytes, end_offset: int) -> None:
        if _octal(record[148:156]) != record_sum(record) - sum(record[148:156]) + 8 * 0x20:
            raise FormatError("bad header checksum")
        ustar, gnu = record[257:265] == b"ustar\x0000", record[257:265] == b"ustar  \0"
        size = _number(record[124:136])
        if size is None:
            raise FormatError("size is no number")
        pax = self._pax
        if not size and pax is not None:
            size = pax.number(b"size") or 0
        if end_offset + size > self._limits.tar_bytes:
            raise LimitExceeded(f"member of {size} bytes is over the layer limit of {self._limits.tar_bytes} bytes")
        kind = record[156]
        if (ustar or gnu) and kind in b"LKx":
            self._begin_extension(kind, size)
            return
        long_name, long_link = self._long_name, self._long_link
        self._pax = self._long_name = self._long_link = None
        self._members += 1
        if self._members > self._limits.entries:
            raise LimitExceeded(f"more than {self._limits.entries} entries")

        name = _cut(record[:100])
        if ustar and record[345]:
            name = _cut(record[345:500]) + b"/" + name
        link_field = _cut(record[157:257]) or None
        link = link_field
        uid, gid = _number(record[108:116]) or 0, _number(record[116:124]) or 0
        if pax is not None:
            name = name if pax.path is None else pax.path
            link = link if pax.linkpath is None else pax.linkpath
            if self._dialect.pax_ids:
                pax_uid, pax_gid = pax.number(b"uid"), pax.number(b"gid")
                uid = uid if pax_uid is None else pax_uid
                gid = gid if pax_gid is None else pax_gid
        if long_name is not None:
            name = long_name.removesuffix(b"\0")
        if long_link is not None:
            link = long_link.removesuffix(b"\0")
        if len(name) > self._limits.path_bytes:
            raise LimitExceeded(f"path of {len(name)} bytes, over the limit of {self._limits.path_bytes}")
        device = None
        if ustar or gnu:
            major, minor = _octal(record[329:337]), _octal(record[337:345])
            if major is not None and minor is not None:
                device = major & 0xFFFFFFFF, minor & 0xFFFFFFFF
        member = TarfsMember(
            type=kind,
            name=name,
            link=link,
            link_offset_bytes=end_offset - RECORD_BYTES + _LINK_FIELD_OFFSET_BYTES if link == link_field else None,
            mode=_octal(record[100:108]),
            uid=uid & 0xFFFFFFFF,
            gid=gid & 0xFFFFFFFF,
            mtime=_number(record[136:148]) or 0,
            device=device,
            size_bytes=size,
            data_offset_bytes=end_offset,
            xattrs=pax.xattrs if pax is not None else 0,
        )
        if kind == 0x53:
            if not gnu:
                raise FormatError("sparse member without a GNU header")
            sparse = _SparseMap(record, size)
            if sparse.goes_on:
                self._sparse = (sparse, size)
            else:
                sparse.finish()
                self._skip_data(size)
        else:
            self._skip_data(size)
        self._on_member(member)

    def _begin_extension(self, kind: int, size: int) -> None:
        there = {0x4C: self._long_name, 0x4B: self._long_link, 0x78: self._pax}[kind]
        if there is not None:
            raise FormatError(f"two extended headers of type {chr(kind)!r} for one member")
        if size > self._limits.extended_header_bytes:
            raise LimitExceeded(
                f"extended header of {size} bytes, over the limit of {self._limits.extended_header_bytes}"
            )
        self._extension = kind
        self._want_body(size)

    def _body(self, body: bytes) -> None:
        if self._extension == 0x78:
            self._pax = _Pax(body)
        elif self._extension == 0x4C:
            self._long_name = body
        else:
            self._long_link = body
