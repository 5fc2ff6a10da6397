"""Recurrent cells as compositions of ordinary operations: any activation, gradients of any order.

The equations are those of `recurrent.lstm`, `recurrent.gru` and `recurrent.simple`. Cells whose settings have no fused
form compute by these steps, and the gradients of the fused operations' gradients by the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.errors import GradientError, message
from gpulayers.ops.activations import hard_sigmoid, sigmoid
from gpulayers.ops.arithmetic import tanh, where
from gpulayers.ops.creation import zeros_like
from gpulayers.ops.products import matmul
from gpulayers.ops.recurrent.lstm import GATE_ORDERS
from gpulayers.ops.shaping import cast, flip, reshape, split, stack, unstack

__all__ = ["composed_sequence", "composed_step"]


def composed_step(
    kind: str, x: Any, states: list[Any], entering: Any, kernel: Any, recurrent_kernel: Any, bias: Any,
    activation: Any, gate: Any, **settings: Any,
) -> list[Any]:  # fmt: skip
    """Compute one step of a cell of `kind` ("lstm", "gru", "simple_rnn"); return the new states, the output h' first.

    `x` (N, D); `states` (N, U) each; `entering` (N, U): what of h enters the products, h itself without dropout;
    `activation` and `gate`: the functions for tanh and for sigma; `settings`: ``reset_after``; ``gate_order`` and
    ``forget_bias``. `bias` may be None.

    >>> zeros = np.zeros((1, 2))
    >>> composed_step("simple_rnn", zeros, [zeros], zeros, np.ones((2, 2)), np.ones((2, 2)), None, tanh, sigmoid)
    [array([[0., 0.]])]
    """
    return _STEPS[kind](x, states, entering, kernel, recurrent_kernel, bias, activation, gate, **settings)


def _sums(x: Any, kernel: Any, bias: Any) -> Any:
    product = matmul(x, kernel)
    return product if bias is None else product + bias


def _simple_rnn(
    x: Any, states: list[Any], entering: Any, kernel: Any, recurrent_kernel: Any, bias: Any, activation: Any, gate: Any
) -> list[Any]:
    return [activation(_sums(x, kernel, bias) + matmul(entering, recurrent_kernel))]


def _lstm(
    x: Any, states: list[Any], entering: Any, kernel: Any, recurrent_kernel: Any, bias: Any, activation: Any,
    gate: Any, gate_order: str = "ifco", forget_bias: float = 0.0,
) -> list[Any]:  # fmt: skip
    columns = split(_sums(x, kernel, bias) + matmul(entering, recurrent_kernel), 4, -1)
    s_i, s_f, s_o, s_c = (columns[k] for k in GATE_ORDERS[gate_order])
    s_f = s_f + forget_bias if forget_bias else s_f
    new_c = gate(s_f) * states[1] + gate(s_i) * activation(s_c)
    return [gate(s_o) * activation(new_c), new_c]


def _gru(
    x: Any, states: list[Any], entering: Any, kernel: Any, recurrent_kernel: Any, bias: Any, activation: Any,
    gate: Any, reset_after: bool = True,
) -> list[Any]:  # fmt: skip
    h, candidate = states[0], [2 * tuple(recurrent_kernel.shape)[0]]
    of_inputs, of_state = bias, None
    if bias is not None and reset_after:
        of_inputs, of_state = unstack(bias, 0)
    a_zr, a_h = split(_sums(x, kernel, of_inputs), candidate, -1)
    if reset_after:
        c_zr, c_h = split(_sums(entering, recurrent_kernel, of_state), candidate, -1)
        z, r = split(gate(a_zr + c_zr), 2, -1)
        n = activation(a_h + r * c_h)
    else:
        of_zr, of_h = split(recurrent_kernel, candidate, -1)
        z, r = split(gate(a_zr + matmul(entering, of_zr)), 2, -1)
        n = activation(a_h + matmul(r * entering, of_h))
    return [z * h + (1 - z) * n]


_STEPS: dict[str, Callable[..., list[Any]]] = {"lstm": _lstm, "gru": _gru, "simple_rnn": _simple_rnn}
_GATES = {"sigmoid": sigmoid, "hard_sigmoid": hard_sigmoid}


def composed_sequence(
    kind: str, x: Any, states: list[Any], kernel: Any, recurrent_kernel: Any, bias: Any, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False, recurrent_activation: str = "sigmoid", **settings: Any,
) -> list[Any]:  # fmt: skip
    """Run a cell over `x` (T, N, D) step by step; return the outputs (T, N, U) and the last states.

    Parameters as in `gpulayers.ops.recurrent.arrays.lstm_sequence`. 16-bit data is computed in float32, results have
    the dtype of `x`. Raises GradientError in a graph where T is unknown: the steps are recorded one by one.
    """
    time = tuple(x.shape)[0]
    if time is None:
        raise GradientError(
            message(
                kind, "a gradient of a gradient needs the number of steps", do="Give the inputs a known time length."
            )
        )
    dtype, wide = x.dtype, np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    own = [None if a is None else cast(a, wide) for a in (kernel, recurrent_kernel, bias, input_mask, recurrent_mask)]
    kernel, recurrent_kernel, bias, input_mask, recurrent_mask = own
    states, gate = [cast(s, wide) for s in states], _GATES[recurrent_activation]
    if not time:  # no step, but the right shape
        empty = matmul(cast(x, wide), kernel)[..., : tuple(states[0].shape)[-1]]
        return [cast(value, dtype) for value in (empty, *states)]
    masks = [None] * time if mask is None else unstack(flip(mask, 0) if go_backwards else mask, 0, time)
    outputs: list[Any] = []
    for entering_x, counts in zip(unstack(flip(x, 0) if go_backwards else x, 0, time), masks, strict=True):
        now = cast(entering_x, wide)
        dropped = now if input_mask is None else now * input_mask
        entering = states[0] if recurrent_mask is None else states[0] * recurrent_mask
        new = composed_step(kind, dropped, states, entering, kernel, recurrent_kernel, bias, tanh, gate, **settings)
        output = now + new[0] if residual else new[0]
        if counts is not None:
            on = reshape(counts, (-1, 1))
            held = zeros_like(output) if zero_output_for_mask or not outputs else outputs[-1]
            output, new = where(on, output, held), [where(on, a, b) for a, b in zip(new, states, strict=True)]
        outputs.append(output)
        states = new
    return [cast(value, dtype) for value in (stack(outputs, 0), *states)]
