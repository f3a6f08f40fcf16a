# SPDX-License-Identifier: Apache-2.0
"""One module per interface of the kernel."""
