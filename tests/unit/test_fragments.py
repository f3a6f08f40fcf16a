# SPDX-License-Identifier: Apache-2.0
"""The files of config/ for containerd, as text; tests/integration/test_fragments.py starts them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter.config import Config

FRAGMENTS = sorted((Path(__file__).parents[2] / "config").glob("containerd-*.toml"))
KEY = re.compile(r"\s*([a-z_]+) = ")


def keys_without_a_comment(text: str) -> Iterator[str]:
    """A comment stands over the key, or over the table whose keys follow each other."""
    commented = False
    explained: set[str] = set()
    for line in text.splitlines():
        key = KEY.match(line)
        if line.lstrip().startswith("#"):
            commented = True
        elif key:
            if commented:
                explained.add(key[1])
            elif key[1] not in explained:
                yield key[1]
        elif not line.strip():
            commented = False


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_every_key_is_explained(fragment: Path) -> None:
    # The first lines say what the file is.
    assert list(keys_without_a_comment(fragment.read_text())) == []


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_it_agrees_with_our_own_default(fragment: Path) -> None:
    table: dict[str, Any] = tomllib.loads(fragment.read_text())
    ours = Config()
    proxies = table["proxy_plugins"]
    assert {name for name, proxy in proxies.items() if proxy["type"] == "snapshot"} == set(ours.snapshotters)
    assert {proxy["address"] for proxy in proxies.values()} == {ours.address}
    for proxy in proxies.values():
        assert proxy.get("exports", {"root": ours.root}) == {"root": ours.root}
