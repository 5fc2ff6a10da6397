"""The NumPy body of batch normalisation, on contiguous arrays and a collapsed layout.

The same five functions as the kernel body in ``batch_norm.kernels``. Small arrays take whole-array expressions
(``batch_norm.direct``), larger ones blocks and threads (``batch_norm.sweeps``); what happens per channel is here, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers.ops.batch_norm import direct, sweeps
from gpulayers.ops.batch_norm import moving as batch_norm_moving
from gpulayers.ops.batch_norm.layout import Layout
from gpulayers.ops.batch_norm.moving import MovingStatistics, Renorm
from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.host.settings import quiet

__all__ = ["Tables", "backward", "channel_tables", "forward", "gradient_tables", "inference", "inference_backward"]


class Tables(NamedTuple):
    """What one training step knows per channel: averaged moments (C,), factors (groups, C), what backward needs."""

    mean: Any
    variance: Any
    a: Any
    b: Any
    saved: Any


def channel_tables(
    xp: Any,
    pivot: Any,
    offset: Any,
    variance: Any,
    gamma: Any,
    beta: Any,
    epsilon: float,
    renorm: Renorm | None,
    dtype: Any,
) -> Tables:
    """Turn moments of shape (groups, C) into ``y = (x - pivot) * a + b`` and what backward needs.

    ``a = gamma r / s``, ``b = beta + gamma d - offset a``, ``s = sqrt(variance + epsilon)``; r = 1 and d = 0 without
    renorm. `pivot` None stands for zeros. `offset` None says that `pivot` is the mean itself, to all its digits; `b` is
    then beta + gamma d, or None. `saved` has shape (3, groups, C): pivot, offset, 1 / s; with renorm (5, groups, C):
    also r and d.
    """
    groups, channels = variance.shape
    inverse = 1 / xp.sqrt(variance + epsilon)
    saved = xp.empty((3 if renorm is None else 5, groups, channels), dtype)
    saved[0], saved[2] = 0 if pivot is None else pivot, inverse
    if offset is None:
        mean = pivot
        saved[1] = pivot - saved[0]
    else:
        mean = offset if pivot is None else pivot + offset
        saved[1] = offset
    mean, average = (mean[0], variance[0]) if groups == 1 else (mean.mean(axis=0), variance.mean(axis=0))
    a, b = inverse, None if beta is None else _row(beta)
    if renorm is not None:
        r, d = batch_norm_moving.corrections(xp, mean, average, epsilon, renorm)
        saved[3], saved[4] = r, d
        a = a * r
        d = d if gamma is None else d * _row(gamma)
        b = d if b is None else b + d
    if gamma is not None:
        a = a * _row(gamma)
    if offset is not None:
        b = -offset * a if b is None else b - offset * a
    return Tables(mean.astype(dtype, copy=False), average.astype(dtype, copy=False), a, b, saved)


def _row(values: Any) -> Any:
    """Return per-channel values flat."""
    return values if values.ndim == 1 else values.reshape(-1)


def gradient_tables(xp: Any, sums: tuple[Any, Any], saved: Any, gamma: Any, count: int) -> tuple[Any, ...]:
    """Turn the sums of g and of ``g * (x - pivot)``, (groups, C) each, into (a, slope, b, dgamma, dbeta).

    ``dx = (g + (x - pivot) slope + b) a``: `a`, `slope`, `b` of shape (groups, C). dgamma and dbeta: (C,).
    """
    offset, inverse = saved[1], saved[2]
    first, centred = sums[0], sums[1] - sums[0] * offset
    a, dgamma = inverse, centred * inverse
    if saved.shape[0] == 5:
        a, dgamma = a * saved[3], dgamma * saved[3] + saved[4] * first
    if gamma is not None:
        a = a * _row(gamma)
    slope = -centred * inverse * inverse / count
    b = -first / count - offset * slope
    if saved.shape[1] == 1:
        return a, slope, b, dgamma[0], first[0]
    return a, slope, b, dgamma.sum(axis=0), first.sum(axis=0)


def _empty(layout: Layout, dtype: Any, renorm: Renorm | None) -> tuple[Any, Any, Any]:
    zero = np.zeros(layout.channels, dtype)
    return zero, zero.copy(), np.zeros((3 if renorm is None else 5, layout.groups, layout.channels), dtype)


@quiet
def forward(
    x: Any,
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
    """Return (y, mean, variance, saved) of a training step, and update `moving` in place."""
    if x.size == 0:
        return (np.empty_like(x), *_empty(layout, dtype, renorm))
    small = direct.suits(layout)
    if small:
        centre, variance, shifted = direct.moments(x, layout)
        pivot, offset = centre, None
    else:
        pivot, offset, variance = sweeps.moments(x, layout, dtype)
    tables = channel_tables(np, pivot, offset, variance, gamma, beta, epsilon, renorm, dtype)
    if small:
        result = direct.normalise(shifted, layout, tables.a, tables.b, residual, relu)
        y = result.astype(x.dtype, copy=False).reshape(x.shape)
    else:
        y = recycled(x.shape, x.dtype)
        affine = sweeps.Affine(pivot, tables.a, tables.b)
        sweeps.normalise(x, y, layout, affine, residual, relu, dtype)
    if moving is not None:
        batch_norm_moving.update(moving, tables.mean, tables.variance, epsilon, layout.samples)
    return y, tables.mean, tables.variance, tables.saved


@quiet
def backward(
    dy: Any, x: Any, layout: Layout, gamma: Any, saved: Any, y: Any, residual: bool, dtype: Any
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of a training step; `y` is None where there was no ReLU."""
    if x.size == 0:
        zero = np.zeros(layout.channels, dtype)
        return np.empty_like(x), zero, zero.copy(), dy
    own_residual = residual and y is not None  # without a ReLU the residual's gradient is dy itself
    if direct.suits(layout):
        shifted = direct.shift(x, layout, saved[0], dtype)
        g, *sums = direct.backward_sums(dy, layout, shifted, y)
        a, slope, b, dgamma, dbeta = gradient_tables(np, (sums[0], sums[1]), saved, gamma, layout.samples)
        dx = direct.backward_apply(g, layout, a, shifted, slope, b).astype(x.dtype, copy=False).reshape(x.shape)
        dresidual = g.astype(x.dtype, copy=False).reshape(x.shape) if own_residual else dy
    else:
        pivot = saved[0] if saved[0].any() else None
        double = sweeps.backward_sums(dy, x, layout, pivot, y, dtype)
        a, slope, b, dgamma, dbeta = gradient_tables(np, double, saved, gamma, layout.samples)
        dx = recycled(x.shape, x.dtype)
        dresidual = recycled(x.shape, x.dtype) if own_residual else None
        affine = sweeps.Affine(pivot, a, b)
        sweeps.backward_apply(dy, x, dx, dresidual, layout, affine, slope, y, dtype)
        dresidual = dresidual if own_residual else dy
    return dx, dgamma.astype(dtype, copy=False), dbeta.astype(dtype, copy=False), dresidual if residual else None


def _inference_tables(layout: Layout, gamma: Any, mean: Any, variance: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """Return (mean, inverse, gamma * inverse), each (groups, C) = (1, C)."""
    inverse = 1 / np.sqrt(variance.reshape(1, -1) + epsilon)
    return mean.reshape(1, -1), inverse, inverse if gamma is None else inverse * gamma.reshape(1, -1)


@quiet
def inference(
    x: Any,
    layout: Layout,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    epsilon: float,
    residual: Any,
    relu: bool,
    dtype: Any,
) -> Any:
    """Return ``(x - mean) * gamma / sqrt(variance + epsilon) + beta`` (+ residual, then ReLU)."""
    if x.size == 0:
        return np.empty_like(x)
    mean, inverse, a = _inference_tables(layout, gamma, mean, variance, epsilon)
    bias = None if beta is None else beta.reshape(1, -1)
    if direct.suits(layout):
        result = direct.shift(x, layout, mean, dtype)
        return direct.normalise(result, layout, a, bias, residual, relu).astype(x.dtype, copy=False).reshape(x.shape)
    y = recycled(x.shape, x.dtype)
    affine = sweeps.near_zero(mean, a, bias, inverse)
    sweeps.normalise(x, y, layout, affine, residual, relu, dtype)
    return y


@quiet
def inference_backward(
    dy: Any,
    x: Any,
    layout: Layout,
    gamma: Any,
    mean: Any,
    variance: Any,
    epsilon: float,
    y: Any,
    residual: bool,
    dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of inference, the moving statistics constant."""
    if x.size == 0:
        zero = np.zeros(layout.channels, dtype)
        return np.empty_like(x), zero, zero.copy(), dy if residual else None
    own_residual = residual and y is not None
    mean, inverse, a = _inference_tables(layout, gamma, mean, variance, epsilon)
    if direct.suits(layout):
        shifted = direct.shift(x, layout, mean, dtype)
        g, first, second = direct.backward_sums(dy, layout, shifted, y)
        dx = direct.backward_apply(g, layout, a, shifted, None, None).astype(x.dtype, copy=False).reshape(x.shape)
        dresidual = g.astype(x.dtype, copy=False).reshape(x.shape) if own_residual else dy
    else:
        first, second = sweeps.backward_sums(dy, x, layout, mean if mean.any() else None, y, dtype)
        dx = recycled(x.shape, x.dtype)
        dresidual = recycled(x.shape, x.dtype) if own_residual else None
        affine = sweeps.Affine(None, a, np.zeros_like(a))
        sweeps.backward_apply(dy, x, dx, dresidual, layout, affine, None, y, dtype)
        dresidual = dresidual if own_residual else dy
    dgamma, dbeta = second[0] * inverse[0], first[0]
    return dx, dgamma.astype(dtype, copy=False), dbeta.astype(dtype, copy=False), dresidual if residual else None


@quiet
def statistics(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any]:
    """Return mean and biased variance, shape (groups, C)."""
    if x.size == 0:
        return np.zeros(layout[1:4:2], dtype), np.zeros(layout[1:4:2], dtype)
    if direct.suits(layout):
        mean, variance, _ = direct.moments(x, layout)
        return mean.astype(dtype, copy=False), variance.astype(dtype, copy=False)
    pivot, offset, variance = sweeps.moments(x, layout, dtype)
    mean = offset if pivot is None else pivot + offset
    return mean.astype(dtype, copy=False), variance.astype(dtype, copy=False)
