"""Adding up device rows by place, in a fixed order: the gradient of every selection."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.dtypes import dtype_name
from gpulayers.launch import Kernel, contiguous

__all__ = ["add_rows", "has_kernel"]

_THREADS = 256
_DTYPES = ("float16", "bfloat16", "float32", "float64")

_kernel = Kernel(
    "indexing.cu",
    "gl_add_rows",
    arguments=[
        ("rows", "const STORAGE*"),
        ("order", "const int64*"),
        ("places", "const int64*"),
        ("out", "STORAGE*"),
        ("count", "int64"),
        ("width", "int64"),
    ],
    defines={"STORAGE": _DTYPES},
)


def has_kernel(dtype: Any) -> bool:
    """Say whether `add_rows` takes rows of this dtype."""
    return dtype_name(dtype) in _DTYPES


def add_rows(rows: Any, order: Any, places: Any, out: Any) -> None:
    """Write the sum of the rows of each place to that row of `out`, in one launch; the other rows stay as they are.

    Parameters: `rows` (n, ...) and `out` (m, ...), device arrays of one dtype among float16, bfloat16, float32 and
    float64, `out` C-contiguous; `order` (n,), integers that sort the rows by place, stably; `places` (n,), the places
    in that order, from 0 to m - 1. Sums run from front to back, of 16-bit data in float32, rounded once.
    """
    count = rows.shape[0]
    rows, order, places = contiguous(rows, order.astype(np.int64, copy=False), places.astype(np.int64, copy=False))
    values = {"rows": rows, "order": order, "places": places, "out": out, "count": count, "width": rows.size // count}
    _kernel.launch(values, grid=(-(-rows.size // _THREADS),), block=(_THREADS,), defines={"STORAGE": rows.dtype})
