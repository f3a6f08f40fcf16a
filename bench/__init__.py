# SPDX-License-Identifier: Apache-2.0
"""Speed and memory, compared within one run: figures of different runs or machines mean little beside each other."""
