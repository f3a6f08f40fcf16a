# SPDX-License-Identifier: Apache-2.0
"""The daemon: containerd's Snapshots and Diff services over layer files."""

from typing import Final

VERSION: Final = "0.1.0"
