# SPDX-License-Identifier: Apache-2.0
"""`tardevctl` as a person or a script meets it: output, JSON, exit status, what is left behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chains import make, parents_layer
from tests.golden import make_tars
from tests.golden.make_tars import EOA, D, F
from tests.golden.test_tar_index import build

TARDEVCTL = Path(sys.executable).parent / "tardevctl"


def tardevctl(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TARDEVCTL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, **options
    )


def output(*arguments: str | Path) -> Any:
    done = tardevctl(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def some_tar() -> bytes:
    tar = make_tars.T()
    tar.d("d", mode=0o750, uid=6)
    tar.f("d/file", b"content" * 1000, mtime=1_700_000_000)
    tar.s("link", "d/file")
    return bytes(tar.done())


@pytest.fixture
def layer(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    (tmp_path / "tar.gz").write_bytes(gzip.compress(some_tar()))
    record = output("layer", "build", tmp_path / "tar.gz", "--output", tmp_path / "layer")
    return tmp_path / "layer", record


def test_build_says_what_it_built(layer: tuple[Path, dict[str, Any]]) -> None:
    path, record = layer
    tar = some_tar()
    built, data = build(tar)
    assert path.read_bytes() == data
    assert record["format"] == "tar-index"
    assert record["diff_id"] == "sha256:" + hashlib.sha256(tar).hexdigest()
    assert record["root_hash"] == built.root_hash.hex()
    assert record["file_size_bytes"] == len(data)
    assert record["data_size_bytes"] == built.data_size_bytes
    assert record["tree_size_bytes"] == built.tree_size_bytes
    assert record["entries"] == built.entries == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_verify_accepts_the_root_hash_and_no_other(layer: tuple[Path, dict[str, Any]]) -> None:
    path, record = layer
    found = output("layer", "verify", path, "--root-hash", record["root_hash"])
    assert found["verified"] is True
    assert (found["data_block_bytes"], found["hash_block_bytes"]) == (512, 4096)
    assert found["data_size_bytes"] == record["data_size_bytes"]
    for wrong in ("0" * 64, record["root_hash"][:-1], "x" * 64, ""):
        done = tardevctl("layer", "verify", path, "--root-hash", wrong)
        assert done.returncode == 1
        assert done.stderr.startswith("tardevctl: ")
        assert done.stderr.count("\n") == 1


def test_verify_names_the_first_bad_block(layer: tuple[Path, dict[str, Any]]) -> None:
    path, record = layer
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[12 * 512 + 5] ^= 1
    path.write_bytes(data)
    done = tardevctl("layer", "verify", path, "--root-hash", record["root_hash"])
    assert done.returncode == 1
    assert "data block 12 " in done.stderr


def test_inspect_shows_the_regions(layer: tuple[Path, dict[str, Any]]) -> None:
    path, record = layer
    found = output("layer", "inspect", path)
    assert found["tar_size_bytes"] == len(some_tar())
    assert found["root_hash"] == record["root_hash"]
    assert found["dm_table"].split()[10:13] == ["sha256", record["root_hash"], "0" * 64]
    assert "root hash" in tardevctl("layer", "inspect", path).stdout


def test_ls_shows_the_files(layer: tuple[Path, dict[str, Any]]) -> None:
    path, _ = layer
    found = {entry["path"]: entry for entry in output("layer", "ls", path)}
    assert list(found) == ["/", "/d", "/d/file", "/link"]
    assert (found["/d"]["mode"], found["/d"]["uid"]) == ("040750", 6)
    assert (found["/d/file"]["size_bytes"], found["/d/file"]["mtime"]) == (7000, 1_700_000_000)
    lines = tardevctl("layer", "ls", path).stdout.splitlines()
    assert lines[1].startswith("drwxr-x---")
    assert lines[3].endswith("/link -> d/file")


@pytest.mark.parametrize("command", ["verify", "inspect", "ls", "tar"])
@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(8192), some_tar()])
def test_what_is_no_layer_file_is_refused(tmp_path: Path, command: str, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    more = ["--root-hash", "0" * 64] if command == "verify" else []
    done = tardevctl("layer", command, tmp_path / "file", *more)
    assert done.returncode == 1
    assert done.stderr.startswith("tardevctl: ")
    assert "Traceback" not in done.stderr


def test_a_failed_build_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(gzip.compress(some_tar())[:-20])
    (tmp_path / "layer").write_bytes(b"precious")
    done = tardevctl("layer", "build", tmp_path / "bad", "--output", tmp_path / "layer")
    assert done.returncode == 1
    assert "truncated" in done.stderr
    assert str(tmp_path / "bad") in done.stderr
    assert (tmp_path / "layer").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "layer"}


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(some_tar())
    done = tardevctl("layer", "build", tmp_path / "tar", "--output", tmp_path / "out", "--format", "tarf")
    assert done.returncode == 1
    assert "'tarf' is not known" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_usage_has_a_status_of_its_own(tmp_path: Path) -> None:
    assert tardevctl("layer", "build").returncode == 2
    assert tardevctl("layer", "verify", tmp_path / "absent", "--root-hash", "0" * 64).returncode == 2
    assert tardevctl("no-such-command").returncode == 2


def test_a_terminated_build_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(some_tar())
    os.mkfifo(tmp_path / "blob")
    process = subprocess.Popen(
        [TARDEVCTL, "layer", "build", tmp_path / "blob", "--output", tmp_path / "layer"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with (tmp_path / "blob").open("wb"):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"tar", "blob"}


def test_standard_input_may_be_closed(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(some_tar())
    command = f"exec {TARDEVCTL} layer build {tmp_path}/tar --output {tmp_path}/layer <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "layer").read_bytes() == build(some_tar())[1]


def test_listing_without_a_daemon_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'root = "{tmp_path}/nowhere"\n')
    for command in ("layers", "snapshots"):
        done = tardevctl(command, "--config", tmp_path / "config.toml")
        assert done.returncode == 1
        assert f"{tmp_path}/nowhere/metadata.db" in done.stderr


@pytest.fixture
def parents(tmp_path: Path) -> tuple[Path, str, str]:
    """A parents layer, its identity and its root hash."""
    made = parents_layer([make(D(b"a/", mode=0o700) + EOA), make(F(b"a/x") + EOA)])
    assert made is not None
    (tmp_path / "parents").write_bytes(made.file)
    return tmp_path / "parents", "sha256:" + made.built.diff_id.hex(), made.built.root_hash.hex()


def test_a_parents_layer_is_a_layer_file(parents: tuple[Path, str, str]) -> None:
    path, identity, root_hash = parents
    found = output("layer", "inspect", path)
    assert (found["format"], found["identity"], found["root_hash"]) == ("tar-index-parents", identity, root_hash)
    assert "diff_id" not in found
    assert "table" in {region["name"] for region in found["regions"]}
    assert output("layer", "verify", path, "--root-hash", root_hash, "--diff-id", identity)["identity"] == identity
    assert [(entry["path"], entry["mode"]) for entry in output("layer", "ls", path)] == [
        ("/", "040755"), ("/a", "040700"),
    ]  # fmt: skip


def test_a_parents_layer_has_no_tar(parents: tuple[Path, str, str], tmp_path: Path) -> None:
    done = tardevctl("layer", "tar", parents[0], "--output", tmp_path / "tar")
    assert done.returncode == 1
    assert "there is no tar of it" in done.stderr
    assert not (tmp_path / "tar").exists()


def test_a_parents_layer_is_not_built_of_one_layer(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(some_tar())
    done = tardevctl("layer", "build", tmp_path / "tar", "--output", tmp_path / "out", "--format", "tar-index-parents")
    assert done.returncode == 1
    assert "of a chain of layers" in done.stderr
