# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: snapshotter → policy → blockdev → verity → standard library; uvm stands above blockdev."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["verity", "blockdev", "policy", "uvm", "snapshotter"]
# What a package may bring in from outside; None: anything that pyproject.toml names.
OUTSIDE: dict[str, set[str] | None] = {
    "verity": set(),
    "blockdev": {"isal", "zstandard", "pyroute2", "aiohttp", "msgspec", "qemu"},
    "policy": None,
    "uvm": {"zstandard"},
}
# Only these know gRPC and protobuf.
GRPC = {"api", "service", "interceptor", "daemon", "errors"}  # who is called,
GRPC |= {"containerd", "content", "desync", "image_layers", "images", "ingest"}  # and who calls containerd
GRPC |= {"maintenance"}  # and tardevctl, which calls the daemon


def modules() -> list[tuple[str, Path]]:
    return [(package, path) for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize(("package", "path"), modules(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_go_one_way(package: str, path: Path) -> None:
    for name in imports(path):
        top = name.partition(".")[0]
        if top in ORDER:
            assert ORDER.index(top) <= ORDER.index(package), f"{package} must not import {name}"
        elif top not in sys.stdlib_module_names:
            allowed = OUTSIDE.get(package)
            assert allowed is None or top in allowed, f"{package} must not import {name}"


def test_only_the_command_line_knows_the_reference_uvm() -> None:
    for path in (ROOT / "snapshotter").rglob("*.py"):
        if path.relative_to(ROOT / "snapshotter").parts[0] != "cli":
            assert not any(name.partition(".")[0] == "uvm" for name in imports(path)), path


def test_pure_code_starts_nothing_and_opens_nothing() -> None:
    for path in (ROOT / "blockdev" / "formats").glob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"os", "subprocess", "asyncio", "socket", "io", "tempfile", "shutil"}, path


def test_only_the_clients_of_vmms_bring_their_libraries() -> None:
    """What serves or builds layers starts without them."""
    for path in (ROOT / "blockdev").rglob("*.py"):
        if path.parent.name != "vmm":
            assert not {name.partition(".")[0] for name in imports(path)} & {"aiohttp", "qemu"}, path


def test_only_the_edge_knows_grpc() -> None:
    for path in (ROOT / "snapshotter").rglob("*.py"):
        part = path.relative_to(ROOT / "snapshotter").parts[0].removesuffix(".py")
        tops = {name.partition(".")[0] for name in imports(path)}
        if part not in GRPC:
            assert not tops & {"grpc", "grpc_health", "google"}, path


def test_the_daemon_does_not_load_what_few_ask_for() -> None:
    """Its memory is that of a node with thousands of pods."""
    heavy = "{'cryptography', 'oras', 'regopy', 'requests', 'ruamel', 'typer', 'aiohttp'}"
    subprocess.run(
        [sys.executable, "-c", f"import sys, snapshotter.daemon; assert not {heavy} & set(sys.modules), sys.modules"],
        check=True,
        cwd=ROOT,
    )
