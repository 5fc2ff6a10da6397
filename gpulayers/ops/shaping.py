"""Changing shapes, joining and splitting. Names and arguments are NumPy's; a shape that is given may be a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.dtypes import as_dtype
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.operation import (
    GradientContext,
    Operation,
    Shape,
    Spec,
    cast_operation,
    like_first,
    match,
    result_dtype,
    sum_to_like,
)
from gpulayers.ops.static import axes_of, axis_of, host_sizes, is_small_float, known_size, sizes_of, static_shape

__all__ = [
    "astype",
    "broadcast_to",
    "cast",
    "concatenate",
    "expand_dims",
    "flip",
    "identity",
    "moveaxis",
    "pad",
    "rank",
    "ravel",
    "repeat",
    "reshape",
    "reshape_like",
    "reverse",
    "roll",
    "shape_of",
    "size",
    "split",
    "split_sizes",
    "squeeze",
    "stack",
    "stop_gradient",
    "swapaxes",
    "tile",
    "transpose",
    "unstack",
]


# --- the same elements in another shape -------------------------------------------------------------------------------

reshape_like: Operation = Operation(
    "reshape_like",
    lambda xp, x, like: x.reshape(like.shape),
    spec=lambda x, like: Spec(like.shape, x.dtype),
    gradient=(lambda c, g: reshape_like(g, c.x), None),
    doc="Return `x` in the shape of `like`.",
)


def _reshaped(name: str, shape: Shape, wanted: tuple[int | None, ...]) -> Shape:
    """Return the static result of a reshape; -1 is worked out where all else is known."""
    if wanted.count(-1) > 1 or any(size is not None and size < -1 for size in wanted):
        raise ShapeError(message(name, "not a shape to reshape to", "sizes of 0 or more and at most one -1", wanted))
    total = known_size(shape)
    rest = [size for size in wanted if size != -1]
    if None in rest:
        return tuple(None if size == -1 else size for size in wanted)
    product = int(np.prod([size or 0 for size in rest], dtype=np.int64))
    if total is not None and (product != total if -1 not in wanted else product == 0 or total % product):
        raise ShapeError(message(name, "the number of elements differs", f"a shape for {shape}", wanted))
    inferred = None if total is None else (total // product if product else 0)
    return tuple(inferred if size == -1 else size for size in wanted)


_reshape = Operation(
    "reshape",
    lambda xp, x, *, shape: x.reshape(shape),
    spec=lambda x, shape: Spec(_reshaped("reshape", x.shape, shape), x.dtype),
    gradient=(lambda c, g: reshape_like(g, c.x),),
)
_dynamic_reshape = Operation(
    "dynamic_reshape",
    lambda xp, x, vector, *, known: x.reshape(host_sizes(vector)),
    spec=lambda x, vector, known: Spec(None if known is None else _reshaped("reshape", x.shape, known), x.dtype),
    gradient=(lambda c, g: reshape_like(g, c.x), None),
    type="Reshape",
)


def reshape(x: Any, shape: Any) -> Any:
    """Return `x` in another `shape`: integers, one of which may be -1, or a tensor of integers, or a mix of both.

    A tensor's contents are needed on the host: one that lives on a device is waited for.

    >>> import numpy as np
    >>> reshape(np.arange(6), (2, -1)).shape
    (2, 3)
    """
    known, vector = sizes_of("reshape", shape)
    return _reshape(x, shape=known) if vector is None else _dynamic_reshape(x, vector, known=known)


def ravel(x: Any) -> Any:
    """Return the elements of `x` along one axis, the last axis running fastest."""
    return _reshape(x, shape=(-1,)) if known_size(static_shape(x)) != 0 else _reshape(x, shape=(0,))


def _permutation(axes: Any, rank: int) -> tuple[int, ...]:
    if axes is None:
        return tuple(reversed(range(rank)))
    order = axes_of("transpose", axes, rank)
    if len(order) != rank:
        raise ShapeError(message("transpose", "axes is not a permutation", f"{rank} axes", axes))
    return order


def _transpose_spec(x: Spec, axes: Any) -> Spec:
    if x.shape is None:
        return Spec(None if axes is None else (None,) * len(axes), x.dtype)
    return Spec(tuple(x.shape[axis] for axis in _permutation(axes, len(x.shape))), x.dtype)


def _transpose_rule(c: GradientContext, g: Any) -> Any:
    axes = c["axes"]
    return _transpose(g, axes=None if axes is None else tuple(int(i) for i in np.argsort(np.mod(axes, len(axes)))))


_transpose = Operation(
    "transpose",
    lambda xp, x, *, axes: xp.transpose(x, axes),
    spec=_transpose_spec,
    gradient=(_transpose_rule,),
)


def transpose(x: Any, axes: Sequence[int] | None = None) -> Any:
    """Return `x` with its axes in the order `axes`; None reverses them.

    >>> import numpy as np
    >>> transpose(np.ones((2, 3, 4)), (0, 2, 1)).shape
    (2, 4, 3)
    """
    return _transpose(x, axes=None if axes is None else tuple(int(axis) for axis in axes))


def _rank_of(name: str, x: Any) -> int:
    shape = static_shape(x)
    if shape is None:
        raise ShapeError(message(name, "the rank is unknown", do="Give the tensor a shape: t.set_shape(...)."))
    return len(shape)


def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    """Return `x` with two axes exchanged."""
    order = list(range(_rank_of("swapaxes", x)))
    first, second = axis_of("swapaxes", axis1, len(order)), axis_of("swapaxes", axis2, len(order))
    order[first], order[second] = order[second], order[first]
    return _transpose(x, axes=tuple(order))


def moveaxis(x: Any, source: Any, destination: Any) -> Any:
    """Return `x` with the axes `source` moved to the places `destination`, the others in their order."""
    rank = _rank_of("moveaxis", x)
    moved, places = axes_of("moveaxis", source, rank), axes_of("moveaxis", destination, rank)
    if len(moved) != len(places):
        raise ShapeError(message("moveaxis", "source and destination differ in length", len(moved), len(places)))
    order = [axis for axis in range(rank) if axis not in moved]
    for place, axis in sorted(zip(places, moved, strict=True)):
        order.insert(place, axis)
    return _transpose(x, axes=tuple(order))


def _expanded(shape: Shape, axis: Any) -> Shape:
    if shape is None:
        return None
    count = len(axis) if isinstance(axis, tuple) else 1
    places = axes_of("expand_dims", axis, len(shape) + count)
    rest = iter(shape)
    return tuple(1 if index in places else next(rest) for index in range(len(shape) + count))


def _squeezed(shape: Shape, axis: Any) -> Shape:
    if shape is None or (axis is None and None in shape):
        return None
    if axis is None:
        return tuple(size for size in shape if size != 1)
    axes = axes_of("squeeze", axis, len(shape))
    if any(shape[index] not in (1, None) for index in axes):
        raise ShapeError(message("squeeze", "an axis to remove is not of size 1", f"size 1 at {axis}", shape))
    return tuple(size for index, size in enumerate(shape) if index not in axes)


_expand_dims = Operation(
    "expand_dims",
    lambda xp, x, *, axis: xp.expand_dims(x, axis),
    spec=lambda x, axis: Spec(_expanded(x.shape, axis), x.dtype),
    gradient=(lambda c, g: reshape_like(g, c.x),),
)
_squeeze = Operation(
    "squeeze",
    lambda xp, x, *, axis: xp.squeeze(x, axis=axis),
    spec=lambda x, axis: Spec(_squeezed(x.shape, axis), x.dtype),
    gradient=(lambda c, g: reshape_like(g, c.x),),
)


def expand_dims(x: Any, axis: Any) -> Any:
    """Return `x` with new axes of size 1 at the places `axis` (an integer or several) of the result."""
    return _expand_dims(x, axis=tuple(axis) if isinstance(axis, list | tuple) else axis)


def squeeze(x: Any, axis: Any = None) -> Any:
    """Return `x` without the axes `axis`, which must have size 1; None removes every axis of size 1."""
    return _squeeze(x, axis=tuple(axis) if isinstance(axis, list | tuple) else axis)


# --- joining and splitting --------------------------------------------------------------------------------------------


def _concatenated(name: str, specs: Sequence[Spec], axis: int) -> Spec:
    dtype = result_dtype(lambda xp, *a: np.concatenate(a), [Spec((None,), s.dtype) for s in specs])
    known = [s.shape for s in specs if s.shape is not None]
    if not known:
        return Spec(None, dtype)
    place = axis_of(name, axis, len(known[0]))
    if len({len(shape) for shape in known}) > 1:
        raise ShapeError(message(name, "ranks differ", "equal ranks", ", ".join(map(str, known))))
    sizes: list[int | None] = []
    for index, column in enumerate(zip(*known, strict=True)):
        if index == place:
            sizes.append(None if None in column or len(known) < len(specs) else sum(column))
            continue
        fixed = set(column) - {None}
        if len(fixed) > 1:
            raise ShapeError(message(name, f"sizes differ beside axis {axis}", got=", ".join(map(str, known))))
        sizes.append(fixed.pop() if fixed else None)
    return Spec(tuple(sizes), dtype)


def _split_like_forward(xp: Any, g: Any, *likes: Any, axis: int) -> Any:
    """Cut `g` along `axis` into pieces as long as each of `likes`."""
    ends = np.cumsum([like.shape[axis] for like in likes])
    return tuple(xp.split(g, [int(end) for end in ends[:-1]], axis=axis))


def _split_like_rule(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    pieces = [zero_of(y) if g is None else g for g, y in zip(gs, c.outputs, strict=True)]
    return (_concatenate(*pieces, axis=c["axis"]), *[None] * (len(c.inputs) - 1))


def zero_of(y: Any) -> Any:
    """Return zeros of the shape and dtype of `y`: the cotangent of an output that nothing came back to."""
    return y * 0


_split_like = Operation(
    "split_like",
    _split_like_forward,
    spec=lambda g, *likes, axis: tuple(Spec(like.shape, g.dtype) for like in likes),
    gradient=_split_like_rule,
)
_split_like.many = True  # type: ignore[attr-defined]
_concatenate = Operation(
    "concatenate",
    lambda xp, *arrays, axis: xp.concatenate(arrays, axis=axis),
    spec=lambda *specs, axis: _concatenated("concatenate", specs, axis),
    gradient=lambda c, g: tuple(
        match(piece, x) for piece, x in zip(_split_like(g, *c.inputs, axis=c["axis"]), c.inputs, strict=True)
    ),
    type="ConcatV2",
)


def concatenate(arrays: Sequence[Any], axis: int | None = 0) -> Any:
    """Return `arrays` joined along an axis they have; None joins them flattened. Dtypes promote as in NumPy.

    >>> import numpy as np
    >>> concatenate([np.ones((2, 1)), np.zeros((2, 2))], axis=1).shape
    (2, 3)
    """
    arrays = list(arrays)
    if not arrays:
        raise ShapeError(message("concatenate", "nothing to join", "at least one array", 0))
    if axis is None:
        arrays, axis = [ravel(x) for x in arrays], 0
    return _concatenate(*arrays, axis=axis)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Return `arrays`, all of one shape, joined along a new axis.

    >>> import numpy as np
    >>> stack([np.ones(3), np.zeros(3)], axis=-1).shape
    (3, 2)
    """
    return concatenate([expand_dims(x, axis) for x in arrays], axis)


def _cuts(size: int | None, sections: Any) -> list[int | None]:
    """Return the lengths of the pieces for a number of equal sections or a tuple of cut positions."""
    if isinstance(sections, int):
        if sections < 1 or (size is not None and size % sections):
            raise ShapeError(message("split", "does not divide equally", f"a divisor of {size}", sections))
        return [None if size is None else size // sections] * sections
    if size is None:
        return [None] * (len(sections) + 1)
    edges = [0, *(slice(cut).indices(size)[1] for cut in sections), size]
    return [max(end - start, 0) for start, end in zip(edges, edges[1:], strict=False)]


def _split_spec(x: Spec, sections: Any, axis: int) -> tuple[Spec, ...]:
    if x.shape is None:
        return tuple(Spec(None, x.dtype) for _ in _cuts(None, sections))
    place = axis_of("split", axis, len(x.shape))
    lengths = _cuts(x.shape[place], sections)
    return tuple(Spec((*x.shape[:place], n, *x.shape[place + 1 :]), x.dtype) for n in lengths)


def _split_forward(xp: Any, x: Any, *, sections: Any, axis: int) -> Any:
    """Cut `x` along `axis`."""
    return tuple(xp.split(x, sections if isinstance(sections, int) else list(sections), axis=axis))


_split = Operation(
    "split",
    _split_forward,
    spec=_split_spec,
    gradient=lambda c, *gs: _concatenate(
        *(zero_of(y) if g is None else g for g, y in zip(gs, c.outputs, strict=True)), axis=c["axis"]
    ),
)
_split.many = True  # type: ignore[attr-defined]


def split(x: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    """Cut `x` along `axis` into equal sections (an integer), or before each index of a rising sequence.

    As in NumPy a sequence holds positions; TensorFlow's ``split``, which takes sizes, is `gl.split`.

    >>> import numpy as np
    >>> [piece.tolist() for piece in split(np.arange(6), [1, 3])]
    [[0], [1, 2], [3, 4, 5]]
    """
    if hasattr(indices_or_sections, "__index__") and not np.shape(indices_or_sections):
        sections: Any = int(indices_or_sections)
    else:
        sections = tuple(int(cut) for cut in indices_or_sections)
    return list(_split(x, sections=sections, axis=axis))


def split_sizes(x: Any, sizes: Any, axis: int = 0) -> list[Any]:
    """Cut `x` along `axis` into pieces of the given sizes, one of which may be -1: the rest.

    Raises ValueError if the sizes do not add up to the axis.
    """
    lengths = [int(one) for one in sizes]
    shape = static_shape(x)
    total = None if shape is None else shape[axis_of("split", axis, len(shape))]
    rest = lengths.index(-1) if -1 in lengths else len(lengths)
    given = sum(lengths) + (rest < len(lengths))
    fits = total is None or (given == total if rest == len(lengths) else given <= total)
    if not lengths or lengths.count(-1) > 1 or min(lengths) < -1 or not fits:
        raise ShapeError(message("split", "sizes do not add up to the axis", total, list(sizes)))
    front = np.cumsum(lengths[:rest])
    back = -np.cumsum(lengths[:rest:-1])[::-1]  # behind the unknown piece cuts are counted from the end
    return split(x, [*front[: len(lengths) - 1], *back], axis)


def unstack(x: Any, axis: int = 0, num: int | None = None) -> list[Any]:
    """Return the slices of `x` along `axis`, without that axis. `num` says how many where the size is unknown."""
    shape = static_shape(x)
    size = None if shape is None else shape[axis_of("unstack", axis, len(shape))]
    count = num if size is None else size
    if count is None:
        raise ShapeError(message("unstack", f"the size of axis {axis} is unknown", do="Give it as num."))
    return [squeeze(piece, axis) for piece in split(x, count, axis)] if count else []


# --- repeating and moving ---------------------------------------------------------------------------------------------


def _times(size: int | None, factor: int) -> int | None:
    return None if size is None else size * factor


def _tile_spec(x: Spec, reps: tuple[int, ...]) -> Spec:
    if x.shape is None:
        return Spec(None, x.dtype)
    rank = max(len(reps), len(x.shape))
    shape = (1,) * (rank - len(x.shape)) + x.shape
    factors = (1,) * (rank - len(reps)) + reps
    return Spec(tuple(_times(size, factor) for size, factor in zip(shape, factors, strict=True)), x.dtype)


def _sum_groups(xp: Any, grouped: Any, axes: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype) -> Any:
    wide = np.float32 if is_small_float(dtype) else dtype
    return xp.sum(grouped, axis=axes, dtype=wide).reshape(shape).astype(dtype, copy=False)


def _tile_gradient_forward(xp: Any, g: Any, x: Any, *, reps: tuple[int, ...]) -> Any:
    """Add up the copies that `tile` made of each element."""
    rank = max(len(reps), x.ndim)
    shape = (1,) * (rank - x.ndim) + x.shape
    factors = (1,) * (rank - len(reps)) + reps
    pairs = [number for pair in zip(factors, shape, strict=True) for number in pair]
    return _sum_groups(xp, g.reshape(pairs), tuple(range(0, 2 * rank, 2)), x.shape, g.dtype)


_tile_gradient = Operation(
    "tile_gradient",
    _tile_gradient_forward,
    spec=lambda g, x, reps: Spec(x.shape, g.dtype),
    gradient=(lambda c, g: _tile(g, reps=c["reps"]), None),
)
_tile: Operation = Operation(
    "tile",
    lambda xp, x, *, reps: xp.tile(x, reps),
    spec=_tile_spec,
    gradient=(lambda c, g: _tile_gradient(g, c.x, reps=c["reps"]),),
)


def tile(x: Any, reps: Any) -> Any:
    """Return `x` repeated `reps` times along its last axes, as a whole.

    >>> import numpy as np
    >>> tile(np.array([1, 2]), 2)
    array([1, 2, 1, 2])
    """
    sizes, vector = sizes_of("tile", reps)
    if vector is not None or sizes is None:
        raise DTypeError(message("tile", "the repetitions are a tensor", "integers", repr(reps), "Use broadcast_to."))
    return _tile(x, reps=sizes)


def _repeat_spec(x: Spec, repeats: int, axis: int) -> Spec:
    if x.shape is None:
        return x
    place = axis_of("repeat", axis, len(x.shape))
    return Spec((*x.shape[:place], _times(x.shape[place], repeats), *x.shape[place + 1 :]), x.dtype)


def _repeat_gradient_forward(xp: Any, g: Any, x: Any, *, repeats: int, axis: int) -> Any:
    """Add up the copies that `repeat` made of each element."""
    place = axis % x.ndim
    grouped = g.reshape((*x.shape[: place + 1], repeats, *x.shape[place + 1 :]))
    return _sum_groups(xp, grouped, (place + 1,), x.shape, g.dtype)


_repeat_gradient = Operation(
    "repeat_gradient",
    _repeat_gradient_forward,
    spec=lambda g, x, repeats, axis: Spec(x.shape, g.dtype),
    gradient=(lambda c, g: _repeat(g, repeats=c["repeats"], axis=c["axis"]), None),
)
_repeat: Operation = Operation(
    "repeat",
    lambda xp, x, *, repeats, axis: xp.repeat(x, repeats, axis=axis),
    spec=_repeat_spec,
    gradient=(lambda c, g: _repeat_gradient(g, c.x, repeats=c["repeats"], axis=c["axis"]),),
)


def repeat(x: Any, repeats: int, axis: int | None = None) -> Any:
    """Return `x` with each element repeated along `axis`; None repeats in the flattened array.

    >>> import numpy as np
    >>> repeat(np.array([1, 2]), 2)
    array([1, 1, 2, 2])
    """
    if not hasattr(repeats, "__index__"):
        raise DTypeError(message("repeat", "not one number of repetitions", "an integer", repr(repeats)))
    if axis is None:
        x, axis = ravel(x), 0
    return _repeat(x, repeats=int(repeats), axis=axis)


_broadcast_to = Operation(
    "broadcast_to",
    lambda xp, x, *, shape: xp.broadcast_to(x, shape),
    spec=lambda x, shape: Spec(_stretched(x.shape, shape), x.dtype),
    gradient=(lambda c, g: sum_to_like(g, c.x),),
)
_dynamic_broadcast_to = Operation(
    "dynamic_broadcast_to",
    lambda xp, x, vector, *, known: xp.broadcast_to(x, host_sizes(vector)),
    spec=lambda x, vector, known: Spec(None if known is None else _stretched(x.shape, known), x.dtype),
    gradient=(lambda c, g: sum_to_like(g, c.x), None),
    type="BroadcastTo",
)


def _stretched(shape: Shape, wanted: tuple[int | None, ...]) -> Shape:
    own = () if shape is None else shape
    fits = len(own) <= len(wanted) and all(
        size in (1, None) or target is None or size == target
        for size, target in zip(reversed(own), reversed(wanted), strict=False)
    )
    if not fits:
        raise ShapeError(message("broadcast_to", "does not broadcast", f"a shape that stretches to {wanted}", shape))
    return wanted


def broadcast_to(x: Any, shape: Any) -> Any:
    """Return `x` stretched to `shape` (integers, or a tensor of them) by NumPy's rules; read-only."""
    known, vector = sizes_of("broadcast_to", shape)
    return _broadcast_to(x, shape=known) if vector is None else _dynamic_broadcast_to(x, vector, known=known)


_flip: Operation = Operation(
    "flip",
    lambda xp, x, *, axis: xp.flip(x, axis),
    spec=lambda x, axis: like_first(x, axis=x.shape is None or axes_of("flip", axis, len(x.shape))),
    gradient=(lambda c, g: _flip(g, axis=c["axis"]),),
    type="ReverseV2",
)
_roll: Operation = Operation(
    "roll",
    lambda xp, x, *, shift, axis: xp.roll(x, shift, axis),
    spec=lambda x, shift, axis: like_first(x, axis=x.shape is None or axes_of("roll", axis, len(x.shape))),
    gradient=(lambda c, g: _roll(g, shift=tuple(-s for s in c["shift"]), axis=c["axis"]),),
)


def flip(x: Any, axis: Any = None) -> Any:
    """Return `x` in reverse order along `axis` (None: every axis)."""
    return _flip(x, axis=tuple(axis) if isinstance(axis, list | tuple) else axis)


reverse = flip


def roll(x: Any, shift: Any, axis: Any = None) -> Any:
    """Return `x` moved by `shift` places along `axis`, what falls off the end coming in at the start.

    None rolls the flattened array and keeps the shape.
    """
    if axis is None:
        return reshape_like(roll(ravel(x), shift, 0), x)
    axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    shifts = tuple(shift) if isinstance(shift, list | tuple) else (shift,) * len(axes)
    return _roll(x, shift=tuple(int(s) for s in shifts), axis=axes)


def _pad_spec(x: Spec, widths: tuple[tuple[int, int], ...], value: Any) -> Spec:
    if x.shape is None:
        return Spec((None,) * len(widths), x.dtype)
    if len(widths) != len(x.shape):
        raise ShapeError(message("pad", "one pair for each axis is needed", f"{len(x.shape)} pairs", widths))
    sizes = tuple(
        None if size is None else before + size + after for size, (before, after) in zip(x.shape, widths, strict=True)
    )
    return Spec(sizes, x.dtype)


def _crop_forward(xp: Any, g: Any, *, widths: tuple[tuple[int, int], ...]) -> Any:
    """Remove what `pad` added."""
    return g[tuple(slice(before, size - after) for size, (before, after) in zip(g.shape, widths, strict=True))]


_crop = Operation(
    "crop",
    _crop_forward,
    spec=lambda g, widths: _pad_spec(g, tuple((-before, -after) for before, after in widths), 0),
    gradient=(lambda c, g: _pad(g, widths=c["widths"], value=0),),
)
_pad: Operation = Operation(
    "pad",
    lambda xp, x, *, widths, value: xp.pad(x, widths, mode="constant", constant_values=value),
    spec=_pad_spec,
    gradient=(lambda c, g: _crop(g, widths=c["widths"]),),
)


def pad(x: Any, pad_width: Any, mode: str = "constant", *, constant_values: Any = 0) -> Any:
    """Return `x` with `constant_values` around it.

    `pad_width`: (before, after) for each axis, one such pair for all axes, or one number for every side. Only the mode
    ``"constant"`` exists. Raises ValueError for another mode or a negative width.

    >>> import numpy as np
    >>> pad(np.array([1, 2]), (1, 2))
    array([0, 1, 2, 0, 0])
    """
    if mode.lower() != "constant":
        raise ValueError(message("pad", "unknown mode", "'constant'", repr(mode)))
    try:
        pairs = np.broadcast_to(np.asarray(pad_width, dtype=np.int64), (_rank_of("pad", x), 2))
    except ValueError as error:
        raise ShapeError(
            message("pad", "not one pair for each axis", f"{_rank_of('pad', x)} pairs", pad_width)
        ) from error
    if (pairs < 0).any():
        raise ShapeError(message("pad", "a width is negative", "0 or more", pad_width))
    return _pad(x, widths=tuple((int(before), int(after)) for before, after in pairs), value=constant_values)


# --- values as they are -----------------------------------------------------------------------------------------------


def cast(x: Any, dtype: Any) -> Any:
    """Return `x` in another dtype. The gradient comes back in the dtype of `x`; through integers there is none.

    >>> import numpy as np
    >>> cast(np.array([1.7]), "int32")
    array([1], dtype=int32)
    """
    return cast_operation(x, dtype=as_dtype(dtype))


astype = cast

identity = Operation(
    "identity",
    lambda xp, x: x if hasattr(x, "shape") else xp.asarray(x),
    spec=like_first,
    gradient=(lambda c, g: g,),
    doc="Return `x`; in a graph, a new tensor with its value.",
)
stop_gradient = Operation(
    "stop_gradient",
    lambda xp, x: x,
    spec=like_first,
    doc="Return `x`; no gradient flows back through it.",
)
_shape = Operation(
    "shape",
    lambda xp, x: np.asarray(np.shape(x), dtype=np.int32),
    spec=lambda x: Spec((None if x.shape is None else len(x.shape),), np.dtype(np.int32)),
    doc="Return the shape as an int32 vector, which lives on the host like TensorFlow's.",
)
_size = Operation(
    "size",
    lambda xp, x: np.asarray(np.prod(np.shape(x), dtype=np.int64), dtype=np.int32),
    spec=lambda x: Spec((), np.dtype(np.int32)),
)
_rank = Operation(
    "rank",
    lambda xp, x: np.asarray(len(np.shape(x)), dtype=np.int32),
    spec=lambda x: Spec((), np.dtype(np.int32)),
)


def shape_of(x: Any) -> Any:
    """Return the shape of `x` as a vector of int32: what the sizes are when it runs. It stays on the host.

    >>> import numpy as np
    >>> shape_of(np.ones((2, 3)))
    array([2, 3], dtype=int32)
    """
    return _shape(x)


def size(x: Any) -> Any:
    """Return the number of elements of `x`, an int32 scalar on the host."""
    return _size(x)


def rank(x: Any) -> Any:
    """Return the number of axes of `x`, an int32 scalar on the host."""
    return _rank(x)
