# SPDX-License-Identifier: Apache-2.0
"""Salted digests of equal blocks, and of the stream they are cut from, by the fastest means there is;
and the place where they wait."""

from __future__ import annotations

import hashlib
from typing import Final, Self

from verity.buffers import Buffer
from verity.errors import VerityError
from verity.params import BLOCK_BYTES, DIGEST_BYTES, Params
from verity.spool import Spool, SpooledBytes

try:
    from verity import _leafhash as _leafhash
except ImportError:  # the extension is optional: no compiler, or another interpreter
    _leafhash = None  # type: ignore[assignment]

# "sha-ni", "portable-c" or "hashlib": a fact for logs and `doctor`; results are equal.
IMPLEMENTATION: Final[str] = _leafhash.IMPLEMENTATIONS[0] if _leafhash else "hashlib"
# Leaves beside the stream cost little where both wait for the same instructions. Elsewhere hashlib has the
# quicker sha256 of one stream, and a caller with threads does better to hash stream and leaves apart.
ONE_PASS: Final[bool] = IMPLEMENTATION == "sha-ni"
_STREAM_IMPLEMENTATION: Final = IMPLEMENTATION if ONE_PASS else "hashlib"
# The extension puts the salt and the head of a block into one 64-byte message block.
_EXTENSION_SALT_BYTES_MAX: Final = 63


def leaf_digests(data: Buffer, params: Params) -> bytes:
    """Digests of the data blocks in `data`, 32 bytes each. Raises VerityError unless blocks are whole."""
    return block_digests(data, params.data_block_bytes, params.salt)


def block_digests(data: Buffer, block_bytes: int, salt: bytes, implementation: str = IMPLEMENTATION) -> bytes:
    """sha256(salt ‖ block) of each block. Releases the GIL for its whole length with the C extension."""
    view = memoryview(data).cast("B")
    if len(view) % block_bytes:
        raise VerityError(f"{len(view)} bytes are no whole number of {block_bytes}-byte blocks")
    if _extension_does(block_bytes, salt, implementation):
        return _leafhash.digests(view, block_bytes, salt, implementation)
    seeded = hashlib.sha256(salt)
    out = bytearray()
    for start in range(0, len(view), block_bytes):
        digest = seeded.copy()
        digest.update(view[start : start + block_bytes])
        out += digest.digest()
    return bytes(out)


def _extension_does(block_bytes: int, salt: bytes, implementation: str) -> bool:
    return implementation != "hashlib" and block_bytes in BLOCK_BYTES and len(salt) <= _EXTENSION_SALT_BYTES_MAX


class StreamHash:
    """sha256 of one stream, used like hashlib's, that takes leaf digests along in the same pass.

    No two threads may update it at a time. Raises ValueError for an `implementation` that is not there.
    """

    def __init__(self, implementation: str = _STREAM_IMPLEMENTATION) -> None:
        if implementation != "hashlib" and _leafhash is None:
            raise ValueError(f"implementation {implementation} needs the C extension")
        self._implementation = implementation
        self._hash: hashlib._Hash | _leafhash.Stream = (
            hashlib.sha256() if implementation == "hashlib" else _leafhash.Stream(implementation)
        )

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def update_with_leaves(self, data: Buffer, blocks: Buffer, block_bytes: int, salt: bytes) -> bytes:
        """`update(data)` and `block_digests(blocks, block_bytes, salt)` in one.

        `blocks` is what of `data` are whole blocks, though nothing depends on that. Releases the GIL for
        its whole length where ONE_PASS. Raises VerityError unless blocks are whole; the stream is then
        where it was.
        """
        size = memoryview(blocks).nbytes
        if size % block_bytes:
            raise VerityError(f"{size} bytes are no whole number of {block_bytes}-byte blocks")
        if _extension_does(block_bytes, salt, self._implementation):
            assert isinstance(self._hash, _leafhash.Stream)
            return self._hash.update_with_leaves(data, blocks, block_bytes, salt)
        self._hash.update(data)
        return block_digests(blocks, block_bytes, salt)

    def digest(self) -> bytes:
        """Of all data so far; more may follow."""
        return self._hash.digest()

    def hexdigest(self) -> str:
        return self.digest().hex()

    def copy(self) -> Self:
        other = type(self).__new__(type(self))
        other._implementation, other._hash = self._implementation, self._hash.copy()
        return other


class LeafHasher:
    """Cuts what it is given into data blocks, wherever the pieces end, and hashes those that are whole."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._partial = bytearray()

    def update(self, data: Buffer, stream: StreamHash | None = None, streamed: Buffer | None = None) -> bytes:
        """Digests of the blocks that `data` completes, 32 bytes each.

        With `stream`, that goes on by `data`, too, or by `streamed` instead.
        """
        view = memoryview(data).cast("B")
        block, partial = self._params.data_block_bytes, self._partial
        first = b""
        rest = view
        if partial:
            take = min(block - len(partial), len(view))
            partial += view[:take]
            rest = view[take:]
            if len(partial) == block:
                first = leaf_digests(partial, self._params)
                partial.clear()
        whole = len(rest) - len(rest) % block
        if stream is None:
            digests = leaf_digests(rest[:whole], self._params)
        else:
            streamed = view if streamed is None else streamed
            digests = stream.update_with_leaves(streamed, rest[:whole], block, self._params.salt)
        partial += rest[whole:]
        return first + digests if first else digests


class LeafStore:
    """Digests in order of their blocks; beyond `threshold_bytes` they go to a file.

    The file is `spool_fd` (the caller's, empty, writable) or an unnamed temporary one. Raises OSError when it cannot
    be written or read.
    """

    def __init__(self, *, threshold_bytes: int = 8 << 20, spool_fd: int | None = None) -> None:
        self._digests = SpooledBytes(Spool(spool_fd), threshold_bytes=threshold_bytes)
        self.append, self.chunks, self.read = self._digests.append, self._digests.chunks, self._digests.read

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    @property
    def bytes_spooled(self) -> int:
        """All that was written to the file, by whatever else waits in it, too."""
        return self._digests.spool.size_bytes

    def replace(self, index: int, digests: bytes) -> None:
        """Put other digests from `index` on, all of which are there already."""
        self._digests.replace(index * DIGEST_BYTES, digests)

    def beside(self) -> SpooledBytes:
        """Other bytes that wait for the end, in the same file."""
        return self._digests.beside()

    def close(self) -> None:
        self._digests.spool.close()
