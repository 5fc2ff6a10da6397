"""The products of a recurrent sequence's way back that no step waits for, on NumPy: gradients of weights and inputs.

A step needs the product with the recurrent weights before the one before it can begin. The gradients of the weights are
sums over steps, of which another thread takes a block as soon as its steps are done; the gradients of the inputs come
last, when the calling thread is free to take its share of them.

All this only where the products can be small (``recurrent.products``) and the sums stay in a core's cache. Larger ones
are left to BLAS, when all steps are done.
"""

from __future__ import annotations

import functools

import numpy as np

from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.host.settings import quiet
from gpulayers.ops.host.threads import InOrder, run_tasks
from gpulayers.ops.recurrent.common import reverse_if
from gpulayers.ops.recurrent.products import SMALL_PRODUCT, WORTH_A_THREAD, in_strips, strip_width, weight_strips

__all__ = ["WeightGradients", "input_gradients", "rows_times"]

_NARROW = 16  # columns of a strip
_SHORT = 32  # rows multiplied at once, of one step or several
_TALL = 256  # rows summed by one product: enough that adding its result costs little beside it
_CACHED = 1 << 20  # bytes of a sum that stays in the second-level cache


class WeightGradients:
    """``left^T right``, (D, C), for some `left` arrays, and the sum of the rows of ``right``, (C), over all steps.

    Each left array is (T, N, D), `right` is (T, N, C); steps and rows of each must lie evenly in memory. `add` says
    that a block of steps may be taken. The same bits on every run: blocks are summed in the order they are added in.
    """

    def __init__(self, right: np.ndarray, *lefts: np.ndarray) -> None:
        (time, batch, columns), depth = right.shape, max(left.shape[2] for left in lefts)
        self._batch, self._right = batch, right.reshape(time * batch, columns)
        self._lefts = [left.reshape(time * batch, left.shape[2]) for left in lefts]
        self._tall = max(1, min(_TALL, time * batch, SMALL_PRODUCT // (_NARROW * max(depth, 1))))
        small = columns % _NARROW == 0 and depth * columns * right.itemsize <= _CACHED
        small = small and time * batch * depth * columns >= WORTH_A_THREAD
        self._strips = columns // _NARROW if small else 0
        self._calls = InOrder()
        if small:
            self._totals = [self._zeros(left) for left in self._lefts]
            self._parts = [self._zeros(left) for left in self._lefts]
            self._rows: list[np.ndarray] = []

    def _zeros(self, left: np.ndarray) -> np.ndarray:
        return np.zeros((self._strips, left.shape[1], _NARROW), self._right.dtype)

    def add(self, start: int, end: int) -> None:
        """Take the steps from `start` to `end`, in which nothing will change any more."""
        if self._strips:
            self._calls.add(functools.partial(self._sum, start * self._batch, end * self._batch))

    def _sum(self, start: int, end: int) -> None:
        for first in range(start, end, self._tall):
            some = slice(first, min(first + self._tall, end))
            right = self._right[some]
            self._rows.append(np.add.reduce(right, axis=0))  # which brings all of it into the cache
            strips = right.reshape(-1, self._strips, _NARROW).transpose(1, 0, 2)
            for left, part, total in zip(self._lefts, self._parts, self._totals, strict=True):
                np.matmul(left[some].T, strips, out=part)
                np.add(total, part, out=total)

    def results(self) -> tuple[np.ndarray, ...]:
        """Return the sum for each left array, then that of the rows, when all steps have been added."""
        right = self._right
        if not self._strips:
            rows = [np.add.reduce(right[first : first + _TALL], axis=0) for first in range(0, len(right), _TALL)]
            return *(np.matmul(left.T, right) for left in self._lefts), _added(rows, right)
        self._calls.finish()
        columns = self._strips * _NARROW
        return *(total.transpose(1, 0, 2).reshape(-1, columns) for total in self._totals), _added(self._rows, right)


def _added(rows: list[np.ndarray], like: np.ndarray) -> np.ndarray:
    """Return the sum of rows, added up in float64, in the dtype of `like`; zeros for no rows."""
    return np.sum(rows, axis=0, dtype=np.float64).astype(like.dtype) if rows else np.zeros(like.shape[1], like.dtype)


@quiet
def rows_times(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return ``rows weights``, made by all threads: `rows` (T, N, C), `weights` (C, D), the result (T, N, D)."""
    (time, batch, columns), depth = rows.shape, weights.shape[1]
    out = recycled((time, batch, depth), rows.dtype)
    flat, into = rows.reshape(time * batch, columns), out.reshape(time * batch, depth)
    if not strip_width(_SHORT, columns, depth):
        np.matmul(flat, weights.astype(rows.dtype, copy=False), out=into)
        return out
    strips = weight_strips(weights, _SHORT, rows.dtype)[0]
    tall = _SHORT * -(-WORTH_A_THREAD // (_SHORT * columns * depth))

    def work(first: int) -> None:
        some = slice(first, first + tall)
        whole = (len(flat[some]) // _SHORT) * _SHORT
        parts = (slice(first, first + whole), (-1, _SHORT)), (slice(first + whole, first + tall), (1, -1))
        for part, shape in parts if whole else parts[1:]:
            left, right = flat[part].reshape(*shape, columns), into[part].reshape(*shape, depth)
            np.matmul(left[:, None], strips, out=in_strips(right, strips[None]))

    run_tasks(work, range(0, time * batch, tall), threaded=True)
    return out


def input_gradients(
    rows: np.ndarray, kernel: np.ndarray, mask: np.ndarray | None, added: np.ndarray | None, go_backwards: bool
) -> np.ndarray:
    """Return dx (T, N, D), in the inputs' own direction, from the gradients `rows` (T, N, C) of the pre-activations.

    `mask` is the inputs' dropout mask, `added` what reaches the inputs beside the cell.
    """
    d_x = rows_times(rows, kernel.T)
    if mask is not None:
        d_x *= mask
    if added is not None:
        d_x += added
    return np.ascontiguousarray(reverse_if(go_backwards, d_x))
