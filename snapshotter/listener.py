# SPDX-License-Identifier: Apache-2.0
"""The public socket: mode 0600, and root's processes only, whatever its mode has become.

gRPC for Python neither takes an accepted socket nor says whose it is. So connections are accepted
here, their peer asked for (man 7 unix, SO_PEERCRED), and their bytes passed on to gRPC's own socket,
which lies in the daemon's private directory.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotter.errors import ConfigError
from snapshotter.log import get_logger

_PEER: Final = struct.Struct("iII")  # pid, uid, gid
_CONNECTIONS_MAX: Final = 256
_PIECE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Bound:
    """A listening socket and the name it has in the file system."""

    socket: socket.socket
    path: Path
    inode: int

    def release(self) -> None:
        """Close the socket and take its name away, unless that is another's by now."""
        self.socket.close()
        with suppress(OSError):
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()


def bind(path: Path) -> Bound:
    """Listen at `path`, in the place of a socket that nobody serves. Raises ConfigError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Before the umask: others need to go through a directory like /run/containerd.
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _clear(path)
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(128)
        listening.setblocking(False)
        return Bound(listening, path, path.lstat().st_ino)
    except ConfigError:
        listening.close()
        raise
    except (OSError, ValueError) as error:
        listening.close()
        raise ConfigError(f"address {path}: {error}") from None


def _clear(path: Path) -> None:
    """Raises ConfigError where something else than a forgotten socket is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"address {path} is there and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except FileNotFoundError:
            pass
        else:
            raise ConfigError(f"address {path} is served by another process")


class Listener:
    def __init__(self, listening: socket.socket, inner: Path) -> None:
        self._listening, self._inner = listening, inner
        self._connections: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    async def serve(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # out of descriptors, most likely: those that close free some
                self._log.error("accept failed", error=str(error))
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if uid != 0 or len(self._connections) >= _CONNECTIONS_MAX:
                self._log.warning("connection refused", pid=pid, uid=uid, connections=len(self._connections))
                connection.close()
                continue
            task = asyncio.create_task(self._relay(connection))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def close(self) -> None:
        self._listening.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _relay(self, outer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with outer:
            try:
                inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError as error:  # out of descriptors: who called learns it now, not at his deadline
                self._log.error("connection refused", error=str(error))
                return
            await self._between(loop, outer, inner)

    async def _between(self, loop: asyncio.AbstractEventLoop, outer: socket.socket, inner: socket.socket) -> None:
        with inner:
            ways: list[asyncio.Task[None]] = []
            try:
                await loop.sock_connect(inner, str(self._inner))
                ways = [asyncio.create_task(_copy(outer, inner)), asyncio.create_task(_copy(inner, outer))]
                # gRPC has no use for a connection that is half closed.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            except OSError as error:
                self._log.warning("connection lost", error=str(error))
            finally:
                for way in ways:
                    way.cancel()
                if ways:
                    await asyncio.wait(ways)


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while piece := await loop.sock_recv(source, _PIECE_BYTES):
            await loop.sock_sendall(target, piece)
