# SPDX-License-Identifier: Apache-2.0
"""A layer as a block device: formats (pure), workers (processes), kernel interfaces."""
