"""Batch normalisation with weights (masks): whole-array expressions that run on NumPy and on CuPy alike.

Masks are rare and their weights may vary in any way that broadcasts, so this path is written for being right: it makes
temporaries of the size of the input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.errors import ShapeError, message
from gpulayers.ops import batch_norm_moving
from gpulayers.ops.batch_norm_moving import MovingStatistics, Renorm
from gpulayers.ops.batch_norm_numpy import channel_tables, gradient_tables
from gpulayers.ops.batch_norm_plan import Layout

__all__ = ["backward", "broadcast", "forward", "moments", "share"]

AXES = (0, 2, 4)


def broadcast(xp: Any, weights: Any, shape: tuple[int, ...], layout: Layout, dtype: Any) -> Any:
    """Return `weights`, broadcast to the input's shape, in the five sizes of the layout.

    Raises ShapeError where they do not broadcast.
    """
    try:
        full = xp.broadcast_to(weights.astype(dtype), shape)
    except ValueError as error:
        raise ShapeError(
            message(
                "batch_norm",
                "mask or weights do not fit the input",
                f"weights that broadcast to {shape}",
                tuple(weights.shape),
                "A layer's mask has the input's shape without its last axis; weights are it with a 1 behind.",
            )
        ) from error
    if layout.order is not None:
        full = full.transpose(layout.order)
    return full.reshape(layout[:5])


def moments(xp: Any, x: Any, weights: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Return (pivot, mean - pivot, variance), shape (groups, channels), of `x` and `weights` in five sizes.

    ``mean = sum(w x) / W``, ``variance = sum(w (x - mean)^2) / W``, ``W = sum(w)``; both 0 where W is 0. Values of
    weight 0 count for nothing even where they are not finite.
    """
    values = x.astype(dtype)
    counted = weights != 0
    total = weights.sum(axis=AXES)
    some = total != 0
    safe = xp.where(some, total, 1)
    pivot = (xp.where(counted, values, 0) * weights).sum(axis=AXES) / safe
    shifted = xp.where(counted, values - pivot[None, :, None, :, None], 0)
    offset = (shifted * weights).sum(axis=AXES) / safe
    centred = xp.where(counted, shifted - offset[None, :, None, :, None], 0)
    variance = (centred * centred * weights).sum(axis=AXES) / safe
    return pivot, offset, xp.where(some, variance, 0)


def share(xp: Any, weights: Any) -> Any:
    """Return each value's share in its statistics, ``w / W``, 0 where W is 0: what 1 / count is without weights."""
    total = weights.sum(axis=AXES, keepdims=True)
    return xp.where(total != 0, weights / xp.where(total != 0, total, 1), 0)


def forward(
    xp: Any,
    x: Any,
    weights: Any,
    layout: Layout,
    gamma: Any,
    beta: Any,
    epsilon: float,
    renorm: Renorm | None,
    residual: Any,
    relu: bool,
    moving: MovingStatistics | None,
    dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return (y, mean, variance, saved) of a training step with weights, and update `moving` in place."""
    with np.errstate(all="ignore"):
        values = x.reshape(layout[:5])
        pivot, offset, variance = moments(xp, values, weights, dtype)
        tables = channel_tables(xp, pivot, offset, variance, gamma, beta, epsilon, renorm, dtype)
        y = (values.astype(dtype) - _spread(pivot)) * _spread(tables.a) + _spread(tables.b)
        y = y.reshape(x.shape)
        if residual is not None:
            y = y + residual.astype(dtype)
        if relu:
            y = xp.maximum(y, 0)
        if moving is not None:
            batch_norm_moving.update(moving, tables.mean, tables.variance, epsilon, layout.samples, xp)
    return y.astype(x.dtype), tables.mean, tables.variance, tables.saved


def backward(
    xp: Any, dy: Any, x: Any, weights: Any, layout: Layout, gamma: Any, saved: Any, y: Any, residual: bool, dtype: Any
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual); the means of the formula become weighted, each value by its share."""
    with np.errstate(all="ignore"):
        g = dy.astype(dtype).reshape(layout[:5])
        if y is not None:
            g = xp.where(y.reshape(layout[:5]) > 0, g, 0)
        part = share(xp, weights)
        shifted = x.astype(dtype).reshape(layout[:5]) - _spread(saved[0])
        product = xp.where(g != 0, g * shifted, 0)  # padding may be NaN: where nothing uses it, it has no gradient
        sums = g.sum(axis=AXES), product.sum(axis=AXES)
        a, slope, b, dgamma, dbeta = gradient_tables(xp, sums, saved, gamma, 1)
        dx = (g + xp.where(part != 0, part * (shifted * _spread(slope) + _spread(b)), 0)) * _spread(a)
        dresidual = (dy if y is None else g.astype(x.dtype).reshape(x.shape)) if residual else None
    return dx.astype(x.dtype).reshape(x.shape), dgamma, dbeta, dresidual


def _spread(table: Any) -> Any:
    """Return a (groups, channels) table in a shape that broadcasts against the five sizes."""
    return table[None, :, None, :, None]
