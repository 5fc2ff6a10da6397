"""Optimizer updates on arrays, in place: the maths of SGD, momentum and Adam, for lists of parameters.

NumPy arrays are updated in blocks that stay in the cache, so each parameter is read and written once per call and no
temporary of its size is made. On a GPU the kernels of `gpulayers.ops.optimizer_kernels` update all parameters of a
dtype in one launch; what they do not take (other layouts or mixtures of dtypes) is updated array by array. Parameters
of 16 bits are computed with in float32 (their slots are float32) and rounded once, when they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers.launch import has_kernels
from gpulayers.ops import optimizer_kernels

__all__ = ["adam_update", "sgd_update"]

BLOCK = 1 << 14  # elements: four float32 arrays of this length fit a second-level cache with room to spare


def _blocks(xp: Any, *arrays: Any) -> Iterator[Sequence[Any]]:
    """Yield matching pieces of equally shaped arrays, as views to write into."""
    if arrays[0].ndim == 0:  # NumPy gives scalars for scalars, which nothing can be written into
        arrays = tuple(array.reshape(1) for array in arrays)
    if xp is not np or arrays[0].size <= BLOCK or not all(array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, arrays[0].size, BLOCK):
        yield [array[start : start + BLOCK] for array in flat]


def _wide(array: Any) -> Any:
    """Return 16-bit numbers as float32, others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _subtract(xp: Any, parameter: Any, step: Any) -> None:
    if parameter.dtype == step.dtype:
        xp.subtract(parameter, step, out=parameter)
    else:
        parameter[...] = (_wide(parameter) - step).astype(parameter.dtype)


def sgd_update(
    xp: Any,
    params: Sequence[Any],
    grads: Sequence[Any],
    momentums: Sequence[Any] | None,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> None:
    """Update `params` (and `momentums`) in place.

    Without momentums ``w -= a g``. With them ``b <- momentum b + g``, then ``w -= a b``, or with `nesterov`
    ``w -= a (g + momentum b)``. Source: ``tf.compat.v1.train.MomentumOptimizer``; Sutskever et al. 2013.

    >>> w, b = np.ones(2), np.zeros(2)
    >>> for _ in range(2):
    ...     sgd_update(np, [w], [np.ones(2)], [b], learning_rate=0.5, momentum=0.5)
    >>> w, b
    (array([-0.25, -0.25]), array([1.5, 1.5]))
    """
    members = list(zip(params, grads, params if momentums is None else momentums, strict=True))
    left: Iterable[int] = range(len(members))
    if params and has_kernels(params[0]):
        if momentums is None:
            left = optimizer_kernels.sgd_update(params, grads, rate=learning_rate)
        else:
            left = optimizer_kernels.momentum_update(
                params, grads, momentums, rate=learning_rate, momentum=momentum, nesterov=nesterov
            )
    for index in left:
        if momentums is None:
            for w, g in _blocks(xp, *members[index][:2]):
                _subtract(xp, w, _wide(g) * learning_rate)
            continue
        for w, g, b in _blocks(xp, *members[index]):
            xp.multiply(b, momentum, out=b)
            xp.add(b, g, out=b)
            if nesterov:
                step = b * momentum
                xp.add(step, g, out=step)
                xp.multiply(step, learning_rate, out=step)
            else:
                step = b * learning_rate
            _subtract(xp, w, step)


def adam_update(
    xp: Any,
    params: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    *,
    learning_rate: float,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    decays: Sequence[bool] | None = None,
    step: int = 1,
) -> None:
    """Update `params`, and the moments `m` and `v`, in place; `step` counts from 1.

    ``w -= learning_rate weight_decay w`` (where `decays`, one for each parameter, does not say False), then
    ``m <- m + (1 - beta_1) (g - m)``, ``v <- v + (1 - beta_2) (g^2 - v)`` and ``w -= a m / (sqrt(v) + epsilon)``, with
    ``a = learning_rate sqrt(1 - beta_2^step) / (1 - beta_1^step)``.

    Source: Kingma and Ba 2015, the form before section 2.1, whose epsilon is TensorFlow's (PyTorch adds its epsilon to
    the corrected root); Loshchilov and Hutter 2019 for the decay.

    >>> w, m, v = np.ones(1), np.zeros(1), np.zeros(1)
    >>> adam_update(np, [w], [np.full(1, 3.0)], [m], [v], learning_rate=0.1, step=1)
    >>> bool(abs(w[0] - 0.9) < 1e-6)
    True
    """
    rate = learning_rate * math.sqrt(1.0 - beta_2**step) / (1.0 - beta_1**step)
    decay = learning_rate * weight_decay
    members = list(zip(params, grads, m, v, strict=True))
    left: Iterable[int] = range(len(members))
    if params and has_kernels(params[0]):
        settings = {"rate": rate, "beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon, "decay": decay}
        left = optimizer_kernels.adam_update(params, grads, m, v, decays=decays, **settings)
    for index in left:
        for w, g, m_block, v_block in _blocks(xp, *members[index]):
            g = _wide(g)
            scratch = g - m_block
            xp.multiply(scratch, 1.0 - beta_1, out=scratch)
            xp.add(m_block, scratch, out=m_block)
            xp.multiply(g, g, out=scratch)
            xp.subtract(scratch, v_block, out=scratch)
            xp.multiply(scratch, 1.0 - beta_2, out=scratch)
            xp.add(v_block, scratch, out=v_block)
            xp.sqrt(v_block, out=scratch)
            xp.add(scratch, epsilon, out=scratch)
            xp.divide(m_block, scratch, out=scratch)
            xp.multiply(scratch, rate, out=scratch)
            if decay and (decays is None or decays[index]):
                scratch += _wide(w) * decay
            _subtract(xp, w, scratch)
