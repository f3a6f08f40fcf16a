# SPDX-License-Identifier: Apache-2.0
from setuptools import Extension, setup

setup(
    ext_modules=[
        # Optional: without a compiler the package works all the same, through hashlib.
        Extension("verity._leafhash", ["verity/_leafhash.c"], extra_compile_args=["-O3"], optional=True),
        # Optional, too: then through ctypes.
        Extension("blockdev.workers._sandbox", ["blockdev/workers/_sandbox.c"], optional=True),
    ]
)
