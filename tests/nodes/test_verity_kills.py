# SPDX-License-Identifier: Apache-2.0
"""host.verity = "require" with daemon, containerd and runc, in a guest that has device-mapper."""

from __future__ import annotations

import pytest

from tests.nodes.conftest import Boot
from tests.nodes.test_node import last_document

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.tool, pytest.mark.containerd, pytest.mark.soak]


@pytest.mark.timeout(900)
def test_no_device_is_left_of_starts_at_once_and_of_kills(boot: Boot) -> None:
    said = last_document(boot().python("tests.nodes.verity_kills"))
    print(said)
    assert (said["shared"], said["killed"]) == (9, 2)  # 8 layers, and the parents layer on top of them
    assert (said["devices"], said["loops"]) == ([], [])
