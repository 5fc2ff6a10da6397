"""Batch normalisation of large NumPy arrays in blocks: sums, and one affine sweep each way.

Sums are taken of ``x - pivot``, in the working dtype inside a block and in float64 across blocks. The pivot is 0, which
costs no subtraction, where a sample of the array and then the sums themselves show every channel's mean within a few
standard deviations of 0; else it is the sample's mean, and the sums are taken again if even that lies too far away. The
pivot stays in the normalise step, ``y = (x - pivot) * a + b``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers.ops.batch_norm_blocks import ELEMENTS, Block, Operand, View, block_rows, run_tasks, view_of
from gpulayers.ops.batch_norm_plan import Layout
from gpulayers.ops.host_buffers import aligned

__all__ = ["Affine", "backward_apply", "backward_sums", "moments", "near_zero", "normalise"]

FAR_PIVOT = 16.0  # (mean - pivot)^2 / variance above which float32 sums and factors lose digits: take a nearer pivot
REPEATED = 1 << 20  # elements that a table may be blown up to
SAMPLE = 4096  # elements of the sample, and at least
SAMPLE_EACH = 16  # of every statistic: fewer often look far from 0 by chance
SHORT_ROW = 8192  # BLAS dot products start threads above 10000 elements


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
            # Whole blocks of repeated rows: NumPy's loops are faster on equal shapes than on broadcast ones.
            rows, width = block_rows(view), view.slots * view.inner
            rows = rows if view.tables * rows * view.tile * width <= REPEATED else 1
            whole = _filled((view.tables, rows * view.tile, view.slots, view.inner), shaped)
            self.main = whole.reshape(view.tables, rows, view.tile * width)
            self.rest = whole.reshape(view.tables, rows * view.tile, width)[:, :1]
        else:
            repeat = view.inner if shaped.size * view.inner <= REPEATED else 1
            self.main = _filled((view.tables, view.slots, repeat), shaped[:, 0])

    def row(self, block: Block) -> Any:
        segment, rest, first, last, left, right = block
        table = segment % self.view.tables
        if self.view.columns:
            return self.rest[table] if rest else self.main[table, : last - first]
        return self.main[table, left:right]


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


def _fold(view: View, sums: Any) -> Any:
    """Return the sums of a block's columns (or of its rows) as one float64 value per slot of the block."""
    if not view.columns:
        return np.add.reduce(sums, axis=0, dtype=np.float64)
    return np.add.reduce(sums.reshape(-1, view.slots, view.inner), axis=(0, 2), dtype=np.float64)


def _dot(view: View, left: Any, right: Any) -> Any:
    """Sum ``left * right`` over columns or rows, without threads and without a temporary."""
    if view.columns:
        return np.einsum("rc,rc->c", left, right)
    return np.vecdot(left, right) if view.inner <= SHORT_ROW else np.einsum("rci,rci->rc", left, right)


def _sum(view: View, values: Any, ones: Any) -> Any:
    if view.columns:
        return np.add.reduce(values, axis=0)
    return np.vecdot(values, ones) if view.inner <= SHORT_ROW else np.add.reduce(values, axis=-1)


def _two_sums(view: View, task: Any, itemsize: int) -> Any:
    """Run `task()(block) -> (sums, sums)` over all blocks and return both totals, shape (2, tables, slots), float64."""

    def work(blocks: tuple[Block, ...]) -> Any:
        total = np.zeros((2, view.tables, view.slots))
        width = view.tile * view.slots * view.inner
        wide = np.zeros((2, view.tables, width)) if view.columns and view.tables * width <= REPEATED else None
        one = task()
        for block in blocks:
            sums = one(block)
            table = block.segment % view.tables
            for which in (0, 1):
                if wide is not None and sums[which].size == width:  # the columns are added up at the end, not per block
                    wide[which, table] += sums[which]
                else:
                    total[which, table, block.left : block.right] += _fold(view, sums[which])
        if wide is not None:
            total += wide.reshape(2, view.tables, view.tile, view.slots, view.inner).sum(axis=(2, 4))
        return total

    parts = run_tasks(work, view, itemsize)
    result = parts[0]
    for part in parts[1:]:
        result += part
    return result


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


def _power_sums(x: Any, view: View, pivot: Any, dtype: Any) -> Any:
    table = _pivot_table(view, pivot, dtype)
    ones = np.ones(view.inner, dtype)
    itemsize, x = x.itemsize, Operand(view, x)

    def task() -> Any:
        scratch = _Scratch(dtype)

        def one(block: Block) -> Any:
            shifted = _shifted(x, block, table, scratch, dtype)
            return _sum(view, shifted, ones), _dot(view, shifted, shifted)

        return one

    return _two_sums(view, task, itemsize)


def _first_pivot(x: Any, layout: Layout, dtype: Any) -> Any:
    """Return 0 where a sample's means are near it, beside its standard deviations; else the sample's means."""
    rows, groups, spread, channels, inner, _ = layout
    wanted = max(SAMPLE_EACH, SAMPLE // (groups * channels))  # values per statistic, spread over the axes in this order
    many = min(rows, wanted)
    places = min(spread, max(1, wanted // many))
    neighbours = min(inner, max(1, wanted // (many * places)))
    five = x.reshape(layout[:5])
    sample = five[:many, :, :: -(-spread // places), :, :: -(-inner // neighbours)].astype(dtype)
    mean = sample.mean(axis=(0, 2, 4))
    deviation = sample.std(axis=(0, 2, 4))
    near = (mean * mean <= FAR_PIVOT / 4 * deviation * deviation).all()
    return np.zeros_like(mean) if near else np.where(np.isfinite(mean), mean, 0)


def moments(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any, Any]:
    """Return (pivot, mean - pivot, biased variance), each of shape (groups, channels).

    `x` is contiguous. `pivot` has `dtype`, which the arithmetic is done in (float32 or float64); the others are
    float64.
    """
    view = view_of(layout)
    pivot = _first_pivot(x, layout, dtype)
    offset, variance = _from_sums(_power_sums(x, view, pivot, dtype), layout)
    if (offset * offset > FAR_PIVOT * variance).any():
        better = (pivot + offset).astype(dtype)
        pivot = np.where(np.isfinite(better), better, pivot)
        offset, variance = _from_sums(_power_sums(x, view, pivot, dtype), layout)
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

    run_tasks(work, view, itemsize, backwards=True)


def backward_sums(dy: Any, x: Any, layout: Layout, pivot: Any, y: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the sums of g and of ``g * (x - pivot)``, shape (groups, channels), float64; g is dy where y > 0.

    `y` None means that there was no ReLU: g is dy.
    """
    view = view_of(layout)
    table = _pivot_table(view, pivot, dtype)
    ones = np.ones(view.inner, dtype)
    itemsize, x, dy = x.itemsize, Operand(view, x), Operand(view, dy)
    y = None if y is None else Operand(view, y)

    def task() -> Any:
        scratch = _Scratch(dtype)

        def one(block: Block) -> Any:
            shifted = _shifted(x, block, table, scratch, dtype)
            g = _gradient(dy, y, block, scratch, dtype)
            return _sum(view, g, ones), _dot(view, g, shifted)

        return one

    sums = _two_sums(view, task, itemsize)
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
    """Write ``dx = g * a + (x - pivot) * slope + b``, and g itself to `dresidual` unless that is None.

    `slope` None leaves the middle term out (inference).
    """
    view = view_of(layout, ELEMENTS // 2)  # up to seven operands share the cache
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
            np.multiply(g, scale.row(block), out=result)
            if slopes is not None:
                shifted = scratch.like(target, "x")
                source = x.cut(block)
                if shift is not None:
                    source = np.subtract(source, shift.row(block), out=shifted, dtype=dtype)
                np.multiply(source, slopes.row(block), out=shifted, dtype=dtype)
                np.add(result, shifted, out=result)
                np.add(result, bias.row(block), out=result)
            if not direct:
                np.copyto(target, result, casting="unsafe")

    run_tasks(work, view, itemsize, backwards=True)
