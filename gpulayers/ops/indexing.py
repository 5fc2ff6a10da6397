"""Selecting elements: indexing, gather, masks. The gradient of a selection adds up in a fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers.device import is_array
from gpulayers.dtypes import as_dtype, broadcast_static_shape
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.indexing_kernels import add_rows, has_kernel
from gpulayers.ops.operation import GradientContext, Operation, Recordable, Shape, Spec
from gpulayers.ops.shaping import ravel
from gpulayers.ops.static import axis_of, is_small_float, static_shape

__all__ = ["boolean_mask", "gather", "getitem", "one_hot", "take", "take_along_axis"]


class _Input(NamedTuple):
    """Stands in an index for input number `position` of the operation; `scalar` ones are ends of slices."""

    position: int
    scalar: bool


# --- adding up --------------------------------------------------------------------------------------------------------


def _add_rows(xp: Any, rows: Any, places: Any, count: int) -> Any:
    """Return an array of `count` rows, row i holding the sum of those `rows` whose place is i.

    Rows are sorted by place, stably, and each run is added up by itself, from front to back, so the result has the same
    bits at every run, which scattering with atomics would not give. 16-bit floats are added up in float32.
    """
    if not rows.size or not count:
        return xp.zeros((count, *rows.shape[1:]), dtype=rows.dtype)
    order = xp.argsort(places, kind="stable")
    sorted_places = places[order]
    if xp is not np and has_kernel(rows.dtype):  # CuPy's reduceat takes differences of one sum over all rows
        result = xp.zeros((count, *rows.shape[1:]), dtype=rows.dtype)
        add_rows(rows, order, sorted_places, result)
        return result
    wide = np.float32 if is_small_float(rows.dtype) else rows.dtype
    result = xp.zeros((count, *rows.shape[1:]), dtype=wide)
    first = xp.ones(sorted_places.shape, dtype=bool)
    first[1:] = sorted_places[1:] != sorted_places[:-1]
    starts = xp.flatnonzero(first)
    result[sorted_places[starts]] = xp.add.reduceat(rows[order].astype(wide, copy=False), starts, axis=0)
    return result.astype(rows.dtype, copy=False)


def _add_elements(xp: Any, g: Any, places: Any, like: Any) -> Any:
    """Return an array shaped as `like` with the elements of `g` added at the flat positions `places`."""
    return _add_rows(xp, g.reshape(-1), places.reshape(-1), like.size).reshape(like.shape)


def _positions(xp: Any, x: Any) -> Any:
    """Return the flat position of each element of `x`, in its shape."""
    return xp.arange(x.size).reshape(x.shape)


# --- indexing ---------------------------------------------------------------------------------------------------------


def _resolve(part: Any, arrays: Sequence[Any]) -> Any:
    """Put the inputs back where an index refers to them."""
    if isinstance(part, _Input):
        value = arrays[part.position]
        return int(value) if part.scalar else value
    if isinstance(part, slice):
        return slice(*(_resolve(end, arrays) for end in (part.start, part.stop, part.step)))
    return part


def _index(key: tuple[Any, ...], arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_resolve(part, arrays) for part in key)


def _getitem_forward(xp: Any, x: Any, *arrays: Any, key: tuple[Any, ...]) -> Any:
    """Return ``x[key]``."""
    return x[_index(key, arrays)]


def _getitem_gradient_forward(xp: Any, g: Any, x: Any, *arrays: Any, key: tuple[Any, ...]) -> Any:
    """Return zeros in the shape of `x` with `g` added at ``[key]``."""
    index = _index(key, arrays)
    if any(is_array(part) for part in index):
        return _add_elements(xp, g, _positions(xp, x)[index], x)
    result = xp.zeros(x.shape, dtype=g.dtype)  # slices and integers name no element twice
    result[index] = g
    return result


def _sliced(size: int | None, part: slice) -> int | None:
    if part == slice(None):
        return size
    ends = (part.start, part.stop, part.step)
    if size is None or any(isinstance(end, _Input) for end in ends):
        return None
    return len(range(*part.indices(size)))


def _consumed(part: Any, arrays: Sequence[Spec]) -> int:
    """Return how many axes of the array one part of an index stands for."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, _Input) and not part.scalar and arrays[part.position].dtype == bool:
        return len(arrays[part.position].shape or ())
    return 1


def _full_key(key: tuple[Any, ...], rank: int, arrays: Sequence[Spec]) -> list[Any]:
    """Return the index with its ellipsis (or its missing end) written out."""
    missing = rank - sum(_consumed(part, arrays) for part in key)
    if missing < 0:
        raise ShapeError(message("getitem", "too many indices", f"at most {rank}", rank - missing))
    place = next((i for i, part in enumerate(key) if part is Ellipsis), len(key))
    return [*key[:place], *[slice(None)] * missing, *key[place + 1 :]]


def _getitem_spec(x: Spec, *arrays: Spec, key: tuple[Any, ...]) -> Spec:
    if x.shape is None:
        return Spec(None, x.dtype)
    sizes = iter(x.shape)
    result: list[Any] = []
    selected: list[Shape] = []
    places: list[int] = []  # positions in the index that hold arrays (or integers beside arrays)
    insert_at = 0
    full = _full_key(key, len(x.shape), arrays)
    has_arrays = any(isinstance(part, _Input) for part in full)
    for position, part in enumerate(full):
        if part is None:
            result.append(1)
        elif isinstance(part, slice):
            result.append(_sliced(next(sizes), part))
        else:
            consumed = list(itertools.islice(sizes, _consumed(part, arrays)))
            if isinstance(part, int) and consumed[0] is not None and not -consumed[0] <= part < consumed[0]:
                raise IndexError(message("getitem", "index out of range", f"a place in {consumed[0]}", part))
            if has_arrays:
                insert_at = len(result) if not places else insert_at
                places.append(position)
                selected.append(_selected_shape(part, arrays))
    if has_arrays:
        together = places == list(range(places[0], places[0] + len(places)))
        shape = broadcast_static_shape(*selected)
        if shape is None:
            return Spec(None, x.dtype)
        insert_at = insert_at if together else 0  # arrays with something between them move to the front
        result[insert_at:insert_at] = shape
    return Spec(tuple(result), x.dtype)


def _selected_shape(part: Any, arrays: Sequence[Spec]) -> Shape:
    if isinstance(part, int):
        return ()
    spec = arrays[part.position]
    return (None,) if spec.dtype == bool else spec.shape


def _pass_index(c: GradientContext, g: Any) -> Any:
    return _getitem(g, *c.inputs[2:], key=c["key"])


_getitem_gradient = Operation(
    "getitem_gradient",
    _getitem_gradient_forward,
    spec=lambda g, x, *arrays, key: Spec(x.shape, g.dtype),
    gradient=(_pass_index, None),
)
_getitem: Operation = Operation(
    "getitem",
    _getitem_forward,
    spec=_getitem_spec,
    gradient=(lambda c, g: _getitem_gradient(g, c.x, *c.inputs[1:], key=c["key"]), None),
    type="StridedSlice",
)


def _parse_part(part: Any, inputs: list[Any]) -> Any:
    """Turn one part of an index into an attribute, arrays and tensors into numbered inputs."""

    def end(value: Any) -> Any:
        if isinstance(value, Recordable) or (is_array(value) and not isinstance(value, np.ndarray | np.generic)):
            inputs.append(value)
            return _Input(len(inputs) - 1, True)
        return None if value is None else int(value)

    if part is None or part is Ellipsis:
        return part
    if isinstance(part, slice):
        return slice(end(part.start), end(part.stop), end(part.step))
    if isinstance(part, bool | list | np.bool_):
        part = np.asarray(part, dtype=np.int64 if isinstance(part, list) and not part else None)
    if isinstance(part, np.ndarray) and part.ndim == 0 and part.dtype.kind in "iu":
        part = int(part)
    if isinstance(part, Recordable) or is_array(part):
        if isinstance(part, np.integer):
            return int(part)
        if part.dtype.kind not in "iub":
            raise IndexError(message("getitem", "not an index", "integers or booleans", f"an array of {part.dtype}"))
        inputs.append(part)
        return _Input(len(inputs) - 1, False)
    if not hasattr(part, "__index__"):
        raise IndexError(message("getitem", "not an index", "integers, slices, arrays, ... or None", repr(part)))
    return int(part)


def getitem(x: Any, key: Any) -> Any:
    """Return ``x[key]``: integers, slices, ``...``, None, and integer or boolean arrays, as in NumPy.

    Ends of slices and indices may be tensors. An element chosen several times gets the sum of the gradients, added up
    in a fixed order. Raises IndexError for anything else in `key`, for too many or too large indices.

    >>> import numpy as np
    >>> getitem(np.arange(5), slice(1, None, 2))
    array([1, 3])
    """
    inputs: list[Any] = []
    parts = tuple(_parse_part(part, inputs) for part in (key if isinstance(key, tuple) else (key,)))
    return _getitem(x, *inputs, key=parts)


# --- gather -----------------------------------------------------------------------------------------------------------


def _take_spec(x: Spec, indices: Spec, axis: int) -> Spec:
    if x.shape is None or indices.shape is None:
        return Spec(None, x.dtype)
    place = axis_of("take", axis, len(x.shape))
    return Spec((*x.shape[:place], *indices.shape, *x.shape[place + 1 :]), x.dtype)


def _take_gradient_forward(xp: Any, g: Any, x: Any, indices: Any, *, axis: int) -> Any:
    """Add the slices of `g` to the slices of zeros that `indices` name."""
    place = axis % x.ndim
    indices = xp.asarray(indices)
    moved = xp.moveaxis(g, tuple(range(place, place + indices.ndim)), tuple(range(indices.ndim)))
    rest = x.shape[:place] + x.shape[place + 1 :]
    rows = _add_rows(
        xp, moved.reshape((indices.size, *rest)), indices.reshape(-1) % max(x.shape[place], 1), x.shape[place]
    )
    return xp.moveaxis(rows, 0, place)


_take_gradient = Operation(
    "take_gradient",
    _take_gradient_forward,
    spec=lambda g, x, indices, axis: Spec(x.shape, g.dtype),
    gradient=(lambda c, g: _take(g, c.inputs[2], axis=c["axis"]), None, None),
)
_take: Operation = Operation(
    "take",
    lambda xp, x, indices, *, axis: xp.take(x, indices, axis=axis),
    spec=_take_spec,
    gradient=(lambda c, g: _take_gradient(g, c.x, c.inputs[1], axis=c["axis"]), None),
    type="GatherV2",
)


def take(x: Any, indices: Any, axis: int | None = None) -> Any:
    """Return the slices of `x` along `axis` that `indices` (of any shape) name; None takes from the flattened array.

    >>> import numpy as np
    >>> take(np.array([10, 20, 30]), np.array([[2, 0]]))
    array([[30, 10]])
    """
    if axis is None:
        x, axis = ravel(x), 0
    return _take(x, indices, axis=axis)


def gather(params: Any, indices: Any, axis: int = 0) -> Any:
    """Return the slices of `params` along `axis` that `indices` name: `take` with TensorFlow's default axis."""
    return take(params, indices, axis)


def _along_spec(x: Spec, indices: Spec, axis: int) -> Spec:
    if x.shape is None or indices.shape is None:
        return Spec(indices.shape, x.dtype)
    place = axis_of("take_along_axis", axis, len(x.shape))
    if len(indices.shape) != len(x.shape):
        raise ShapeError(message("take_along_axis", "ranks differ", len(x.shape), len(indices.shape)))
    others = broadcast_static_shape(
        (*x.shape[:place], 1, *x.shape[place + 1 :]), (*indices.shape[:place], 1, *indices.shape[place + 1 :])
    )
    sizes = list(others or ())
    sizes[place] = indices.shape[place]
    return Spec(tuple(sizes), x.dtype)


_along_gradient = Operation(
    "take_along_axis_gradient",
    lambda xp, g, x, indices, *, axis: _add_elements(
        xp, g, xp.take_along_axis(_positions(xp, x), indices, axis=axis), x
    ),
    spec=lambda g, x, indices, axis: Spec(x.shape, g.dtype),
    gradient=(lambda c, g: _along(g, c.inputs[2], axis=c["axis"]), None, None),
)
_along: Operation = Operation(
    "take_along_axis",
    lambda xp, x, indices, *, axis: xp.take_along_axis(x, indices, axis=axis),
    spec=_along_spec,
    gradient=(lambda c, g: _along_gradient(g, c.x, c.inputs[1], axis=c["axis"]), None),
)


def take_along_axis(x: Any, indices: Any, axis: int | None = -1) -> Any:
    """Return, for each line of `x` along `axis`, the elements that the same line of `indices` names."""
    if axis is None:
        x, axis = ravel(x), 0
    return _along(x, indices, axis=axis)


def boolean_mask(x: Any, mask: Any, axis: int = 0) -> Any:
    """Return the parts of `x` where `mask`, which covers the axes from `axis` on, is true.

    >>> import numpy as np
    >>> boolean_mask(np.array([1, 2, 3]), np.array([True, False, True]))
    array([1, 3])
    """
    if isinstance(mask, list | tuple):
        mask = np.asarray(mask)
    if getattr(getattr(mask, "dtype", None), "kind", None) != "b":
        raise DTypeError(message("boolean_mask", "mask is not boolean", "dtype bool", getattr(mask, "dtype", mask)))
    shape = static_shape(x)
    place = axis if shape is None else axis_of("boolean_mask", axis, len(shape))
    return getitem(x, (*[slice(None)] * place, mask))


def _one_hot_forward(xp: Any, indices: Any, *, depth: int, on: Any, off: Any, axis: int, dtype: np.dtype) -> Any:
    """Compare each index with 0 .. depth - 1 along a new axis."""
    hot = xp.expand_dims(indices, -1) == xp.arange(depth)
    return xp.moveaxis(xp.where(hot, on, off).astype(dtype), -1, axis)


def _one_hot_spec(indices: Spec, depth: int, on: Any, off: Any, axis: int, dtype: np.dtype) -> Spec:
    if indices.shape is None:
        return Spec(None, dtype)
    place = axis_of("one_hot", axis, len(indices.shape) + 1)
    return Spec((*indices.shape[:place], depth, *indices.shape[place:]), dtype)


_one_hot = Operation("one_hot", _one_hot_forward, spec=_one_hot_spec)


def one_hot(
    indices: Any, depth: int, on_value: Any = 1, off_value: Any = 0, axis: int = -1, dtype: Any = np.float32
) -> Any:
    """Return `on_value` where the place along a new axis of size `depth` is the index, `off_value` elsewhere.

    An index outside 0 .. depth - 1 gives `off_value` everywhere.

    >>> import numpy as np
    >>> one_hot(np.array([1, 3]), 3)
    array([[0., 1., 0.],
           [0., 0., 0.]], dtype=float32)
    """
    return _one_hot(indices, depth=int(depth), on=on_value, off=off_value, axis=axis, dtype=as_dtype(dtype))
