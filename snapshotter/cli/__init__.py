# SPDX-License-Identifier: Apache-2.0
"""tardevctl: one module per noun."""
