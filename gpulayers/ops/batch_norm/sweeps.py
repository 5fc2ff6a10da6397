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

from gpulayers.ops.batch_norm.blocks import LONG_ROW, ROWS, Block, View, parts_of, table_parts_of, threaded, view_of
from gpulayers.ops.batch_norm.layout import Layout
from gpulayers.ops.host.buffers import aligned, recycled
from gpulayers.ops.host.threads import run_tasks

__all__ = ["Affine", "backward_apply", "backward_sums", "clear", "moments", "near_zero", "normalise"]

FAR_PIVOT = 4.0  # |mean - pivot| / sqrt(variance) above which float32 factors lose digits: keep the pivot
FAR_SUMS = 4.0  # and (mean - pivot)^2 / variance above which float32 sums do: take them again around the mean
PIECE = 2048  # elements of a row summed at once, where it has two of them


class Affine(NamedTuple):
    """``y = (x - pivot) * a + b``; every member has shape (groups, channels). `pivot` None stands for zeros."""

    pivot: Any
    a: Any
    b: Any


def _factors(view: View, values: Sequence[Any], dtype: Any) -> list[list[Any] | None]:
    """Lay out per-channel values in tables that broadcast against the blocks of a view, and cut them for those.

    None stays None.
    """
    present = [each.astype(dtype, copy=False) for each in values if each is not None]
    if not present:
        return [None] * len(values)
    tables = recycled((len(present), *view.table_shape), dtype)
    for table, each in zip(tables, present, strict=True):
        if view.folded is not None:
            each = np.broadcast_to(each.reshape(view.folded[0], 1, view.folded[2]), view.folded)
        table[...] = each.reshape(view.tables, 1, view.slots, 1)
    shape = (view.tables, -1) if view.columns else (view.tables, *view.table_shape[2:])
    parts = iter([table_parts_of(view, table.reshape(shape)) for table in tables])
    return [None if each is None else next(parts) for each in values]


def _tasks(view: View, operands: Sequence[list[Any] | None]) -> list[tuple[Any, ...]]:
    """Return for each block what it needs of every operand; None stays None.

    All is cut before any thread begins: a thread that cuts holds the interpreter lock, and another that finishes a call
    then goes to sleep.
    """
    missing = [None] * len(view.blocks)
    return list(zip(*[missing if each is None else each for each in operands], strict=True))


class _Scratch(threading.local):
    """Each thread's working copies of blocks, one per use and shape."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.buffers: dict[Any, Any] = {}

    def like(self, part: Any, use: str) -> Any:
        key = use, part.shape
        if key not in self.buffers:
            self.buffers[key] = aligned(part.shape, self.dtype)
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

    into = [sums[:, block.segment, block.first : block.last, block.left : block.right] for block in view.blocks]
    run_tasks(work, list(zip(into, view.blocks, _tasks(view, operands), strict=True)), threaded(view, itemsize))
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

    def work(task: tuple[Any, Any, tuple[Any, ...]]) -> None:
        into, pieces, parts = task
        u, v = pair(*parts)
        whole, columns = len(u) // ROWS, u.shape[1]
        if whole:
            cut = (whole, ROWS, columns)
            _sums_of_rows(u[: whole * ROWS].reshape(cut), v[: whole * ROWS].reshape(cut), pieces[:, :whole])
        if whole * ROWS < len(u):
            _sums_of_rows(u[None, whole * ROWS :], v[None, whole * ROWS :], pieces[:, whole:])
        np.add.reduce(pieces, axis=1, dtype=np.float64, out=into)

    sums, targets = [], []
    for series in view.series:
        sums.append(np.empty((2, len(series.pieces), series.columns)))
        pieces = recycled((2, series.pieces[-1].stop, series.columns), dtype)
        targets += [(sums[-1][:, number], pieces[:, place]) for number, place in enumerate(series.pieces)]
    tasks = [(*target, parts) for target, parts in zip(targets, _tasks(view, operands), strict=True)]
    run_tasks(work, tasks, threaded(view, itemsize))
    if len(sums) == 1:
        return np.add.reduce(sums[0].reshape(2, 1, -1, view.slots, view.inner), axis=(2, 4))
    totals = np.zeros((2, view.tables, view.slots))
    for (table, left, right, *_), each in zip(view.series, sums, strict=True):
        totals[:, table, left:right] += np.add.reduce(each.reshape(2, -1, right - left, view.inner), axis=(1, 3))
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
    view = view_of(layout, sums=True, copies=pivot is not None or x.dtype != dtype)
    scratch = _Scratch(dtype)

    def pair(part: Any, shift: Any) -> Any:
        shifted = _shifted(part, shift, scratch)
        return shifted, shifted

    return _two_sums(view, (parts_of(view, x), *_factors(view, (pivot,), dtype)), pair, dtype, x.itemsize)


def moments(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any, Any]:
    """Return (pivot, mean - pivot, biased variance), each of shape (groups, channels); `pivot` None stands for zeros.

    `x` is contiguous. `pivot` has `dtype`, which the arithmetic is done in (float32 or float64); the others are
    float64.
    """
    offset, variance, near = _from_sums(_power_sums(x, layout, None, dtype), layout)
    if near:
        return None, offset, variance
    mean = offset.astype(dtype)
    pivot = np.where(np.isfinite(mean), mean, np.zeros_like(mean))
    offset, variance, _ = _from_sums(_power_sums(x, layout, pivot, dtype), layout)
    return pivot, offset, variance


def _from_sums(sums: Any, layout: Layout) -> tuple[Any, Any, bool]:
    """Return (mean - pivot, variance), and whether they are finite and no mean is so far that digits are lost."""
    sums = sums.reshape(2, layout.groups, layout.channels)
    sums /= layout.samples
    offset, variance = sums
    squared = offset * offset
    np.maximum(np.subtract(variance, squared, out=variance), 0, out=variance)
    near = np.logical_and.reduce(squared <= FAR_SUMS * variance, axis=None)
    return offset, variance, bool(near and np.add.reduce(variance, axis=None) < np.inf)


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
    scratch = None if y.dtype == dtype else _Scratch(dtype)

    def work(parts: tuple[Any, ...]) -> None:
        source, target, added, shift, scale, bias = parts
        result = target if scratch is None else scratch.like(target, "x")
        if shift is not None:
            source = np.subtract(source, shift, out=result, dtype=dtype)
        np.multiply(source, scale, out=result, dtype=dtype)
        np.add(result, bias, out=result)
        if added is not None:
            np.add(result, added, out=result, dtype=dtype)
        if relu:
            np.maximum(result, 0, out=result)
        if scratch is not None:
            np.copyto(target, result, casting="unsafe")

    arrays = (None if each is None else parts_of(view, each) for each in (x, y, residual))
    tasks = _tasks(view, (*arrays, *_factors(view, factors, dtype)))
    run_tasks(work, tasks, threaded(view, x.itemsize), backwards=True)


def backward_sums(dy: Any, x: Any, layout: Layout, pivot: Any, y: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the sums of g and of ``g * (x - pivot)``, shape (groups, channels), float64; g is dy where y > 0.

    `y` None means that there was no ReLU: g is dy.
    """
    view = view_of(layout, sums=True, copies=x.dtype != dtype or y is not None or pivot is not None)
    scratch = _Scratch(dtype)

    def pair(dy_part: Any, y_part: Any, x_part: Any, shift: Any) -> Any:
        return _gradient(dy_part, y_part, scratch), _shifted(x_part, shift, scratch)

    outputs = None if y is None else parts_of(view, y)
    operands = parts_of(view, dy), outputs, parts_of(view, x), *_factors(view, (pivot,), dtype)
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
        dy, y, source, target, dresidual, shift, scale, bias, slope = parts
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
    tasks = _tasks(view, (*arrays, *_factors(view, (*factors, slope), dtype)))
    run_tasks(work, tasks, threaded(view, x.itemsize), backwards=True)
