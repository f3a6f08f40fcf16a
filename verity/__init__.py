# SPDX-License-Identifier: Apache-2.0
"""dm-verity in user space: parameters, leaf hashing, hash tree, verification. Standard library only."""
