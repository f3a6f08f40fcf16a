# SPDX-License-Identifier: Apache-2.0
from tests.nodes.conftest import boot as boot
