# SPDX-License-Identifier: Apache-2.0
"""The pod owner's side: images, the root hashes of their layers, pod manifests, policies, signatures."""
