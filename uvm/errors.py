# SPDX-License-Identifier: Apache-2.0
"""What can go wrong around the machine. A refusal by the guest is none of these: it is a result."""

from __future__ import annotations


class UVMError(Exception):
    """Base of all errors of this package."""


class ImageError(UVMError):
    """The guest's image cannot be built from these packages, or is not there."""


class PolicyError(UVMError):
    """Something that the guest's policy cannot say."""


class MachineError(UVMError):
    """QEMU did not start, ended early or ran out of time; or the guest sent what no guest of ours sends."""
