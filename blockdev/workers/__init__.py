# SPDX-License-Identifier: Apache-2.0
"""The two processes of a build, and what starts them.

    blob ─► builder ═ring═► decompressor ═ring═► builder ─► staged files, result

The builder hashes what it reads and what comes back, scans, and writes. The decompressor, the only
code here that parses compressed bytes in C, is handed two rings and a file for its report: from it come
bytes, which the digests then refuse where they are others than the image's. Both run as who starts
them; taking their privileges away is still to come.
"""
