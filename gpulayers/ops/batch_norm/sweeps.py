"""Batch normalisation of large NumPy arrays in blocks: sums, and one affine sweep each way.

Sums are taken of ``x - pivot``, in the working dtype inside a block and in float64 across blocks. The pivot is 0 first,
which costs no subtraction. Where the sums show a channel's mean more than a few standard deviations away from 0, they
are taken again with the means as pivots, which then stay in the normalise step, ``y = (x - pivot) * a + b``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers.ops.batch_norm.blocks import (
    LONG_ROW,
    Block,
    View,
    blocks_of,
    parts_of,
    series_of,
    table_parts_of,
    threaded,
    view_of,
)
from gpulayers.ops.batch_norm.layout import Layout
from gpulayers.ops.host.buffers import aligned, recycled
from gpulayers.ops.host.threads import run_tasks

__all__ = ["Affine", "backward_apply", "backward_sums", "clear", "moments", "near_zero", "normalise"]

FAR_PIVOT = 4.0  # |mean - pivot| / sqrt(variance) above which float32 factors lose digits: keep the pivot
FAR_SUMS = 4.0  # and (mean - pivot)^2 / variance above which float32 sums do: take them again around the mean
REPEATED = 1 << 20  # elements that a table may be blown up to
PIECE = 2048  # elements of a row summed at once, where it has two of them
ROWS = 64  # rows of a column summed at once: longer running float32 sums lose digits


class Affine(NamedTuple):
    """``y = (x - pivot) * a + b``; every member has shape (groups, channels). `pivot` None stands for zeros."""

    pivot: Any
    a: Any
    b: Any


def _table_parts(view: View, values: Any, dtype: Any) -> list[Any]:
    """Lay out per-channel values in a table that broadcasts against the blocks of a view, and cut it for them."""
    if view.folded is not None:
        values = np.broadcast_to(values.reshape(view.folded[0], 1, view.folded[2]), view.folded)
    values = values.astype(dtype, copy=False).reshape(view.tables, 1, view.slots, 1)
    if view.columns:
        shape: tuple[int, ...] = view.tables, view.tile, view.slots, view.inner
    else:
        repeat = view.inner if view.inner < LONG_ROW and values.size * view.inner <= REPEATED else 1
        shape, values = (view.tables, view.slots, repeat), values[:, 0]
    table = recycled(shape, dtype)
    table[...] = values
    return table_parts_of(view, table.reshape(view.tables, -1) if view.columns else table)


def _pivot_parts(view: View, pivot: Any, dtype: Any) -> list[Any] | None:
    return None if pivot is None or not pivot.any() else _table_parts(view, pivot, dtype)


def _tasks(view: View, operands: Sequence[list[Any] | None]) -> list[tuple[Any, ...]]:
    """Return for each block what it needs of every operand; None stays None.

    All is cut before any thread begins: a thread that cuts holds the interpreter lock, and another that finishes a call
    then goes to sleep.
    """
    missing = [None] * len(blocks_of(view))
    return list(zip(*[missing if each is None else each for each in operands], strict=True))


class _Scratch(threading.local):
    """Each thread's working copies of blocks, one per use and shape."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.buffers: dict[Any, Any] = {}

    def like(self, part: Any, use: str) -> Any:
        return self.of(part.shape, use)

    def of(self, shape: tuple[int, ...], use: str) -> Any:
        key = use, shape
        if key not in self.buffers:
            self.buffers[key] = aligned(shape, self.dtype)
        return self.buffers[key]


def _row_sums(view: View, operands: Sequence[Any], pair: Callable[..., Any], dtype: Any, itemsize: int) -> Any:
    """Channels first: one sum for every row of a slot, all folded at the end.

    Long rows are summed in pieces: a running float32 sum of thousands of squares loses the digits that the variance
    needs.
    """
    pieces = -(-view.inner // PIECE) if view.inner >= 2 * PIECE else 1
    sums = np.empty((2, view.segments, view.length, view.slots, pieces), dtype)
    ones = np.ones(view.inner, dtype)

    def work(task: tuple[Any, Block, tuple[Any, ...]]) -> None:
        into, block, parts = task
        u, v = pair(*parts)
        if pieces == 1:
            _sum_and_dot(u, v, ones, into[..., 0])
            return
        piece, whole = block.begin // PIECE, u.shape[-1] // PIECE
        if whole:
            long, other = (each[..., : whole * PIECE].reshape(*each.shape[:2], whole, PIECE) for each in (u, v))
            _sum_and_dot(long, other, ones, into[..., piece : piece + whole])
        if whole * PIECE < u.shape[-1]:
            _sum_and_dot(u[..., whole * PIECE :], v[..., whole * PIECE :], ones, into[..., piece + whole])

    blocks = blocks_of(view)
    into = [sums[:, block.segment, block.first : block.last, block.left : block.right] for block in blocks]
    run_tasks(work, list(zip(into, blocks, _tasks(view, operands), strict=True)), threaded(view, itemsize))
    folded = np.add.reduce(sums, axis=(2, 4), dtype=np.float64)
    return np.add.reduce(folded.reshape(2, -1, view.tables, view.slots), axis=1)


def _sum_and_dot(u: Any, v: Any, ones: Any, into: Any) -> None:
    """Write the sums of u and of ``u * v`` over the last axis."""
    if u.shape[-1] < LONG_ROW:
        np.vecdot(u, ones[: u.shape[-1]], out=into[0])
        np.vecdot(u, v, out=into[1])
    else:
        np.einsum("...i->...", u, out=into[0])
        np.einsum("...i,...i->...", u, v, out=into[1])


def _column_sums(view: View, operands: Sequence[Any], pair: Callable[..., Any], dtype: Any, itemsize: int) -> Any:
    """Channels last: a sum for every column of a block, folded for all blocks of the same statistics at once."""
    scratch = _Scratch(dtype)

    def work(task: tuple[Any, tuple[Any, ...]]) -> None:
        into, parts = task
        u, v = pair(*parts)
        whole, columns = len(u) // ROWS, u.shape[1]
        sums = scratch.of((2, -(-len(u) // ROWS), columns), "sums")
        if whole:
            cut = (whole, ROWS, columns)
            _sums_of_rows(u[: whole * ROWS].reshape(cut), v[: whole * ROWS].reshape(cut), sums[:, :whole])
        if whole * ROWS < len(u):
            _sums_of_rows(u[None, whole * ROWS :], v[None, whole * ROWS :], sums[:, whole:])
        np.add.reduce(sums.astype(np.float64), axis=1, out=into)

    series = series_of(view)
    sums = [np.empty((2, len(blocks), view.columns_of(blocks[0]))) for blocks in series]
    into = [each[:, index] for each in sums for index in range(each.shape[1])]
    run_tasks(work, list(zip(into, _tasks(view, operands), strict=True)), threaded(view, itemsize))
    totals = np.zeros((2, view.tables, view.slots))
    for blocks, each in zip(series, sums, strict=True):
        left, right = blocks[0].left, blocks[0].right
        columns = np.add.reduce(each, axis=1)
        folded = np.add.reduce(columns.reshape(2, -1, right - left, view.inner), axis=(1, 3))
        totals[:, blocks[0].segment % view.tables, left:right] += folded
    return totals


def _sums_of_rows(u: Any, v: Any, into: Any) -> None:
    """Write the sums of u and of ``u * v``, (pieces, rows, columns), over the rows."""
    np.einsum("prc,prc->pc", u, v, out=into[1])  # the slower one first: it hides behind the memory
    np.add.reduce(u, axis=1, out=into[0])


def _two_sums(view: View, operands: Sequence[Any], pair: Callable[..., Any], dtype: Any, itemsize: int) -> Any:
    """Return the sums of u and of ``u * v`` over all blocks, two of each statistic, float64.

    `pair` makes u and v, both in `dtype`, from a block's parts of the operands, the last of which is the pivots.
    """
    sums = (_column_sums if view.columns else _row_sums)(view, operands, pair, dtype, itemsize)
    return sums if view.folded is None else np.add.reduce(sums.reshape(2, *view.folded), axis=2)


def _shifted(part: Any, pivot: Any, scratch: _Scratch) -> Any:
    """Return a block of ``x - pivot`` in the working dtype; the block of x where that is x itself."""
    if pivot is None and part.dtype == scratch.dtype:
        return part
    shifted = scratch.like(part, "x")
    if pivot is None:
        np.copyto(shifted, part)
    else:
        np.subtract(part, pivot, out=shifted, dtype=scratch.dtype)
    return shifted


def _power_sums(x: Any, layout: Layout, pivot: Any, dtype: Any) -> Any:
    view = view_of(layout, read=pivot is None and x.dtype == dtype)
    scratch = _Scratch(dtype)

    def pair(part: Any, shift: Any) -> Any:
        shifted = _shifted(part, shift, scratch)
        return shifted, shifted

    return _two_sums(view, (parts_of(view, x), _pivot_parts(view, pivot, dtype)), pair, dtype, x.itemsize)


def moments(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any, Any]:
    """Return (pivot, mean - pivot, biased variance), each of shape (groups, channels).

    `x` is contiguous. `pivot` has `dtype`, which the arithmetic is done in (float32 or float64); the others are
    float64.
    """
    offset, variance = _from_sums(_power_sums(x, layout, None, dtype), layout)
    pivot = np.zeros((layout.groups, layout.channels), dtype)
    near = offset * offset <= FAR_SUMS * variance
    if not (near & np.isfinite(variance)).all():
        mean = offset.astype(dtype)
        pivot = np.where(np.isfinite(mean), mean, pivot)
        offset, variance = _from_sums(_power_sums(x, layout, pivot, dtype), layout)
    return pivot, offset, variance


def _from_sums(sums: Any, layout: Layout) -> tuple[Any, Any]:
    offset, square = sums.reshape(2, layout.groups, layout.channels) / layout.samples
    return offset, np.maximum(square - offset * offset, 0)


def near_zero(pivot: Any, a: Any, b: Any, inverse: Any) -> Affine:
    """Return the factors with the pivot folded into b where every channel's is near 0 beside its deviation."""
    b = np.zeros_like(a) if b is None else b
    if np.maximum.reduce(abs(pivot * inverse), axis=None) <= FAR_PIVOT:
        return Affine(None, a, b - np.multiply(pivot, a, dtype=np.float64))
    return Affine(pivot, a, b)


def normalise(x: Any, y: Any, layout: Layout, factors: Affine, residual: Any, relu: bool, dtype: Any) -> None:
    """Write ``(x - pivot) * a + b`` (+ `residual`, then ReLU) to `y`, in one sweep, backwards through memory.

    Backwards, because the end of x is what the statistics sweep left in the cache.
    """
    view = view_of(layout)
    scratch, direct = _Scratch(dtype), y.dtype == dtype

    def work(parts: tuple[Any, ...]) -> None:
        source, target, shift, scale, bias, added = parts
        result = target if direct else scratch.like(target, "x")
        if shift is not None:
            source = np.subtract(source, shift, out=result, dtype=dtype)
        np.multiply(source, scale, out=result, dtype=dtype)
        np.add(result, bias, out=result)
        if added is not None:
            np.add(result, added, out=result, dtype=dtype)
        if relu:
            np.maximum(result, 0, out=result)
        if not direct:
            np.copyto(target, result, casting="unsafe")

    scale, bias = (_table_parts(view, table, dtype) for table in (factors.a, factors.b))
    added = None if residual is None else parts_of(view, residual)
    operands = parts_of(view, x), parts_of(view, y), _pivot_parts(view, factors.pivot, dtype), scale, bias, added
    run_tasks(work, _tasks(view, operands), threaded(view, x.itemsize), backwards=True)


def backward_sums(dy: Any, x: Any, layout: Layout, pivot: Any, y: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the sums of g and of ``g * (x - pivot)``, shape (groups, channels), float64; g is dy where y > 0.

    `y` None means that there was no ReLU: g is dy.
    """
    view = view_of(layout, read=x.dtype == dtype and y is None and not pivot.any())
    scratch = _Scratch(dtype)

    def pair(dy_part: Any, y_part: Any, x_part: Any, shift: Any) -> Any:
        return _gradient(dy_part, y_part, scratch), _shifted(x_part, shift, scratch)

    outputs = None if y is None else parts_of(view, y)
    operands = parts_of(view, dy), outputs, parts_of(view, x), _pivot_parts(view, pivot, dtype)
    sums = _two_sums(view, operands, pair, dtype, x.itemsize)
    first, second = sums.reshape(2, layout.groups, layout.channels)
    return first, second


def clear(g: Any, keep: Any) -> None:
    """Set `g` to 0 where `keep` is false, whatever stood there.

    Its bits are and-ed with all ones or none: a product would leave NaN where g is not finite, and NumPy's masked
    copies take ten times as long.
    """
    bits = np.int32 if g.dtype.itemsize == 4 else np.int64
    g.view(bits)[...] &= np.subtract(0, keep.view(np.int8), dtype=bits)


def _gradient(dy: Any, y: Any, scratch: _Scratch) -> Any:
    """Return a block of dy in the working dtype, masked by the ReLU; the block itself where nothing changes."""
    if y is None and dy.dtype == scratch.dtype:
        return dy
    g = scratch.like(dy, "g")
    np.copyto(g, dy)
    if y is not None:
        clear(g, y > 0)
    return g


def backward_apply(
    dy: Any, x: Any, dx: Any, dresidual: Any, layout: Layout, factors: Affine, slope: Any, y: Any, dtype: Any
) -> None:
    """Write ``dx = (g + (x - pivot) * slope + b) * a``, and g itself to `dresidual` unless that is None.

    `slope` None stands for ``dx = g * a`` (inference).
    """
    view = view_of(layout)
    scratch, direct = _Scratch(dtype), dx.dtype == dtype

    def work(parts: tuple[Any, ...]) -> None:
        dy, y, source, target, dresidual, shift, slope, bias, scale = parts
        g = _gradient(dy, y, scratch)
        result = target if direct else scratch.like(target, "result")
        if dresidual is not None:
            np.copyto(dresidual, g, casting="unsafe")
        if slope is None:
            np.multiply(g, scale, out=result)
        else:
            if shift is not None:
                source = np.subtract(source, shift, out=result, dtype=dtype)
            np.multiply(source, slope, out=result, dtype=dtype)
            np.add(result, bias, out=result)
            np.add(result, g, out=result)
            np.multiply(result, scale, out=result)
        if not direct:
            np.copyto(target, result, casting="unsafe")

    arrays = (None if each is None else parts_of(view, each) for each in (dy, y, x, dx, dresidual))
    tables = (None if each is None else _table_parts(view, each, dtype) for each in (slope, factors.b, factors.a))
    operands = *arrays, _pivot_parts(view, factors.pivot, dtype), *tables
    run_tasks(work, _tasks(view, operands), threaded(view, x.itemsize), backwards=True)
