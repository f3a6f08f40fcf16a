# SPDX-License-Identifier: Apache-2.0
"""Layer files with an EROFS index, read by docs/formats.md alone: no code of blockdev or verity, nothing but asserts.

It is the reader beside the model, which writes: the tree that a file shows, and the tar that it gives back.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

PREFIXES: Final = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.",
                   6: b"security."}  # fmt: skip
BLOCKS: Final = {b"TARINDEX": 512, b"TARPARNT": 512, b"EROFS-4K": 4096, b"EROFS4KP": 4096}


@dataclass(frozen=True)
class Seen:
    """What a name shows; `nid` is the inode's."""

    nid: int
    mode: int
    owner: tuple[int, int]
    mtime: tuple[int, int]
    links: int
    device: tuple[int, int]
    content: bytes  # of a file, or the text of a symlink
    xattrs: tuple[tuple[bytes, bytes], ...]


def u(file: bytes, at: int, size: int) -> int:
    return int.from_bytes(file[at : at + size], "little")


class LayerFile:
    def __init__(self, file: bytes) -> None:
        self.file = file
        trailer = file[-4096:]
        self.block, self.data_size = BLOCKS[file[:8]], u(trailer, 32, 8)
        assert trailer[:16] == b"TARIDXTR\1\0\0\0\1\0\0\0"
        assert struct.unpack("<IIQ", trailer[3584:3600]) == (self.block, 4096, self.data_size // self.block)
        assert hashlib.sha256(trailer[:120]).digest() == trailer[120:152]
        assert len(file) == self.data_size + u(trailer, 40, 8) + 4096
        assert struct.unpack("<IIQ", file[8:24]) == (1, 0, 4096)
        self.tar_len, self.meta_off, self.diff_id = u(file, 24, 8), u(file, 32, 8), file[40:72]
        assert trailer[88:120] == self.diff_id
        assert struct.unpack("<IxxxxIB", file[1024:1037]) == (0xE0F5E1E2, 3, self.block.bit_length() - 1)
        assert u(file, 1060, 4) * self.block == self.data_size
        assert u(file, 1064, 4) * self.block == self.meta_off

    def tree(self) -> dict[bytes, Seen]:
        """By path."""
        found: dict[bytes, Seen] = {}
        todo = [(b"", u(self.file, 1038, 2), u(self.file, 1038, 2))]
        while todo:
            path, nid, above = todo.pop()
            seen = found[path] = self.inode(nid)
            if seen.mode & 0o170000 != 0o040000:
                continue
            names = self.names(seen.content)
            assert list(names) == sorted(names)
            assert (names.pop(b"."), names.pop(b"..")) == (nid, above)
            todo += [(path + b"/" + name if path else name, child, nid) for name, child in names.items()]
        assert u(self.file, 1040, 8) == len({seen.nid for seen in found.values()})
        return found

    def inode(self, nid: int) -> Seen:
        at = self.meta_off + 32 * nid
        record = self.file[at : at + 64]
        assert at % 64 == 0
        layout, icount, mode, size, i_u = record[0], u(record, 2, 2), u(record, 4, 2), u(record, 8, 8), u(record, 16, 4)
        body_bytes = 12 + 4 * (icount - 1) if icount else 0
        end = at + 64 + body_bytes
        device, content = (0, 0), b""
        if mode & 0o170000 in (0o020000, 0o060000):
            device = i_u >> 8 & 0xFFF, i_u & 0xFF | i_u >> 12 & 0xFFF00
        elif layout == 1:
            content = self.file[i_u * self.block :][:size]
        else:
            assert layout == 5
            tail = size % self.block
            assert tail > 0
            assert end // self.block == (end + tail - 1) // self.block
            content = self.file[i_u * self.block :][: size - tail] + self.file[end : end + tail]
        return Seen(
            nid, mode, (u(record, 24, 4), u(record, 28, 4)), (u(record, 32, 8), u(record, 40, 4)), u(record, 44, 4),
            device, content, self.xattrs(self.file[at + 64 : end]),
        )  # fmt: skip

    def xattrs(self, body: bytes) -> tuple[tuple[bytes, bytes], ...]:
        found, at = [], 12
        while at < len(body):
            name_bytes, index, value_bytes = body[at], body[at + 1], u(body, at + 2, 2)
            name = body[at + 4 : at + 4 + name_bytes]
            found.append((PREFIXES[index] + name, body[at + 4 + name_bytes :][:value_bytes]))
            at += 4 + name_bytes + value_bytes
            at += -at % 4
        return tuple(sorted(found))

    def names(self, content: bytes) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for start in range(0, len(content), self.block):
            block = content[start : start + self.block]
            count = u(block, 8, 2) // 12
            offsets = [u(block, 12 * n + 8, 2) for n in range(count)]
            for n, (offset, stop) in enumerate(zip(offsets, [*offsets[1:], len(block)], strict=True)):
                found[block[offset:stop].rstrip(b"\0")] = u(block, 12 * n, 8)
        return found

    def tar(self) -> bytes:
        if self.block == 512:
            return self.file[4096 : 4096 + self.tar_len]
        keep_off, lost, tails, size = struct.unpack("<QQQQ", self.file[72:104])
        places = [u(self.file, keep_off + lost + 8 * n, 8) for n in range(tails)]
        at = keep_off + lost + 8 * tails
        end, body, out = at + size, 4096, bytearray()
        while at < end:
            value = shift = 0
            while True:
                byte = self.file[at]
                at += 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            do, count = value & 3, value >> 2
            if do == 0:
                out += self.file[at : at + count]
                at += count
            elif do == 1:
                out += bytes(count)
            elif do == 2:
                out += self.file[body : body + count]
                body += count + -count % 4096
            else:
                place = places.pop(0)
                out += self.file[place : place + count]
        assert (at, body, places, len(out)) == (end, self.meta_off, [], self.tar_len)
        return bytes(out)
