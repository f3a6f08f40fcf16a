# SPDX-License-Identifier: Apache-2.0
"""The two processes of a build, and what starts them.

    blob ─► builder ═ring═► decompressor ═ring═► builder ─► staged files, result

The builder hashes what it reads and what comes back, scans, and writes. The decompressor, the only
code here that parses compressed bytes in C, is handed two rings and a file for its report: from it come
bytes, which the digests then refuse where they are others than the image's. Before the first of these
bytes each gives up all that it does not need (`sandbox`): what takes one over can compute, and write to
the descriptors that it was given.
"""
