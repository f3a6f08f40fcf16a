# SPDX-License-Identifier: Apache-2.0
"""The parts behind the services, wired together on a locked root directory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snapshotter import config, desync, figures, inventory, log, reconcile
from snapshotter.activation import Activation
from snapshotter.builder import Builder
from snapshotter.collector import Collector
from snapshotter.config import Config
from snapshotter.content import Content
from snapshotter.contracts import CONTRACTS, Place
from snapshotter.directories import Directories
from snapshotter.errors import ConfigError
from snapshotter.figures import Figures
from snapshotter.fsck import Fsck
from snapshotter.inventory import Parts
from snapshotter.layerstore import LayerStore
from snapshotter.links import Links
from snapshotter.metastore import FILE_NAME, Layer, Metastore
from snapshotter.repair import Repair
from snapshotter.reserve import Reserve
from snapshotter.snapshots import Named, Snapshots
from snapshotter.trace import trace
from snapshotter.trash import Trash


def real_path(path: str) -> Path:
    """Without symlinks, as the kernel's mount table has it."""
    return Path(os.path.realpath(path))


def check_root(root: Path) -> None:
    """Raises ConfigError for a directory that is somebody else's, or whose metadata was lost: all in it would
    count as left over."""
    if not (root / FILE_NAME).exists():
        there = [name for name in ("layers", "snapshots") if (root / name).exists()]
        if there:
            raise ConfigError(
                f"root {root} holds {' and '.join(there)} but no {FILE_NAME}: not ours, or its metadata was lost. Put"
                f" back a copy of {root / FILE_NAME}, or start with nothing: mv {shlex.quote(str(root))}"
                f" {shlex.quote(f'{root}.lost')}; then remove the images from containerd that were pulled through it"
                " (ctr -n NAMESPACE images rm --sync IMAGE), and pull them again"
            )


def open_root(root: Path) -> int:
    """Make the root directory ours alone; the descriptor holds its lock. Raises ConfigError."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
        fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 20).decode("ascii", "replace").strip()
            os.close(fd)
            raise ConfigError(f"root {root} is locked by another daemon, process {holder or 'unknown'}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise ConfigError(f"root {root}: {error}") from None
    return fd


@dataclass(frozen=True, slots=True)
class Node:
    """Everything behind the services, put together; recovered from whatever was before."""

    root: Path
    settings: Config
    parts: Parts
    snapshots: Snapshots
    collector: Collector
    fsck: Fsck
    reserve: Reserve
    builder: Builder

    async def figures(self) -> Figures:
        """Raises OSError, KernelError, Internal."""
        return await figures.take(self.parts, self.builder, self.reserve)


@asynccontextmanager
async def opened(
    settings: Config, *, bind: Callable[[], Awaitable[None]] | None = None, recover: bool = True
) -> AsyncIterator[Node]:
    """The root directory locked, and all that works on it. `bind`: called as soon as it is certain that nobody else
    does. Without `recover` what was left behind stays. Raises ConfigError, OSError, SnapshotterError, KernelError."""
    root = real_path(settings.root)
    async with AsyncExitStack() as at_end:
        at_end.callback(os.close, open_root(root))
        check_root(root)
        trace("boot.locked")
        if bind is not None:
            await bind()
        trace("boot.bound")
        contracts = {name: CONTRACTS[chosen.contract] for name, chosen in settings.snapshotters.items()}
        unmounted = frozenset(name for name, contract in contracts.items() if contract.PLACE is not Place.MOUNTED)
        reserve = Reserve(root / "reserve")
        if not await asyncio.to_thread(reserve.keep):
            log.get_logger().warning("no room for the reserve, from which a full disk is tidied up")
        metastore = await asyncio.to_thread(Metastore, root / FILE_NAME, unmounted=unmounted, reserve=reserve)
        at_end.push_async_callback(metastore.close)
        trace("boot.opened")
        trash = Trash(
            root,
            bytes_per_second=config.parse_size(settings.cache.delete_rate),
            in_a_hurry=lambda: store.is_short_of_space(),
        )
        at_end.callback(trash.close)
        store = LayerStore(root, trash, reserve_bytes=config.parse_size(settings.builds.free_space_reserve))
        directories = Directories(root, trash)
        activation = Activation(
            root,
            store,
            always_loop=settings.host.mount_through == "loop",
            verity=settings.host.verity == "require",
        )
        links = Links(settings.links(), metastore, store)
        for part in (store, directories, activation, links):
            await asyncio.to_thread(part.prepare)
            trace("boot.prepared")
        parts = Parts(metastore, store, directories, activation, links)
        if recover:
            await reconcile.apply(reconcile.plan(await inventory.take(parts)), parts)

        trace("boot.reconciled")

        async def renew(layer: Layer) -> None:
            await links.renew(layer)
            await activation.renew(layer)

        content = Content(Path(settings.containerd.content), settings.containerd.address)
        at_end.push_async_callback(content.close)
        builder = Builder(
            metastore,
            store,
            content,
            workers=settings.builds.workers,
            limits=settings.builds.limits(),
            timeout_seconds=settings.builds.timeout,
            per_namespace=settings.builds.sharing == "namespace",
            renew=renew,
        )
        at_end.push_async_callback(builder.close)
        names = {
            name: Named(
                chosen.contract,
                chosen.format,
                chosen.max_layers,
                remap_ids=chosen.remap_ids,
                skip_download=chosen.skip_download,
                encoding=chosen.encoding,
                writable_bytes=config.parse_size(chosen.writable_size),
            )
            for name, chosen in settings.snapshotters.items()
        }
        collector = Collector(
            metastore,
            store,
            builder,
            cache_bytes=config.parse_size(settings.cache.max_size),
            unused_seconds=settings.cache.max_age,
        )
        repair = Repair(metastore, store, content, builder)
        signatures = None
        if settings.signatures.required:
            from snapshotter.signatures import Signatures  # ten megabytes of cryptography, for those who ask for it

            signed = settings.signatures
            signatures = Signatures([*map(Path, signed.certificates)], Path(signed.store))
            await signatures.look()
        snapshots = Snapshots(
            names, metastore, store, directories, builder, content, activation, links, collector, repair, signatures
        )
        at_end.push_async_callback(snapshots.close)
        emptying = asyncio.create_task(trash.empty_as_it_comes())
        at_end.callback(emptying.cancel)
        if recover:
            await snapshots.resume()
            trace("boot.resumed")
        fsck = Fsck(parts, builder, repair, partial(desync.unknown, metastore, content, names))
        yield Node(root, settings, parts, snapshots, collector, fsck, reserve, builder)
