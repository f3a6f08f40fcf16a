# SPDX-License-Identifier: Apache-2.0
"""What the documents say is measured is, and moves."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_every_run
from tests.harness import CHECKOUT, SNAPSHOTTER, Daemon, ProcessFailed, wait_for
from tests.integration.test_damage import fsck
from tests.integration.test_snapshots_api import Api, Code, chain_of, refused, tar_of

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]

_ROW = re.compile(r"\| `(tardev_[a-z_]+)` \| ([^|]*)\|")


def documented() -> dict[str, set[str]]:
    """Names, with their labels."""
    text = (CHECKOUT / "docs" / "metrics.md").read_text()
    return {name: set(re.findall(r"`([a-z]+)`", labels)) for name, labels in _ROW.findall(text)}


def scraped(daemon: Daemon) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{daemon.metrics_port}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


def values(text: str) -> dict[str, dict[str, float]]:
    """By metric, then by its labels as they are written; of a histogram how many were observed."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(r"^(tardev_[a-z_]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        if not name.endswith(("_bucket", "_sum")):
            found.setdefault(name.removesuffix("_count"), {})[labels] = float(value)
    return found


def test_the_documents_name_every_metric_and_its_labels(daemon: Daemon) -> None:
    with daemon.client() as client:
        everything(Api(daemon, client))
    text = scraped(daemon)
    found = values(text)
    assert found.keys() == documented().keys()
    for name, series in found.items():
        for labels in series:
            assert set(re.findall(r'([a-z]+)="', labels)) == documented()[name], name
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def everything(api: Api) -> None:
    """One of each, as far as a daemon alone can have it."""
    parent = api.layer("a")
    api.prepare(api.key("container"), parent)
    api.apply(tar_of("a"), api.prepare(api.key(f"extract-1-x {chain_of(['a'])}")))
    mounts = api.prepare(api.key(f"extract-2-x {chain_of(['b'])}"))
    refused(Code.INVALID_ARGUMENT, api.apply, b"no tar at all" * 1000, mounts)
    (api.daemon.root / "staging" / "stray").write_bytes(b"x")
    assert fsck(api.daemon, "--repair")[0] == 0


def test_they_move(daemon: Daemon) -> None:
    with daemon.client() as client:
        before = values(scraped(daemon))
        everything(Api(daemon, client))
        after = values(scraped(daemon))

    def moved(name: str) -> float:
        return sum(after[name].values()) - sum(before.get(name, {}).values())

    assert after["tardev_builds_total"] == {f'format="tar-index",result="{end}"': 1 for end in ("ok", "failed")}
    assert after["tardev_build_seconds"] == after["tardev_builds_total"]
    assert after["tardev_layers"] == {'format="tar-index",state="ready"': 1}
    [layer] = daemon.layers()
    assert after["tardev_layer_bytes"] == {'format="tar-index",state="ready"': layer.file_size_bytes}
    assert moved("tardev_build_file_bytes_total") == layer.file_size_bytes
    assert moved("tardev_build_blob_bytes_total") == moved("tardev_build_tar_bytes_total") == layer.tar_size_bytes
    assert moved("tardev_builds_cached_total") == 1
    assert after["tardev_snapshots"] == {
        f'kind="active",snapshotter="{SNAPSHOTTER}"': 3, f'kind="committed",snapshotter="{SNAPSHOTTER}"': 1,
    }  # fmt: skip
    assert moved("tardev_mounts_held") == 1
    assert moved("tardev_reconcile_actions_total") == 1
    assert moved("tardev_worker_cpu_seconds_total") > 0
    assert moved("tardev_worker_peak_bytes") == 1
    assert after["tardev_oldest_check_timestamp_seconds"][""] == pytest.approx(layer.verified_ns / 1e9)
    assert after["tardev_rpc_seconds"]['code="INVALID_ARGUMENT",method="Apply"'] == 1
    assert after["tardev_reserve_kept"] == {"": 1}
    assert after["tardev_layers_unused"] == {"": 0}


@pytest.mark.soak
def test_joined_and_waiting_builds_are_seen(daemon: Daemon) -> None:
    """Three of one blob, and three more, with two workers."""
    daemon.stop()
    daemon.restart({"TARDEV_TRACE_PAUSE": f"build.built={daemon.directory / 'go'}"})
    # All of the daemon rests there, and the three calls meet one build, or what it has left.
    with daemon.client() as client:
        api = Api(daemon, client)
        mounts = [api.prepare(api.key(f"extract-{n}-x {chain_of(['a'])}")) for n in range(3)]
        calls = [threading.Thread(target=api.apply, args=(tar_of("a"), each)) for each in mounts]
        for call in calls:
            call.start()
        (daemon.directory / "go").touch()
        for call in calls:
            call.join()
    found = values(scraped(daemon))
    assert found["tardev_builds_total"] == {'format="tar-index",result="ok"': 1}
    assert found["tardev_builds_joined_total"][""] + found["tardev_builds_cached_total"][""] == 2


@pytest.mark.soak
def test_deleted_and_unused_layers(daemon: Daemon) -> None:
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text() + '\n[cache]\nmax_size = "1GiB"\n')
    daemon.restart()
    with daemon.client() as client:
        api = Api(daemon, client)
        name = api.layer("a")
        [layer] = daemon.layers()
        api.remove(name)
        assert values(scraped(daemon))["tardev_layers_unused_bytes"] == {"": layer.file_size_bytes}
    daemon.stop()
    daemon.config.write_text(daemon.config.read_text().replace('"1GiB"', '"0"'))
    daemon.restart()
    with daemon.client() as client:
        Api(daemon, client).cleanup()
    found = values(scraped(daemon))
    assert found["tardev_layers_deleted_total"] == {"": 1}
    assert found["tardev_layers_deleted_bytes_total"] == {"": layer.file_size_bytes}
    assert found["tardev_layers_unused"] == {"": 0}


def test_a_broken_and_a_quarantined_layer_are_seen(daemon: Daemon) -> None:
    with daemon.client() as client:
        Api(daemon, client).layer("a")
    [path] = daemon.layer_files()
    daemon.stop()
    blobs = daemon.directory.parent / "containerd/io.containerd.content.v1.content/blobs/sha256"
    shutil.rmtree(blobs)
    os.truncate(path, 4096)
    daemon.restart()
    found = values(scraped(daemon))
    assert found["tardev_layers"] == {'format="tar-index",state="broken"': 1}
    assert found["tardev_area_entries"]['area="quarantine"'] == 1
    assert found["tardev_area_bytes"]['area="quarantine"'] == 4096
    assert found["tardev_reconcile_actions_total"] == {'action="Quarantine",result="ok"': 1}


class _OverUnix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def over_unix(path: Path, method: str, target: str) -> Iterator[http.client.HTTPResponse]:
    connection = _OverUnix(path)
    connection.request(method, target)
    yield connection.getresponse()
    connection.close()


def test_a_unix_socket_and_nothing_else_on_it(daemon: Daemon) -> None:
    address = daemon.directory / "metrics.sock"
    daemon.stop()
    text = daemon.config.read_text()
    daemon.config.write_text(re.sub(r"(?<=\[metrics\]\naddress = ).*", f'"unix:{address}"', text))
    for _ in range(2):
        daemon.restart()
        assert address.stat().st_mode & 0o777 == 0o600
        for reply in over_unix(address, "GET", "/metrics?x=1"):
            assert reply.status == 200
            assert b"tardev_layers" in reply.read()
        for reply in over_unix(address, "HEAD", "/metrics"):
            assert (reply.status, reply.read()) == (200, b"")
        for target in ("/", "/metrics/", "/../etc/passwd", "/%2e"):
            for reply in over_unix(address, "GET", target):
                assert reply.status == 404
        for reply in over_unix(address, "POST", "/metrics"):
            assert reply.status == 501
        daemon.kill()  # and the next one finds its socket there
    daemon.restart()
    daemon.stop()
    assert not address.exists()


@pytest.mark.parametrize(
    "address", in_every_run(["127.0.0.1:99999", "nonsense", "unix:/proc/none/s.sock", "unix:"], "nonsense".__eq__)
)
def test_an_address_that_cannot_be_served_is_refused_by_its_key(daemon: Daemon, address: str) -> None:
    daemon.stop()
    daemon.config.write_text(re.sub(r"(?<=\[metrics\]\naddress = ).*", f'"{address}"', daemon.config.read_text()))
    with pytest.raises(ProcessFailed, match=r"metrics\.address"):
        daemon.restart()


def test_figures_are_missing_and_nothing_else_when_they_cannot_be_had(daemon: Daemon) -> None:
    os.rename(daemon.root / "staging", daemon.root / "elsewhere")
    found = values(scraped(daemon))
    assert found["tardev_scrapes_failed_total"] == {"": 0}  # it is counted behind its own scrape
    assert "tardev_layers_unused" not in found
    assert "tardev_rpc_running" not in found or found["tardev_builds_running"] == {"": 0}
    os.rename(daemon.root / "elsewhere", daemon.root / "staging")
    wait_for("they are back", lambda: "tardev_layers_unused" in values(scraped(daemon)))
    assert values(scraped(daemon))["tardev_scrapes_failed_total"] == {"": 1}
