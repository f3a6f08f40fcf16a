# SPDX-License-Identifier: Apache-2.0
"""What the daemon says of itself, and how much of it it writes down."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from snapshotter import metastore
from snapshotter.api.proto import maintenance_pb2, maintenance_pb2_grpc
from tests.harness import BIN, SNAPSHOTTER, Daemon, wait_for
from tests.integration.test_recovery import held
from tests.integration.test_snapshots_api import Api, digest_of

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.tool]


def tardevctl(daemon: Daemon, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and error."""
    done = subprocess.run(
        [BIN / "tardevctl", *arguments, "--config", daemon.config], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def large_tar_of(name: str) -> bytes:
    content = os.urandom(8 << 20)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def status(daemon: Daemon) -> tuple[int, dict[str, Any]]:
    code, out, err = tardevctl(daemon, "status", "--json")
    assert out, err
    found: dict[str, Any] = json.loads(out)
    return code, found


def test_a_node_without_a_problem(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)
        api.prepare(api.key("container"), api.layer("a"))
    code, found = status(daemon)
    assert code == 0
    assert found["state"] == "serving"
    assert daemon.process is not None
    assert (found["pid"], found["root"], found["problems"]) == (daemon.process.pid, str(daemon.root), [])
    [layer] = daemon.layers()
    size = layer.file_size_bytes
    assert found["layers"] == [{"format": "tar-index", "state": "ready", "count": 1, "size_bytes": size}]
    assert found["snapshotters"][SNAPSHOTTER] == {
        "contract": "host",
        "format": "tar-index",
        "active": 1,
        "committed": 1,
    }
    assert found["mounts_held"] == 1
    code, out, _ = tardevctl(daemon, "status")
    assert code == 0
    assert f"serving: version {found['version']}, process {daemon.process.pid}, root {daemon.root}" in out
    assert "\nproblem" not in out


def test_a_build_and_those_that_wait(daemon: Daemon) -> None:
    """Three, of which two have their turn; their processes are held meanwhile."""
    names = ("a", "b", "c")
    tars = {name: large_tar_of(name) for name in names}
    held_pids: set[int] = set()
    with (
        daemon.client() as client,
        grpc.insecure_channel(f"unix:{daemon.address}") as channel,
        ThreadPoolExecutor(3) as pool,
    ):
        api = Api(daemon, client)
        maintenance = maintenance_pb2_grpc.MaintenanceStub(channel)
        calls = []
        for name in names:
            mounts = api.prepare(api.key(f"extract-1-x sha256:{hashlib.sha256(tars[name]).hexdigest()}"))
            calls.append(pool.submit(api.apply, tars[name], mounts))
        found: list[dict[str, Any]] = []

        def all_three() -> bool:
            assert daemon.process is not None
            pid = daemon.process.pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                held_pids.add(int(child))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGSTOP)
            reply = maintenance.Status(maintenance_pb2.StatusRequest(), timeout=30)
            found[:] = MessageToDict(reply.status)["builds"]
            return len(found) == 3

        try:
            wait_for("all are seen", all_three)
            code, out, _ = tardevctl(daemon, "status")
        finally:
            while not all(call.done() for call in calls):
                for pid in held_pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)
    assert code == 0
    assert sorted(each["is_waiting"] for each in found) == [False, False, True]
    assert {each["what"] for each in found} == {digest_of(tar) for tar in tars.values()}
    assert {each["size_bytes"] for each in found} == {len(tars["a"])}
    assert out.count("\nbuild of sha256:") == 3
    assert out.count(": waits, ") == 1
    assert [call.result() for call in calls] == [digest_of(tars[name]) for name in names]
    assert status(daemon)[1]["builds"] == []


def test_problems_and_what_mends_them(daemon: Daemon) -> None:
    with daemon.client() as client:
        Api(daemon, client).layer("a")
    [path] = daemon.layer_files()
    daemon.stop()
    shutil.rmtree(daemon.directory.parent / "containerd")
    os.truncate(path, 4096)
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace('free_space_reserve = "0"', 'free_space_reserve = "8191TiB"'))
    daemon.restart()
    os.unlink(daemon.root / "reserve")
    code, found = status(daemon)
    assert code == 1
    said = [problem["what"] for problem in found["problems"]]
    for words in (
        "1 layers are broken", "1 damaged layer files were put aside", "less than builds.free_space_reserve",
        "no room set aside for removals", "containerd's content store is not at",
    ):  # fmt: skip
        assert len([each for each in said if words in each]) == 1, words
    assert len(said) == 5
    code, out, _ = tardevctl(daemon, "status")
    assert (code, out.count("\nproblem: ")) == (1, 5)


def test_a_start_that_is_not_over_and_none(daemon: Daemon) -> None:
    daemon.stop()
    code, out, err = tardevctl(daemon, "status")
    assert (code, out) == (1, "")
    assert err == f"tardevctl: no daemon serves at {daemon.address}\n"
    with held(daemon.root / metastore.FILE_NAME):
        daemon.launch()
        wait_for("the socket", daemon.address.exists)
        code, found = status(daemon)
        assert (code, found["state"]) == (0, "recovering")
    wait_for("it is over", lambda: status(daemon)[1]["state"] == "serving")


def test_the_log_says_more_from_now_on(daemon: Daemon) -> None:
    with daemon.client() as client:
        api = Api(daemon, client)

        def logged() -> list[str]:
            """Of one call."""
            before = len(daemon.log.read_text())
            api.list()
            text = ""

            def ended() -> bool:
                nonlocal text
                text = daemon.log.read_text()[before:]
                return '"event": "rpc"' in text

            wait_for("the call's line", ended)
            return re.findall(r'"event": "([^"]*)"', text)

        assert logged() == ["rpc"]
        assert tardevctl(daemon, "log-level", "debug") == (0, "info\n", "")
        assert logged() == ["rpc begins", "rpc"]
        assert tardevctl(daemon, "log-level", "info") == (0, "debug\n", "")
        assert logged() == ["rpc"]
        code, _, err = tardevctl(daemon, "log-level", "loud")
        assert code == 1
        assert "no log level is called 'loud'; there are debug, info, warning, error" in err
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        wait_for("it is said", lambda: '"now": "debug"' in daemon.log.read_text())
        assert logged() == ["rpc begins", "rpc"]
        daemon.process.send_signal(signal.SIGHUP)
        wait_for("it is said", lambda: '"now": "info"' in daemon.log.read_text())
        assert logged() == ["rpc"]
