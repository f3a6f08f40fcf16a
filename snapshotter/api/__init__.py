# SPDX-License-Identifier: Apache-2.0
"""containerd's interfaces, as far as they are spoken here: our own minimal .proto files and generated code."""
