# SPDX-License-Identifier: Apache-2.0
"""Disks of running virtual machines: one protocol, a module for each virtual machine monitor."""
