# SPDX-License-Identifier: Apache-2.0
"""Contiguous bytes that are read, not kept; and how to read some of a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# collections.abc.Buffer is as young as Python 3.12.
Buffer: TypeAlias = bytes | bytearray | memoryview
ReadAt: TypeAlias = Callable[[int, int], bytes]  # (offset, size) in bytes → at most size bytes
