"""The residual add as one operation on all leaves of a structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.dtypes import dtype_name
from gpulayers.ops.operation import GradientContext, Operation, Spec, match
from gpulayers.ops.residual_kernels import residual_add as add_on_device

__all__ = ["residual_add"]

_KERNEL_DTYPES = ("float16", "bfloat16", "float32", "float64")


def _host(xp: Any, *values: Any) -> tuple[Any, ...]:
    half = len(values) // 2
    return tuple(x + y for x, y in zip(values[:half], values[half:], strict=True))


def _device(xp: Any, *values: Any) -> tuple[Any, ...]:
    half = len(values) // 2
    pairs = list(zip(values[:half], values[half:], strict=True))
    if all(x.dtype == y.dtype and dtype_name(x.dtype) in _KERNEL_DTYPES for x, y in pairs):
        return tuple(add_on_device(values[:half], values[half:]))
    return _host(xp, *values)


def _spec(*specs: Spec) -> tuple[Spec, ...]:
    half = len(specs) // 2
    return tuple(
        Spec(y.shape if x.shape is None else x.shape, np.result_type(x.dtype, y.dtype))
        for x, y in zip(specs[:half], specs[half:], strict=True)
    )


def _gradient(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    both = zip([*gs, *gs], c.inputs, c.needs, strict=True)
    return tuple(None if g is None or not needed else match(g, like) for g, like, needed in both)


_operation = Operation(
    "residual_add",
    _host,
    spec=_spec,
    gradient=_gradient,
    kernel=_device,
    type="AddV2",
    doc="Add the first half of the operands to the second, pair by pair; shapes are equal, nothing broadcasts.",
)


def residual_add(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Return the sums of pairs of equal shapes, on a device in one launch.

    >>> residual_add([np.ones(2)], [np.ones(2)])
    [array([2., 2.])]
    """
    result = _operation(*inputs, *outputs)
    return list(result) if isinstance(result, tuple) else [result]
