# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from snapshotter.config import Config, load
from snapshotter.errors import ConfigError
from snapshotter.fragments import DIFFER, VERSIONS, fragment, version_of
from tests.harness import CHECKOUT

BOTH = """
address = "/run/odd \\"place\\"/s.sock"
root = "/srv/tardev"
[snapshotters.tardev]
contract = "kata-tardev"
format = "tarfs"
[snapshotters.up]
contract = "kata-erofs"
format = "erofs-4k"
[snapshotters.plain]
contract = "host"
format = "tar-index"
remap_ids = true
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_are_what_is_printed(version: str) -> None:
    assert (CHECKOUT / "config" / f"containerd-{version}.toml").read_text() == fragment(version, Config())


@pytest.mark.parametrize("version", VERSIONS)
def test_all_snapshotters_of_the_daemon_are_in_it(version: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(BOTH)
    text = fragment(version, load(tmp_path / "c.toml"), "linux/arm64")
    assert max(map(len, text.splitlines())) <= 120
    found = tomllib.loads(text)
    assert found["version"] == (3 if version.startswith("2") else 2)
    expected = {"plain", "tardev", "up"} | ({DIFFER} if version != "1.6" else set())
    assert found["proxy_plugins"].keys() == expected
    for name, plugin in found["proxy_plugins"].items():
        assert plugin["address"] == '/run/odd "place"/s.sock'
        assert plugin["type"] == ("diff" if name == DIFFER else "snapshot")
        if name != DIFFER and version != "1.6":
            assert plugin["exports"] == {"root": "/srv/tardev"}
    plugins = found["plugins"]
    assert ("io.containerd.service.v1.diff-service" in plugins) == (version != "1.6")
    if version.startswith("2"):
        assert found["proxy_plugins"]["plain"]["capabilities"] == ["remap-ids"]
        unpack = plugins["io.containerd.transfer.v1.local"]["unpack_config"]
        assert {(each["snapshotter"], each["differ"]) for each in unpack} == {
            ("plain", DIFFER), ("tardev", DIFFER), ("up", DIFFER), ("overlayfs", "walking"),
        }  # fmt: skip
        assert {each["platform"] for each in unpack} == {"linux/arm64"}
        images = plugins["io.containerd.cri.v1.images"]
        assert images["snapshotter"] == "plain"
        chosen = {handler: each["snapshotter"] for handler, each in images["runtime_platforms"].items()}
        assert chosen == {"kata-cc": "tardev", "kata": "up"}
        runtimes = plugins["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
    else:
        assert plugins["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"] == "plain"
        runtimes = plugins["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert {handler: each["runtime_type"] for handler, each in runtimes.items()} == {
        "kata-cc": "io.containerd.kata-cc.v2", "kata": "io.containerd.kata.v2",
    }  # fmt: skip


def test_a_node_with_kata_alone_has_it_for_all_pods(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[snapshotters.tardev]\ncontract = "kata-tardev"\nformat = "tarfs"\n')
    for version in VERSIONS:
        found = tomllib.loads(fragment(version, load(tmp_path / "c.toml")))
        table = "io.containerd.cri.v1.images" if version.startswith("2") else "io.containerd.grpc.v1.cri"
        images = found["plugins"][table]
        assert (images if version.startswith("2") else images["containerd"])["snapshotter"] == "tardev"
        assert "tardev-host" not in fragment(version, load(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.6", "1.6"), ("1.6.20", "1.6"), ("v1.7.27", "1.7"), ("2.0.0-rc.1", "2.0"), ("2.1.9", "2.1"), ("2.2", "2.1"),
     ("3.0", "2.1")],
)  # fmt: skip
def test_versions(text: str, version: str) -> None:
    assert version_of(text) == version


@pytest.mark.parametrize("text", ["", "1", "1.5.9", "x", "latest", "1.x"])
def test_no_version(text: str) -> None:
    with pytest.raises(ConfigError, match="there is one for"):
        version_of(text)
