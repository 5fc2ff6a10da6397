"""Maximum and average pooling over any number of spatial axes, and their gradients as operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.errors import ShapeError, message
from gpulayers.ops.operation import Operation, Spec
from gpulayers.ops.static import static_shape, widened
from gpulayers.ops.windows import Window, numbers, out_size, pads, parse_format, parse_padding, taps

__all__ = ["avg_pool", "max_pool"]


def _spatial(shape: Any, last: bool) -> Any:
    return shape[1:-1] if last else shape[2:]


def _with_spatial(items: Any, rest: Any, last: bool) -> tuple[Any, ...]:
    """Put one item for each spatial axis where they stand, `rest` at batch and channels."""
    return (rest, *items, rest) if last else (rest, rest, *items)


def _places(x: Any, window: Window, last: bool) -> tuple[int, ...]:
    rows = zip(_spatial(x.shape, last), window.size, window.strides, window.dilation, strict=True)
    return tuple(out_size(*row, window.padding) or 0 for row in rows)


def _views(padded: Any, x: Any, window: Window, last: bool) -> list[Any]:
    """Return, for each position in the window, the elements of the padded input seen there at all places."""
    everything = slice(None)
    return [padded[_with_spatial(seen, everything, last)] for _, seen in taps(window, _places(x, window, last))]


def _padded(xp: Any, x: Any, window: Window, last: bool, value: Any) -> Any:
    widths = pads(_spatial(x.shape, last), window)
    if not any(sum(pair) for pair in widths):
        return x
    return xp.pad(x, _with_spatial(widths, (0, 0), last), mode="constant", constant_values=value)


def _cropped(padded: Any, x: Any, window: Window, last: bool) -> Any:
    sizes = _spatial(x.shape, last)
    inner = (slice(a, a + n) for n, (a, _) in zip(sizes, pads(sizes, window), strict=True))
    return padded[_with_spatial(inner, slice(None), last)]


def _lowest(dtype: np.dtype) -> Any:
    return np.iinfo(dtype).min if dtype.kind in "iu" else -np.inf


def _max_forward(xp: Any, x: Any, *, window: Window, last: bool) -> Any:
    """Take the largest element of each window."""
    views = _views(_padded(xp, x, window, last, _lowest(x.dtype)), x, window, last)
    result = views[0].copy()
    for view in views[1:]:
        xp.maximum(result, view, out=result)
    return result


def _first_chosen(xp: Any, x: Any, y: Any, window: Window, last: bool) -> list[Any]:
    """Return, for each position in the window, the places where the maximum stands there and not before."""
    masks, free = [], xp.ones(y.shape, dtype=bool)
    for view in _views(_padded(xp, x, window, last, _lowest(x.dtype)), x, window, last):
        mask = (view == y) & free
        free &= ~mask
        masks.append(mask)
    return masks


def _max_gradient_forward(xp: Any, g: Any, x: Any, y: Any, *, window: Window, last: bool) -> Any:
    """Send each cotangent to the first maximum of its window."""
    (wide,), narrow = widened([g])
    padded = xp.zeros(_padded(xp, x, window, last, 0).shape, dtype=wide.dtype)
    for view, mask in zip(_views(padded, x, window, last), _first_chosen(xp, x, y, window, last), strict=True):
        view += wide * mask
    result = _cropped(padded, x, window, last)
    return result if narrow is None else result.astype(narrow)


def _max_pick_forward(xp: Any, v: Any, x: Any, y: Any, *, window: Window, last: bool) -> Any:
    """Take from each window of `v` the element that stands where `x` has its first maximum."""
    result = xp.zeros(y.shape, dtype=v.dtype)
    views = _views(_padded(xp, v, window, last, 0), x, window, last)
    for view, mask in zip(views, _first_chosen(xp, x, y, window, last), strict=True):
        result += view * mask
    return result


def _counts(xp: Any, x: Any, window: Window, last: bool, dtype: np.dtype) -> Any:
    """Return how many elements that are not padding each place sees, for broadcasting."""
    rank = len(window.size)
    sizes, places = _spatial(x.shape, last), _places(x, window, last)
    total: Any = np.ones((1,) * rank)
    for axis, (before, _) in enumerate(pads(sizes, window)):
        start = np.arange(places[axis])[:, None] * window.strides[axis] - before
        seen = start + np.arange(window.size[axis]) * window.dilation[axis]
        count = ((seen >= 0) & (seen < sizes[axis])).sum(axis=1)
        total = total * count.reshape([-1 if i == axis else 1 for i in range(rank)])
    return xp.asarray(total[(None, ..., None) if last else (None, None, ...)], dtype=dtype)


def _avg_forward(xp: Any, x: Any, *, window: Window, last: bool) -> Any:
    """Take the mean of the elements of each window that are not padding."""
    (wide,), narrow = widened([x])
    views = _views(_padded(xp, wide, window, last, 0), x, window, last)
    total = views[0].copy()
    for view in views[1:]:
        total += view
    result = total / _counts(xp, x, window, last, total.dtype if total.dtype.kind == "f" else np.dtype(np.float64))
    return result if narrow is None else result.astype(narrow)


def _avg_gradient_forward(xp: Any, g: Any, x: Any, *, window: Window, last: bool) -> Any:
    """Give each element of a window its share of the cotangent."""
    (wide,), narrow = widened([g])
    share = wide / _counts(xp, x, window, last, wide.dtype)
    padded = xp.zeros(_padded(xp, x, window, last, 0).shape, dtype=wide.dtype)
    for view in _views(padded, x, window, last):
        view += share
    result = _cropped(padded, x, window, last)
    return result if narrow is None else result.astype(narrow)


def _spec(x: Spec, *, window: Window, last: bool) -> Spec:
    if x.shape is None:
        return x
    if len(x.shape) != len(window.size) + 2:
        raise ShapeError(message("pooling", "rank does not fit", f"{len(window.size) + 2} axes", x.shape))
    rows = zip(_spatial(x.shape, last), window.size, window.strides, window.dilation, strict=True)
    sizes = tuple(out_size(*row, window.padding) for row in rows)
    channels = x.shape[-1] if last else x.shape[1]
    return Spec((x.shape[0], *sizes, channels) if last else (x.shape[0], channels, *sizes), x.dtype)


_max_pool = Operation(
    "max_pool",
    _max_forward,
    spec=_spec,
    gradient=(lambda c, g: _max_gradient(g, c.x, c.y, **c.attributes),),
    type="MaxPool",
)
_max_gradient: Operation = Operation(
    "max_pool_gradient",
    _max_gradient_forward,
    spec=lambda g, x, y, **_: Spec(x.shape, g.dtype),
    gradient=(lambda c, v: _max_pick(v, *c.inputs[1:], **c.attributes), None, None),
    type="MaxPoolGrad",
)
_max_pick: Operation = Operation(
    "max_pool_pick",
    _max_pick_forward,
    spec=lambda v, x, y, **_: Spec(y.shape, v.dtype),
    gradient=(lambda c, g: _max_gradient(g, *c.inputs[1:], **c.attributes), None, None),
    type="MaxPoolGradGrad",
)
_avg_pool = Operation(
    "avg_pool",
    _avg_forward,
    spec=lambda x, **attributes: Spec(
        _spec(x, **attributes).shape, x.dtype if x.dtype.kind not in "iub" else np.dtype(np.float64)
    ),
    gradient=(lambda c, g: _avg_gradient(g, c.x, **c.attributes),),
    type="AvgPool",
)
_avg_gradient: Operation = Operation(
    "avg_pool_gradient",
    _avg_gradient_forward,
    spec=lambda g, x, **_: Spec(x.shape, g.dtype),
    gradient=(lambda c, v: _avg_pool(v, **c.attributes), None),
    type="AvgPoolGrad",
)


def _pool(
    operation: Callable[..., Any], x: Any, pool_size: Any, strides: Any, padding: str, data_format: str | None
) -> Any:
    name = operation.__name__
    shape = static_shape(x)
    rank = len(shape) - 2 if shape is not None else len(tuple(pool_size))
    if rank < 1:
        raise ShapeError(message(name, "rank does not fit", "(n, spatial..., c)", shape))
    size = numbers(name, "pool_size", pool_size, rank)
    steps = size if strides is None else numbers(name, "strides", strides, rank)
    window = Window(size, steps, (1,) * rank, parse_padding(name, padding))
    return operation(x, window=window, last=parse_format(name, data_format))


def max_pool(
    x: Any, pool_size: Any, strides: Any = None, padding: str = "valid", data_format: str | None = "channels_last"
) -> Any:
    """Return the largest element of each window of the spatial axes; `strides` None means `pool_size`.

    `x`: (n, spatial..., c) or, with "channels_first", (n, c, spatial...). The gradient goes to the first maximum.

    >>> import numpy as np
    >>> max_pool(np.array([1.0, 3.0, 2.0, 5.0]).reshape(1, 4, 1), 2)[0, :, 0]
    array([3., 5.])
    """
    return _pool(_max_pool, x, pool_size, strides, padding, data_format)


def avg_pool(
    x: Any, pool_size: Any, strides: Any = None, padding: str = "valid", data_format: str | None = "channels_last"
) -> Any:
    """Return the mean of each window of the spatial axes; padding does not count. Arguments as in `max_pool`.

    >>> import numpy as np
    >>> avg_pool(np.array([1.0, 3.0, 2.0]).reshape(1, 3, 1), 2, padding="same")[0, :, 0]
    array([2., 2.])
    """
    return _pool(_avg_pool, x, pool_size, strides, padding, data_format)
