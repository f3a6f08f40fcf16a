# SPDX-License-Identifier: Apache-2.0
"""The two processes of a build, and what starts them.

    blob ─► builder ═pipe═► decompressor ═pipe═► builder ─► staged file, result

The builder hashes what it reads and what comes back, scans, and writes. The decompressor, the only
code here that parses compressed bytes in C, holds two pipes and nothing else: taken over, it can
choose bytes, which the digests then refuse.
"""
