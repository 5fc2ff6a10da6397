"""Batch normalisation of large NumPy arrays in blocks: sums, and one affine sweep each way.

Sums are taken of ``x - pivot``, in the working dtype inside a block and in float64 across blocks. The pivot is 0, which
costs no subtraction, where a sample of the array and then the sums themselves show every channel's mean within a few
standard deviations of 0; else it is the sample's mean, and the sums are taken again if even that lies too far away. The
pivot stays in the normalise step, ``y = (x - pivot) * a + b``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpulayers.ops.batch_norm_blocks import LONG_ROW, Block, Operand, View, run_blocks, view_of
from gpulayers.ops.batch_norm_plan import Layout
from gpulayers.ops.host_buffers import aligned

__all__ = ["Affine", "backward_apply", "backward_sums", "moments", "near_zero", "normalise"]

FAR_PIVOT = 16.0  # (mean - pivot)^2 / variance above which float32 sums and factors lose digits: take a nearer pivot
REPEATED = 1 << 20  # elements that a table may be blown up to
SAMPLE = 4096  # elements of the sample, and at least
SAMPLE_ROWS = 4  # from several rows: neighbours in one are often alike
SAMPLE_EACH = 16  # of every statistic: fewer often look far from 0 by chance
PIECE = 2048  # elements of a row summed at once, where it has two of them


class Affine(NamedTuple):
    """``y = (x - pivot) * a + b``; every member has shape (groups, channels)."""

    pivot: Any
    a: Any
    b: Any


class _Tables:
    """Per-channel rows for the blocks of a view, laid out to broadcast against them."""

    def __init__(self, view: View, values: Any, dtype: Any) -> None:
        self.view = view
        shaped = values.astype(dtype, copy=False).reshape(view.tables, 1, view.slots, 1)
        if view.columns:
            shape = view.tables, view.tile, view.slots, view.inner
            self.main = _filled(shape, shaped).reshape(view.tables, -1)
        else:
            repeat = view.inner if view.inner < LONG_ROW and shaped.size * view.inner <= REPEATED else 1
            self.main = _filled((view.tables, view.slots, repeat), shaped[:, 0])

    def row(self, block: Block) -> Any:
        view, table = self.view, self.main[block.segment % self.view.tables]
        if not view.columns:
            rows = table[block.left : block.right]
            return rows if rows.shape[1] == 1 else rows[:, block.begin : block.end]
        if block.rest or view.span < view.slots:
            return table[block.left * view.inner : block.right * view.inner]
        return table


def _filled(shape: tuple[int, ...], values: Any) -> Any:
    """Return an aligned array of this shape with `values` broadcast into it."""
    array = aligned(shape, values.dtype)
    array[...] = values
    return array


class _Scratch:
    """Working copies of blocks, one per use and shape, kept for a whole task."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.buffers: dict[Any, Any] = {}

    def like(self, part: Any, use: str) -> Any:
        key = use, part.shape
        if key not in self.buffers:
            self.buffers[key] = aligned(part.shape, self.dtype)
        return self.buffers[key]


def _row_sums(view: View, pairs: Callable[[], Any], dtype: Any, itemsize: int) -> Any:
    """Channels first: one sum for every row of a slot, all folded at the end.

    Long rows are summed in pieces: a running float32 sum of thousands of squares loses the digits that the variance
    needs.
    """
    pieces = -(-view.inner // PIECE) if view.inner >= 2 * PIECE else 1
    sums = np.empty((2, view.segments, view.length, view.slots, pieces), dtype)
    ones = np.ones(view.inner, dtype)

    def work(blocks: tuple[Block, ...]) -> None:
        pair = pairs()
        for block in blocks:
            segment, _, first, last, left, right, begin, end = block
            u, v = pair(block)
            into = sums[:, segment, first:last, left:right]
            if pieces == 1:
                _sum_and_dot(u, v, ones, into[..., 0])
                continue
            piece, whole = begin // PIECE, (end - begin) // PIECE
            if whole:
                cut = [each[..., : whole * PIECE].reshape(*each.shape[:2], whole, PIECE) for each in (u, v)]
                _sum_and_dot(*cut, ones, into[..., piece : piece + whole])
            if whole * PIECE < end - begin:
                _sum_and_dot(u[..., whole * PIECE :], v[..., whole * PIECE :], ones, into[..., piece + whole])

    run_blocks(work, view, itemsize)
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


def _column_sums(view: View, pairs: Callable[[], Any], dtype: Any, itemsize: int) -> Any:
    """Channels last: one sum for every column of a block, folded once per task and run of blocks of the same columns.

    Short calls are what threads get into each other's way with.
    """

    def work(blocks: tuple[Block, ...]) -> Any:
        totals, pair = np.zeros((2, view.tables, view.slots)), pairs()
        for (table, rest, left, right), same in itertools.groupby(
            blocks, lambda block: (block.segment % view.tables, block.rest, block.left, block.right)
        ):
            group, width = list(same), (right - left) * view.inner
            sums = np.empty((2, len(group), width * (1 if rest else view.tile)), dtype)
            for index, block in enumerate(group):
                u, v = pair(block)
                np.add.reduce(u, axis=0, out=sums[0, index])
                np.einsum("rc,rc->c", u, v, out=sums[1, index])
            folded = np.add.reduce(sums.reshape(2, -1, width), axis=1, dtype=np.float64)
            if view.inner > 1:
                folded = np.add.reduce(folded.reshape(2, -1, view.inner), axis=2)
            totals[:, table, left:right] += folded
        return totals

    return functools.reduce(np.add, run_blocks(work, view, itemsize))


def _two_sums(view: View, pairs: Callable[[], Any], dtype: Any, itemsize: int) -> Any:
    """Return the sums of u and of ``u * v`` over all blocks, shape (2, tables, slots), float64.

    `pairs()` makes one task's function from a block to its (u, v), both in `dtype`.
    """
    return (_column_sums if view.columns else _row_sums)(view, pairs, dtype, itemsize)


def _shifted(x: Operand, block: Block, table: _Tables | None, scratch: _Scratch, dtype: Any) -> Any:
    """Return the block of ``x - pivot`` in the working dtype; a view of x where that is x itself."""
    part = x.cut(block)
    if table is None and part.dtype == dtype:
        return part
    shifted = scratch.like(part, "x")
    if table is None:
        np.copyto(shifted, part)
    else:
        np.subtract(part, table.row(block), out=shifted, dtype=dtype)
    return shifted


def _pivot_table(view: View, pivot: Any, dtype: Any) -> _Tables | None:
    return _Tables(view, pivot, dtype) if pivot.any() else None


def _power_sums(x: Any, layout: Layout, pivot: Any, dtype: Any) -> Any:
    view = view_of(layout, read=x.dtype == dtype and not pivot.any())
    table = _pivot_table(view, pivot, dtype)
    itemsize, x = x.itemsize, Operand(view, x)

    def pairs() -> Callable[[Block], Any]:
        scratch = _Scratch(dtype)

        def pair(block: Block) -> Any:
            shifted = _shifted(x, block, table, scratch, dtype)
            return shifted, shifted

        return pair

    return _two_sums(view, pairs, dtype, itemsize)


def _first_pivot(x: Any, layout: Layout, dtype: Any) -> Any:
    """Return 0 where a sample's means are near it, beside its standard deviations; else the sample's means."""
    rows, groups, spread, channels, inner, _ = layout
    wanted = max(SAMPLE_EACH, SAMPLE // (groups * channels))  # values per statistic, from several rows if there are any
    many = min(rows, max(SAMPLE_ROWS, -(-wanted // (spread * inner))))
    places = min(spread, -(-wanted // many))
    neighbours = min(inner, -(-wanted // (many * places)))
    middle = (inner - neighbours) // 2
    five = x.reshape(layout[:5])[:: -(-rows // many), :, :: -(-spread // places), :, middle : middle + neighbours]
    sample = np.array(five.transpose(0, 2, 4, 1, 3), dtype, order="C").reshape(-1, groups * channels)
    mean = np.add.reduce(sample, axis=0) / len(sample)
    sample -= mean
    variance = np.einsum("rc,rc->c", sample, sample) / len(sample)
    near = (mean * mean <= FAR_PIVOT / 4 * variance).all()
    pivot = np.zeros_like(mean) if near else np.where(np.isfinite(mean), mean, 0)
    return pivot.reshape(groups, channels)


def moments(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any, Any]:
    """Return (pivot, mean - pivot, biased variance), each of shape (groups, channels).

    `x` is contiguous. `pivot` has `dtype`, which the arithmetic is done in (float32 or float64); the others are
    float64.
    """
    pivot = _first_pivot(x, layout, dtype)
    offset, variance = _from_sums(_power_sums(x, layout, pivot, dtype), layout)
    if (offset * offset > FAR_PIVOT * variance).any():
        better = (pivot + offset).astype(dtype)
        pivot = np.where(np.isfinite(better), better, pivot)
        offset, variance = _from_sums(_power_sums(x, layout, pivot, dtype), layout)
    return pivot, offset, variance


def _from_sums(sums: Any, layout: Layout) -> tuple[Any, Any]:
    offset, square = sums.reshape(2, layout.groups, layout.channels) / layout.samples
    return offset, np.maximum(square - offset * offset, 0)


def near_zero(pivot: Any, a: Any, b: Any, inverse: Any) -> Affine:
    """Return the factors with the pivot folded into b where every channel's is near 0 beside its deviation."""
    b = np.zeros_like(a) if b is None else b
    if (pivot * pivot * inverse * inverse <= FAR_PIVOT).all():
        return Affine(np.zeros_like(a), a, b - pivot.astype(np.float64) * a)
    return Affine(pivot, a, b)


def normalise(x: Any, y: Any, layout: Layout, factors: Affine, residual: Any, relu: bool, dtype: Any) -> None:
    """Write ``(x - pivot) * a + b`` (+ `residual`, then ReLU) to `y`, in one sweep, backwards through memory.

    Backwards, because the end of x is what the statistics sweep left in the cache.
    """
    view = view_of(layout)
    shift = _pivot_table(view, factors.pivot, dtype)
    scale, bias = (_Tables(view, table, dtype) for table in (factors.a, factors.b))
    direct, itemsize = y.dtype == dtype, x.itemsize
    x, y = Operand(view, x), Operand(view, y)
    residual = None if residual is None else Operand(view, residual)

    def work(blocks: tuple[Block, ...]) -> None:
        scratch = _Scratch(dtype)
        for block in blocks:
            target = y.cut(block)
            result = target if direct else scratch.like(target, "x")
            source = x.cut(block)
            if shift is not None:
                source = np.subtract(source, shift.row(block), out=result, dtype=dtype)
            np.multiply(source, scale.row(block), out=result, dtype=dtype)
            np.add(result, bias.row(block), out=result)
            if residual is not None:
                np.add(result, residual.cut(block), out=result, dtype=dtype)
            if relu:
                np.maximum(result, 0, out=result)
            if not direct:
                np.copyto(target, result, casting="unsafe")

    run_blocks(work, view, itemsize, backwards=True)


def backward_sums(dy: Any, x: Any, layout: Layout, pivot: Any, y: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the sums of g and of ``g * (x - pivot)``, shape (groups, channels), float64; g is dy where y > 0.

    `y` None means that there was no ReLU: g is dy.
    """
    view = view_of(layout, read=x.dtype == dtype and y is None and not pivot.any())
    table = _pivot_table(view, pivot, dtype)
    itemsize, x, dy = x.itemsize, Operand(view, x), Operand(view, dy)
    y = None if y is None else Operand(view, y)

    def pairs() -> Callable[[Block], Any]:
        scratch = _Scratch(dtype)
        return lambda block: (
            _gradient(dy, y, block, scratch, dtype),
            _shifted(x, block, table, scratch, dtype),
        )

    sums = _two_sums(view, pairs, dtype, itemsize)
    first, second = sums.reshape(2, layout.groups, layout.channels)
    return first, second


def _clear(g: Any, keep: Any) -> None:
    """Set `g` to 0 where `keep` is false, whatever stood there.

    Its bits are and-ed with all ones or none: a product would leave NaN where g is not finite, and NumPy's masked
    copies take ten times as long.
    """
    bits = np.int32 if g.dtype.itemsize == 4 else np.int64
    g.view(bits)[...] &= np.subtract(0, keep.view(np.int8), dtype=bits)


def _gradient(dy: Operand, y: Operand | None, block: Block, scratch: _Scratch, dtype: Any) -> Any:
    """Return the block of dy in the working dtype, masked by the ReLU; a view of dy where nothing changes."""
    part = dy.cut(block)
    if y is None and part.dtype == dtype:
        return part
    g = scratch.like(part, "g")
    np.copyto(g, part)
    if y is not None:
        _clear(g, y.cut(block) > 0)
    return g


def backward_apply(
    dy: Any, x: Any, dx: Any, dresidual: Any, layout: Layout, factors: Affine, slope: Any, y: Any, dtype: Any
) -> None:
    """Write ``dx = (g + (x - pivot) * slope + b) * a``, and g itself to `dresidual` unless that is None.

    `slope` None stands for ``dx = g * a`` (inference).
    """
    view = view_of(layout)
    shift = _pivot_table(view, factors.pivot, dtype)
    scale, bias = (_Tables(view, table, dtype) for table in (factors.a, factors.b))
    slopes = None if slope is None else _Tables(view, slope, dtype)
    direct, itemsize = dx.dtype == dtype, x.itemsize
    x, dy, dx = (Operand(view, array) for array in (x, dy, dx))
    y = None if y is None else Operand(view, y)
    dresidual = None if dresidual is None else Operand(view, dresidual)

    def work(blocks: tuple[Block, ...]) -> None:
        scratch = _Scratch(dtype)
        for block in blocks:
            g = _gradient(dy, y, block, scratch, dtype)
            target = dx.cut(block)
            result = target if direct else scratch.like(target, "result")
            if dresidual is not None:
                np.copyto(dresidual.cut(block), g, casting="unsafe")
            if slopes is None:
                np.multiply(g, scale.row(block), out=result)
            else:
                source = x.cut(block)
                if shift is not None:
                    source = np.subtract(source, shift.row(block), out=result, dtype=dtype)
                np.multiply(source, slopes.row(block), out=result, dtype=dtype)
                np.add(result, bias.row(block), out=result)
                np.add(result, g, out=result)
                np.multiply(result, scale.row(block), out=result)
            if not direct:
                np.copyto(target, result, casting="unsafe")

    run_blocks(work, view, itemsize, backwards=True)
