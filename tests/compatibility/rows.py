# SPDX-License-Identifier: Apache-2.0
"""The rows of the table in docs/compatibility.md: the first line of each docstring is what the table says is checked.

A row passes, raises NotThere where this containerd has no such thing, or raises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from snapshotter.metastore import Kind
from tests.compatibility.bench import OTHER, Bench, Image, sees
from tests.compatibility.table import Verdict
from tests.cri import images as cri_images
from tests.cri.node import HANDLER, CriNode, Settings, cri_node
from tests.harness import SNAPSHOTTER, ProcessFailed, check_tree, make_images, run, wait_for
from tests.integration.test_images import promised

Check = Callable[[Bench], None]
ROWS: Final[dict[str, Check]] = {}
FAILURES: Final = (AssertionError, ProcessFailed, TimeoutError, grpc.RpcError)  # how a check says that it does not work


class NotThere(Exception):
    """This containerd has no such thing; the check has made sure of it."""


def row(title: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        assert check.__doc__
        assert title not in ROWS
        ROWS[title] = check
        return check

    return register


def meaning(title: str) -> str:
    return (ROWS[title].__doc__ or "").splitlines()[0].removesuffix(".")


def verdict(title: str, bench: Bench) -> Verdict:
    """Raises what the check raises, but for NotThere."""
    try:
        ROWS[title](bench)
    except NotThere:
        return Verdict.NOT_THERE
    return Verdict.YES


@row("pull")
def pull(bench: Bench) -> None:
    """`ctr images pull` from a registry: every layer is built once, from its blob, and committed under its chain ID."""
    image = bench.pushed(bench.image("pull"))
    builds, applies, new = bench.builds(), bench.applies(), set(image.diff_ids) - bench.diff_ids()
    bench.node.containerd.pull(image.reference)
    assert set(image.chain_ids) <= bench.committed()
    assert set(image.diff_ids) <= bench.diff_ids()
    assert bench.builds() - builds == len(new)
    # Without the plugin of 1.7 the daemon finds the blobs itself.
    assert (bench.applies() > applies) == bench.node.containerd.has_differ
    bench.run(image, "pulled")


@row("import")
def import_(bench: Bench) -> None:
    """The same by `ctr images import` from an archive."""
    image = bench.image("import")
    bench.node.containerd.import_image(image.archive)
    assert set(image.chain_ids) <= bench.committed()
    assert set(image.diff_ids) <= bench.diff_ids()
    bench.run(image, "imported")


@row("unpack on demand")
def on_demand(bench: Bench) -> None:
    """An image that was imported with `--no-unpack` is unpacked when a container of it is run."""
    image = bench.image("on-demand")
    bench.node.containerd.ctr("images", "import", "--no-unpack", image.archive)
    assert image.chain_ids[-1] not in bench.committed()
    bench.run(image, "on-demand")
    assert set(image.chain_ids) <= bench.committed()


@row("second snapshotter")
def second_snapshotter(bench: Bench) -> None:
    """An image that was pulled for overlayfs runs with ours without another pull, and with overlayfs as before."""
    image = bench.pushed(bench.image("overlayfs"))
    bench.node.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", image.reference)
    assert image.diff_ids[-1] not in bench.diff_ids()
    for name in (SNAPSHOTTER, "overlayfs"):
        bench.run(image, f"second-{name}", snapshotter=name)
        assert set(image.chain_ids) <= bench.committed(name)


@row("second name")
def second_name(bench: Bench) -> None:
    """Pulled for another name of ours, the layers are shared: nothing is built; both names run it."""
    image = bench.image("second-name")
    bench.node.containerd.import_image(image.archive)
    builds = bench.builds()
    bench.node.containerd.ctr("images", "import", "--snapshotter", OTHER, image.archive)
    assert set(image.chain_ids) <= bench.committed(OTHER)
    assert bench.builds() == builds
    for name in (SNAPSHOTTER, OTHER):
        bench.run(image, f"name-{name}", snapshotter=name)


@row("second namespace")
def second_namespace(bench: Bench) -> None:
    """Imported into another namespace the layers are shared: nothing is built; removed there, it still runs here."""
    image = bench.image("namespace")
    containerd = bench.node.containerd
    containerd.import_image(image.archive)
    builds, other = bench.builds(), f"{containerd.namespace}-b"
    containerd.import_image(image.archive, namespace=other)
    assert bench.builds() == builds
    bench.run(image, "there", namespace=other)
    containerd.ctr("images", "rm", "--sync", image.reference, namespace=other)
    containerd.collect_until("its snapshots are removed there", lambda: not bench.committed(namespace=other))
    bench.run(image, "here")


@row("run")
def run_(bench: Bench) -> None:
    """A container sees the tree that the image promises, to the last attribute; nothing of it stays when it ends."""
    images = make_images(bench.directory / "images", "hello")
    containerd = bench.node.containerd
    containerd.import_image(images / "hello.tar")
    mounts = bench.node.daemon.mounts()
    with containerd.rootfs(promised(images, "hello")["chain_ids"][-1], bench.directory / "rootfs") as rootfs:
        assert check_tree(images / "hello.json", rootfs) == ""
    command = ("/bin/sh", "-c", '[ "$(cat /etc/hello)" = "hello from a tar layer" ]')
    containerd.run_container("localhost/tardev-test/hello:latest", "run", *command)
    containerd.ctr("images", "rm", "--sync", "localhost/tardev-test/hello:latest")
    containerd.collect_until("its mounts are released", lambda: set(bench.node.daemon.mounts()) <= set(mounts))


@row("commit")
def commit(bench: Bench) -> None:
    """The changes of a container are committed as a layer with a root hash; a container on top sees what was left."""
    image = bench.image("commit")
    containerd, daemon = bench.node.containerd, bench.node.daemon
    containerd.import_image(image.archive)
    script = "echo changed >/etc/which; echo new >/etc/new; rm /etc/passwd; mkdir -m 700 /left"
    containerd.ctr("run", "--snapshotter", SNAPSHOTTER, image.reference, "changer", "/bin/sh", "-c", script)
    try:
        containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "commit", "changed", "changer")
    finally:
        containerd.ctr("containers", "rm", "changer")
    row = next(row for row in daemon.tardevctl("snapshots") if row["name"].rpartition("/")[2] == "changed")
    assert row["kind"] == "committed"
    daemon.verify_layer(next(layer for layer in daemon.tardevctl("layers") if layer["diff_id"] == row["diff_id"]))
    with containerd.rootfs("changed", bench.directory / "changed") as rootfs:
        assert (rootfs / "etc/new").read_text() == "new\n"
        assert not (rootfs / "etc/passwd").exists()
        assert (rootfs / "left").stat().st_mode & 0o7777 == 0o700
        containerd.ctr("run", "--rm", "--rootfs", str(rootfs), "on-top", *sees("changed"))
    containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "rm", "changed")


@row("remove")
def remove(bench: Bench) -> None:
    """A removed image leaves no snapshot, directory or mount behind; one that shares a layer with it still runs."""
    gone, kept = bench.image("removed"), bench.image("kept")
    containerd, daemon = bench.node.containerd, bench.node.daemon
    containerd.import_image(gone.archive)
    containerd.import_image(kept.archive)
    bench.run(gone, "removed")
    containerd.ctr("images", "rm", "--sync", gone.reference)
    containerd.collect_until("its snapshot is removed", lambda: gone.chain_ids[-1] not in bench.committed())
    wait_for("its mounts are released", lambda: not daemon.mounts())
    wait_for("its directories are removed", lambda: not list((daemon.root / "snapshots").iterdir()))
    bench.run(kept, "kept")


@row("garbage collection")
def garbage_collection(bench: Bench) -> None:
    """containerd's collection reaches the layer file of a removed image and no other; imported again, it is built."""
    gone, kept = bench.image("collected"), bench.image("not-collected")
    containerd, daemon = bench.node.containerd, bench.node.daemon
    containerd.import_image(gone.archive)
    containerd.import_image(kept.archive)
    # For a minute it keeps what it has just built: a snapshot may be about to refer to it. The next one knows of none.
    daemon.stop()
    daemon.restart()
    containerd.retry("snapshots", "--snapshotter", SNAPSHOTTER, "list")
    containerd.ctr("images", "rm", "--sync", gone.reference)
    wait_for("its layer file is deleted", lambda: gone.diff_ids[-1] not in bench.diff_ids())
    assert bench.diff_ids() >= set(kept.diff_ids)
    containerd.import_image(gone.archive)
    bench.run(gone, "collected")


@row("parallel unpack")
def parallel_unpack(bench: Bench) -> None:
    """Layers of an image that are unpacked side by side (`max_concurrent_unpacks`, containerd 2.2 and later)."""
    release = bench.node.containerd.release
    if "max_concurrent_unpacks" not in run(release.containerd, "config", "default"):
        raise NotThere
    raise AssertionError("this containerd can, and no check of it is written yet")


def _sleeper(bench: Bench, image: Image) -> Callable[[], None]:
    """Start a container. The answer makes sure that it runs, and that programs of its image still can be started."""
    name = image.name
    containerd = bench.node.containerd
    containerd.import_image(image.archive)
    containerd.ctr("run", "-d", "--snapshotter", SNAPSHOTTER, image.reference, name, "/bin/sleep", "1000")

    def check() -> None:
        assert name in containerd.retry("tasks", "list").split()
        containerd.retry("tasks", "exec", "--exec-id", os.urandom(4).hex(), name, *sees(name))

    return check


def _end(bench: Bench, image: Image) -> None:
    containerd = bench.node.containerd
    containerd.ctr("tasks", "delete", "--force", image.name)
    containerd.ctr("containers", "rm", image.name)
    containerd.ctr("images", "rm", "--sync", image.reference)  # and a garbage collection before it ends
    bench.node.containerd.collect_until("its mounts are released", lambda: not bench.node.daemon.mounts())


@row("restart of containerd")
def restart_of_containerd(bench: Bench) -> None:
    """A container goes on; a new image can be imported and run; the old container's mounts go with it."""
    old, new = bench.image("over-containerd"), bench.image("after-containerd")
    check = _sleeper(bench, old)
    bench.node.containerd.stop()
    bench.node.containerd.start()
    check()
    bench.node.containerd.import_image(new.archive)
    bench.run(new, new.name)
    _end(bench, old)


@row("restart of the daemon")
def restart_of_ours(bench: Bench) -> None:
    """A container goes on without it, and with the next one; a new image can be imported and run; the mounts go."""
    old, new = bench.image("over-ours"), bench.image("after-ours")
    check = _sleeper(bench, old)
    bench.node.daemon.stop()
    check()
    bench.node.daemon.restart()
    check()
    bench.node.containerd.retry("images", "import", "--snapshotter", SNAPSHOTTER, str(new.archive))
    bench.run(new, new.name)
    _end(bench, old)


@contextlib.contextmanager
def _cri(bench: Bench, name: str, **options: Any) -> Iterator[tuple[CriNode, cri_images.Image]]:
    """A node of its own with CRI on, and an image that it does not have."""
    directory = bench.directory / name
    directory.mkdir()
    pause = cri_images.pause(directory, bench.registry)
    app = cri_images.app(directory, bench.registry, name)
    with cri_node(directory, bench.node.containerd.release, Settings(pause.reference, **options)) as node:
        yield node, app


@row("CRI pull")
def cri_pull(bench: Bench) -> None:
    """The kubelet's PullImage, by the transfer service and by containerd's own client (up to 2.0 by that alone)."""
    ways = (False, True) if bench.node.containerd.release.version >= (2, 1) else (True,)
    for local in ways:
        name = f"cri-pull-{'client' if local else 'transfer'}"
        with _cri(bench, name, local_pull=local and len(ways) > 1) as (node, app):
            node.cri.pull(app.reference)
            assert [row.diff_id for row in node.snapshots(Kind.COMMITTED)] == list(app.diff_ids)


@row("CRI sandbox")
def cri_sandbox(bench: Bench) -> None:
    """A pod and its container run with our snapshots, and a file is read by ExecSync; nothing of both stays."""
    with _cri(bench, "cri-sandbox") as (node, app):
        node.cri.pull(app.reference)
        pod = node.cri.run_pod(node.cri.pod_config("sandbox"))
        container = node.cri.run_container(pod, app.reference)
        assert node.cri.execute(container, "cat", "/etc/hello").stdout == "cri-sandbox"
        for of_ours in (pod.id, container):
            assert [mount.type for mount in node.mounts(of_ours)] == ["overlay"]
        node.cri.remove_pod(pod.id)
        node.cri.remove_image(app.reference)
        wait_for("its snapshots are removed", lambda: not node.snapshots(Kind.ACTIVE))
        wait_for("its mounts are released", lambda: not node.daemon.mounts())


@row("CRI runtime class")
def cri_runtime_class(bench: Bench) -> None:
    """One class of pods has our snapshotter, all others overlayfs; an image pulled without it is unpacked on demand."""
    release = bench.node.containerd.release
    if release.version < (1, 7):
        # Its CRI knows one snapshotter, for all runtimes.
        assert run(release.containerd, "config", "default").count(" snapshotter = ") == 1
        raise NotThere
    with _cri(bench, "cri-class", snapshotter="overlayfs") as (node, app):
        config = node.cri.pod_config("class")
        node.cri.pull(app.reference, config)
        assert not node.snapshots(Kind.COMMITTED)
        pod = node.cri.run_pod(config, HANDLER)
        container = node.cri.run_container(pod, app.reference)
        assert node.cri.execute(container, "cat", "/etc/hello").stdout == "cri-class"
        assert {row.diff_id for row in node.snapshots(Kind.COMMITTED)} > set(app.diff_ids)
