"""Convolution over any number of spatial axes, and its two gradients, which are operations of the same kind.

Forward: windows are laid out as rows of a matrix, a block of rows at a time and all blocks in the same memory, and
multiplied with the kernel by BLAS, which writes into the result. Channels are the last axis inside; the other format is
transposed on the way in and out. Sums run in a fixed order, 16-bit data is accumulated in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.errors import ShapeError, message
from gpulayers.ops.device_products import matmul
from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.operation import GradientContext, Operation, Spec, result_dtype
from gpulayers.ops.static import static_shape, widened
from gpulayers.ops.windows import Window, numbers, out_size, pads, parse_format, parse_padding, taps

__all__ = ["convolution"]

BLOCK_ELEMENTS = 1 << 18
"""How many elements of unrolled windows are held at once: they stay cached, and have rows enough for BLAS."""
GRADIENT_ELEMENTS = 1 << 17
"""How many elements of the input's gradient a block has: they are added to once for each tap, so they stay cached."""


def _window(kernel: Any, strides: tuple[int, ...], dilation: tuple[int, ...], padding: str) -> Window:
    return Window(kernel.shape[:-2], strides, dilation, padding)


def _to_last(xp: Any, x: Any, last: bool) -> Any:
    return x if last else xp.moveaxis(x, 1, -1)


def _from_last(xp: Any, x: Any, last: bool) -> Any:
    return x if last else xp.ascontiguousarray(xp.moveaxis(x, -1, 1))


def _empty(xp: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array with any contents; on the host in memory that is used again."""
    return recycled(shape, dtype) if xp is np else xp.empty(shape, dtype=dtype)


def _padded(xp: Any, x: Any, window: Window) -> Any:
    """Return `x` with zeros around its spatial axes; `x` itself where there are none."""
    widths = pads(x.shape[1:-1], window)
    if not any(before or after for before, after in widths):
        return x
    rows = zip(x.shape[1:-1], widths, strict=True)
    padded = _empty(xp, (x.shape[0], *(before + n + after for n, (before, after) in rows), x.shape[-1]), x.dtype)
    inner: tuple[slice, ...] = (slice(None),)  # zeros go where no earlier axis has put some
    for n, (before, after) in zip(x.shape[1:-1], widths, strict=True):
        for border in (slice(0, before), slice(before + n, before + n + after)):
            outer = (*inner, border)
            padded[outer] = 0
        inner = (*inner, slice(before, before + n))
    padded[inner] = x
    return padded


def _places(shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    rows = zip(shape[1:-1], window.size, window.strides, window.dilation, strict=True)
    return tuple(out_size(*row, window.padding) or 0 for row in rows)


def _blocks(batch: int, places: tuple[int, ...], width: int) -> Iterator[tuple[slice, slice]]:
    """Yield parts of the batch and of the first spatial axis whose unrolled windows fit the block size."""
    row = max(math.prod(places[1:]) * width, 1)
    image = row * places[0]
    if image <= BLOCK_ELEMENTS:
        step = max(BLOCK_ELEMENTS // max(image, 1), 1)
        for start in range(0, batch, step):
            yield slice(start, min(start + step, batch)), slice(0, places[0])
        return
    step = max(BLOCK_ELEMENTS // row, 1)
    for index in range(batch):
        for start in range(0, places[0], step):
            yield slice(index, index + 1), slice(start, min(start + step, places[0]))


def _scratch(xp: Any, dtype: Any, shape: tuple[int, ...], window: Window, blocks: Sequence[Any]) -> Any:
    """Return memory for the windows of any of `blocks`, the first of which is the largest."""
    part, rows = blocks[0]
    places = (part.stop - part.start) * (rows.stop - rows.start) * math.prod(shape[2:-1])
    return _empty(xp, (places * math.prod(window.size) * shape[-1],), dtype)


def _unroll(
    xp: Any, padded: Any, window: Window, places: tuple[int, ...], part: slice, rows: slice, scratch: Any
) -> Any:
    """Return the windows of a block as a matrix: one row for each place, (*window, channels) along it."""
    width = math.prod(window.size) * padded.shape[-1]
    if width == padded.shape[-1] and set(window.strides) == {1}:
        return padded[part, rows].reshape(-1, width)
    counts = (rows.stop - rows.start, *places[1:])
    block = padded[part, rows.start * window.strides[0] :]
    batch, spatial = block.strides[0], block.strides[1:-1]
    view = xp.lib.stride_tricks.as_strided(
        block,
        (block.shape[0], *counts, *window.size, block.shape[-1]),
        (
            batch,
            *(s * step for s, step in zip(spatial, window.strides, strict=True)),
            *(s * step for s, step in zip(spatial, window.dilation, strict=True)),
            block.strides[-1],
        ),
    )
    matrix = scratch[: view.size]
    matrix.reshape(view.shape)[...] = view
    return matrix.reshape(-1, width)


def _by_group(groups: int, function: Callable[..., Any], joins: Callable[[list[Any]], Any], *arrays: Any) -> Any:
    """Apply `function` to each group's share of the last axis of `arrays`, and join the results."""
    if groups == 1:
        return function(*arrays)
    shares = [a.shape[-1] // groups for a in arrays]
    return joins(
        [function(*(a[..., i * n : (i + 1) * n] for a, n in zip(arrays, shares, strict=True))) for i in range(groups)]
    )


def _convolve(xp: Any, x: Any, kernel: Any, window: Window) -> Any:
    padded, places = _padded(xp, x, window), _places(x.shape, window)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    shape, dtype = (x.shape[0], *places, kernel.shape[-1]), np.result_type(x.dtype, kernel.dtype)
    if not (x.size and kernel.size):
        return xp.zeros(shape, dtype=dtype)
    result = _empty(xp, shape, dtype)
    blocks = list(_blocks(x.shape[0], places, matrix.shape[0]))
    scratch = _scratch(xp, padded.dtype, (*shape[:-1], x.shape[-1]), window, blocks)
    for part, rows in blocks:
        windows = _unroll(xp, padded, window, places, part, rows, scratch)
        matmul(xp, windows, matrix, out=result[part, rows].reshape(-1, shape[-1]))
    return result


def _convolve_back(xp: Any, g: Any, kernel: Any, x: Any, window: Window) -> Any:
    """Return the gradient with respect to the input: each tap of the kernel adds its product with `g` where it saw."""
    widths, places = pads(x.shape[1:-1], window), _places(x.shape, window)
    shape = (x.shape[0], *(n + a + b for n, (a, b) in zip(x.shape[1:-1], widths, strict=True)), x.shape[-1])
    padded = xp.zeros(shape, dtype=np.result_type(g.dtype, kernel.dtype))
    if g.size and x.size:
        step = max(GRADIENT_ELEMENTS // max(math.prod(places) * x.shape[-1], 1), 1)
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            rows = xp.ascontiguousarray(g[part]).reshape(-1, g.shape[-1])
            for tap, seen in taps(window, places):
                index = (part, *seen)
                view = padded[index]
                view += matmul(xp, rows, kernel[tap].T).reshape(view.shape)
    inner = (slice(None), *(slice(a, a + n) for n, (a, _) in zip(x.shape[1:-1], widths, strict=True)))
    return padded[inner]


def _correlate(xp: Any, x: Any, g: Any, kernel_shape: tuple[int, ...], window: Window) -> Any:
    """Return the gradient with respect to the kernel: the windows' matrix, transposed, times `g`."""
    padded, places = _padded(xp, x, window), _places(x.shape, window)
    width = math.prod(window.size) * x.shape[-1]
    result = xp.zeros((width, g.shape[-1]), dtype=np.result_type(x.dtype, g.dtype))
    if g.size and x.size:
        blocks = list(_blocks(x.shape[0], places, width))
        scratch = _scratch(xp, padded.dtype, (x.shape[0], *places, x.shape[-1]), window, blocks)
        for part, rows in blocks:
            block = _unroll(xp, padded, window, places, part, rows, scratch)
            result += matmul(xp, block.T, xp.ascontiguousarray(g[part, rows]).reshape(-1, g.shape[-1]))
    return result.reshape(kernel_shape)


# --- the three operations, each the gradient of the others ------------------------------------------------------------


def _narrowed(result: Any, dtype: np.dtype | None) -> Any:
    return result if dtype is None else result.astype(dtype)


def _forward(xp: Any, x: Any, kernel: Any, *, last: bool, groups: int, **geometry: Any) -> Any:
    """Slide `kernel` (spatial..., channels / groups, filters) over `x`."""
    (x, kernel), narrow = widened([x, kernel])
    x, window = _to_last(xp, x, last), _window(kernel, **geometry)
    joined = _by_group(
        groups, lambda a, k: _convolve(xp, a, k, window), lambda parts: xp.concatenate(parts, axis=-1), x, kernel
    )
    return _from_last(xp, _narrowed(joined, narrow), last)


def _input_gradient_forward(xp: Any, g: Any, kernel: Any, x: Any, *, last: bool, groups: int, **geometry: Any) -> Any:
    """Return the cotangent of the input of a convolution."""
    (g, kernel), narrow = widened([g, kernel])
    g, x, window = _to_last(xp, g, last), _to_last(xp, x, last), _window(kernel, **geometry)
    joined = _by_group(
        groups,
        lambda a, k, like: _convolve_back(xp, a, k, like, window),
        lambda parts: xp.concatenate(parts, axis=-1),
        g,
        kernel,
        x,
    )
    return _from_last(xp, _narrowed(joined, narrow), last)


def _kernel_gradient_forward(xp: Any, x: Any, g: Any, kernel: Any, *, last: bool, groups: int, **geometry: Any) -> Any:
    """Return the cotangent of the kernel of a convolution."""
    (x, g), narrow = widened([x, g])
    x, g, window = _to_last(xp, x, last), _to_last(xp, g, last), _window(kernel, **geometry)
    shape = (*kernel.shape[:-1], kernel.shape[-1] // groups)
    joined = _by_group(
        groups,
        lambda a, b: _correlate(xp, a, b, shape, window),
        lambda parts: xp.concatenate(parts, axis=-1),
        x,
        g,
    )
    return _narrowed(joined, narrow)


def _spec(x: Spec, kernel: Spec, *, strides: Any, dilation: Any, padding: str, last: bool, groups: int) -> Spec:
    dtype = result_dtype(lambda xp, a, b: a * b, [Spec((), x.dtype), Spec((), kernel.dtype)])
    if kernel.shape is None:
        raise ShapeError(message("convolution", "the kernel's rank is unknown", f"{len(strides) + 2} axes"))
    _check("convolution", x.shape, kernel.shape, len(strides), last, groups)
    if x.shape is None:
        return Spec(None, dtype)
    spatial = x.shape[1:-1] if last else x.shape[2:]
    rows = zip(spatial, kernel.shape[:-2], strides, dilation, strict=True)
    sizes = tuple(None if k is None else out_size(n, k, s, d, padding) for n, k, s, d in rows)
    filters = kernel.shape[-1]
    return Spec((x.shape[0], *sizes, filters) if last else (x.shape[0], filters, *sizes), dtype)


def _check(name: str, x: Any, kernel: Any, rank: int, last: bool, groups: int) -> None:
    if len(kernel) != rank + 2 or (x is not None and len(x) != rank + 2):
        raise ShapeError(
            message(name, "ranks do not fit", f"{rank + 2} axes for input and kernel", f"{x} and {kernel}")
        )
    channels = None if x is None else x[-1 if last else 1]
    if channels is not None and kernel[-2] is not None and channels != kernel[-2] * groups:
        raise ShapeError(message(name, "channels do not fit the kernel", f"{kernel[-2] * groups} channels", channels))
    if kernel[-1] is not None and kernel[-1] % groups:
        raise ShapeError(message(name, "filters do not divide into the groups", f"a multiple of {groups}", kernel[-1]))


def _only(c: GradientContext, *gradients: Callable[[], Any] | None) -> tuple[Any, ...]:
    """Compute the gradients that are wanted."""
    return tuple(g() if g is not None and needed else None for g, needed in zip(gradients, c.needs, strict=True))


def _rule(c: GradientContext, g: Any) -> tuple[Any, ...]:
    x, kernel = c.inputs
    return _only(
        c,
        lambda: _input_gradient(g, kernel, x, **c.attributes),
        lambda: _kernel_gradient(x, g, kernel, **c.attributes),
    )


def _input_rule(c: GradientContext, v: Any) -> tuple[Any, ...]:
    g, kernel, _ = c.inputs
    return _only(
        c, lambda: _convolution(v, kernel, **c.attributes), lambda: _kernel_gradient(v, g, kernel, **c.attributes), None
    )


def _kernel_rule(c: GradientContext, v: Any) -> tuple[Any, ...]:
    x, g, _ = c.inputs
    return _only(c, lambda: _input_gradient(g, v, x, **c.attributes), lambda: _convolution(x, v, **c.attributes), None)


_convolution = Operation("convolution", _forward, spec=_spec, gradient=_rule, type="Conv2D")
_input_gradient = Operation(
    "convolution_input_gradient",
    _input_gradient_forward,
    spec=lambda g, kernel, x, **_: Spec(x.shape, np.result_type(g.dtype, kernel.dtype)),
    gradient=_input_rule,
    type="Conv2DBackpropInput",
)
_kernel_gradient = Operation(
    "convolution_kernel_gradient",
    _kernel_gradient_forward,
    spec=lambda x, g, kernel, **_: Spec(kernel.shape, np.result_type(x.dtype, g.dtype)),
    gradient=_kernel_rule,
    type="Conv2DBackpropFilter",
)


def convolution(
    x: Any,
    kernel: Any,
    strides: Any = 1,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Slide a kernel over an input (cross-correlation, as everywhere in deep learning).

    `x`: (n, spatial..., c), or (n, c, spatial...) with `data_format` "channels_first". `kernel`: (spatial...,
    c / groups, filters). `strides` and `dilation`: one integer, or one for each spatial axis. `padding`: "valid",
    "same" (an odd number of zeros has the larger half behind), or "causal" (zeros in front only, so that no output sees
    a later input). Returns (n, places..., filters) or (n, filters, places...) in the promoted dtype.

    Raises ValueError for shapes that do not fit, an unknown padding or data format.

    >>> import numpy as np
    >>> convolution(np.ones((1, 4, 1)), np.ones((3, 1, 1)), padding="same")[0, :, 0]
    array([2., 3., 3., 2.])
    """
    shape, kernel_shape = static_shape(x), static_shape(kernel)
    if kernel_shape is None or len(kernel_shape) < 3:
        raise ShapeError(message("convolution", "not a kernel", "(spatial..., channels, filters)", kernel_shape))
    rank, last = len(kernel_shape) - 2, parse_format("convolution", data_format)
    _check("convolution", shape, kernel_shape, rank, last, groups)
    return _convolution(
        x,
        kernel,
        strides=numbers("convolution", "strides", strides, rank),
        dilation=numbers("convolution", "dilation", dilation, rank),
        padding=parse_padding("convolution", padding, causal=True),
        last=last,
        groups=int(groups),
    )
