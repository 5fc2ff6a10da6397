"""Reductions over axes. Names and arguments are NumPy's; 16-bit floats are accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.dtypes import as_dtype
from gpulayers.ops.arithmetic import equal, exp, not_equal, where
from gpulayers.ops.operation import (
    GradientContext,
    Operation,
    Spec,
    broadcast_like,
    cast_operation,
    result_dtype,
)
from gpulayers.ops.shaping import flip, ravel, reshape_like
from gpulayers.ops.static import axes_of, is_small_float, reduced_shape, static_shape

__all__ = [
    "all",
    "any",
    "argmax",
    "argmin",
    "count_nonzero",
    "cumsum",
    "logsumexp",
    "max",
    "mean",
    "min",
    "prod",
    "std",
    "sum",
    "var",
]


def _accumulated(name: str) -> Callable[..., Any]:
    """Make the forward of a reduction that NumPy and CuPy have under `name` with a `dtype` to accumulate in."""

    def forward(xp: Any, x: Any, *, axis: Any, keepdims: bool, **options: Any) -> Any:
        function = getattr(xp, name)
        if is_small_float(x.dtype):
            return function(x, axis=axis, dtype=np.float32, keepdims=keepdims, **options).astype(x.dtype)
        return function(x, axis=axis, keepdims=keepdims, **options)

    return forward


def _plain(name: str) -> Callable[..., Any]:
    """Make the forward of a reduction that adds nothing up."""
    return lambda xp, x, *, axis, keepdims: getattr(xp, name)(x, axis=axis, keepdims=keepdims)


def _shape_rule(name: str, forward: Callable[..., Any]) -> Callable[..., Spec]:
    """Make the shape rule of a reduction; the dtype is what `forward` gives."""

    def spec(x: Spec, *, axis: Any, keepdims: bool, **options: Any) -> Spec:
        shape = reduced_shape(name, x.shape, axis, keepdims)
        options |= {"ddof": 0} if "ddof" in options else {}  # the probe is one element
        return Spec(shape, result_dtype(forward, [Spec((), x.dtype)], axis=None, keepdims=False, **options))

    return spec


def _reduction(name: str, forward: Callable[..., Any], gradient: Any = None, type: str | None = None) -> Operation:
    return Operation(
        name,
        forward,
        spec=_shape_rule(name, forward),
        gradient=None if gradient is None else (gradient,),
        type=type,
    )


# --- what gradient rules need -----------------------------------------------------------------------------------------


def _restore(xp: Any, y: Any, x: Any, *, axis: Any) -> Any:
    """Give a reduced array its axes back, with size 1."""
    axes = axes_of("restore_axes", axis, x.ndim)
    return y.reshape(tuple(1 if index in axes else size for index, size in enumerate(x.shape)))


_restore_axes = Operation(
    "restore_axes",
    _restore,
    spec=lambda y, x, axis: Spec(
        None if x.shape is None else reduced_shape("restore_axes", x.shape, axis, True), y.dtype
    ),
    gradient=(lambda c, g: reshape_like(g, c.x), None),
)


def _axis_size(xp: Any, x: Any, *, axis: Any) -> Any:
    """Count the elements that one result of a reduction over `axis` is made of."""
    return xp.full((), _count_of(x.shape, axis), dtype=x.dtype)  # filled on the device: nothing is copied there


def _count_of(shape: Any, axis: Any) -> int:
    return int(np.prod([shape[index] for index in axes_of("reduction", axis, len(shape))], dtype=np.int64))


_axis_size_operation = Operation("axis_size", _axis_size, spec=lambda x, axis: Spec((), x.dtype))


def _count(x: Any, axis: Any) -> Any:
    """Return the number of elements reduced over: a Python number where it is known now."""
    shape = static_shape(x)
    if shape is not None and None not in [shape[index] for index in axes_of("reduction", axis, len(shape))]:
        return _count_of(shape, axis)
    return _axis_size_operation(x, axis=axis)


def _kept(value: Any, c: GradientContext) -> Any:
    """Return a reduced value (the result or its cotangent) with the reduced axes as size 1."""
    axis = c["axis"]
    return (
        value if c["keepdims"] or (axis is None and static_shape(value) == ()) else _restore_axes(value, c.x, axis=axis)
    )


def _spread(g: Any, c: GradientContext) -> Any:
    """Return the cotangent of a reduction stretched back over what was reduced."""
    return broadcast_like(_kept(g, c), c.x)


# --- the reductions ---------------------------------------------------------------------------------------------------


def _extremum_rule(c: GradientContext, g: Any) -> Any:
    chosen = equal(c.x, _kept(c.y, c))
    share = cast_operation(chosen, dtype=g.dtype)
    return share * (_kept(g, c) / _sum(share, axis=c["axis"], keepdims=True))


def _prod_rule(c: GradientContext, g: Any) -> Any:
    # x may hold zeros, so the product of the others cannot be y / x: with one zero it is the product of the rest.
    zero = equal(c.x, 0)
    safe = where(zero, 1.0, c.x)
    rest = _prod(safe, axis=c["axis"], keepdims=True)
    zeros = _sum(zero, axis=c["axis"], keepdims=True)
    others = where(zero, where(equal(zeros, 1), rest, 0.0), where(equal(zeros, 0), rest / safe, 0.0))
    return _kept(g, c) * others


def _deviation(c: GradientContext) -> Any:
    return c.x - _mean(c.x, axis=c["axis"], keepdims=True)


def _var_rule(c: GradientContext, g: Any) -> Any:
    return _kept(g, c) * _deviation(c) * (2.0 / (_count(c.x, c["axis"]) - c["ddof"]))


def _std_rule(c: GradientContext, g: Any) -> Any:
    return _kept(g / c.y, c) * _deviation(c) * (1.0 / (_count(c.x, c["axis"]) - c["ddof"]))


def _logsumexp_forward(xp: Any, x: Any, *, axis: Any, keepdims: bool) -> Any:
    """Return `log(sum(exp(x)))`, shifted by the largest element so that nothing overflows."""
    wide = x.astype(np.float32) if is_small_float(x.dtype) else x
    largest = xp.max(wide, axis=axis, keepdims=True)
    shift = xp.where(xp.isfinite(largest), largest, 0 * xp.isfinite(largest))
    total = xp.log(xp.sum(xp.exp(wide - shift), axis=axis, keepdims=True)) + shift
    result = total if keepdims else xp.squeeze(total, axis=axes_of("logsumexp", axis, x.ndim))
    return result.astype(x.dtype) if is_small_float(x.dtype) else result


def _cumsum_forward(xp: Any, x: Any, *, axis: Any) -> Any:
    """Return the running sum along `axis`."""
    if is_small_float(x.dtype):
        return xp.cumsum(x, axis=axis, dtype=np.float32).astype(x.dtype)
    return xp.cumsum(x, axis=axis)


_sum = _reduction("sum", _accumulated("sum"), lambda c, g: _spread(g, c), type="Sum")
_mean = _reduction("mean", _accumulated("mean"), lambda c, g: _spread(g, c) / _count(c.x, c["axis"]), type="Mean")
_max = _reduction("max", _plain("max"), _extremum_rule, type="Max")
_min = _reduction("min", _plain("min"), _extremum_rule, type="Min")
_prod = _reduction("prod", _accumulated("prod"), _prod_rule, type="Prod")
_var = _reduction("var", _accumulated("var"), _var_rule)
_std = _reduction("std", _accumulated("std"), _std_rule)
_all = _reduction("all", _plain("all"), type="All")
_any = _reduction("any", _plain("any"), type="Any")
_argmax = _reduction("argmax", _plain("argmax"), type="ArgMax")
_argmin = _reduction("argmin", _plain("argmin"), type="ArgMin")
_logsumexp = _reduction(
    "logsumexp", _logsumexp_forward, lambda c, g: _kept(g, c) * exp(c.x - _kept(c.y, c)), type="LogSumExp"
)
_cumsum: Operation = Operation(
    "cumsum",
    _cumsum_forward,
    spec=lambda x, axis: Spec(x.shape, result_dtype(_cumsum_forward, [Spec((1,), x.dtype)], axis=0)),
    gradient=(lambda c, g: flip(_cumsum(flip(g, c["axis"]), axis=c["axis"]), c["axis"]),),
)


def _cast_first(x: Any, dtype: Any) -> Any:
    return x if dtype is None else cast_operation(x, dtype=as_dtype(dtype))


def _axis(axis: Any) -> Any:
    """Return `axis` as None, an integer or a tuple: lists and arrays are not hashable."""
    return tuple(int(one) for one in axis) if hasattr(axis, "__len__") else axis


def sum(x: Any, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
    """Return the sum over `axis` (None: all axes; an integer; a tuple), computed in `dtype` if given.

    16-bit floats are added up in float32 and returned as they came. Small integers widen as in NumPy.

    >>> import numpy as np
    >>> sum(np.ones((2, 3)), axis=0)
    array([2., 2., 2.])
    """
    return _sum(_cast_first(x, dtype), axis=_axis(axis), keepdims=keepdims)


def mean(x: Any, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
    """Return the mean over `axis`; integers give a floating result.

    >>> import numpy as np
    >>> mean(np.array([[1.0, 2.0], [3.0, 4.0]]), axis=1)
    array([1.5, 3.5])
    """
    return _mean(_cast_first(x, dtype), axis=_axis(axis), keepdims=keepdims)


def prod(x: Any, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
    """Return the product over `axis`. The gradient is right where `x` holds zeros, its own gradient there is not."""
    return _prod(_cast_first(x, dtype), axis=_axis(axis), keepdims=keepdims)


def max(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return the largest element over `axis`; equal ones share the gradient. Raises ValueError for an empty range."""
    return _max(x, axis=_axis(axis), keepdims=keepdims)


def min(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return the smallest element over `axis`; equal ones share the gradient. Raises ValueError for an empty range."""
    return _min(x, axis=_axis(axis), keepdims=keepdims)


def var(x: Any, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Any:
    """Return the variance over `axis`, `sum((x - mean)**2) / (m - ddof)`, from two passes over the data."""
    return _var(x, axis=_axis(axis), keepdims=keepdims, ddof=ddof)


def std(x: Any, axis: Any = None, *, ddof: float = 0, keepdims: bool = False) -> Any:
    """Return the square root of `var`. Its gradient is infinite or not a number where all elements are equal."""
    return _std(x, axis=_axis(axis), keepdims=keepdims, ddof=ddof)


def all(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return whether every element over `axis` is true."""
    return _all(x, axis=_axis(axis), keepdims=keepdims)


def any(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return whether an element over `axis` is true."""
    return _any(x, axis=_axis(axis), keepdims=keepdims)


def argmax(x: Any, axis: int | None = None, *, keepdims: bool = False) -> Any:
    """Return the index of the first largest element along `axis`, int64; None looks at the flattened array."""
    return _argmax(x, axis=axis, keepdims=keepdims)


def argmin(x: Any, axis: int | None = None, *, keepdims: bool = False) -> Any:
    """Return the index of the first smallest element along `axis`, int64; None looks at the flattened array."""
    return _argmin(x, axis=axis, keepdims=keepdims)


def logsumexp(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return `log(sum(exp(x)))` over `axis`, without overflow.

    >>> import numpy as np
    >>> float(logsumexp(np.array([1000.0, 1000.0])) - 1000.0) == float(np.log(2.0))
    False
    >>> abs(float(logsumexp(np.array([1000.0, 1000.0])) - 1000.0 - np.log(2.0))) < 1e-12
    True
    """
    return _logsumexp(x, axis=_axis(axis), keepdims=keepdims)


def count_nonzero(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Return how many elements over `axis` are not zero, int64."""
    return sum(not_equal(x, 0), axis, keepdims=keepdims)


def cumsum(x: Any, axis: int | None = None) -> Any:
    """Return the running sum along `axis`; None takes the flattened array."""
    return _cumsum(ravel(x), axis=0) if axis is None else _cumsum(x, axis=axis)
