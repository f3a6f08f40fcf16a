# SPDX-License-Identifier: Apache-2.0
"""The type of contiguous bytes that are read, not kept."""

from __future__ import annotations

from typing import TypeAlias

# collections.abc.Buffer is as young as Python 3.12.
Buffer: TypeAlias = bytes | bytearray | memoryview
