"""What shape rules share: axes, sizes that may be unknown, and shapes given as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.device import asnumpy, current_device, is_array, module_of
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.operation import Recordable, Shape

__all__ = [
    "axes_of",
    "axis_of",
    "default_module",
    "host_sizes",
    "is_small_float",
    "known_size",
    "reduced_shape",
    "sizes_of",
    "static_shape",
    "widened",
]


def static_shape(value: Any) -> Shape:
    """Return the sizes of an array, number or tensor, None for unknown ones; None if even the rank is unknown."""
    shape = value.shape if hasattr(value, "shape") else np.shape(value)
    if isinstance(shape, tuple):
        return shape
    return None if shape.rank is None else tuple(shape)


def known_size(shape: Shape) -> int | None:
    """Return the number of elements, or None if a size is unknown."""
    if shape is None or None in shape:
        return None
    return int(np.prod(shape, dtype=np.int64))  # type: ignore[arg-type]


def axis_of(name: str, axis: int, rank: int) -> int:
    """Return `axis` counted from the front. Raises ShapeError if there is no such axis."""
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise DTypeError(message(name, "axis is not an integer", "an integer", repr(axis)))
    index = int(axis)
    if not -rank <= index < rank:
        raise ShapeError(message(name, "axis is out of range", f"{-rank} <= axis < {rank}", index))
    return index % rank


def axes_of(name: str, axis: Any, rank: int) -> tuple[int, ...]:
    """Return axes counted from the front: all for None, one for an integer. Raises ShapeError if one repeats."""
    if axis is None:
        return tuple(range(rank))
    given = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    axes = tuple(axis_of(name, one, rank) for one in given)
    if len(set(axes)) != len(axes):
        raise ShapeError(message(name, "an axis is given twice", "different axes", given))
    return axes


def reduced_shape(name: str, shape: Shape, axis: Any, keepdims: bool) -> Shape:
    """Return the shape after reducing over `axis`."""
    if shape is None:
        return () if axis is None and not keepdims else None
    axes = axes_of(name, axis, len(shape))
    if keepdims:
        return tuple(1 if index in axes else size for index, size in enumerate(shape))
    return tuple(size for index, size in enumerate(shape) if index not in axes)


def sizes_of(name: str, shape: Any) -> tuple[tuple[int | None, ...] | None, Any]:
    """Split a `shape` argument into what is known now and the tensor that knows the rest.

    Returns (sizes, None) for integers and arrays; (sizes with None for unknown ones or None, a vector) where a graph or
    tape tensor is among them. A single integer is a shape of one axis.
    """
    from gpulayers.ops import shaping  # shaping is built on this module

    if isinstance(shape, Recordable):
        vector = static_shape(shape)
        rank = vector[0] if vector else None
        return (None if rank is None else (None,) * rank), shape
    if is_array(shape):
        return tuple(int(size) for size in np.atleast_1d(asnumpy(shape))), None
    sizes = tuple(shape) if not hasattr(shape, "__index__") else (shape,)
    if any(isinstance(size, Recordable) for size in sizes):
        vector_of_sizes = shaping.stack([shaping.cast(size, np.int32) for size in sizes])
        return tuple(None if isinstance(size, Recordable) else int(size) for size in sizes), vector_of_sizes
    if any(not hasattr(size, "__index__") for size in sizes):
        raise DTypeError(message(name, "a size is not an integer", "integers", repr(shape)))
    return tuple(int(size) for size in sizes), None


def host_sizes(vector: Any) -> tuple[int, ...]:
    """Return the integers in an array. A device array is copied to the host, which waits for the device."""
    return tuple(int(size) for size in np.atleast_1d(asnumpy(vector)))


def default_module() -> Any:
    """Return the array module of the default device: what has no array input is created there."""
    return module_of(current_device())


def is_small_float(dtype: np.dtype) -> bool:
    """Say whether a dtype is a 16-bit floating one (bfloat16 included), whose sums are taken in float32."""
    return dtype.itemsize == 2 and (dtype.kind == "f" or dtype.name == "bfloat16")


def widened(arrays: Sequence[Any]) -> tuple[list[Any], np.dtype | None]:
    """Return the arrays with 16-bit floats turned to float32, and the dtype to return to (None: nothing was 16-bit)."""
    small = [a.dtype for a in arrays if hasattr(a, "dtype") and is_small_float(a.dtype)]
    if not small:
        return list(arrays), None
    wide = [a.astype(np.float32) if hasattr(a, "dtype") and is_small_float(a.dtype) else a for a in arrays]
    others = [a.dtype for a in arrays if hasattr(a, "dtype") and not is_small_float(a.dtype)]
    return wide, np.result_type(*small, *others)
