"""The NumPy body of batch normalisation for small arrays: whole-array expressions, as few calls as there can be.

Below 32768 elements the time goes to starting NumPy calls, not to memory, so nothing is cut into blocks. The mean is
taken first and is the pivot; its own rounding is measured and carried as ``offset``, as in the blocked body.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.ops.batch_norm.layout import Layout
from gpulayers.ops.batch_norm.sweeps import clear

__all__ = ["backward_apply", "backward_sums", "clear", "moments", "normalise", "suits"]

SMALL = 32768  # elements
LONG_SUM = 1024  # NumPy adds down a column one by one: longer float32 sums lose digits

Axes = int | tuple[int, ...]


def _view(layout: Layout) -> tuple[tuple[int, ...], Axes, tuple[int, ...]]:
    """Return (shape to view arrays in, reduced axes, shape to view tables in)."""
    rows, groups, spread, channels, inner, _ = layout
    if spread == 1 and inner == 1:
        return (rows, groups * channels), 0, (groups * channels,)
    if groups == 1:
        return (rows, channels, inner), (0, 2), (channels, 1)
    return layout[:5], (0, 2, 4), (groups, 1, channels, 1)


def suits(layout: Layout) -> bool:
    """Say whether this body is the right one for the layout."""
    rows, groups, spread, channels, inner, _ = layout
    count = rows * spread * inner
    return count * groups * channels <= SMALL and count <= LONG_SUM


def moments(x: Any, layout: Layout) -> tuple[Any, Any, Any]:
    """Return (mean, biased variance), of shape (groups, channels), and ``x - mean``, all in float64."""
    shape, axes, table = _view(layout)
    values = x.reshape(shape).astype(np.float64)
    count = layout.rows * layout.spread * layout.inner
    mean = np.add.reduce(values, axes)
    mean /= count
    values -= mean.reshape(table)
    variance = np.add.reduce(values * values, axes)
    variance /= count
    both = (layout.groups, layout.channels)
    return mean.reshape(both), variance.reshape(both), values


def normalise(shifted: Any, layout: Layout, a: Any, b: Any, residual: Any, relu: bool) -> Any:
    """Return ``shifted * a + b`` (+ residual, then ReLU), in the working dtype; overwrites `shifted`."""
    shape, _, table = _view(layout)
    shifted *= a.reshape(table)
    if b is not None:
        shifted += b.reshape(table) if b.size == a.size else np.broadcast_to(b, (layout.groups, b.size)).reshape(table)
    if residual is not None:
        np.add(shifted, residual.reshape(shape), out=shifted, dtype=shifted.dtype)
    if relu:
        np.maximum(shifted, 0, out=shifted)
    return shifted


def shift(x: Any, layout: Layout, pivot: Any, dtype: Any) -> Any:
    """Return ``x - pivot`` in the working dtype, a new array."""
    shape, _, table = _view(layout)
    return np.subtract(x.reshape(shape), pivot.reshape(table), dtype=dtype)


def backward_sums(dy: Any, layout: Layout, shifted: Any, y: Any) -> tuple[Any, Any, Any]:
    """Return (g, sum of g, sum of ``g * shifted``); g is dy in the working dtype, masked where y <= 0 (y None: no
    ReLU).
    """
    shape, axes, _ = _view(layout)
    g = dy.reshape(shape)
    if g.dtype != shifted.dtype or y is not None:
        g = g.astype(shifted.dtype, order="C")
    if y is not None:
        clear(g, y.reshape(shape) > 0)
    both = (layout.groups, layout.channels)
    return (
        g,
        np.add.reduce(g, axis=axes).reshape(both),
        np.add.reduce(g * shifted, axis=axes).reshape(both),
    )


def backward_apply(g: Any, layout: Layout, a: Any, shifted: Any, slope: Any, b: Any) -> Any:
    """Return ``(g + shifted * slope + b) * a`` in the working dtype; overwrites `shifted`. `slope` None: ``g * a``."""
    table = _view(layout)[2]
    if slope is None:
        return g * a.reshape(table)
    shifted *= slope.reshape(table)
    shifted += b.reshape(table)
    shifted += g
    shifted *= a.reshape(table)
    return shifted
