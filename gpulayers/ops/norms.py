"""The Euclidean length of several arrays together, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.ops import optimizer_kernels
from gpulayers.ops.operation import GradientContext, Operation, Spec, match, result_dtype

__all__ = ["global_norm"]

_KERNEL_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _host(xp: Any, *arrays: Any) -> Any:
    total: Any = 0.0
    for x in arrays:
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 else x  # a 16-bit number's square may not fit 16 bits
        total = xp.sum(xp.square(wide)) + total
    return xp.sqrt(total)


def _device(xp: Any, *arrays: Any) -> Any:
    if all(x.dtype.name in _KERNEL_DTYPES for x in arrays):
        return optimizer_kernels.global_norm(arrays)
    return _host(xp, *arrays)


def _spec(*specs: Spec) -> Spec:
    return Spec((), result_dtype(_host, [Spec((1,), spec.dtype) for spec in specs]))


def _gradient(c: GradientContext, g: Any) -> tuple[Any, ...]:
    """The length grows along each array's own direction: ``g x / norm``."""
    slope = g / c.y
    pairs = zip(c.inputs, c.needs, strict=True)
    return tuple(match(slope * x, x) if needed else None for x, needed in pairs)


_operation = Operation(
    "global_norm",
    _host,
    spec=_spec,
    gradient=_gradient,
    kernel=_device,
    type="GlobalNorm",
    doc="The Euclidean length of all inputs together, sqrt(sum of squares).",
)


def global_norm(arrays: Sequence[Any]) -> Any:
    """Return ``sqrt(sum of the squares of all elements)`` of one or more arrays, of shape ().

    float64 if one of the arrays is, else float32 for floating arrays. On a device one launch reads all arrays of a
    dtype, squares are added in float64, and the bits are the same on every run. Each gradient is ``g x / norm``, which
    is NaN where everything is 0.

    >>> float(global_norm([np.array([3.0]), np.array([[0.0, 4.0]])]))
    5.0
    """
    return _operation(*arrays)
