# SPDX-License-Identifier: Apache-2.0
"""What a pod owner is told. The message names the container, the image and the layer, as far as there are such."""

from __future__ import annotations


class PolicyError(Exception):
    """Base of everything that a command may end with on purpose. Nothing was written then."""


class ImageError(PolicyError):
    """An image is not there, is none that we know, or is not what its digests say."""


class RegistryError(PolicyError):
    """A registry does not answer, or refuses."""


class ManifestError(PolicyError):
    """A Kubernetes manifest cannot be used."""


class SignatureError(PolicyError):
    """A signature is missing, or is not one of what it should sign."""


class EvidenceError(PolicyError):
    """A report of a TEE is none, or does not say what it should."""
