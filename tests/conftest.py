"""Triton kernels run in its CPU interpreter in every test: it reads the variable when it is first
imported, which may be in any test module.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
