"""Recurrent sequences on device arrays: one matmul before the loop, one kernel and one matmul per step.

The functions have the signatures of `recurrent.lstm`, `recurrent.gru` and `recurrent.simple`, where they are described.
Differences: arrays of the loop have the dtype of `x`, so the states of 16-bit data are rounded at every step, the
LSTM's c too; the arithmetic of 16-bit data is float32 inside each kernel and each matmul, what the backward pass adds
up over the steps is float32, and so are its weight gradients; host masks are copied to the device. A step is a sequence
of one, which reads and returns its states as they are: it saves the caller's arrays.

Each step's product with the recurrent weights is added by the matmul to the gate buffer, which the projection of the
inputs has filled for all steps; backward, to what goes around the product. Buffers for all steps and the launches of
their kernels are made once. Without a residual and a mask the outputs of several steps are the states, and share their
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers.ops.recurrent.common import RECURRENT_ACTIVATIONS, check_choice, check_gate_weights
from gpulayers.ops.recurrent.gru import _check as _check_gru
from gpulayers.ops.recurrent.lstm import GATE_ORDERS
from gpulayers.ops.recurrent.run import Inputs, Onward, Return, Run, States

__all__ = [
    "gru_sequence",
    "gru_sequence_backward",
    "gru_step",
    "gru_step_backward",
    "lstm_sequence",
    "lstm_sequence_backward",
    "lstm_step",
    "lstm_step_backward",
    "simple_rnn_sequence",
    "simple_rnn_sequence_backward",
    "simple_rnn_step",
    "simple_rnn_step_backward",
]


def lstm_sequence(
    x_tnd: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False, gate_order: str = "ifco", forget_bias: float = 0.0, recurrent_activation: str = "sigmoid",
    save: bool = True,
) -> tuple[Any, Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run an LSTM over a device sequence; see `recurrent.lstm.lstm_sequence`."""
    check_choice("lstm", "gate_order", gate_order, tuple(GATE_ORDERS))
    check_choice("lstm", "recurrent_activation", recurrent_activation, RECURRENT_ACTIVATIONS)
    check_gate_weights("lstm", 4, x_tnd, (h0, c0), kernel, recurrent_kernel, residual)
    units = h0.shape[1]
    run = Run(x_tnd, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, recurrent, total = run.directed(x_tnd), run.own(recurrent_kernel), _lstm_bias(run, bias, gate_order, forget_bias)
    gates = run.empty(run.time, run.batch, 4 * units)
    Inputs(run, run.own(kernel)).project(x, gates)
    h, c = States(run, h0), States(run, c0)
    onward = Onward(run, h, x if residual else None)
    launch = run.step(
        "gl_lstm_forward", gates, total, *c.each[:2], *onward.arrays(), hard=recurrent_activation == "hard_sigmoid",
        order=GATE_ORDERS[gate_order],
    )  # fmt: skip
    for t in run.steps:
        sums = gates[t]
        run.product(onward.entering(t), recurrent, sums, True)
        launch({"gates": sums, "bias": total, "c": c.each[t], "new_c": c.each[t + 1], **onward.fields(t)})
    return onward.outputs, h.last(), c.last(), (x, h, c, gates, total) if save else ()


def _lstm_bias(run: Run, bias: Any, gate_order: str, forget_bias: float) -> Any:
    """Return the bias with the forget bias in it, or None."""
    if not forget_bias:
        return run.own(bias)
    total = run.xp.zeros(4 * run.units, dtype=run.dtype) if bias is None else bias.astype(run.dtype, copy=True)
    forget = GATE_ORDERS[gate_order][1]
    total[forget * run.units : (forget + 1) * run.units] += forget_bias
    return total


def lstm_sequence_backward(
    d_outputs: Any, d_h_last: Any, d_c_last: Any, saved: tuple[Any, ...], kernel: Any, recurrent_kernel: Any, *,
    mask: Any = None, input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False,
    go_backwards: bool = False, residual: bool = False, gate_order: str = "ifco",
    recurrent_activation: str = "sigmoid",
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of `lstm_sequence`; see `recurrent.lstm.lstm_sequence_backward`."""
    x, h, c, gates, total = saved
    run = Run(x, h.units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    inputs, transposed = Inputs(run, run.own(kernel)), run.own(recurrent_kernel).T
    back = Return(run, d_h_last, run.own(d_outputs), residual, around=False)
    d_c, d_gates = run.cotangent_or_zeros(d_c_last), run.xp.empty_like(gates)
    launch = run.step(
        "gl_lstm_backward", gates, total, *c.each[:2], *back.arrays(), hard=recurrent_activation == "hard_sigmoid",
        order=GATE_ORDERS[gate_order], always=False,
    )  # fmt: skip
    for t in reversed(run.steps):
        d_sums = d_gates[t]
        launch({"gates": gates[t], "bias": total, "c": c.each[t], "d_c": d_c, "d_gates": d_sums, **back.fields(t)})
        back.through(d_sums, transposed)
    d_recurrent = run.d_weights(run.rows(run.entered(h)), run.rows(d_gates))
    d_x, d_kernel = inputs.d_x(d_gates, back.added), inputs.d_kernel(x, d_gates)
    return d_x, back.first(), run.own(d_c), d_kernel, d_recurrent, run.d_bias(d_gates)


def _gru_inputs(run: Run, kernel: Any, reset_after: bool) -> tuple[Inputs, int]:
    """Return the inputs' part, and the width of the gate buffer.

    With the reset after the product the state's part of the candidate needs a place of its own, which stands between:
    z, r, c, a. So z, r, c are one product's columns.
    """
    units = run.units
    if not reset_after:
        return Inputs(run, kernel), 3 * units
    z_and_r, candidate = slice(0, 2 * units), slice(2 * units, 3 * units)
    return Inputs(run, kernel, ((z_and_r, z_and_r), (slice(3 * units, 4 * units), candidate))), 4 * units


def _gru_bias(run: Run, bias: Any, reset_after: bool) -> Any:
    """Return the bias in the order of the gate buffer, or None."""
    if bias is None or not reset_after:
        return run.own(bias)
    units = run.units
    of_inputs, of_state = bias.astype(run.dtype, copy=False)
    total = run.empty(4 * units)
    total[: 2 * units] = of_inputs[: 2 * units] + of_state[: 2 * units]
    total[2 * units : 3 * units], total[3 * units :] = of_state[2 * units :], of_inputs[2 * units :]
    return total


def gru_sequence(
    x_tnd: Any, h0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, reset_after: bool = True,
    mask: Any = None, input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False,
    go_backwards: bool = False, residual: bool = False, recurrent_activation: str = "sigmoid", save: bool = True,
) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run a GRU over a device sequence; see `recurrent.gru.gru_sequence`."""
    _check_gru(x_tnd, h0, kernel, recurrent_kernel, bias, residual, reset_after, recurrent_activation)
    units, hard = h0.shape[1], recurrent_activation == "hard_sigmoid"
    run = Run(x_tnd, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, recurrent, total = run.directed(x_tnd), run.own(recurrent_kernel), _gru_bias(run, bias, reset_after)
    inputs, width = _gru_inputs(run, run.own(kernel), reset_after)
    gates, h = run.empty(run.time, run.batch, width), States(run, h0)
    inputs.project(x, gates)
    onward = Onward(run, h, x if residual else None)
    if reset_after:
        gates[:, :, 2 * units : 3 * units] = 0
        _gru_after_loop(run, onward, gates, recurrent, total, hard)
        return onward.outputs, h.last(), (x, h, gates, total) if save else ()
    inner = run.empty(run.time, run.batch, units)
    _gru_before_loop(run, onward, gates, inner, recurrent, total, hard)
    return onward.outputs, h.last(), (x, h, gates, total, inner) if save else ()


def _gru_after_loop(run: Run, onward: Onward, gates: Any, recurrent: Any, total: Any, hard: bool) -> None:
    launch = run.step("gl_gru_forward", gates, total, *onward.arrays(), hard=hard)
    for t in run.steps:
        sums = gates[t]
        run.product(onward.entering(t), recurrent, sums[:, : 3 * run.units], True)
        launch({"gates": sums, "bias": total, **onward.fields(t)})


def _gru_before_loop(run: Run, onward: Onward, gates: Any, inner: Any, recurrent: Any, total: Any, hard: bool) -> None:
    of_z_and_r, of_candidate = recurrent[:, : 2 * run.units], recurrent[:, 2 * run.units :]
    reset = run.step("gl_gru_reset_forward", gates, total, inner, *onward.arrays(), hard=hard)
    finish = run.step("gl_gru_candidate_forward", gates, total, *onward.arrays(), hard=hard)
    for t in run.steps:
        sums, entering, remaining = gates[t], onward.entering(t), inner[t]
        run.product(entering, of_z_and_r, sums[:, : 2 * run.units], True)
        reset({"gates": sums, "bias": total, "entering": entering, "reset": remaining})
        run.product(remaining, of_candidate, sums[:, 2 * run.units :], True)
        finish({"gates": sums, "bias": total, **onward.fields(t)})


def gru_sequence_backward(
    d_outputs: Any, d_h_last: Any, saved: tuple[Any, ...], kernel: Any, recurrent_kernel: Any, *,
    reset_after: bool = True, mask: Any = None, input_mask: Any = None, recurrent_mask: Any = None,
    zero_output_for_mask: bool = False, go_backwards: bool = False, residual: bool = False,
    recurrent_activation: str = "sigmoid",
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of `gru_sequence`; see `recurrent.gru.gru_sequence_backward`."""
    x, h, gates, total, *inner = saved
    units, hard = h.units, recurrent_activation == "hard_sigmoid"
    run = Run(x, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    inputs, _ = _gru_inputs(run, run.own(kernel), reset_after)
    back = Return(run, d_h_last, run.own(d_outputs), residual, around=True)
    d_gates, transposed = run.xp.empty_like(gates), run.own(recurrent_kernel).T
    entered, rows = run.rows(run.entered(h)), run.rows(d_gates)
    if reset_after:
        _gru_after_backward(run, back, h, gates, transposed, total, d_gates, hard)
        d_recurrent, d_bias = run.d_weights(entered, rows[:, : 3 * units]), run.d_bias(d_gates)
        d_inputs = run.xp.concatenate([d_bias[: 2 * units], d_bias[3 * units :]])
        d_bias = run.xp.stack([d_inputs, d_bias[: 3 * units]])
    else:
        _gru_before_backward(run, back, h, gates, transposed, total, d_gates, hard)
        d_recurrent = run.xp.empty((units, 3 * units), dtype=run.wide())
        run.d_weights(entered, rows[:, : 2 * units], d_recurrent[:, : 2 * units])
        run.d_weights(run.rows(inner[0]), rows[:, 2 * units :], d_recurrent[:, 2 * units :])
        d_bias = run.d_bias(d_gates)
    return inputs.d_x(d_gates, back.added), back.first(), inputs.d_kernel(x, d_gates), d_recurrent, d_bias


def _gru_after_backward(
    run: Run, back: Return, h: States, gates: Any, transposed: Any, total: Any, d_gates: Any, hard: bool
) -> None:
    launch = run.step("gl_gru_backward", gates, total, *h.each[:2], *back.arrays(), hard=hard, always=True)
    for t in reversed(run.steps):
        d_sums = d_gates[t]
        launch({"gates": gates[t], "bias": total, "h": h.each[t], "d_gates": d_sums, **back.fields(t)})
        back.through(d_sums[:, : 3 * run.units], transposed)


def _gru_before_backward(
    run: Run, back: Return, h: States, gates: Any, transposed: Any, total: Any, d_gates: Any, hard: bool
) -> None:
    units, q = run.units, run.xp.empty_like(back.carry)
    of_z_and_r, of_candidate = transposed[: 2 * units], transposed[2 * units :]
    arrays = (gates, total, *h.each[:2], *back.arrays())
    candidate = run.step("gl_gru_candidate_backward", *arrays, hard=hard, always=True)
    reset = run.step("gl_gru_reset_backward", *arrays, hard=hard)
    for t in reversed(run.steps):
        fields, d_sums = back.fields(t), d_gates[t]
        of_step = {"gates": gates[t], "bias": total, "h": h.each[t], "d_gates": d_sums}
        candidate({**of_step, **fields})
        run.product(d_sums[:, 2 * units :], of_candidate, q, False)
        mask, carry = fields["mask"], fields["carry"]
        reset({**of_step, "q": q, "recurrent_mask": run.recurrent_mask, "mask": mask, "carry": carry})
        back.through(d_sums[:, : 2 * units], of_z_and_r)


def simple_rnn_sequence(
    x_tnd: Any, h0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False, save: bool = True,
) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run a simple RNN over a device sequence; see `recurrent.simple.simple_rnn_sequence`."""
    check_gate_weights("simple_rnn", 1, x_tnd, (h0,), kernel, recurrent_kernel, residual)
    run = Run(x_tnd, h0.shape[1], mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, recurrent, bias = run.directed(x_tnd), run.own(recurrent_kernel), run.own(bias)
    h = States(run, h0)  # the projections lie where the states will be
    Inputs(run, run.own(kernel)).project(x, h.after())
    onward = Onward(run, h, x if residual else None)
    launch = run.step("gl_simple_rnn_forward", *onward.arrays(), bias)
    for t in run.steps:
        run.product(onward.entering(t), recurrent, h.each[t + 1], True)
        launch({"bias": bias, **onward.fields(t)})
    return onward.outputs, h.last(), (x, h) if save else ()


def simple_rnn_sequence_backward(
    d_outputs: Any, d_h_last: Any, saved: tuple[Any, ...], kernel: Any, recurrent_kernel: Any, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of `simple_rnn_sequence`; see `recurrent.simple.simple_rnn_sequence_backward`."""
    x, h = saved
    run = Run(x, h.units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    inputs, transposed = Inputs(run, run.own(kernel)), run.own(recurrent_kernel).T
    back = Return(run, d_h_last, run.own(d_outputs), residual, around=False)
    d_sums = run.empty(run.time, run.batch, run.units)
    launch = run.step("gl_simple_rnn_backward", *h.each[:2], *back.arrays(), always=False)
    for t in reversed(run.steps):
        of_step = d_sums[t]
        launch({"new_h": h.each[t + 1], "d_gates": of_step, **back.fields(t)})
        back.through(of_step, transposed)
    d_recurrent = run.d_weights(run.rows(run.entered(h)), run.rows(d_sums))
    return inputs.d_x(d_sums, back.added), back.first(), inputs.d_kernel(x, d_sums), d_recurrent, run.d_bias(d_sums)


def _forward_step(sequence: Callable[..., Any], x: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    outputs, *rest = sequence(x[None], *arguments, **keywords)
    return outputs[0], *rest


def _backward_step(
    sequence: Callable[..., Any], d_output: Any, arguments: Sequence[Any], keywords: dict[str, Any]
) -> Any:
    d_x, *rest = sequence(None if d_output is None else d_output[None], *arguments, **keywords)
    return d_x[0], *rest


def lstm_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one LSTM step; see `recurrent.lstm.lstm_step`."""
    return _forward_step(lstm_sequence, x, arguments, keywords)


def lstm_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `lstm_step`; see `recurrent.lstm.lstm_step_backward`."""
    return _backward_step(lstm_sequence_backward, d_output, arguments, keywords)


def gru_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one GRU step; see `recurrent.gru.gru_step`."""
    return _forward_step(gru_sequence, x, arguments, keywords)


def gru_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `gru_step`; see `recurrent.gru.gru_step_backward`."""
    return _backward_step(gru_sequence_backward, d_output, arguments, keywords)


def simple_rnn_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one step of a simple RNN; see `recurrent.simple.simple_rnn_step`."""
    return _forward_step(simple_rnn_sequence, x, arguments, keywords)


def simple_rnn_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `simple_rnn_step`; see `recurrent.simple.simple_rnn_step_backward`."""
    return _backward_step(simple_rnn_sequence_backward, d_output, arguments, keywords)
