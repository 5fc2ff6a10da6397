"""LSTM on NumPy: one step, and a whole sequence with one matmul before the loop and the weight gradients after it.

    s = x K + h R + b;  i, f, o = sigma(s_i), sigma(s_f), sigma(s_o);  g = tanh(s_c)
    c' = f c + i g;  h' = o tanh(c');  output = h' (+ x with `residual`)

Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; column order of TensorFlow.

The plan of the sequence. Inside, the gates of a step lie side by side in the order i, f, o, g, each a contiguous (N, U)
block, in one buffer for all steps that is filled by the input projection and activated in place. Sigmoid columns are
negated before the loop. The backward pass turns activations into factors a block of steps at a time, while they are in
cache, so that a step is a handful of multiplications and one matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.host.settings import quiet
from gpulayers.ops.recurrent.common import (
    RECURRENT_ACTIVATIONS,
    apply_gates,
    check_choice,
    check_gate_weights,
    finish_gates,
    gate_scale,
    gate_slope,
    hold_outputs,
    output_cotangents,
    reverse_if,
    skipped_rows,
    state_cotangent,
    steps_per_block,
    times_mask,
    working_dtype,
)
from gpulayers.ops.recurrent.gradients import WeightGradients, input_gradients
from gpulayers.ops.recurrent.products import in_strips, weight_strips
from gpulayers.ops.recurrent.projections import Inputs, inputs_of, projected_blocks, steps_kept

__all__ = ["GATE_ORDERS", "lstm_sequence", "lstm_sequence_backward", "lstm_step", "lstm_step_backward"]

GATE_ORDERS = {"ifco": (0, 1, 3, 2), "ijfo": (0, 2, 3, 1)}
"""Where i, f, o and the candidate stand among the weights' four column blocks: modern cells, legacy cells."""


def _check(
    x: Any, h: Any, c: Any, kernel: Any, recurrent_kernel: Any, residual: bool, gate_order: str, activation: str
) -> None:
    check_choice("lstm", "gate_order", gate_order, tuple(GATE_ORDERS))
    check_choice("lstm", "recurrent_activation", activation, RECURRENT_ACTIVATIONS)
    check_gate_weights("lstm", 4, x, (h, c), kernel, recurrent_kernel, residual)


def lstm_step(
    x: np.ndarray,
    h: np.ndarray,
    c: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    residual: bool = False,
    gate_order: str = "ifco",
    forget_bias: float = 0.0,
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Compute one LSTM step.

    Parameters: `x` (N, D); `h`, `c` (N, U); `kernel` (D, 4U); `recurrent_kernel` (U, 4U); `bias` (4U) or None;
    `gate_order` of the columns, ``"ifco"`` or the legacy cells' ``"ijfo"``; `forget_bias` added to the f gate;
    `residual` adds `x` to the output, never to the state.

    Returns ``(output, h', c', saved)``; `saved` is a tuple of arrays for `lstm_step_backward`. Results have the dtype
    of `x`; float16 and bfloat16 are computed in float32. Raises ShapeError where widths do not fit.

    >>> zeros = np.zeros((1, 2), np.float32)
    >>> output, h, c, _ = lstm_step(zeros + 3, zeros, zeros, np.zeros((2, 8)), np.zeros((2, 8)), residual=True)
    >>> output, h
    (array([[3., 3.]], dtype=float32), array([[0., 0.]], dtype=float32))
    """
    _check(x, h, c, kernel, recurrent_kernel, residual, gate_order, recurrent_activation)
    dtype = working_dtype(x)
    x_nd, h_nu, c_nu, kernel, recurrent_kernel = (
        a if a.dtype == dtype else a.astype(dtype) for a in (x, h, c, kernel, recurrent_kernel)
    )
    gates = np.matmul(x_nd, kernel)
    gates += np.matmul(h_nu, recurrent_kernel)
    if bias is not None:
        gates += bias
    units = h.shape[1]
    at_i, at_f, at_o, at_g = _columns(gate_order, units)
    if forget_bias:
        gates[:, at_f] += forget_bias
    _activate(gates, gate_order, units, recurrent_activation)
    new_c = gates[:, at_f] * c_nu
    new_c += gates[:, at_i] * gates[:, at_g]
    tanh_c = np.tanh(new_c)
    new_h = gates[:, at_o] * tanh_c
    output = new_h + x_nd if residual else new_h.copy()
    saved = (x_nd, h_nu, c_nu, gates, tanh_c)
    if dtype != x.dtype:
        output, new_h, new_c = output.astype(x.dtype), new_h.astype(x.dtype), new_c.astype(x.dtype)
    return output, new_h, new_c, saved


@functools.cache
def _columns(gate_order: str, units: int) -> tuple[slice, ...]:
    """Return the columns of i, f, o and the candidate."""
    return tuple(slice(k * units, (k + 1) * units) for k in GATE_ORDERS[gate_order])


@functools.lru_cache(maxsize=64)
def _rows(gate_order: str, units: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return rows a, b (4U): a tanh(a x) + b is sigma(x) in the gates' columns, tanh(x) in the candidate's."""
    scale, shift = np.full(4 * units, 0.5, dtype), np.full(4 * units, 0.5, dtype)
    candidate = _columns(gate_order, units)[3]
    scale[candidate], shift[candidate] = 1.0, 0.0
    return scale, shift


def _activate(gates: np.ndarray, gate_order: str, units: int, activation: str) -> None:
    """Apply the gate function and, in the candidate's columns, tanh to pre-activations (N, 4U), in place."""
    if activation == "sigmoid":
        scale, shift = _rows(gate_order, units, gates.dtype)
        np.multiply(gates, scale, out=gates)
        np.tanh(gates, out=gates)
        np.multiply(gates, scale, out=gates)
        np.add(gates, shift, out=gates)
        return
    candidate = gates[:, _columns(gate_order, units)[3]]
    g = np.tanh(candidate)
    apply_gates(activation, gates)
    candidate[...] = g


def lstm_step_backward(
    d_output: np.ndarray | None,
    d_h: np.ndarray | None,
    d_c: np.ndarray | None,
    saved: tuple[np.ndarray, ...],
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    *,
    residual: bool = False,
    gate_order: str = "ifco",
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, ...]:
    """Return the gradients ``(dx, dh, dc, dkernel, drecurrent_kernel, dbias)`` of `lstm_step`.

    `d_output`, `d_h` and `d_c` are the cotangents of its three results, None where none arrived. The gradients have
    the working dtype (float32, or float64 for float64 data).
    """
    x, h, c, gates, tanh_c = saved
    dtype, units = x.dtype, h.shape[1]
    i, f, o, g = (gates[:, k * units : (k + 1) * units] for k in GATE_ORDERS[gate_order])
    d_new_h = np.zeros_like(tanh_c)
    for cotangent in (d_output, d_h):
        if cotangent is not None:
            d_new_h += cotangent
    d_new_c = (1.0 - tanh_c * tanh_c) * o
    d_new_c *= d_new_h
    if d_c is not None:
        d_new_c += d_c
    d_gates = np.empty_like(gates)
    gate_slope(recurrent_activation, gates, d_gates)
    d_i, d_f, d_o, d_g = (d_gates[:, k * units : (k + 1) * units] for k in GATE_ORDERS[gate_order])
    d_i *= d_new_c * g
    d_f *= d_new_c * c
    d_o *= d_new_h * tanh_c
    np.multiply(d_new_c * i, 1.0 - g * g, out=d_g)
    d_x = np.matmul(d_gates, kernel.T.astype(dtype, copy=False))
    if residual and d_output is not None:
        d_x += d_output
    d_h_previous = np.matmul(d_gates, recurrent_kernel.T.astype(dtype, copy=False))
    d_new_c *= f
    return d_x, d_h_previous, d_new_c, np.matmul(x.T, d_gates), np.matmul(h.T, d_gates), d_gates.sum(axis=0)


@quiet
def lstm_sequence(
    x_tnd: np.ndarray,
    h0: np.ndarray,
    c0: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    input_mask: np.ndarray | None = None,
    recurrent_mask: np.ndarray | None = None,
    zero_output_for_mask: bool = False,
    go_backwards: bool = False,
    residual: bool = False,
    gate_order: str = "ifco",
    forget_bias: float = 0.0,
    recurrent_activation: str = "sigmoid",
    save: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Run an LSTM over a whole sequence, time axis first.

    Parameters: `x_tnd` (T, N, D); `h0`, `c0` (N, U); weights and `gate_order`, `forget_bias` as in `lstm_step`.

    - `mask` (T, N) bool: where False the state keeps its value and the output repeats the row's previous output
      (the residual one; zeros before the first True), or is zero with `zero_output_for_mask`.
    - `input_mask` (N, D) and `recurrent_mask` (N, U): dropout masks, already scaled, the same for all steps. They
      multiply what enters the matmuls; `residual` adds the undropped `x`.
    - `go_backwards`: sequence and mask are read from the end; outputs come in processing order.
    - `save`: keep what the backward pass needs; without, `saved` is ``()`` and memory for a few steps is enough.

    Returns ``(outputs (T, N, U), h (N, U), c (N, U), saved)``, all of the dtype of `x_tnd`; 16-bit data is computed in
    float32, and the state stays float32 between the steps. `saved` is a tuple of arrays for `lstm_sequence_backward`.
    Raises ShapeError where widths do not fit, StructureError for an unknown gate order or gate function.

    >>> x = np.ones((3, 1, 2), np.float32)
    >>> state = np.zeros((1, 2), np.float32)
    >>> outputs, h, c, _ = lstm_sequence(x, state, state, np.zeros((2, 8)), np.zeros((2, 8)), residual=True)
    >>> outputs.shape, float(outputs.sum())
    ((3, 1, 2), 6.0)
    """
    _check(x_tnd, h0, c0, kernel, recurrent_kernel, residual, gate_order, recurrent_activation)
    dtype, (time, batch, _), units = working_dtype(x_tnd), x_tnd.shape, h0.shape[1]
    inputs = inputs_of(x_tnd, go_backwards, dtype, input_mask)
    kept = time if save else steps_kept(time, 4 * batch * units * dtype.itemsize)
    gates = recycled((kept, 4, batch, units), dtype)
    ring = time + 1 if save else 2
    h_tnu, c_tnu = recycled((ring, batch, units), dtype), recycled((ring, batch, units), dtype)
    h_tnu[0], c_tnu[0] = h0, c0
    outputs = recycled((time, batch, units), dtype)
    mask = reverse_if(go_backwards, mask)
    weights = _inner_weights(
        kernel, recurrent_kernel, bias, gate_order, forget_bias, recurrent_activation, dtype, batch
    )
    _lstm_loop(
        inputs, residual, weights, gates, h_tnu, c_tnu, outputs, mask, recurrent_mask,
        recurrent_activation,
    )  # fmt: skip
    if mask is not None:
        hold_outputs(outputs, mask, zero_output_for_mask)
    h_last, c_last = h_tnu[time % ring].astype(x_tnd.dtype), c_tnu[time % ring].astype(x_tnd.dtype)
    return outputs.astype(x_tnd.dtype, copy=False), h_last, c_last, (inputs.x, h_tnu, c_tnu, gates) if save else ()


def _inner_weights(
    kernel: np.ndarray, recurrent_kernel: np.ndarray, bias: np.ndarray | None, gate_order: str, forget_bias: float,
    activation: str, dtype: np.dtype, batch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return kernel and recurrent kernel in strips and the offset (4, U), with gates in inner order, scaled."""
    order, units = GATE_ORDERS[gate_order], recurrent_kernel.shape[0]
    scale = np.array([gate_scale(activation, dtype)] * 3 + [1.0], dtype)
    offset_gu = np.zeros((4, units), dtype)
    if bias is not None:
        offset_gu += bias.reshape(4, units)[list(order)]
    offset_gu[1] += forget_bias
    offset_gu *= scale[:, None]
    inner, recurrent_inner = (weight_strips(each, batch, dtype, order, scale) for each in (kernel, recurrent_kernel))
    return inner, recurrent_inner, offset_gu


def _lstm_loop(
    inputs: Inputs, residual: bool, weights: tuple[np.ndarray, np.ndarray, np.ndarray], gates: np.ndarray,
    h_tnu: np.ndarray, c_tnu: np.ndarray, outputs: np.ndarray, mask: np.ndarray | None,
    recurrent_mask: np.ndarray | None, activation: str,
) -> None:  # fmt: skip
    """Run all steps; allocates nothing inside the loop, in which every tenth of a microsecond counts.

    `gates` (T, 4, N, U), or fewer steps where nothing is saved, receives the activations; `h_tnu` and `c_tnu` are
    (T + 1, N, U), or rings of 2. The projections are made a block of steps at a time so that they are still in cache
    when their step comes.
    """
    add, multiply, tanh, matmul = np.add, np.multiply, np.tanh, np.matmul
    kernel, recurrent, offset_gu = weights
    (time, batch, _), (_, _, _, units), ring = inputs.x.shape, gates.shape, len(h_tnu)
    product, candidate = recycled((4, batch, units), gates.dtype), recycled((batch, units), gates.dtype)
    into = in_strips(product, recurrent)
    skipped, skips = skipped_rows(mask, time)
    states = list(zip(h_tnu, c_tnu, strict=True))
    h, c = states[0]
    for start, block in projected_blocks(inputs, kernel, offset_gu, gates):
        for t, gate_gnu in enumerate(block, start):
            new_h, new_c = states[(t + 1) % ring]
            matmul(h if recurrent_mask is None else multiply(h, recurrent_mask, candidate), recurrent, into)
            add(gate_gnu, product, gate_gnu)
            tanh(gate_gnu[3], gate_gnu[3])
            finish_gates(activation, gate_gnu[:3])
            multiply(gate_gnu[1], c, new_c)
            multiply(gate_gnu[0], gate_gnu[3], candidate)
            add(new_c, candidate, new_c)
            tanh(new_c, candidate)
            multiply(gate_gnu[2], candidate, new_h)
            if residual:
                add(new_h, inputs.x[t], outputs[t])
            else:
                np.copyto(outputs[t], new_h)
            if skips[t]:
                np.copyto(new_h, h, where=skipped[t])
                np.copyto(new_c, c, where=skipped[t])
            h, c = new_h, new_c


def lstm_sequence_backward(
    d_outputs: np.ndarray | None,
    d_h_last: np.ndarray | None,
    d_c_last: np.ndarray | None,
    saved: tuple[np.ndarray, ...],
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    input_mask: np.ndarray | None = None,
    recurrent_mask: np.ndarray | None = None,
    zero_output_for_mask: bool = False,
    go_backwards: bool = False,
    residual: bool = False,
    gate_order: str = "ifco",
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, ...]:
    """Return ``(dx, dh0, dc0, dkernel, drecurrent_kernel, dbias)`` of `lstm_sequence`.

    `d_outputs` (T, N, U), `d_h_last` and `d_c_last` (N, U) are the cotangents of its results, None where none arrived;
    the keywords are those of the forward call. Gradients have the working dtype (float32, or float64 for float64
    data). `dbias` is returned whether or not there was a bias. Same bits on every run.
    """
    x, h_tnu, c_tnu, gates = saved
    dtype, (time, _, batch, units) = x.dtype, gates.shape
    mask = reverse_if(go_backwards, mask)
    d_outputs = output_cotangents(d_outputs, (time, batch, units), dtype, mask, zero_output_for_mask)
    d_h = state_cotangent(d_h_last, (batch, units), dtype)
    d_c = state_cotangent(d_c_last, (batch, units), dtype)
    d_gates = recycled((time, batch, 4 * units), dtype)
    weights = WeightGradients(d_gates, times_mask(x, input_mask), times_mask(h_tnu[:-1], recurrent_mask))
    for start, end in _lstm_loop_backward(
        d_outputs, d_h, d_c, c_tnu, gates, d_gates, recurrent_kernel, mask,
        recurrent_mask, GATE_ORDERS[gate_order], recurrent_activation,
    ):  # fmt: skip
        weights.add(start, end)
    d_x = input_gradients(d_gates, kernel, input_mask, d_outputs if residual else None, go_backwards)
    return d_x, d_h, d_c, *weights.results()


def _lstm_loop_backward(
    d_outputs: np.ndarray, d_h: np.ndarray, d_c: np.ndarray, c_tnu: np.ndarray, gates: np.ndarray,
    d_gates: np.ndarray, recurrent: np.ndarray, mask: np.ndarray | None, recurrent_mask: np.ndarray | None,
    order: tuple[int, ...], activation: str,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield the first and last step of each block when the gradients of its pre-activations stand in `d_gates`.

    `d_gates` (T, N, 4U) has the weights' column order; `d_h`, `d_c` become the states' gradients.
    """
    time, _, batch, units = gates.shape
    add, multiply, matmul, dtype = np.add, np.multiply, np.matmul, gates.dtype
    columns = d_gates.reshape(time, batch, 4, units).swapaxes(1, 2)
    by_c, by_h = columns[:, :3], columns[:, 3]  # o is the last column in either order, and alone follows from dh
    transposed = weight_strips(recurrent.T, batch, dtype)
    into, scratch = in_strips(d_h[None], transposed), recycled((batch, units), dtype)
    skipped = None if mask is None else ~mask[:, :, None]
    longest = steps_per_block(time, 6 * batch * units * dtype.itemsize)
    factors = recycled((longest, 6, batch, units), dtype)
    for end in range(time, 0, -longest):
        start = max(0, end - longest)
        block = factors[: end - start]
        kept = _lstm_factors(gates[start:end], c_tnu[start : end + 1], activation, order, block)
        if skipped is not None:
            np.copyto(block, 0.0, where=skipped[start:end, None])
            kept = np.where(skipped[start:end], dtype.type(1.0), kept)
        for t in range(end - 1, start - 1, -1):
            of = block[t - start]
            add(d_h, d_outputs[t], d_h)
            multiply(d_h, of[4], scratch)
            add(d_c, scratch, d_c)
            multiply(d_c, of[:3], by_c[t])
            multiply(d_h, of[3], by_h[t])
            multiply(d_c, kept[t - start], d_c)
            if skipped is not None:
                multiply(d_h, skipped[t], scratch)
            matmul(d_gates[t], transposed, into)
            if recurrent_mask is not None:
                multiply(d_h, recurrent_mask, d_h)
            if skipped is not None:
                add(d_h, scratch, d_h)
        yield start, end


def _lstm_factors(
    gates: np.ndarray, c_tnu: np.ndarray, activation: str, order: tuple[int, ...], factors: np.ndarray
) -> np.ndarray:
    """Fill a block's factors and return f: ds_i = dc of_i, ds_f = dc of_f, ds_g = dc of_g, ds_o = dh of_o.

    `factors` (steps, 6, N, U) has these in the weights' column order, then what dh adds to dc, o (1 - tanh(c')^2), then
    room. `c_tnu` has one step more than the block: before and after each.
    """
    i, f, o, g = (gates[:, gate] for gate in range(4))
    of_i, of_f, of_o, of_g = (factors[:, column] for column in order)
    of_c, tanh_c = factors[:, 4], factors[:, 5]
    np.tanh(c_tnu[1:], out=tanh_c)
    for gate, of_gate, factor in ((i, of_i, g), (f, of_f, c_tnu[:-1]), (o, of_o, tanh_c)):
        gate_slope(activation, gate, of_gate)
        np.multiply(of_gate, factor, out=of_gate)
    for value, of_value, factor in ((g, of_g, i), (tanh_c, of_c, o)):
        np.multiply(value, value, out=of_value)
        np.subtract(1.0, of_value, out=of_value)
        np.multiply(of_value, factor, out=of_value)
    return f
