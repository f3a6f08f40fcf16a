# SPDX-License-Identifier: Apache-2.0
"""Members to the bytes of a tar: ustar headers, with a pax extended header where one cannot say it. Pure.

One member has one form, whatever the clock, the host or the locale, so equal trees give equal tars.
`tar.TarScanner` reads back what `member_header` wrote. Sources: POSIX.1-2017 pax, "ustar Interchange
Format" and "pax Extended Header"; star(5) for SCHILY.xattr.
"""

from __future__ import annotations

from typing import Final

from blockdev.errors import LimitExceeded, UnsupportedError
from blockdev.formats.limits import Limits
from blockdev.formats.tar import RECORD_BYTES, Member, MemberType, record_sum

# Two records of zeros.
END: Final = bytes(2 * RECORD_BYTES)
_TYPEFLAGS: Final = {
    MemberType.FILE: b"0",
    MemberType.HARDLINK: b"1",
    MemberType.SYMLINK: b"2",
    MemberType.CHAR: b"3",
    MemberType.BLOCK: b"4",
    MemberType.DIRECTORY: b"5",
    MemberType.FIFO: b"6",
}
_NAME_FIELD_BYTES: Final = 100
_PAX_NAME: Final = b"././@PaxHeader"
# Octal digits and a NUL, in fields of eight and of twelve bytes.
_SHORT_MAX: Final = 8**7 - 1
_LONG_MAX: Final = 8**11 - 1
_NANOSECONDS: Final = 1_000_000_000


def padding(size_bytes: int) -> bytes:
    """What follows so many bytes of data."""
    return bytes(-size_bytes % RECORD_BYTES)


def member_header(member: Member, limits: Limits) -> bytes:
    """All that stands in front of the member's data. A directory's name ends with a slash.

    `mtime` may lie before 1970. `data_offset_bytes` has no part in it. Raises UnsupportedError for what
    no tar can say, LimitExceeded for an extended header that `limits` would refuse to read.
    """
    pax: dict[bytes, bytes] = {}
    for key, text in ((b"path", member.name), (b"linkpath", member.link)):
        if b"\0" in text:
            raise UnsupportedError(f"a NUL in {text[:80]!r}, which no tar can hold")
        if len(text) > _NAME_FIELD_BYTES:
            pax[key] = text
            if not _is_utf8(text):
                pax[b"hdrcharset"] = b"BINARY"
    for key, number, most in (
        (b"uid", member.uid, _SHORT_MAX),
        (b"gid", member.gid, _SHORT_MAX),
        (b"size", member.size_bytes, _LONG_MAX),
    ):
        if number > most:
            pax[key] = b"%d" % number
    seconds, nanoseconds = member.mtime
    if nanoseconds or not 0 <= seconds <= _LONG_MAX:
        pax[b"mtime"] = _pax_time(seconds, nanoseconds)
    for name, value in member.xattrs.items():
        # A reader cuts a record at the first "=", and would take what stands before it for the name.
        if not name or b"\0" in name or b"=" in name:
            raise UnsupportedError(f"extended attribute {name[:80]!r}: no tar can hold this name")
        pax[b"SCHILY.xattr." + name] = value
    record = _record(
        name=member.name[:_NAME_FIELD_BYTES],
        mode=member.mode,
        uid=member.uid if b"uid" not in pax else 0,
        gid=member.gid if b"gid" not in pax else 0,
        size=member.size_bytes if b"size" not in pax else 0,
        mtime=seconds if 0 <= seconds <= _LONG_MAX else 0,
        typeflag=_TYPEFLAGS[member.type],
        link=member.link[:_NAME_FIELD_BYTES],
        major=member.major,
        minor=member.minor,
    )
    if not pax:
        return record
    body = b"".join(_pax_record(key, pax[key]) for key in sorted(pax))
    if len(body) > limits.extended_header_bytes:
        raise LimitExceeded(
            f"names and attributes of {len(body)} bytes, over the limit of {limits.extended_header_bytes}"
        )
    extended = _record(name=_PAX_NAME, mode=0o644, size=len(body), typeflag=b"x")
    return extended + body + padding(len(body)) + record


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pax_time(seconds: int, nanoseconds: int) -> bytes:
    """Decimal seconds, exactly: the sign is that of the whole, as a pax reader takes it."""
    total = seconds * _NANOSECONDS + nanoseconds
    whole, fraction = divmod(abs(total), _NANOSECONDS)
    text = b"%s%d" % (b"-" if total < 0 else b"", whole)
    return text + (b".%09d" % fraction).rstrip(b"0") if fraction else text


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`; the length counts itself."""
    rest = len(key) + len(value) + len(b" =\n")
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _record(
    *,
    name: bytes,
    typeflag: bytes,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
) -> bytes:
    def short(value: int) -> bytes:
        return b"%07o\0" % value

    def long(value: int) -> bytes:
        return b"%011o\0" % value

    head = name.ljust(100, b"\0") + short(mode) + short(uid) + short(gid) + long(size) + long(mtime)
    tail = typeflag + link.ljust(100, b"\0") + b"ustar\00000" + bytes(64) + short(major) + short(minor)
    record = (head + b" " * 8 + tail).ljust(RECORD_BYTES, b"\0")
    return record[:148] + b"%06o\0 " % record_sum(record) + record[156:]
