# SPDX-License-Identifier: Apache-2.0
"""A tar as Microsoft's tools for tarfs read it: by the rules of the `tar` crate that they are built with.

Other rules than tar.py's, on purpose: the root hash of a tarfs layer must be theirs. docs/formats.md,
"tarfs: reading the tar stream".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from blockdev.errors import FormatError, LimitExceeded
from blockdev.formats.limits import Limits
from blockdev.formats.tar import RECORD_BYTES, RecordStream, cut, parse_pax, record_sum

# name, mode, uid, gid, size, mtime, checksum, type, link text, magic, device numbers, prefix
_HEADER: Final = struct.Struct("<100s8s8s8s12s12s8sB100s8s64x8s8s155s12x")
assert _HEADER.size == RECORD_BYTES
_USTAR: Final = b"ustar\x0000"
_GNU: Final = b"ustar  \0"
_EXTENSIONS: Final = b"LKx"
_REGULAR: Final = b"0\0"
_SPARSE: Final = 0x53
_STAR_PREFIX_BYTES: Final = 131  # star(5): times stand behind it
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
    """One member. None where its header's field makes no sense; offsets from the start of the tar.

    `faults`: by name (tarfs_writer.FAULTS), how often it is read otherwise than by containerd, or holds
    what the file system has no place for.
    """

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
    faults: dict[str, int] | None


@lru_cache(maxsize=1 << 12)
def _octal(field: bytes) -> int | None:
    try:
        text = cut(field).decode().strip(_BLANKS)
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
        self._body = body
        self._records: dict[bytes, bytes] = {}
        self._numbers: dict[bytes, int | None] = {}
        lines = body.split(b"\n")
        good = True
        seen = 0
        for line in lines:
            if not line:
                break
            seen += 1
            length, blank, record = line.partition(b" ")
            key, equals, value = record.partition(b"=")
            if not blank or not equals or _decimal(length) != len(line) + 1:
                good = False
            elif key not in self._records:
                self._records[key] = value
                if key in (b"size", b"uid", b"gid"):
                    self._numbers[key] = _decimal(value) if good else None
        # Nothing hidden, nothing repeated: then POSIX reads the same.
        self._plain = good and seen == len(lines) - 1 == len(self._records)

    def text(self, key: bytes) -> bytes | None:
        return self._records.get(key)

    def number(self, key: bytes) -> int | None:
        return self._numbers.get(key)

    def posix(self) -> dict[bytes, bytes]:
        """The records as POSIX has them. Raises FormatError."""
        return self._records if self._plain else parse_pax(self._body)


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
        self._zero_record = False
        self.hidden_members = False  # headers, or what else, behind a single zero block

    def close(self) -> None:
        if self._ended or self._zero_record:
            return
        if self._sparse is not None:
            raise FormatError(f"tar ends inside a sparse map, at byte {self._offset}")
        super().close()
        if self._skip:
            raise FormatError(f"tar ends inside the padding of a member, at byte {self._offset}")
        self._end()

    def _end(self) -> None:
        if self._pax is not None or self._long_name is not None or self._long_link is not None:
            raise FormatError("tar ends with an extended header that no member follows")

    def _record(self, record: bytes, end_offset: int) -> None:
        try:
            if self._zero_record:
                self.hidden_members = record != _ZERO_RECORD
                self._ended = True
            elif self._sparse is not None:
                self._extend_sparse(record)
            elif record == _ZERO_RECORD:
                self._end()
                self._zero_record = True
            else:
                self._header(record, end_offset)
        except (FormatError, LimitExceeded) as error:
            at = end_offset - RECORD_BYTES
            raise type(error)(f"tar header at byte {at} ({cut(record[:100])[:60]!r}): {error}") from None

    def _extend_sparse(self, record: bytes) -> None:
        assert self._sparse is not None
        sparse, size = self._sparse
        sparse.extend(record)
        if not sparse.goes_on:
            sparse.finish()
            self._sparse = None
            self._skip_data(size)

    def _header(self, record: bytes, end_offset: int) -> None:
        (
            name_field, mode_field, uid_field, gid_field, size_field, mtime_field, sum_field, kind, link_field, magic,
            major_field, minor_field, prefix_field,
        ) = _HEADER.unpack(record)  # fmt: skip
        if _octal(sum_field) != record_sum(record) - sum(sum_field) + 8 * 0x20:
            raise FormatError("bad header checksum")
        size = _number(size_field)
        if size is None:
            raise FormatError("size is no number")
        pax, long_name, long_link = self._pax, self._long_name, self._long_link
        if not size and pax is not None:
            size = pax.number(b"size") or 0
        if end_offset + size > self._limits.tar_bytes:
            raise LimitExceeded(f"member of {size} bytes is over the layer limit of {self._limits.tar_bytes} bytes")
        ustar = magic == _USTAR
        known = ustar or magic == _GNU
        if known and kind in _EXTENSIONS:
            self._begin_extension(kind, size)
            return
        self._members += 1
        if self._members > self._limits.entries:
            raise LimitExceeded(f"more than {self._limits.entries} entries")

        faults: dict[str, int] | None = None
        name = name_field.split(b"\0", 1)[0]
        if prefix_field[0]:
            prefix = cut(prefix_field)
            if ustar:
                name = prefix + b"/" + name
                odd = len(prefix) > _STAR_PREFIX_BYTES and record[508:] == b"tar\0"
            else:
                odd = magic.startswith(b"ustar\0")  # of another version: a name that others know the prefix of
            if odd:
                faults = {"misread_headers": 1}
        link = field = cut(link_field) if link_field[0] else None
        uid, gid, mtime = _number(uid_field), _number(gid_field), _number(mtime_field) or 0
        if pax is not None or long_name is not None or long_link is not None:
            self._pax = self._long_name = self._long_link = None
            header_name = name
            if pax is not None:
                path, linkpath = pax.text(b"path"), pax.text(b"linkpath")
                name = name if path is None else path
                link = link if linkpath is None else linkpath
                if self._dialect.pax_ids:
                    pax_uid, pax_gid = pax.number(b"uid"), pax.number(b"gid")
                    uid = uid if pax_uid is None else pax_uid
                    gid = gid if pax_gid is None else pax_gid
            if long_name is not None:
                name = long_name.removesuffix(b"\0")
            if long_link is not None:
                link = long_link.removesuffix(b"\0")
            try:
                records = pax.posix() if pax is not None else {}
            except FormatError:
                faults = _counted(faults, "misread_headers")
            else:
                # As containerd reads them: cut at a NUL, and an empty one is none.
                right_name = cut(long_name or b"") or records.get(b"path") or header_name
                right_link = cut(long_link or b"") or records.get(b"linkpath") or field
                if name != right_name or (kind in b"12" and link != right_link):
                    faults = _counted(faults, "misread_headers")
                if records:
                    faults = _misread(faults, records, kind, size, uid, gid, mtime)
        if len(name) > self._limits.path_bytes:
            raise LimitExceeded(f"path of {len(name)} bytes, over the limit of {self._limits.path_bytes}")
        if kind not in _REGULAR:
            if size and kind in b"123456":
                faults = _counted(faults, "misread_headers")  # containerd takes what follows for the next header
        elif not kind and name.endswith(b"/"):
            faults = _counted(faults, "misread_headers")  # a directory for everybody else
        if uid is None or gid is None or (uid | gid) >> 32:
            if not _sound_id(uid, uid_field) or not _sound_id(gid, gid_field):
                faults = _counted(faults, "wrong_owners")
            uid, gid = (uid or 0) & 0xFFFFFFFF, (gid or 0) & 0xFFFFFFFF
        device = None
        if known and kind in b"34":
            major, minor = _octal(major_field), _octal(minor_field)
            if major is not None and minor is not None:
                device = major & 0xFFFFFFFF, minor & 0xFFFFFFFF
        if kind == _SPARSE:
            if magic != _GNU:
                raise FormatError("sparse member without a GNU header")
            sparse = _SparseMap(record, size)
            if sparse.goes_on:
                self._sparse = (sparse, size)
            else:
                sparse.finish()
                self._skip_data(size)
        elif size:
            self._skip_data(size)
        self._on_member(
            TarfsMember(
                kind, name, link,
                end_offset - RECORD_BYTES + _LINK_FIELD_OFFSET_BYTES if link == field else None,
                _octal(mode_field), uid, gid, mtime, device, size, end_offset, faults,
            )
        )  # fmt: skip

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


def _counted(faults: dict[str, int] | None, fault: str) -> dict[str, int]:
    faults = faults or {}
    faults[fault] = faults.get(fault, 0) + 1
    return faults


def _sound_id(value: int | None, field: bytes) -> bool:
    return not field.strip(b" \0") if value is None else not value >> 32


def _misread(
    faults: dict[str, int] | None, records: dict[bytes, bytes], kind: int, size: int, uid: int | None, gid: int | None,
    mtime: int,
) -> dict[str, int] | None:  # fmt: skip
    """What an extended header says that comes out otherwise."""
    for key, value in records.items():
        if key == b"size":
            if kind in _REGULAR and value and _decimal(value) != size:
                faults = _counted(faults, "misread_headers")
        elif key in (b"uid", b"gid"):
            if value and _decimal(value) != (uid if key == b"uid" else gid):
                faults = _counted(faults, "wrong_owners")
        elif key == b"mtime":
            seconds, _, fraction = value.partition(b".")
            # Some tools round in the header what they write here.
            right = _decimal(seconds)
            if value and (right is None or mtime - right not in ((0, 1) if fraction else (0,))):
                faults = _counted(faults, "wrong_times")
        elif key.startswith(b"SCHILY.xattr.") and not key.startswith(b"SCHILY.xattr.trusted."):
            # Those of trusted are dropped by containerd, too.
            faults = _counted(faults, "dropped_xattrs")
    if any(key.startswith(b"GNU.sparse.") for key in records):
        faults = _counted(faults, "sparse_members")  # the map comes out as a part of the data
    return faults
