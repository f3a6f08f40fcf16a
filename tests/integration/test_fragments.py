# SPDX-License-Identifier: Apache-2.0
"""The files of config/ for containerd, each started as it is shipped: only addresses and roots are the test's."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshotter.config import Config
from tests.conftest import in_every_run
from tests.harness import CHECKOUT, Containerd, ProcessFailed, Registry, Release, releases, run
from tests.integration.conftest import Node, a_node
from tests.integration.test_images import HELLO, promised, reference

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.containerd, pytest.mark.tool, pytest.mark.slow]

FRAGMENTS = {label: CHECKOUT / "config" / f"containerd-{label}.toml" for label in ("1.6", "1.7", "2.0", "2.1")}
# No Debian suite has containerd 2.0: its file is started with the next one, which reads the same version of files.
STARTED_WITH = {"1.6": "1.6", "1.7": "1.7", "2.0": "later", "2.1": "later"}
# Where / is no mount point, btrfs keeps half of containerd from loading; without a pool 1.6 takes devmapper for failed.
DISABLED = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper"]


def shipped(fragment: Path, address: Path, root: Path) -> str:
    """The text with the test's address and root in place of the default ones."""
    text = fragment.read_text()
    default = Config()
    assert default.address in text
    return text.replace(default.address, str(address)).replace(default.root, str(root))


@dataclass
class Shipped(Containerd):
    """A containerd whose configuration is a fragment, and what keeps it within the test's directory."""

    fragment: Path | None = None

    def _configuration(self) -> str:
        assert self.fragment is not None
        v3 = self.release.version >= (2, 0)
        cni = "io.containerd.cri.v1.runtime" if v3 else "io.containerd.grpc.v1.cri"
        return (
            f"root = '{self.root}'\nstate = '{self.state}'\ndisabled_plugins = {DISABLED}\n"
            f"{shipped(self.fragment, self.daemon_address, self.daemon_address.parent / 'root')}\n"
            f"[grpc]\naddress = '{self.address}'\n[ttrpc]\naddress = '{self.address}.ttrpc'\n"
            f"[plugins.'{cni}'.cni]\nconf_dir = '{self.directory}/cni'\nbin_dir = '{self.directory}/cni'\n"
            f"[plugins.'io.containerd.internal.v1.opt']\npath = '{self.directory}/opt'\n"
        )


@dataclass(frozen=True)
class Plugin:
    type: str
    id: str
    status: str


def plugins(containerd: Containerd) -> list[Plugin]:
    lines = [line.split() for line in containerd.ctr("plugins", "ls").splitlines()[1:]]
    return [Plugin(words[0], words[1], words[-1]) for words in lines if words]


@pytest.fixture(scope="module", params=in_every_run(FRAGMENTS, {"1.6", "2.1"}.__contains__))
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[Node]:
    """The containerd of a fragment, and ours."""
    label = request.param

    def make(release: Release, directory: Path, address: Path) -> Containerd:
        return Shipped(release, directory, address, fragment=FRAGMENTS[label])

    with a_node(tmp_path_factory.mktemp("node"), STARTED_WITH[label], make=make) as made:
        yield made


def test_every_plugin_is_loaded(node: Node) -> None:
    """None has failed; and no key is one that this containerd does not know."""
    containerd = node.containerd
    loaded = plugins(containerd)
    assert not [plugin for plugin in loaded if plugin.status not in ("ok", "skip")], containerd.ctr(
        "plugins", "ls", "-d"
    )
    ok = {(plugin.type, plugin.id) for plugin in loaded if plugin.status == "ok"}
    assert ("io.containerd.snapshotter.v1", "tardev-host") in ok
    assert (("io.containerd.differ.v1", "tardev-diff") in ok) == containerd.has_differ
    assert ("io.containerd.service.v1", "diff-service") in ok
    cri = {("io.containerd.grpc.v1", "cri")}
    if containerd.release.version >= (2, 0):
        cri |= {("io.containerd.cri.v1", "images"), ("io.containerd.cri.v1", "runtime")}
        cri |= {("io.containerd.transfer.v1", "local")}
    assert cri <= ok
    log = containerd.log.read_text()
    assert "nknown key" not in log
    # It is given no network.
    assert not [line for line in log.splitlines() if "level=error" in line and "cni" not in line]


def test_a_pull_and_a_run(node: Node, registry: Registry, images: Path) -> None:
    pulled = registry.push(images / "hello.tar", "hello:fragment")
    node.containerd.pull(pulled)
    layers = node.daemon.tardevctl("layers")
    assert [layer["diff_id"] for layer in layers] == promised(images, "hello")["diff_ids"]
    assert node.containerd.cat(pulled, "fragment", "/etc/hello").strip() == HELLO["hello"]
    # That the differ is asked, and not the other one in vain: here by the transfer service or the client.
    assert node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK") == int(node.containerd.has_differ)


def test_a_client_that_unpacks_itself(node: Node, images: Path) -> None:
    """By the diff service, in the order that the file gives."""
    before = node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK")
    node.containerd.ctr("images", "import", "--no-unpack", images / "dup.tar")
    node.containerd.run_container(reference("dup"), "itself", "/bin/true")
    layers = {layer["diff_id"] for layer in node.daemon.tardevctl("layers")}
    assert set(promised(images, "dup")["diff_ids"]) <= layers
    applied = node.daemon.metric("tardev_rpc_seconds_count", method="Apply", code="OK") - before
    assert bool(applied) == node.containerd.has_differ


def test_overlayfs_still_works(node: Node, registry: Registry, images: Path) -> None:
    """Its layers pass our differ by; and the list of the transfer service replaces the built-in one."""
    before = len(node.daemon.layer_files())
    pulled = registry.push(images / "hello-zstd.tar", "hello-zstd:fragment")
    node.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", pulled)
    out = node.containerd.says(
        "run", "--rm", "--snapshotter", "overlayfs", pulled, "overlayfs", "/bin/cat", "/etc/hello"
    )
    assert out.strip() == HELLO["hello-zstd"]
    assert len(node.daemon.layer_files()) == before


def test_containerd_1_6_dies_of_a_diff_plugin(tmp_path: Path) -> None:
    """Why its file says that there must be none."""
    containerd = Shipped(releases()["1.6"], tmp_path, tmp_path / "s.sock", fragment=FRAGMENTS["1.6"])
    with containerd.config.open("a") as config:
        config.write(f"[proxy_plugins.tardev-diff]\ntype = 'diff'\naddress = '{tmp_path}/s.sock'\n")
    with pytest.raises(ProcessFailed, match="panic: plugin: no type"):
        run(containerd.release.containerd, "--config", containerd.config)


@pytest.mark.parametrize("label", FRAGMENTS)
def test_as_a_drop_in(label: str, tmp_path: Path) -> None:
    """What docs/containerd.md says of `imports`: up to 1.7 a plugin's table is replaced as a whole, then merged."""
    release = releases()[STARTED_WITH[label]]
    v3 = release.version >= (2, 0)
    cri = "io.containerd.cri.v1.images" if v3 else "io.containerd.grpc.v1.cri"
    main = tmp_path / "config.toml"
    main.write_text(
        f"version = {3 if v3 else 2}\nroot = '{tmp_path}/root'\nstate = '{tmp_path}/state'\n"
        f"imports = ['{FRAGMENTS[label]}']\n[plugins.'{cri}']\nmax_concurrent_downloads = 7\n"
    )
    used = tomllib.loads(run(release.containerd, "--config", main, "config", "dump"))
    fragment = tomllib.loads(FRAGMENTS[label].read_text())
    assert set(used["proxy_plugins"]) == set(fragment["proxy_plugins"])
    images = used["plugins"][cri]
    assert (images if v3 else images["containerd"])["snapshotter"] == "tardev-host"
    assert images["max_concurrent_downloads"] == (7 if v3 else 3)
