"""Arrays made from nothing but a shape and numbers. They are made on the default device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.device import asarray, asnumpy, current_device, is_array, placed
from gpulayers.dtypes import as_dtype
from gpulayers.errors import DTypeError, message
from gpulayers.ops.operation import Operation, Recordable, Shape, Spec
from gpulayers.ops.shaping import broadcast_to, cast, identity
from gpulayers.ops.static import default_module, host_sizes, sizes_of

__all__ = [
    "arange",
    "constant",
    "eye",
    "full",
    "full_like",
    "made",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]


def made(
    name: str, create: Callable[..., Any], *, type: str | None = None, stateful: bool = False
) -> Callable[..., Any]:
    """Define an operation that fills a shape: ``create(xp, shape, dtype=..., **options)``.

    Returns a function ``(shape, dtype=..., **options)`` whose `shape` may hold tensors.
    """

    def forward(xp: Any, *vector: Any, shape: Shape, dtype: np.dtype, **options: Any) -> Any:
        sizes = host_sizes(vector[0]) if vector else shape
        with placed(current_device()):
            return create(default_module(), sizes, dtype=dtype, **options)

    operation = Operation(
        name,
        forward,
        spec=lambda *vector, shape, dtype, **options: Spec(shape, dtype),
        type=type,
        stateful=stateful,
    )

    def function(shape: Any, dtype: Any, **options: Any) -> Any:
        known, vector = sizes_of(name, shape)
        inputs = () if vector is None else (vector,)
        return operation(*inputs, shape=known, dtype=as_dtype(dtype), **options)

    return function


_full = made("full", lambda xp, shape, *, dtype, value: xp.full(shape, value, dtype=dtype), type="Fill")


def full(shape: Any, fill_value: Any, dtype: Any = None) -> Any:
    """Return an array of `shape` that holds `fill_value` everywhere.

    `shape`: integers, or a tensor of them. `dtype`: that of `fill_value` if not given (float32 for Python floats).

    >>> full((2,), 7.0)
    array([7., 7.], dtype=float32)
    """
    if isinstance(fill_value, Recordable) or is_array(fill_value):
        return broadcast_to(fill_value if dtype is None else cast(fill_value, dtype), shape)
    return _full(shape, _dtype_of(fill_value) if dtype is None else dtype, value=fill_value)


def _dtype_of(value: Any) -> np.dtype:
    return np.dtype(bool) if isinstance(value, bool) else np.dtype(np.int32 if isinstance(value, int) else np.float32)


def zeros(shape: Any, dtype: Any = np.float32) -> Any:
    """Return zeros. `shape`: integers, or a tensor of them.

    >>> zeros((1, 2))
    array([[0., 0.]], dtype=float32)
    """
    return _full(shape, dtype, value=0)


def ones(shape: Any, dtype: Any = np.float32) -> Any:
    """Return ones. `shape`: integers, or a tensor of them."""
    return _full(shape, dtype, value=1)


_full_like = Operation(
    "full_like",
    lambda xp, x, *, value, dtype: xp.full(np.shape(x), value, dtype=_like_dtype(x, dtype)),
    spec=lambda x, value, dtype: Spec(x.shape, np.dtype(dtype or x.dtype)),
    type="FillLike",
)


def _like_dtype(x: Any, dtype: np.dtype | None) -> np.dtype:
    if dtype is not None:
        return dtype
    return x.dtype if hasattr(x, "dtype") else asarray(x).dtype


def full_like(x: Any, fill_value: Any, dtype: Any = None) -> Any:
    """Return an array shaped as `x`, and in its dtype unless `dtype` is given, full of the number `fill_value`."""
    return _full_like(x, value=fill_value, dtype=None if dtype is None else as_dtype(dtype))


def zeros_like(x: Any, dtype: Any = None) -> Any:
    """Return zeros shaped as `x`; no gradient flows back."""
    return full_like(x, 0, dtype)


def ones_like(x: Any, dtype: Any = None) -> Any:
    """Return ones shaped as `x`; no gradient flows back."""
    return full_like(x, 1, dtype)


_eye = made(
    "eye", lambda xp, shape, *, dtype, diagonal: xp.eye(shape[0], shape[1], k=diagonal, dtype=dtype), type="MatrixDiag"
)


def eye(N: Any, M: Any = None, k: int = 0, dtype: Any = np.float32) -> Any:  # noqa: N803 (NumPy's names)
    """Return a matrix of `N` rows and `M` columns (`N` if not given) with ones on diagonal `k`.

    >>> eye(2)
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    return _eye((N, N if M is None else M), dtype, diagonal=int(k))


def _range_length(start: float, stop: float, step: float) -> int:
    return max(int(np.ceil((stop - start) / step)), 0)


_range = Operation(
    "arange",
    lambda xp, *, start, stop, step, dtype: default_module().arange(start, stop, step, dtype=dtype),
    spec=lambda *, start, stop, step, dtype: Spec((_range_length(start, stop, step),), dtype),
    type="Range",
)
_dynamic_range = Operation(
    "dynamic_range",
    lambda xp, *limits, dtype: default_module().arange(*(asnumpy(limit).item() for limit in limits), dtype=dtype),
    spec=lambda *limits, dtype: Spec((None,), dtype),
    type="Range",
)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> Any:
    """Return the numbers from `start` (0 if only one limit is given) up to, but without, `stop`.

    Limits may be tensors. `dtype`: int32 for integers, float32 for floats, a tensor's own, unless given.

    >>> arange(3)
    array([0, 1, 2], dtype=int32)
    """
    limits = (0, start, step) if stop is None else (start, stop, step)
    if any(hasattr(limit, "dtype") for limit in limits):
        chosen = next(limit.dtype for limit in limits if hasattr(limit, "dtype"))
        return _dynamic_range(*limits, dtype=as_dtype(dtype or chosen))
    if not step:
        raise ValueError(message("arange", "the step is zero", "a number other than 0", step))
    if any(not isinstance(limit, int | float | np.number) for limit in limits):
        raise DTypeError(message("arange", "a limit is not a number", "numbers or tensors", limits))
    integral = all(isinstance(limit, int | np.integer) for limit in limits)
    chosen = np.int32 if integral else np.float32
    return _range(start=limits[0], stop=limits[1], step=limits[2], dtype=as_dtype(dtype or chosen))


def constant(value: Any, dtype: Any = None, shape: Any = None) -> Any:
    """Return `value` (numbers, nested lists, an array) as an array of the default device; in a graph, as a tensor.

    A `value` with one element fills `shape` if it is given.

    >>> constant([1, 2])
    array([1, 2], dtype=int32)
    """
    array = asarray(value, dtype=None if dtype is None else as_dtype(dtype))
    if shape is not None:
        array = broadcast_to(array, shape) if array.size == 1 else array.reshape(tuple(shape))
    return identity(array)
