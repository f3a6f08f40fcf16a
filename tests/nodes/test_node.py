# SPDX-License-Identifier: Apache-2.0
"""The guest itself: what it has, and that a node works in it."""

from __future__ import annotations

import json

import pytest

from tests.nodes.conftest import Boot

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.tool, pytest.mark.containerd]


def last_document(output: str) -> dict[str, object]:
    """What a module in the guest prints at its end."""
    document: dict[str, object] = json.loads(output.splitlines()[-1])
    return document


@pytest.mark.soak
def test_a_container_runs_in_a_node_in_a_guest(boot: Boot) -> None:
    node = boot()
    assert "verity" in node.run("dmsetup targets")
    said = last_document(node.python("tests.nodes.smoke"))
    print(said)
    assert said["output"] == "hello\n"
