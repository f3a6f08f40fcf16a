# SPDX-License-Identifier: Apache-2.0
"""What every place of images has: its documents, and its blobs as streams."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from policy.documents import ImageDocuments, LayerBlob, Platform
from policy.errors import PolicyError
from verity.buffers import Buffer

PIECE_BYTES: Final = 1 << 20
_PIPE_BYTES: Final = 1 << 20
_LINGER_SECONDS: Final = 5.0


class Stream(Protocol):
    """A blob while it is read, once, from `fd`. What was wrong behind a pipe, `failure` has when the reader is done."""

    @property
    def fd(self) -> int: ...
    @property
    def failure(self) -> Exception | None: ...
    def read_bytes(self) -> int:
        """Of it, by now."""


class Source(Protocol):
    """Methods raise ImageError (it is not what it should be), RegistryError, OSError. They may be called from
    several threads."""

    name: str

    def image(self, wanted: Platform | None) -> ImageDocuments:
        """The documents are checked by their digests."""

    def blob(self, layer: LayerBlob) -> AbstractContextManager[Stream]:
        """Its bytes; whether they are those of its digest, the reader finds out."""

    def close(self) -> None: ...


class FileStream:
    """A whole file."""

    failure: Exception | None = None

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read_bytes(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_CUR)  # who reads moves this descriptor's position too


class PipeStream:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.failure: Exception | None = None
        self.moved_bytes = 0

    def read_bytes(self) -> int:
        return self.moved_bytes


@contextmanager
def piped(produce: Callable[[Callable[[Buffer], None]], None]) -> Iterator[PipeStream]:
    """What `produce` writes, on a thread of its own, comes out of a pipe. It ends by BrokenPipeError where nobody reads
    on; the PolicyError or OSError that it raises is the stream's failure."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    stream = PipeStream(read_end)

    def write(data: Buffer) -> None:
        view = memoryview(data)
        while view:
            written = os.write(write_end, view)
            stream.moved_bytes += written
            view = view[written:]

    def work() -> None:
        try:
            _widen(write_end)
            produce(write)
        except BrokenPipeError:
            pass  # the reader has failed, and says why
        except (PolicyError, OSError) as error:
            stream.failure = error
        finally:
            os.close(write_end)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield stream
    finally:
        os.close(read_end)
        thread.join(_LINGER_SECONDS)  # one that waits for the network ends by its own timeouts


def _widen(fd: int) -> None:
    """Fewer turns of reader and writer. Beyond a user's share of such memory the kernel refuses."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass
