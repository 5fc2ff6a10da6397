"""Optimizer updates on arrays, in place: the maths of SGD, momentum and Adam, for lists of parameters.

NumPy arrays are updated in blocks that stay in the cache, so each parameter is read and written once per call; between
the passes over a block there is one scratch block, the same for all. On a GPU the kernels of
`gpulayers.ops.optimizer_kernels` update all parameters of a dtype in one launch; what they do not take (other layouts
or mixtures of dtypes) is updated array by array. Parameters of 16 bits are computed with in float32 (their slots are
float32) and rounded once, when they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.device import is_array
from gpulayers.errors import StateError, message
from gpulayers.launch import has_kernels
from gpulayers.ops import optimizer_kernels
from gpulayers.ops.host.buffers import aligned

__all__ = ["adam_numbers", "adam_update", "sgd_numbers", "sgd_update"]

BLOCK_BYTES = 768 * 1024
"""What a block of all arrays and the scratch take together: most of a second-level cache, and long enough that the
start of twelve NumPy calls is a small part of it."""
LINE = 64  # elements: as many fill whole cache lines in every dtype


class _Scratch:
    """One array to compute in, as long as the longest block so far.

    It begins on a cache line: NumPy takes up to four times as long to write anywhere else.
    """

    def __init__(self) -> None:
        self._whole: Any = None

    def like(self, xp: Any, block: Any, dtype: Any) -> Any:
        """Return an array of the block's shape and of this dtype, with any contents."""
        if xp is not np:
            return xp.empty(block.shape, dtype=dtype)
        if self._whole is None or self._whole.dtype != dtype or self._whole.size < block.size:
            self._whole = aligned((block.size,), dtype)
        return self._whole[: block.size].reshape(block.shape)


def _length(arrays: Sequence[Any]) -> int:
    """Return the number of elements of a block of these arrays and the scratch: whole cache lines."""
    element = sum(array.dtype.itemsize for array in arrays) + max(array.dtype.itemsize for array in arrays)
    return max(BLOCK_BYTES // element // LINE, 1) * LINE


def _blocks(xp: Any, *arrays: Any) -> Iterator[Sequence[Any]]:
    """Yield matching pieces of equally shaped arrays, as views to write into."""
    if arrays[0].ndim == 0:  # NumPy gives scalars for scalars, which nothing can be written into
        arrays = tuple(array.reshape(1) for array in arrays)
    length = _length(arrays)
    if xp is not np or arrays[0].size <= length or not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, arrays[0].size, length):
        yield [array[start : start + length] for array in flat]


def _wide(array: Any) -> Any:
    """Return 16-bit numbers as float32, others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _subtract(xp: Any, parameter: Any, step: Any) -> None:
    if parameter.dtype == step.dtype:
        xp.subtract(parameter, step, out=parameter)
    else:
        parameter[...] = (_wide(parameter) - step).astype(parameter.dtype)


def _check_left(left: Iterable[int], numbers: Any) -> None:
    """Refuse to update by expressions with numbers that only a kernel can read."""
    if is_array(numbers) and left:
        raise StateError(
            message(
                "optimizer",
                f"{len(list(left))} parameters have no kernel, so their update cannot be replayed",
                "contiguous parameters and slots of dtypes that the kernels take, that share no memory",
            )
        )


def sgd_numbers(learning_rate: float, momentum: float | None = None) -> tuple[float, ...]:
    """Return what `sgd_update` takes: (rate,), or with momentums (rate, momentum).

    >>> sgd_numbers(0.5, 0.9)
    (0.5, 0.9)
    """
    return (learning_rate,) if momentum is None else (learning_rate, momentum)


def sgd_update(
    xp: Any,
    params: Sequence[Any],
    grads: Sequence[Any],
    momentums: Sequence[Any] | None,
    numbers: Any,
    *,
    nesterov: bool = False,
) -> None:
    """Update `params` (and `momentums`) in place.

    Without momentums ``w -= a g``. With them ``b <- momentum b + g``, then ``w -= a b``, or with `nesterov`
    ``w -= a (g + momentum b)``. `numbers`: see `sgd_numbers`; on a device also an array of them that the kernels read
    (StateError for a parameter that has no kernel). Source: ``tf.compat.v1.train.MomentumOptimizer``; Sutskever et al.
    2013.

    >>> w, b = np.ones(2), np.zeros(2)
    >>> for _ in range(2):
    ...     sgd_update(np, [w], [np.ones(2)], [b], sgd_numbers(0.5, 0.5))
    >>> w, b
    (array([-0.25, -0.25]), array([1.5, 1.5]))
    """
    members = list(zip(params, grads, params if momentums is None else momentums, strict=True))
    left: Iterable[int] = range(len(members))
    if params and has_kernels(params[0]):
        if momentums is None:
            left = optimizer_kernels.sgd_update(params, grads, numbers)
        else:
            left = optimizer_kernels.momentum_update(params, grads, momentums, numbers, nesterov=nesterov)
    _check_left(left, numbers)
    scratch = _Scratch()
    for index in left:
        if momentums is None:
            for w, g in _blocks(xp, *members[index][:2]):
                _descend(xp, w, _wide(g), scratch, numbers[0])
        else:
            for w, g, b in _blocks(xp, *members[index]):
                _momentum(xp, w, g, b, scratch, numbers, nesterov)


def _descend(xp: Any, w: Any, g: Any, scratch: _Scratch, rate: Any) -> None:
    step = scratch.like(xp, g, np.result_type(g.dtype, rate))
    xp.multiply(g, rate, out=step)
    _subtract(xp, w, step)


def _momentum(xp: Any, w: Any, g: Any, b: Any, scratch: _Scratch, numbers: Any, nesterov: bool) -> None:
    rate, momentum = numbers
    step = scratch.like(xp, b, b.dtype)
    xp.multiply(b, momentum, out=b)
    xp.add(b, g, out=b)
    if nesterov:
        xp.multiply(b, momentum, out=step)
        xp.add(step, g, out=step)
        xp.multiply(step, rate, out=step)
    else:
        xp.multiply(b, rate, out=step)
    _subtract(xp, w, step)


def adam_numbers(
    *,
    learning_rate: float,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    step: int = 1,
) -> tuple[float, ...]:
    """Return what `adam_update` takes in step number `step`, counted from 1.

    (a, 1 - beta_1, 1 - beta_2, epsilon, learning_rate weight_decay), with
    ``a = learning_rate sqrt(1 - beta_2^step) / (1 - beta_1^step)``.

    Source: Kingma and Ba 2015, the form before section 2.1, whose epsilon is TensorFlow's (PyTorch adds its epsilon to
    the corrected root).

    >>> adam_numbers(learning_rate=1.0, beta_1=0.5, beta_2=0.75, epsilon=0.0)
    (1.0, 0.5, 0.25, 0.0, 0.0)
    """
    rate = learning_rate * math.sqrt(1.0 - beta_2**step) / (1.0 - beta_1**step)
    return rate, 1.0 - beta_1, 1.0 - beta_2, epsilon, learning_rate * weight_decay


def adam_update(
    xp: Any,
    params: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    numbers: Any,
    *,
    decays: Sequence[bool] | None = None,
) -> None:
    """Update `params`, and the moments `m` and `v`, in place, with the (a, k_1, k_2, epsilon, d) of `adam_numbers`.

    ``w -= d w`` (where `decays`, one for each parameter, does not say False), then ``m <- m + k_1 (g - m)``,
    ``v <- v + k_2 (g^2 - v)`` and ``w -= a m / (sqrt(v) + epsilon)``. `numbers` may be an array, as in `sgd_update`.

    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019 for the decay.

    >>> w, m, v = np.ones(1), np.zeros(1), np.zeros(1)
    >>> adam_update(np, [w], [np.full(1, 3.0)], [m], [v], adam_numbers(learning_rate=0.1))
    >>> bool(abs(w[0] - 0.9) < 1e-6)
    True
    """
    members = list(zip(params, grads, m, v, strict=True))
    left: Iterable[int] = range(len(members))
    if params and has_kernels(params[0]):
        left = optimizer_kernels.adam_update(params, grads, m, v, numbers, decays=decays)
    _check_left(left, numbers)
    whole = _Scratch()
    for index in left:
        rate, keep_1, keep_2, epsilon, decay = numbers
        for w, g, m_block, v_block in _blocks(xp, *members[index]):
            g = _wide(g)
            scratch = whole.like(xp, g, np.result_type(g.dtype, m_block.dtype))
            xp.subtract(g, m_block, out=scratch)
            xp.multiply(scratch, keep_1, out=scratch)
            xp.add(m_block, scratch, out=m_block)
            xp.multiply(g, g, out=scratch)
            xp.subtract(scratch, v_block, out=scratch)
            xp.multiply(scratch, keep_2, out=scratch)
            xp.add(v_block, scratch, out=v_block)
            xp.sqrt(v_block, out=scratch)
            xp.add(scratch, epsilon, out=scratch)
            xp.divide(m_block, scratch, out=scratch)
            xp.multiply(scratch, rate, out=scratch)
            if decay and (decays is None or decays[index]):
                scratch += _wide(w) * decay
            _subtract(xp, w, scratch)
