"""Batch normalisation of an array where it lies, in pieces, with weights (masks) or without: NumPy and CuPy alike.

Weights may vary in any way that broadcasts, and kept axes need not lie side by side, so nothing is collapsed here: an
array is worked on in its own axes, in pieces small enough that no temporary grows with the input. What is computed is
float64 until it is stored: float32 sums down a long column lose the digits that a mean far from zero needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpulayers.errors import ShapeError, message
from gpulayers.ops.batch_norm import moving as batch_norm_moving
from gpulayers.ops.batch_norm.moving import MovingStatistics, Renorm
from gpulayers.ops.batch_norm.numpy_body import channel_tables, gradient_tables
from gpulayers.ops.host.buffers import recycled

__all__ = ["View", "backward", "forward", "moments", "view_of"]

ELEMENTS_HOST = 1 << 16  # of a piece: its float64 temporaries stay in a core's cache
ELEMENTS_DEVICE = 1 << 20  # enough to fill a device; a handful of temporaries of 8 MB

Piece = tuple[slice, ...]


class View(NamedTuple):
    """How an array is seen: `shape`, its axis 0 cut into (rows, `groups`) or, where it is kept, a 1 put before it.

    `table`: the shape in which statistics broadcast against it; `reduced`: the axes that are averaged. `weights`: an
    array of as many axes that broadcasts to `shape`, or None.
    """

    shape: tuple[int, ...]
    groups: int
    table: tuple[int, ...]
    reduced: tuple[int, ...]
    weights: Any

    @property
    def samples(self) -> int:
        """Number of values behind one statistic."""
        return math.prod(self.shape[a] for a in self.reduced)

    def spread(self, xp: Any, values: Any) -> Any:
        """Return values of (groups, channels), or of channels alone, as a table."""
        if values.size != math.prod(self.table):
            values = xp.broadcast_to(values, (self.groups, values.size))
        return values.reshape(self.table)

    def flat(self, table: Any) -> Any:
        """Return a table as (groups, channels)."""
        return table.reshape(self.groups, -1)

    def pieces(self, xp: Any) -> Iterator[Piece]:
        """Yield slices of the first axes that cut `shape` into pieces of bounded size."""
        limit, at = ELEMENTS_HOST if xp is np else ELEMENTS_DEVICE, len(self.shape) - 1
        while at and math.prod(self.shape[at:]) <= limit:
            at -= 1
        step = max(1, limit // math.prod(self.shape[at + 1 :]))
        for outer in itertools.product(*map(range, self.shape[:at])):
            for start in range(0, self.shape[at], step):
                yield (*(slice(index, index + 1) for index in outer), slice(start, start + step))


def view_of(x: Any, axis: tuple[int, ...], groups: int, weights: Any, dtype: Any) -> View:
    """Return the view of `x` with `axis` kept. Raises ShapeError where the weights do not broadcast to x."""
    kept = {a % x.ndim for a in axis}

    def lead(first: int) -> tuple[int, int]:
        if 0 in kept:
            return 1, first
        return (1, 1) if first == 1 else (first // groups, groups)

    channels = [size if a in kept else 1 for a, size in enumerate(x.shape)]
    table = (1, channels[0] if 0 in kept else groups, *channels[1:])
    reduced = (0, *[a + 1 for a in range(1, x.ndim) if a not in kept])
    if weights is not None:
        _check_weights(weights, x.shape)
        first, *others = (1,) * (x.ndim - weights.ndim) + weights.shape
        weights = weights.astype(dtype, copy=False).reshape(*lead(first), *others)
    return View((*lead(x.shape[0]), *x.shape[1:]), groups, table, reduced, weights)


def _check_weights(weights: Any, shape: tuple[int, ...]) -> None:
    try:
        fits = np.broadcast_shapes(weights.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            message(
                "batch_norm",
                "mask or weights do not fit the input",
                f"weights that broadcast to {shape}",
                weights.shape,
                "A layer's mask has the input's shape without its last axis; weights are it with a 1 behind.",
            )
        )


def _cut(array: Any, piece: Piece) -> Any:
    """Return the part of an array that belongs to a piece; axes of size 1 broadcast."""
    return array[tuple([slice(None) if size == 1 else s for s, size in zip(piece, array.shape, strict=False)])]


def _wide(array: Any, dtype: Any) -> Any:
    """Return an array as float64, by way of the working dtype, which every module makes of 16-bit types."""
    return array.astype(dtype, copy=False).astype(np.float64, copy=False)


def _narrow(array: Any, dtype: Any, storage: Any) -> Any:
    return array.astype(dtype, copy=False).astype(storage, copy=False)


def _new(xp: Any, like: Any) -> Any:
    return recycled(like.shape, like.dtype) if xp is np else xp.empty(like.shape, like.dtype)


def _sums(xp: Any, view: View, terms: Callable[[Piece], tuple[Any, ...]]) -> list[Any]:
    """Return the sums over the reduced axes, as tables, of each of the float64 arrays that a piece gives."""
    totals: list[Any] = []
    for piece in view.pieces(xp):
        for index, term in enumerate(terms(piece)):
            if index == len(totals):
                totals.append(xp.zeros(view.table, np.float64))
            total = _cut(totals[index], piece)
            total += term.sum(axis=view.reduced, keepdims=True)
    return totals


def _counts(xp: Any, view: View) -> Any:
    """Return the table of the sums of the weights behind the statistics; without weights the number of values."""
    if view.weights is None:
        return view.samples
    repeated = math.prod(view.shape[a] for a in view.reduced if view.weights.shape[a] == 1)
    total = view.weights.sum(axis=view.reduced, keepdims=True, dtype=np.float64) * repeated
    return xp.broadcast_to(total, view.table)


def _divided(xp: Any, value: Any, count: Any) -> Any:
    """Return ``value / count``, 0 where the count is 0."""
    return value / count if isinstance(count, int) else xp.where(count != 0, value / count, 0)


def _weighed(xp: Any, view: View, piece: Piece, values: Any) -> Any:
    """Return the values times their weights, 0 for values of weight 0 that are not finite."""
    if view.weights is None:
        return values
    weights = _cut(view.weights, piece)
    return xp.where(weights != 0, values * weights, 0)


def moments(xp: Any, x: Any, view: View, dtype: Any) -> tuple[Any, Any]:
    """Return mean and variance in float64, shape (groups, channels).

    ``mean = sum(w x) / W``, ``variance = sum(w (x - mean)^2) / W``, ``W = sum(w)``; both 0 where W is 0. Values of
    weight 0 count for nothing even where they are not finite.
    """
    x, count = x.reshape(view.shape), _counts(xp, view)
    with np.errstate(all="ignore"):
        (total,) = _sums(xp, view, lambda piece: (_weighed(xp, view, piece, _wide(x[piece], dtype)),))
        mean = _divided(xp, total, count)

        def squares(piece: Piece) -> tuple[Any]:
            values = _wide(x[piece], dtype) - _cut(mean, piece)
            values *= values
            return (_weighed(xp, view, piece, values),)

        (total,) = _sums(xp, view, squares)
        return view.flat(mean), view.flat(_divided(xp, total, count))


def forward(
    xp: Any,
    x: Any,
    view: View,
    gamma: Any,
    beta: Any,
    epsilon: float,
    renorm: Renorm | None,
    residual: Any,
    relu: bool,
    moving: MovingStatistics | None,
    dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return (y, mean, variance, saved) of a training step, and update `moving` in place."""
    with np.errstate(all="ignore"):
        mean, variance = moments(xp, x, view, dtype)
        tables = channel_tables(xp, mean, None, variance, gamma, beta, epsilon, renorm, dtype)
        y = _new(xp, x)
        normalise(xp, x, y, view, (mean, tables.a, tables.b), residual, relu, dtype)
        if moving is not None:
            batch_norm_moving.update(moving, tables.mean, tables.variance, epsilon, view.samples, xp)
    return y, tables.mean, tables.variance, tables.saved


def normalise(
    xp: Any, x: Any, y: Any, view: View, tables: tuple[Any, Any, Any], residual: Any, relu: bool, dtype: Any
) -> None:
    """Write ``(x - centre) * a + b`` (+ residual, then ReLU) into `y`; `tables` are centre, a, and b or None."""
    x, into = x.reshape(view.shape), y.reshape(view.shape)
    residual = None if residual is None else residual.reshape(view.shape)
    centre, a, b = (None if v is None else view.spread(xp, v) for v in tables)
    for piece in view.pieces(xp):
        values = _wide(x[piece], dtype) - _cut(centre, piece)
        values *= _cut(a, piece)
        if b is not None:
            values += _cut(b, piece)
        if residual is not None:
            values += _wide(residual[piece], dtype)
        if relu:
            xp.maximum(values, 0, out=values)
        into[piece] = _narrow(values, dtype, into.dtype)


def backward(
    xp: Any, dy: Any, x: Any, view: View, gamma: Any, saved: Any, y: Any, residual: bool, dtype: Any
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual); a value's share ``w / W`` stands where without weights 1 / count does.

    Padding may be NaN: where nothing uses it, it has no gradient.
    """
    dx = _new(xp, x)
    dresidual = _new(xp, x) if residual and y is not None else dy
    split: list[Any] = [None if v is None else v.reshape(view.shape) for v in (dy, x, y, dx, dresidual)]
    pivot = view.spread(xp, saved[0])

    def incoming(piece: Piece) -> tuple[Any, Any]:
        """Return the gradient that the ReLU lets pass, and x - pivot."""
        g = _wide(split[0][piece], dtype)
        if y is not None:
            g = xp.where(split[2][piece] > 0, g, 0)
        return g, _wide(split[1][piece], dtype) - _cut(pivot, piece)

    def terms(piece: Piece) -> tuple[Any, Any]:
        g, shifted = incoming(piece)
        shifted *= g
        return g, shifted if view.weights is None else xp.where(g != 0, shifted, 0)

    with np.errstate(all="ignore"):
        sums = [view.flat(total) for total in _sums(xp, view, terms)]
        a, slope, b, dgamma, dbeta = gradient_tables(xp, (sums[0], sums[1]), saved, gamma, 1)
        count = _counts(xp, view)
        slope, b = (_divided(xp, view.spread(xp, v), count) for v in (slope, b))
        a = view.spread(xp, a)
        for piece in view.pieces(xp):
            g, shifted = incoming(piece)
            if dresidual is not dy:
                split[4][piece] = _narrow(g, dtype, x.dtype)
            shifted *= _cut(slope, piece)
            shifted += _cut(b, piece)
            g = g + _weighed(xp, view, piece, shifted)
            g *= _cut(a, piece)
            split[3][piece] = _narrow(g, dtype, x.dtype)
    return dx, dgamma.astype(dtype, copy=False), dbeta.astype(dtype, copy=False), dresidual if residual else None
