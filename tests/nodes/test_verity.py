# SPDX-License-Identifier: Apache-2.0
"""The option `host.verity`, where there is device-mapper."""

from __future__ import annotations

import pytest

from tests.nodes.conftest import Boot
from tests.nodes.test_node import last_document

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.tool, pytest.mark.containerd]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_containers_read_what_the_root_hash_vouches_for(boot: Boot) -> None:
    said = last_document(boot().python("tests.nodes.verity", seconds=1100))
    print(said)
    assert said["shared"] == ["V"]  # of two containers; the one from before has none
    assert said["mounts"] == 2
    assert said["after_a_kill"] == ["V"]
    assert "as EROFS" in str(said["wrong_root_hash"])
    for what in ("tampered", "still_refused"):
        assert "error" in str(said[what]).lower(), said[what]
    assert said["noticed"] == ["C"]
    assert said["repaired"] == "hello from a tar layer"
