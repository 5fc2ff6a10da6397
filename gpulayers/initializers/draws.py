"""The maths of initial values, shared by both families: drawn on the host, whatever the device.

16-bit dtypes are drawn as float32 and cast. Every function takes a NumPy generator; the same state gives the same bits
on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpulayers.dtypes import dtype_name, is_floating
from gpulayers.errors import DTypeError, ShapeError, message

__all__ = ["diagonal", "fans", "filled", "normal", "orthogonal", "scaled", "truncated", "uniform"]

# Standard deviation of a standard normal that is redrawn beyond two: dividing by it restores the one asked for.
TRUNCATED_STDDEV = 0.87962566103423978
MODES = ("fan_in", "fan_out", "fan_avg")
DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform", "normal")

Shape = tuple[int, ...]


def _wide(dtype: np.dtype) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def require_floating(name: str, dtype: np.dtype) -> None:
    """Raise DTypeError (which is also a ValueError here, as in Keras) unless `dtype` is floating."""
    if not is_floating(dtype):
        raise InitializerDTypeError(message(name, "draws real numbers", "a floating dtype", dtype_name(dtype)))


class InitializerDTypeError(DTypeError, ValueError):
    """An initializer is asked for a dtype it has no values for."""


def fans(shape: Shape) -> tuple[int, int]:
    """Return (inputs, outputs) of a kernel: a matrix's rows and columns, times the receptive field of a convolution.

    >>> fans(()), fans((5,)), fans((2, 3)), fans((3, 3, 4, 8))
    ((1, 1), (5, 5), (2, 3), (36, 72))
    """
    if not shape:
        return 1, 1
    if len(shape) == 1:
        return shape[0], shape[0]
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


def filled(name: str, shape: Shape, dtype: np.dtype, value: Any) -> np.ndarray:
    """Return an array of one number. Raises for dtypes that are neither numbers nor booleans."""
    if dtype.kind in "SUOM":
        raise InitializerDTypeError(message(name, "has no value for this dtype", "a number dtype or bool", dtype))
    return np.full(shape, value, dtype=dtype)


def uniform(generator: np.random.Generator, shape: Shape, dtype: np.dtype, low: float, high: float) -> np.ndarray:
    """Draw uniformly from ``[low, high)``; integers for an integer dtype."""
    if dtype.kind in "iu":
        return np.asarray(generator.integers(int(low), int(high), size=shape, dtype=np.int64)).astype(dtype)
    require_floating("random_uniform", dtype)
    wide = _wide(dtype)
    drawn = np.asarray(generator.random(shape, dtype=wide) * wide(high - low) + wide(low))  # a scalar draw is no array
    if high > low:  # rounding may reach the open end
        np.minimum(drawn, np.nextafter(wide(high), wide(low)), out=drawn)
    return drawn.astype(dtype, copy=False)


def normal(generator: np.random.Generator, shape: Shape, dtype: np.dtype, mean: float, stddev: float) -> np.ndarray:
    """Draw from a normal distribution."""
    require_floating("random_normal", dtype)
    wide = _wide(dtype)
    drawn = generator.standard_normal(shape, dtype=wide)
    return (drawn * wide(stddev) + wide(mean)).astype(dtype, copy=False)


def truncated(generator: np.random.Generator, shape: Shape, dtype: np.dtype, mean: float, stddev: float) -> np.ndarray:
    """Draw from a normal distribution, again for whatever lies beyond two standard deviations."""
    require_floating("truncated_normal", dtype)
    wide = _wide(dtype)
    drawn = np.asarray(generator.standard_normal(shape, dtype=wide))
    while (outside := np.abs(drawn) > 2).any():
        drawn[outside] = generator.standard_normal(int(outside.sum()), dtype=wide)
    return (drawn * wide(stddev) + wide(mean)).astype(dtype, copy=False)


def check_scaling(name: str, scale: float, mode: str, distribution: str) -> tuple[str, str]:
    """Return mode and distribution in lower case. Raises ValueError for unknown ones and a scale of 0 or less."""
    if not scale > 0:
        raise ValueError(message(name, "scale is not positive", "more than 0", scale))
    mode, distribution = str(mode).lower(), str(distribution).lower()
    if mode not in MODES:
        raise ValueError(message(name, "unknown mode", ", ".join(MODES), repr(mode)))
    if distribution not in DISTRIBUTIONS:
        raise ValueError(message(name, "unknown distribution", ", ".join(DISTRIBUTIONS), repr(distribution)))
    return mode, "truncated_normal" if distribution == "normal" else distribution


def scaled(
    generator: np.random.Generator,
    shape: Shape,
    dtype: np.dtype,
    scale: float,
    mode: str,
    distribution: str,
    full_shape: Shape | None = None,
) -> np.ndarray:
    """Draw with variance ``scale / n``, n the number of inputs, outputs or their mean of `full_shape` or `shape`.

    `truncated_normal` has that variance after truncation; `uniform` is ``+-sqrt(3 scale / n)``.
    """
    fan_in, fan_out = fans(full_shape or shape)
    count = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    variance = scale / max(1.0, count)
    if distribution == "truncated_normal":
        return truncated(generator, shape, dtype, 0.0, math.sqrt(variance) / TRUNCATED_STDDEV)
    if distribution == "untruncated_normal":
        return normal(generator, shape, dtype, 0.0, math.sqrt(variance))
    limit = math.sqrt(3 * variance)
    return uniform(generator, shape, _floating("variance_scaling", dtype), -limit, limit)


def _floating(name: str, dtype: np.dtype) -> np.dtype:
    require_floating(name, dtype)
    return dtype


def orthogonal(generator: np.random.Generator, shape: Shape, dtype: np.dtype, gain: float) -> np.ndarray:
    """Return `gain` times a matrix (leading axes as one, last axis) whose rows or columns, the fewer, are orthonormal.

    The factor Q of a normal matrix, with the signs of R's diagonal, so that it is uniformly distributed.
    Raises ValueError for fewer than two axes.
    """
    require_floating("orthogonal", dtype)
    if len(shape) < 2:
        raise ShapeError(message("orthogonal", "needs a matrix", "2 axes or more", shape))
    rows, columns = math.prod(shape[:-1]), shape[-1]
    drawn = generator.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(drawn)
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    q = q.T if rows < columns else q
    return (gain * q.reshape(shape)).astype(_wide(dtype)).astype(dtype, copy=False)


def diagonal(shape: Shape, dtype: np.dtype, gain: float) -> np.ndarray:
    """Return a matrix with `gain` on its diagonal. Raises ValueError unless there are two axes."""
    require_floating("identity", dtype)
    if len(shape) != 2:
        raise ShapeError(message("identity", "needs a matrix", "2 axes", shape))
    return (gain * np.eye(*shape)).astype(dtype)
