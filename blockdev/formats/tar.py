# SPDX-License-Identifier: Apache-2.0
"""Streaming tar scanner: bytes in, members out; file data is stepped over, never held.

Reads what containerd's unpacker (Go's archive/tar) accepts and refuses what it refuses, with the
exceptions of docs/formats.md. Sources: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual,
"Basic Tar Format"; star(5) for the trailer `tar\\0` at byte 508.

    offset size field            offset size field
    0      100  name             257    8    magic and version
    100    8    mode             265    32   uname (not used)
    108    8    uid              297    32   gname (not used)
    116    8    gid              329    8    devmajor
    124    12   size             337    8    devminor
    136    12   mtime            345    155  prefix (ustar; star: 131)
    148    8    checksum         508    4    `tar\\0` (star)
    156    1    type
    157    100  linkname
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from blockdev.errors import BlockdevError, FormatError, LimitExceeded, UnsupportedError
from blockdev.formats.limits import Limits
from verity.buffers import Buffer

RECORD_BYTES: Final = 512
_ZERO_RECORD: Final = bytes(RECORD_BYTES)
_OCTAL: Final = re.compile(rb"[0-7]+\Z")
_DECIMAL: Final = re.compile(rb"([+-]?)(?=[0-9])0*([0-9]*)\Z")
# Go's time parser: seconds with an optional sign, and a fraction that may be empty.
_PAX_TIME: Final = re.compile(rb"([+-]?[0-9]+)(?:\.([0-9]*))?\Z")
_MAX_64: Final = 1 << 63
_XATTR_PREFIX: Final = b"SCHILY.xattr."
# Last time that counts: 9223372036.854775807 s, Go's largest nanosecond count.
_LAST_TIME: Final = (9223372036, 854775807)
_PLAIN_TEXT_KEYS: Final = frozenset((b"path", b"linkpath", b"uname", b"gname"))


class MemberType(enum.IntEnum):
    FILE = 0
    HARDLINK = 1
    SYMLINK = 2
    CHAR = 3
    BLOCK = 4
    DIRECTORY = 5
    FIFO = 6


_TYPES: Final = {
    0x30: MemberType.FILE,
    0x00: MemberType.FILE,
    0x31: MemberType.HARDLINK,
    0x32: MemberType.SYMLINK,
    0x33: MemberType.CHAR,
    0x34: MemberType.BLOCK,
    0x35: MemberType.DIRECTORY,
    0x36: MemberType.FIFO,
}
_EXTENSIONS: Final = {0x78: "x", 0x67: "g", 0x4C: "L", 0x4B: "K"}


@dataclass(slots=True)
class Member:
    """One member as its headers, together, describe it. Names are raw bytes, not yet split."""

    type: MemberType
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]  # seconds, nanoseconds; in [0, _LAST_TIME]
    major: int
    minor: int
    size_bytes: int
    data_offset_bytes: int  # from the start of the tar
    xattrs: dict[bytes, bytes]


def cut(field: bytes) -> bytes:
    """A text field: up to the first NUL."""
    return field.split(b"\0", 1)[0]


# Modes, ids and device numbers are few in an archive, and each header has eight numbers.
@lru_cache(maxsize=1 << 12)
def _value(field: bytes) -> int | None:
    first = field[0]
    if first & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        if first & 0x40:
            value -= 1 << bits  # two's complement of the whole field, marker bit included
        else:
            value &= (1 << (bits - 1)) - 1
        return value if -_MAX_64 <= value < _MAX_64 else None
    # Go trims blanks and NULs at both ends and then cuts at the first NUL.
    text = cut(field.strip(b" \0"))
    if not text:
        return 0
    if not _OCTAL.match(text):
        return None
    value = int(text, 8)
    if value >= 1 << 64:
        return None
    # Go parses unsigned and converts: the upper half comes out negative.
    return value - (1 << 64) if value >= _MAX_64 else value


@lru_cache(maxsize=1 << 12)
def _fields(fields: bytes) -> tuple[int, ...] | None:
    """Numbers of eight bytes each; None where one is none. Members of one owner have all of them in common."""
    values = [_value(fields[at : at + 8]) for at in range(0, len(fields), 8)]
    return None if None in values else tuple(value for value in values if value is not None)


_NUMBERS: Final = {
    "mode": slice(100, 108),
    "uid": slice(108, 116),
    "gid": slice(116, 124),
    "size": slice(124, 136),
    "mtime": slice(136, 148),
    "devmajor": slice(329, 337),
    "devminor": slice(337, 345),
}


def _no_number(record: bytes) -> FormatError:
    """Of the field of this header that is none."""
    for what, place in _NUMBERS.items():
        if _value(record[place]) is None:
            return FormatError(f"{what} is no number of 64 bits: {record[place]!r}")
    raise AssertionError("all fields are numbers")


def _pax_number(value: bytes, key: str) -> int:
    match = _DECIMAL.match(value)
    if not match:
        raise FormatError(f"pax {key} is no decimal number: {value[:40]!r}")
    sign, digits = match.groups()
    # Twenty digits are more than 64 bits; Python refuses thousands of them with an error of its own.
    number = int(digits[:20] or b"0") * (-1 if sign == b"-" else 1)
    if len(digits) > 20 or not -_MAX_64 <= number < _MAX_64:
        raise FormatError(f"pax {key} does not fit 64 bits")
    return number


def _pax_time(value: bytes, key: str = "mtime") -> tuple[int, int]:
    match = _PAX_TIME.match(value)
    if not match:
        raise FormatError(f"pax {key} is no time: {value[:40]!r}")
    seconds = _pax_number(match[1], key)
    nanoseconds = int((match[2] or b"0")[:9].ljust(9, b"0"))
    if match[1].startswith(b"-") and nanoseconds:
        seconds, nanoseconds = seconds - 1, 1_000_000_000 - nanoseconds
    return seconds, nanoseconds


@lru_cache(maxsize=1 << 12)
def _sum_for(field: bytes) -> int | None:
    """What the bytes of a record with this checksum field add up to; the field itself counts as blanks."""
    stored = None if field[0] & 0x80 else _value(field)  # octal only
    return None if stored is None else stored + sum(field) - 0x20 * len(field)


def record_sum(record: bytes) -> int:
    """Of the bytes of one record. Adler-32's lower half is 1 + their sum, modulo 65521 (RFC 1950): exact for 256 of
    them, and ten times as fast as adding them up in Python."""
    first, second = zlib.adler32(record[:256]) & 0xFFFF, zlib.adler32(record[256:]) & 0xFFFF
    return first + second - 2


def _prefix(record: bytes, ustar: bool, magic: bytes) -> bytes:
    """What goes before the name, of a header with something in that place. Raises FormatError."""
    if ustar and record[508:512] == b"tar\0":
        if _value(record[476:488]) is None or _value(record[488:500]) is None:
            raise FormatError("atime or ctime is no number of 64 bits")
        return cut(record[345:476])
    if ustar:
        return cut(record[345:500])
    if magic == b"ustar  \0" and (_bad_time(record[345:357]) or _bad_time(record[357:369])):
        # GNU has times there, and no prefix; but Go before 1.8, and Docker built with it, wrote one.
        prefix = cut(record[345:500])
        return prefix if prefix.isascii() else b""
    return b""


def _bad_time(field: bytes) -> bool:
    return field[0] != 0 and _value(field) is None


def _check_signed_sum(record: bytes, expected: int | None) -> None:
    """Some old tars summed signed characters: each byte over 127 counts 256 less. Raises FormatError."""
    field = record[148:156]
    if expected is None:
        raise FormatError(f"checksum is no octal number of 64 bits: {field!r}")
    negative = sum(byte > 127 for byte in record) - sum(byte > 127 for byte in field)
    if expected != record_sum(record) - 256 * negative:
        raise FormatError("bad header checksum")


def parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Records of one extended header, the last of a repeated key winning. Raises FormatError."""
    records: dict[bytes, bytes] = {}
    position, end = 0, len(body)
    while position < end:
        blank = body.find(b" ", position)
        digits = body[position:blank] if blank > 0 else b""
        if not digits.removeprefix(b"+").isdigit():
            raise FormatError("pax record without a length")
        length = _pax_number(digits, "record length")
        stop = position + length
        if length < 5 or stop > end or body[stop - 1 : stop] != b"\n" or blank >= stop:
            raise FormatError("pax record of a wrong length")
        key, equals, value = body[blank + 1 : stop - 1].partition(b"=")
        if not equals or not key or b"\0" in key or (key in _PLAIN_TEXT_KEYS and b"\0" in value):
            raise FormatError(f"malformed pax record {key[:40]!r}")
        records[key] = value
        position = stop
    return records


_REFUSALS: Final = (FormatError, UnsupportedError, LimitExceeded)


def _placed(error: BlockdevError, at: int, name: bytes) -> BlockdevError:
    """The same, saying where the header is that it is about."""
    return type(error)(f"tar header at byte {at} ({name[:60]!r}): {error}")


class RecordStream:
    """A tar cut into records, bodies and data: what all readers of tars agree on.

    `feed` it the stream in pieces of any size. A subclass gets each header in `_record`, and says
    there what follows it: data that is stepped over (`_skip_data`) or a body that it wants to have
    (`_want_body`, which `_body` then gets). `_ended` set: all that follows is opaque.
    """

    def __init__(self) -> None:
        self._offset = 0  # of the next byte to be fed, from the start of the tar
        self._partial = bytearray()
        self._skip = 0  # bytes of data and padding still to step over
        self._padding = 0  # how many of them, at the end, are padding
        self._padding_dirty = False  # already counted for this member
        self._ended = False
        self._wanted: int | None = None  # bytes of the body that is collected
        self._collected = bytearray()
        self.dirty_padding = 0  # members whose padding is not zero

    def _record(self, record: bytes, end_offset: int) -> None:
        """One header; `end_offset`: of the byte behind it."""
        raise NotImplementedError

    def _body(self, body: bytes) -> None:
        raise NotImplementedError

    def _skip_data(self, size_bytes: int) -> None:
        self._padding = -size_bytes % RECORD_BYTES
        self._padding_dirty = False
        self._skip = size_bytes + self._padding

    def _want_body(self, size_bytes: int) -> None:
        if size_bytes:
            self._wanted = size_bytes
        else:
            self._body(b"")

    def feed(self, data: Buffer) -> None:
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            skip = self._skip
            if skip:
                if skip > end - position or self._padding_dirty:
                    position = self._step_over(view, position, end)
                    continue
                # Most members end in the piece in which they begin.
                position += skip
                if self._padding and not _ZERO_RECORD.startswith(bytes(view[position - self._padding : position])):
                    self.dirty_padding += 1
                self._skip = self._padding = 0
                continue
            if self._ended:
                break
            if self._wanted is not None:
                position = self._collect(view, position, end)
                continue
            have = len(self._partial)
            if have:
                take = min(RECORD_BYTES - have, end - position)
                self._partial += view[position : position + take]
                position += take
                if len(self._partial) < RECORD_BYTES:
                    break
                record = bytes(self._partial)
                self._partial.clear()
            elif end - position >= RECORD_BYTES:
                record = bytes(view[position : position + RECORD_BYTES])
                position += RECORD_BYTES
            else:
                self._partial += view[position:end]
                position = end
                break
            self._record(record, self._offset + position)
        self._offset += end

    def close(self) -> None:
        """End of stream. Raises FormatError where the tar is cut short."""
        if self._ended:
            return
        if self._wanted is not None:
            raise FormatError(f"tar ends inside an extended header, at byte {self._offset}")
        if self._skip > self._padding:
            raise FormatError(f"tar ends inside a member's data, at byte {self._offset}")
        if self._partial:
            raise FormatError(f"tar ends inside a header, at byte {self._offset}")

    def _step_over(self, view: memoryview, position: int, end: int) -> int:
        take = min(self._skip, end - position)
        if self._padding:
            # Only the padding is looked at; mmap of a file's last page shows it.
            first = max(0, self._skip - self._padding)
            looked_at = b"" if self._padding_dirty else bytes(view[position + first : position + take])
            if not _ZERO_RECORD.startswith(looked_at):
                self._padding_dirty = True
                self.dirty_padding += 1
        self._skip -= take
        if self._skip < self._padding:
            self._padding = self._skip
        return position + take

    def _collect(self, view: memoryview, position: int, end: int) -> int:
        assert self._wanted is not None
        take = min(self._wanted - len(self._collected), end - position)
        self._collected += view[position : position + take]
        position += take
        if len(self._collected) == self._wanted:
            self._skip_data(self._wanted)
            self._skip = self._padding
            self._padding_dirty = True  # nobody ever sees it: not counted
            self._wanted = None
            body, self._collected = bytes(self._collected), bytearray()
            self._body(body)
        return position


class TarScanner(RecordStream):
    """Push parser: `feed` it the stream in pieces of any size, then `close` it.

    `on_member` is called once a member's headers are complete, before its data has passed. Both
    methods raise FormatError, UnsupportedError or LimitExceeded; the message names the member and
    its offset.
    """

    def __init__(self, on_member: Callable[[Member], None], limits: Limits) -> None:
        super().__init__()
        self._on_member = on_member
        self._limits = limits
        self._zero_records = 0
        self._extension = ""
        self._extension_at = 0  # where its header is
        self._pax: dict[bytes, bytes] | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self.members = 0

    def _body(self, body: bytes) -> None:
        try:
            self._extend(self._extension, body)
        except _REFUSALS as error:
            raise _placed(error, self._extension_at, b"extended header") from None

    def _extend(self, kind: str, body: bytes) -> None:
        if kind == "x":
            self._pax = parse_pax(body)
            for key in self._pax:
                if key.startswith(b"GNU.sparse."):
                    raise UnsupportedError("pax sparse member")
        elif kind == "g":
            parse_pax(body)  # malformed ones are refused; well formed ones change nothing
            self._pax = self._long_name = self._long_link = None
        elif kind == "L":
            self._long_name = cut(body)
        else:
            self._long_link = cut(body)

    def _record(self, record: bytes, end_offset: int) -> None:
        at = end_offset - RECORD_BYTES
        if record == _ZERO_RECORD:
            self._zero_records += 1
            self._ended = self._zero_records == 2
            return
        if self._zero_records:
            raise FormatError(f"bytes after a single zero block, at byte {at}")
        try:
            self._header(record, end_offset)
        except _REFUSALS as error:
            raise _placed(error, at, cut(record[:100])) from None

    def _header(self, record: bytes, end_offset: int) -> None:
        expected = _sum_for(record[148:156])
        if record_sum(record) != expected:
            _check_signed_sum(record, expected)
        magic = record[257:265]
        ustar = magic[:6] == b"ustar\0"
        typeflag = record[156]
        fields = _fields(record[100:124])
        size, mtime = _value(record[124:136]), _value(record[136:148])
        if fields is None or size is None or mtime is None:
            raise _no_number(record)
        mode, uid, gid = fields
        major = minor = 0
        if ustar or magic == b"ustar  \0":
            devices = _fields(record[329:345])
            if devices is None:
                raise _no_number(record)
            major, minor = devices
        extension = _EXTENSIONS.get(typeflag)
        if extension is not None:
            if size < 0:
                raise FormatError("negative size")
            if size > self._limits.extended_header_bytes:
                raise LimitExceeded(
                    f"extended header of {size} bytes, over the limit of {self._limits.extended_header_bytes}"
                )
            self._extension, self._extension_at = extension, end_offset - RECORD_BYTES
            self._want_body(size)
            return
        pax, self._pax = self._pax or {}, None
        long_name, self._long_name = self._long_name, None
        long_link, self._long_link = self._long_link, None

        end = record.find(b"\0", 0, 100)
        name = record[: end if end >= 0 else 100]
        if record[345] or record[508]:
            prefix = _prefix(record, ustar, magic)
            if prefix:
                name = prefix + b"/" + name
        link = cut(record[157:257]) if record[157] else b""
        if size < 0 and typeflag in (0x30, 0x00):
            raise FormatError("negative size")  # whatever an extended header says
        nanoseconds = 0
        xattrs: dict[bytes, bytes] = {}
        for key, value in pax.items():
            if key.startswith(_XATTR_PREFIX):
                xattrs[key[len(_XATTR_PREFIX) :]] = value
            elif not value:
                continue
            elif key == b"path":
                name = value
            elif key == b"linkpath":
                link = value
            elif key == b"size":
                size = _pax_number(value, "size")
            elif key == b"uid":
                uid = _pax_number(value, "uid")
            elif key == b"gid":
                gid = _pax_number(value, "gid")
            elif key == b"mtime":
                mtime, nanoseconds = _pax_time(value)
            elif key in (b"atime", b"ctime"):
                _pax_time(value, key.decode())  # not used, but no header that has them malformed is taken
        if long_name:
            name = long_name
        if long_link:
            link = long_link

        member_type = _TYPES.get(typeflag)
        if member_type is None:
            kind = "GNU sparse" if typeflag == 0x53 else f"type {bytes((typeflag,))!r}"
            raise UnsupportedError(f"{kind} member {name[:200]!r}")
        if typeflag == 0 and name.endswith(b"/"):
            member_type = MemberType.DIRECTORY
        if typeflag in (0x30, 0x00):
            if size < 0:
                raise FormatError("negative size")
            if size and member_type is MemberType.DIRECTORY:
                # Go reads the next header where the data is: a scanner would see other files than we.
                raise FormatError("directory of type NUL with data")
            follows = size
        else:
            follows = size = 0
        if member_type is MemberType.DIRECTORY:
            size = 0
        if end_offset + follows > self._limits.tar_bytes:
            raise LimitExceeded(
                f"member {name[:200]!r} of {follows} bytes is over the layer limit of {self._limits.tar_bytes} bytes"
            )
        if not 0 <= uid <= 0xFFFFFFFE or not 0 <= gid <= 0xFFFFFFFE:
            raise FormatError(f"id out of range: uid {uid}, gid {gid}")
        if not 0 <= mtime < _LAST_TIME[0] and not (0, 0) <= (mtime, nanoseconds) <= _LAST_TIME:
            mtime = nanoseconds = 0
        if len(name) > self._limits.path_bytes:
            raise LimitExceeded(f"path of {len(name)} bytes, over the limit of {self._limits.path_bytes}")
        self.members += 1
        if self.members > self._limits.entries:
            raise LimitExceeded(f"more than {self._limits.entries} entries")
        self._skip_data(follows)
        self._on_member(
            Member(
                member_type, name, link, mode & 0o7777, uid, gid, (mtime, nanoseconds), major, minor, size,
                end_offset, xattrs,
            )
        )  # fmt: skip
