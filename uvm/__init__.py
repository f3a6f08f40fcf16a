# SPDX-License-Identifier: Apache-2.0
"""The reference UVM: a small virtual machine that runs a command on layer files, verified by its kernel.

For tests, demonstrations and people who want to see it work; no product. docs/uvm.md describes it.
"""
