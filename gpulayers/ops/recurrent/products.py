"""Products of a recurrent sequence on NumPy, cut so small that BLAS makes them at once.

For a larger product BLAS first copies its operands into packed panels, which for a few rows costs as much as the
product and is done again at every step, and starts threads of its own, which go on waiting for more work in a busy loop
and take a processor from the thread that could do something else meanwhile. So weights lie in strips of columns here,
one small product each; ``np.matmul`` goes over them in one call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.ops.host.buffers import recycled

__all__ = ["SMALL_PRODUCT", "WORTH_A_THREAD", "in_strips", "strip_width", "weight_strips"]


def _small_product() -> int:
    """Return up to how many multiplications OpenBLAS makes a product at once, on the thread that asks.

    Everywhere it stays on one thread up to 2^18; for processors with AVX-512 it has kernels that take larger ones so,
    and leave their operands where they are.
    """
    core = os.environ.get("OPENBLAS_CORETYPE", "").upper()
    wide = core in _WIDE_CORES if core else "AVX512_SKX" in _enabled_features()
    return 1 << 19 if wide else 1 << 18


_WIDE_CORES = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")


def _enabled_features() -> set[str]:
    """Return the features of this processor that NumPy uses."""
    module: Any = sys.modules.get("numpy._core._multiarray_umath")  # a private name: no features where it is gone
    return {name for name, used in getattr(module, "__cpu_features__", {}).items() if used}


SMALL_PRODUCT = _small_product()
"""Multiplications up to which BLAS makes a product at once."""

WORTH_A_THREAD = 1 << 22
"""Multiplications for which another thread is asked: some 100 us, several times what asking costs."""

_WIDTHS = (64, 32, 16)  # columns: a strip of weights stays in the first-level cache while the rows pass


def strip_width(rows: int, depth: int, columns: int) -> int:
    """Return the columns of a strip such that ``(rows, depth) (depth, columns)`` is made of small products; 0: none.

    >>> strip_width(16, 128, 512), strip_width(16, 128, 100), strip_width(1024, 1024, 64)
    (64, 100, 0)
    """
    fit = (width for width in (*_WIDTHS, columns) if 0 < width <= columns and columns % width == 0)
    return next((width for width in fit if 0 < rows * depth * width <= SMALL_PRODUCT), 0)


def weight_strips(
    weights: np.ndarray, rows: int, dtype: Any, order: Sequence[int] = (0,), scale: Any = None
) -> np.ndarray:
    """Return weights (D, gates * U) as aligned strips (gates, S, D, U / S), for products with so many rows.

    The gates stand in the given `order`, each multiplied by its `scale`. One strip per gate where none is small enough.
    """
    depth, gates = weights.shape[0], len(order)
    units = weights.shape[1] // gates
    width = strip_width(rows, depth, units) or units
    strips = recycled((gates, units // max(width, 1), depth, width), dtype)
    apart = weights.reshape(depth, gates, -1, width).transpose(1, 2, 0, 3) if weights.size else strips
    for gate, column in enumerate(order):
        np.multiply(apart[column], 1 if scale is None else dtype.type(scale[gate]), out=strips[gate], dtype=dtype)
    return strips


def in_strips(array: np.ndarray, strips: np.ndarray) -> np.ndarray:
    """Return the view (..., S, N, U / S) of an array (..., N, U) into which the products with `strips` go."""
    _, count, _, width = strips.shape
    return array.reshape(*array.shape[:-1], count, width).swapaxes(-3, -2)
