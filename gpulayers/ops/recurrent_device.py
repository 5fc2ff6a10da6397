"""Recurrent sequences on device arrays: one matmul before the loop, one kernel (and one matmul) per step.

The functions have the signatures of `recurrent_lstm`, `recurrent_gru` and `recurrent_simple`, where they are described.
Differences: arrays of the loop have the dtype of `x`; the arithmetic of 16-bit data is float32 inside each kernel and
each matmul, and its weight gradients are float32; host masks are copied to the device. A step is a sequence of one.

Products of LSTM and simple RNN are accumulated into the gate buffer by cuBLAS where the module offers it; otherwise the
kernel adds a separate product. Buffers for all steps are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpulayers import _cupy
from gpulayers.device import array_module
from gpulayers.ops.device_products import product_into
from gpulayers.ops.recurrent_common import RECURRENT_ACTIVATIONS, check_choice, check_gate_weights
from gpulayers.ops.recurrent_gru import _check as _check_gru
from gpulayers.ops.recurrent_kernels import launch_step
from gpulayers.ops.recurrent_lstm import GATE_ORDERS

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


class _Run:
    """What every sequence needs on the way there and back: module, dtype, sizes, direction, masks."""

    def __init__(
        self, x: Any, units: int, mask: Any, input_mask: Any, recurrent_mask: Any, go_backwards: bool, zero: bool
    ) -> None:
        self.xp, self.dtype = array_module(x), x.dtype
        self.time, self.batch, self.depth = x.shape
        self.units, self.go_backwards, self.zero = units, go_backwards, zero
        self.mask = None
        if mask is not None:
            self.mask = self.directed(self.xp.asarray(mask, dtype=np.bool_)).view(np.uint8)
        self.input_mask, self.recurrent_mask = (
            None if m is None else self.xp.ascontiguousarray(self.xp.asarray(m).astype(self.dtype))
            for m in (input_mask, recurrent_mask)
        )

    def directed(self, array: Any) -> Any:
        """Return `array` contiguous, its time axis reversed for go_backwards."""
        return self.xp.ascontiguousarray(array[::-1] if self.go_backwards else array)

    def own(self, array: Any) -> Any:
        """Return an array contiguous and of the loop's dtype, or None for None."""
        return None if array is None else self.xp.ascontiguousarray(array.astype(self.dtype, copy=False))

    def empty(self, *shape: int) -> Any:
        return self.xp.empty(shape, dtype=self.dtype)

    def state_or_zeros(self, array: Any) -> Any:
        """Return a copy of a cotangent that the loop may write, zeros for None."""
        if array is None:
            return self.xp.zeros((self.batch, self.units), dtype=self.dtype)
        return self.xp.array(array, dtype=self.dtype, copy=True, order="C")

    def dropped(self, x: Any) -> Any:
        """Return the rows (T*N, D) that enter the projection."""
        return (x if self.input_mask is None else x * self.input_mask).reshape(self.time * self.batch, self.depth)

    def entering(self, h: Any, out: Any) -> Any:
        """Return what of the state (N, U) enters the product."""
        return h if self.recurrent_mask is None else self.xp.multiply(h, self.recurrent_mask, out=out)

    def project(self, x: Any, kernel: Any) -> Any:
        """Return the projections of all steps (T, N, columns): one matmul."""
        columns = kernel.shape[1]
        sums = self.empty(self.time, self.batch, columns)
        if sums.size:
            self.xp.matmul(self.dropped(x), kernel, out=sums.reshape(self.time * self.batch, columns))
        return sums

    def step_end(self, t: int, x: Any, h_tnu: Any, outputs: Any) -> dict[str, Any]:
        """Return the kernel fields that every forward step ends with."""
        repeat = t and self.mask is not None and not self.zero
        return {
            "h": h_tnu[t],
            "new_h": h_tnu[t + 1],
            "output": outputs[t],
            "x": None if x is None else x[t],
            "mask": None if self.mask is None else self.mask[t],
            "previous": outputs[t - 1] if repeat else None,
        }

    def backward_start(self, t: int, d_h: Any, d_outputs: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return the kernel fields that every backward step starts with; the last step has no product yet."""
        counted = state["d_counted"]
        return {
            "d_h": d_h if t < self.time - 1 else None,
            "recurrent_mask": self.recurrent_mask if t < self.time - 1 else None,
            "d_output": None if d_outputs is None else d_outputs[t],
            "mask": None if self.mask is None else self.mask[t],
            "carry": state["carry"],
            "pending": state["pending"],
            "d_counted": None if counted is None else counted[t],
            "zero_output": self.zero,
        }

    def backward_state(self, d_h_last: Any, d_outputs: Any, residual: bool) -> dict[str, Any]:
        """Return the buffers that travel back through time."""
        masked = self.mask is not None
        return {
            "carry": self.state_or_zeros(d_h_last),
            "pending": self.state_or_zeros(None) if masked else None,
            "d_counted": self.empty(self.time, self.batch, self.units) if masked and residual else None,
        }

    def first_d_h(self, d_h: Any, carry: Any) -> Any:
        """Return the gradient of h0 after the loop."""
        if not self.time:
            return carry
        return (d_h if self.recurrent_mask is None else d_h * self.recurrent_mask) + carry

    def d_inputs(self, d_sums: Any, kernel: Any, residual: bool, d_outputs: Any, counted: Any) -> Any:
        """Return dx (T, N, D), in the inputs' direction."""
        rows = d_sums.reshape(self.time * self.batch, kernel.shape[1])
        d_x = self.xp.matmul(rows, kernel.T).reshape(self.time, self.batch, self.depth)
        if self.input_mask is not None:
            d_x = d_x * self.input_mask
        added = d_outputs if counted is None else counted
        if residual and added is not None:
            d_x = d_x + added
        return self.directed(d_x)

    def d_weights(self, entering: Any, d_sums: Any) -> Any:
        """Return the gradient of weights as one product over all steps; float32 for 16-bit data."""
        wide = np.float32 if self.dtype.itemsize == 2 else self.dtype
        rows = self.time * self.batch
        left = entering.reshape(rows, entering.shape[-1]).astype(wide, copy=False)
        return self.xp.matmul(left.T, d_sums.reshape(rows, d_sums.shape[-1]).astype(wide, copy=False))

    def d_bias(self, d_sums: Any) -> Any:
        """Return the sum over steps and rows; float32 for 16-bit data."""
        wide = np.float32 if self.dtype.itemsize == 2 else self.dtype
        return self.xp.sum(d_sums.reshape(self.time * self.batch, d_sums.shape[-1]), axis=0, dtype=wide)

    def entered(self, h_tnu: Any) -> Any:
        """Return the states (T, N, U) that entered the steps' products."""
        return h_tnu[:-1] if self.recurrent_mask is None else h_tnu[:-1] * self.recurrent_mask


def _accumulator(run: _Run) -> Callable[[Any, Any, Any], None] | None:
    """Return a function (a, b, sums) that adds a @ b to `sums` in place, or None where cuBLAS is not at hand."""
    if _cupy.cublas(run.xp) is None:
        return None
    product = product_into(run.xp)
    return lambda a, b, sums: product(a, b, sums, True)


def lstm_sequence(
    x_tnd: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False, gate_order: str = "ifco", forget_bias: float = 0.0, recurrent_activation: str = "sigmoid",
    save: bool = True,
) -> tuple[Any, Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run an LSTM over a device sequence; see `recurrent_lstm.lstm_sequence`."""
    check_choice("lstm", "gate_order", gate_order, tuple(GATE_ORDERS))
    check_choice("lstm", "recurrent_activation", recurrent_activation, RECURRENT_ACTIVATIONS)
    check_gate_weights("lstm", 4, x_tnd, (h0, c0), kernel, recurrent_kernel, residual)
    units = h0.shape[1]
    run = _Run(x_tnd, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, kernel, recurrent_kernel = run.directed(x_tnd), run.own(kernel), run.own(recurrent_kernel)
    gates = run.project(x, kernel)
    total = _lstm_bias(run, bias, gate_order, forget_bias)
    h_tnu, c_tnu = run.empty(run.time + 1, run.batch, units), run.empty(run.time + 1, run.batch, units)
    h_tnu[0], c_tnu[0] = h0.astype(run.dtype), c0.astype(run.dtype)
    outputs = run.empty(run.time, run.batch, units)
    accumulate = _accumulator(run)
    if accumulate is not None and total is not None:
        gates, total = gates.__iadd__(total), None  # in the loop the kernel then only reads the gates
    product = None if accumulate is not None else run.empty(run.batch, 4 * units)
    dropped = run.empty(run.batch, units)
    for t in range(run.time if run.batch else 0):
        entering = run.entering(h_tnu[t], dropped)
        if accumulate is None:
            run.xp.matmul(entering, recurrent_kernel, out=product)
        else:
            accumulate(entering, recurrent_kernel, gates[t])
        launch_step(
            "gl_lstm_forward", run.batch, units, hard=recurrent_activation == "hard_sigmoid", gates=gates[t],
            product=product, bias=total, c=c_tnu[t], new_c=c_tnu[t + 1], order=GATE_ORDERS[gate_order],
            **run.step_end(t, x if residual else None, h_tnu, outputs),
        )  # fmt: skip
    saved = (x, h_tnu, c_tnu, gates) if save else ()
    return outputs, h_tnu[-1].copy(), c_tnu[-1].copy(), saved


def _lstm_bias(run: _Run, bias: Any, gate_order: str, forget_bias: float) -> Any:
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
    """Return the gradients of `lstm_sequence`; see `recurrent_lstm.lstm_sequence_backward`."""
    x, h_tnu, c_tnu, gates = saved
    units = h_tnu.shape[2]
    run = _Run(x, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    kernel, recurrent_kernel, d_outputs = run.own(kernel), run.own(recurrent_kernel), run.own(d_outputs)
    transposed = run.xp.ascontiguousarray(recurrent_kernel.T)
    state = run.backward_state(d_h_last, d_outputs, residual)
    d_c, d_h, d_gates = run.state_or_zeros(d_c_last), run.empty(run.batch, units), run.xp.empty_like(gates)
    for t in range(run.time - 1 if run.batch else -1, -1, -1):
        launch_step(
            "gl_lstm_backward", run.batch, units, hard=recurrent_activation == "hard_sigmoid", gates=gates[t],
            c=c_tnu[t], d_c=d_c, d_gates=d_gates[t], order=GATE_ORDERS[gate_order],
            **run.backward_start(t, d_h, d_outputs, state),
        )  # fmt: skip
        run.xp.matmul(d_gates[t], transposed, out=d_h)
    return (
        run.d_inputs(d_gates, kernel, residual, d_outputs, state["d_counted"]),
        run.first_d_h(d_h, state["carry"]),
        d_c,
        run.d_weights(run.dropped(x), d_gates),
        run.d_weights(run.entered(h_tnu), d_gates),
        run.d_bias(d_gates),
    )


def gru_sequence(
    x_tnd: Any, h0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, reset_after: bool = True,
    mask: Any = None, input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False,
    go_backwards: bool = False, residual: bool = False, recurrent_activation: str = "sigmoid", save: bool = True,
) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run a GRU over a device sequence; see `recurrent_gru.gru_sequence`."""
    _check_gru(x_tnd, h0, kernel, recurrent_kernel, bias, residual, reset_after, recurrent_activation)
    units, hard = h0.shape[1], recurrent_activation == "hard_sigmoid"
    run = _Run(x_tnd, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, kernel, recurrent_kernel, bias = (
        run.directed(x_tnd), run.own(kernel), run.own(recurrent_kernel), run.own(bias),
    )  # fmt: skip
    gates, inner = run.project(x, kernel), run.empty(run.time, run.batch, units)
    h_tnu, outputs = run.empty(run.time + 1, run.batch, units), run.empty(run.time, run.batch, units)
    h_tnu[0] = h0.astype(run.dtype)
    added = x if residual else None
    loop = _gru_after_loop if reset_after else _gru_before_loop
    loop(run, gates, inner, h_tnu, outputs, recurrent_kernel, bias, added, hard)
    return outputs, h_tnu[-1].copy(), (x, h_tnu, gates, inner) if save else ()


def _gru_after_loop(
    run: _Run, gates: Any, inner: Any, h_tnu: Any, outputs: Any, recurrent: Any, bias: Any, added: Any, hard: bool
) -> None:
    units = run.units
    inner_bias = None
    if bias is not None:
        total = bias[0].copy()
        total[: 2 * units] += bias[1, : 2 * units]
        bias, inner_bias = total, bias[1, 2 * units :].copy()
    product, dropped = run.empty(run.batch, 3 * units), run.empty(run.batch, units)
    for t in range(run.time if run.batch else 0):
        run.xp.matmul(run.entering(h_tnu[t], dropped), recurrent, out=product)
        launch_step(
            "gl_gru_forward", run.batch, units, hard=hard, gates=gates[t], product=product, bias=bias,
            inner_bias=inner_bias, inner=inner[t], **run.step_end(t, added, h_tnu, outputs),
        )  # fmt: skip


def _gru_before_loop(
    run: _Run, gates: Any, inner: Any, h_tnu: Any, outputs: Any, recurrent: Any, bias: Any, added: Any, hard: bool
) -> None:
    units, contiguous = run.units, run.xp.ascontiguousarray
    of_zr, of_candidate = contiguous(recurrent[:, : 2 * units]), contiguous(recurrent[:, 2 * units :])
    product, candidate = run.empty(run.batch, 2 * units), run.empty(run.batch, units)
    dropped = run.empty(run.batch, units)
    for t in range(run.time if run.batch else 0):
        entering = run.entering(h_tnu[t], dropped)
        run.xp.matmul(entering, of_zr, out=product)
        launch_step(
            "gl_gru_reset_forward", run.batch, units, hard=hard, gates=gates[t], product=product, bias=bias,
            entering=entering, reset=inner[t],
        )  # fmt: skip
        run.xp.matmul(inner[t], of_candidate, out=candidate)
        launch_step(
            "gl_gru_candidate_forward", run.batch, units, hard=hard, gates=gates[t], product=candidate, bias=bias,
            **run.step_end(t, added, h_tnu, outputs),
        )  # fmt: skip


def gru_sequence_backward(
    d_outputs: Any, d_h_last: Any, saved: tuple[Any, ...], kernel: Any, recurrent_kernel: Any, *,
    reset_after: bool = True, mask: Any = None, input_mask: Any = None, recurrent_mask: Any = None,
    zero_output_for_mask: bool = False, go_backwards: bool = False, residual: bool = False,
    recurrent_activation: str = "sigmoid",
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of `gru_sequence`; see `recurrent_gru.gru_sequence_backward`."""
    x, h_tnu, gates, inner = saved
    units, hard = h_tnu.shape[2], recurrent_activation == "hard_sigmoid"
    run = _Run(x, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    kernel, recurrent_kernel, d_outputs = run.own(kernel), run.own(recurrent_kernel), run.own(d_outputs)
    state = run.backward_state(d_h_last, d_outputs, residual)
    d_input = run.xp.empty_like(gates)
    loop = _gru_after_backward if reset_after else _gru_before_backward
    d_h, d_state = loop(run, d_outputs, state, h_tnu, gates, inner, recurrent_kernel, d_input, hard)
    d_x = run.d_inputs(d_input, kernel, residual, d_outputs, state["d_counted"])
    d_kernel, d_bias = run.d_weights(run.dropped(x), d_input), run.d_bias(d_input)
    d_recurrent = run.d_weights(run.entered(h_tnu), d_state)
    if reset_after:
        d_bias = run.xp.stack([d_bias, run.d_bias(d_state)])
    else:
        d_candidate = run.d_weights(inner, d_input[:, :, 2 * units :])
        d_recurrent = run.xp.concatenate([d_recurrent, d_candidate], axis=1)
    return d_x, run.first_d_h(d_h, state["carry"]), d_kernel, d_recurrent, d_bias


def _gru_after_backward(
    run: _Run, d_outputs: Any, state: dict[str, Any], h_tnu: Any, gates: Any, inner: Any, recurrent: Any, d_input: Any,
    hard: bool,
) -> tuple[Any, Any]:  # fmt: skip
    d_state, d_h = run.xp.empty_like(gates), run.empty(run.batch, run.units)
    transposed = run.xp.ascontiguousarray(recurrent.T)
    for t in range(run.time - 1 if run.batch else -1, -1, -1):
        launch_step(
            "gl_gru_backward", run.batch, run.units, hard=hard, gates=gates[t], inner=inner[t], h=h_tnu[t],
            d_input=d_input[t], d_state=d_state[t], **run.backward_start(t, d_h, d_outputs, state),
        )  # fmt: skip
        run.xp.matmul(d_state[t], transposed, out=d_h)
    return d_h, d_state


def _gru_before_backward(
    run: _Run, d_outputs: Any, state: dict[str, Any], h_tnu: Any, gates: Any, inner: Any, recurrent: Any, d_input: Any,
    hard: bool,
) -> tuple[Any, Any]:  # fmt: skip
    units = run.units
    d_state, d_h = run.empty(run.time, run.batch, 2 * units), run.empty(run.batch, units)
    d_candidate, q = run.empty(run.batch, units), run.empty(run.batch, units)
    of_zr = run.xp.ascontiguousarray(recurrent[:, : 2 * units].T)
    of_candidate = run.xp.ascontiguousarray(recurrent[:, 2 * units :].T)
    for t in range(run.time - 1 if run.batch else -1, -1, -1):
        start = run.backward_start(t, d_h, d_outputs, state)
        launch_step(
            "gl_gru_candidate_backward", run.batch, units, hard=hard, gates=gates[t], h=h_tnu[t], d_input=d_input[t],
            d_candidate=d_candidate, d_state=d_state[t], **start,
        )  # fmt: skip
        run.xp.matmul(d_candidate, of_candidate, out=q)
        launch_step(
            "gl_gru_reset_backward", run.batch, units, hard=hard, q=q, gates=gates[t], h=h_tnu[t],
            recurrent_mask=run.recurrent_mask, mask=start["mask"], carry=state["carry"], d_input=d_input[t],
            d_state=d_state[t],
        )  # fmt: skip
        run.xp.matmul(d_state[t], of_zr, out=d_h)
    return d_h, d_state


def simple_rnn_sequence(
    x_tnd: Any, h0: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False, save: bool = True,
) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
    """Run a simple RNN over a device sequence; see `recurrent_simple.simple_rnn_sequence`."""
    check_gate_weights("simple_rnn", 1, x_tnd, (h0,), kernel, recurrent_kernel, residual)
    units = h0.shape[1]
    run = _Run(x_tnd, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    x, kernel, recurrent_kernel, bias = (
        run.directed(x_tnd), run.own(kernel), run.own(recurrent_kernel), run.own(bias),
    )  # fmt: skip
    sums = run.project(x, kernel)
    h_tnu, outputs = run.empty(run.time + 1, run.batch, units), run.empty(run.time, run.batch, units)
    h_tnu[0] = h0.astype(run.dtype)
    accumulate = _accumulator(run)
    product = None if accumulate is not None else run.empty(run.batch, units)
    dropped = run.empty(run.batch, units)
    for t in range(run.time if run.batch else 0):
        entering = run.entering(h_tnu[t], dropped)
        if accumulate is None:
            run.xp.matmul(entering, recurrent_kernel, out=product)
        else:
            accumulate(entering, recurrent_kernel, sums[t])
        launch_step(
            "gl_simple_rnn_forward", run.batch, units, sums=sums[t], product=product, bias=bias,
            **run.step_end(t, x if residual else None, h_tnu, outputs),
        )  # fmt: skip
    return outputs, h_tnu[-1].copy(), (x, h_tnu) if save else ()


def simple_rnn_sequence_backward(
    d_outputs: Any, d_h_last: Any, saved: tuple[Any, ...], kernel: Any, recurrent_kernel: Any, *, mask: Any = None,
    input_mask: Any = None, recurrent_mask: Any = None, zero_output_for_mask: bool = False, go_backwards: bool = False,
    residual: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of `simple_rnn_sequence`; see `recurrent_simple.simple_rnn_sequence_backward`."""
    x, h_tnu = saved
    units = h_tnu.shape[2]
    run = _Run(x, units, mask, input_mask, recurrent_mask, go_backwards, zero_output_for_mask)
    kernel, recurrent_kernel, d_outputs = run.own(kernel), run.own(recurrent_kernel), run.own(d_outputs)
    state = run.backward_state(d_h_last, d_outputs, residual)
    transposed = run.xp.ascontiguousarray(recurrent_kernel.T)
    d_h, d_sums = run.empty(run.batch, units), run.empty(run.time, run.batch, units)
    for t in range(run.time - 1 if run.batch else -1, -1, -1):
        launch_step(
            "gl_simple_rnn_backward", run.batch, units, new_h=h_tnu[t + 1], d_sums=d_sums[t],
            **run.backward_start(t, d_h, d_outputs, state),
        )  # fmt: skip
        run.xp.matmul(d_sums[t], transposed, out=d_h)
    return (
        run.d_inputs(d_sums, kernel, residual, d_outputs, state["d_counted"]),
        run.first_d_h(d_h, state["carry"]),
        run.d_weights(run.dropped(x), d_sums),
        run.d_weights(run.entered(h_tnu), d_sums),
        run.d_bias(d_sums),
    )


def _forward_step(sequence: Callable[..., Any], x: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    outputs, *rest = sequence(x[None], *arguments, **keywords)
    return outputs[0], *rest


def _backward_step(
    sequence: Callable[..., Any], d_output: Any, arguments: Sequence[Any], keywords: dict[str, Any]
) -> Any:
    d_x, *rest = sequence(None if d_output is None else d_output[None], *arguments, **keywords)
    return d_x[0], *rest


def lstm_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one LSTM step; see `recurrent_lstm.lstm_step`."""
    return _forward_step(lstm_sequence, x, arguments, keywords)


def lstm_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `lstm_step`; see `recurrent_lstm.lstm_step_backward`."""
    return _backward_step(lstm_sequence_backward, d_output, arguments, keywords)


def gru_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one GRU step; see `recurrent_gru.gru_step`."""
    return _forward_step(gru_sequence, x, arguments, keywords)


def gru_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `gru_step`; see `recurrent_gru.gru_step_backward`."""
    return _backward_step(gru_sequence_backward, d_output, arguments, keywords)


def simple_rnn_step(x: Any, *arguments: Any, **keywords: Any) -> Any:
    """Compute one step of a simple RNN; see `recurrent_simple.simple_rnn_step`."""
    return _forward_step(simple_rnn_sequence, x, arguments, keywords)


def simple_rnn_step_backward(d_output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the gradients of `simple_rnn_step`; see `recurrent_simple.simple_rnn_step_backward`."""
    return _backward_step(simple_rnn_sequence_backward, d_output, arguments, keywords)
