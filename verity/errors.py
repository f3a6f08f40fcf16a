# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations


class VerityError(Exception):
    """Parameters that dm-verity does not allow, or a tree in disorder."""


class VerificationFailed(VerityError):
    """Bytes that the root hash does not vouch for; the message names the first such block."""


class VeritysetupFailed(VerityError):
    """cryptsetup's veritysetup refused, or is not there; its own words."""
