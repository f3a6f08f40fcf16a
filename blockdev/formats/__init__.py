# SPDX-License-Identifier: Apache-2.0
"""Byte layouts: pure code, no I/O beyond the file objects and callables it is given."""
