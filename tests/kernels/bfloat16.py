"""bfloat16 for parameters of tests; without ml_dtypes its name, and tests with it in their name skip (conftest.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import ml_dtypes
except ImportError:  # a borrowed GPU machine may have no more than NumPy, CuPy and pytest
    BFLOAT16: Any = "bfloat16"
    finfo: Any = np.finfo
else:
    BFLOAT16, finfo = np.dtype(ml_dtypes.bfloat16), ml_dtypes.finfo

HAS_BFLOAT16 = not isinstance(BFLOAT16, str)
