"""GRU on NumPy, in both forms: one step, and a whole sequence with one matmul before the loop.

With `reset_after` (bias (2, 3U): row 0 for the inputs, row 1 for the state):

    a = x K + b0;  c = h R + b1;  z = sigma(a_z + c_z);  r = sigma(a_r + c_r);  n = tanh(a_h + r c_h)

without (bias (3U)):

    a = x K + b;  z = sigma(a_z + h R_z);  r = sigma(a_r + h R_r);  n = tanh(a_h + (r h) R_h)

and in both h' = z h + (1 - z) n, output = h' (+ x with `residual`). Columns z, r, h.

Source: Cho et al. 2014 (reset before the product), cuDNN's variant (after); TensorFlow's column order. PyTorch has the
columns r, z, n and only the second variant.

The plan is that of the LSTM: a step's gates lie side by side, each a contiguous (N, U) block, filled by the projection
and activated in place; the backward pass makes its factors a block of steps at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers.errors import ShapeError, message
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

__all__ = [
    "gru_sequence",
    "gru_sequence_backward",
    "gru_step",
    "gru_step_backward",
    "legacy_gru_gradients",
    "legacy_gru_weights",
]


def _check(
    x: Any, h: Any, kernel: Any, recurrent_kernel: Any, bias: Any, residual: bool, reset_after: bool, activation: str
) -> None:
    check_choice("gru", "recurrent_activation", activation, RECURRENT_ACTIVATIONS)
    check_gate_weights("gru", 3, x, (h,), kernel, recurrent_kernel, residual)
    columns = kernel.shape[1]
    shape = (2, columns) if reset_after else (columns,)
    if bias is not None and bias.shape != shape:
        raise ShapeError(message("gru", f"the bias does not fit reset_after={reset_after}", shape, bias.shape))


def legacy_gru_weights(
    gates_kernel: np.ndarray, gates_bias: np.ndarray, candidate_kernel: np.ndarray, candidate_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the legacy GRUCell's variables as ``(kernel, recurrent_kernel, bias)`` for ``reset_after=False``.

    The legacy cell has `gates_kernel` (D+U, 2U) with columns r, u and `candidate_kernel` (D+U, U); u is z here.

    >>> kernel, recurrent, bias = legacy_gru_weights(np.ones((5, 4)), np.ones(4), np.ones((5, 2)), np.zeros(2))
    >>> kernel.shape, recurrent.shape, bias
    ((3, 6), (2, 6), array([1., 1., 1., 1., 0., 0.]))
    """
    units = candidate_kernel.shape[1]
    depth = candidate_kernel.shape[0] - units
    joined = np.concatenate([gates_kernel[:, units:], gates_kernel[:, :units], candidate_kernel], axis=1)
    bias = np.concatenate([gates_bias[units:], gates_bias[:units], candidate_bias])
    return joined[:depth], joined[depth:], bias


def legacy_gru_gradients(
    d_kernel: np.ndarray, d_recurrent_kernel: np.ndarray, d_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of the four legacy variables, in the order of `legacy_gru_weights`, its transpose.

    >>> [each.shape for each in legacy_gru_gradients(np.ones((3, 6)), np.ones((2, 6)), np.ones(6))]
    [(5, 4), (4,), (5, 2), (2,)]
    """
    units = d_recurrent_kernel.shape[0]
    joined = np.concatenate([d_kernel, d_recurrent_kernel])
    z, r, candidate = (slice(k * units, (k + 1) * units) for k in range(3))
    return (
        np.concatenate([joined[:, r], joined[:, z]], axis=1),
        np.concatenate([d_bias[r], d_bias[z]]),
        joined[:, candidate],
        d_bias[candidate],
    )


@quiet
def gru_step(
    x: np.ndarray,
    h: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    reset_after: bool = True,
    residual: bool = False,
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Compute one GRU step.

    Parameters: `x` (N, D); `h` (N, U); `kernel` (D, 3U); `recurrent_kernel` (U, 3U); `bias` (2, 3U) with `reset_after`,
    (3U) without, or None; `residual` adds `x` to the output, never to the state.

    Returns ``(output, h', saved)``, of the dtype of `x`; 16-bit data is computed in float32. Raises ShapeError where
    widths do not fit.

    >>> output, h, _ = gru_step(np.zeros((1, 1)), np.ones((1, 1)), np.zeros((1, 3)), np.zeros((1, 3)))
    >>> h
    array([[0.5]])
    """
    _check(x, h, kernel, recurrent_kernel, bias, residual, reset_after, recurrent_activation)
    dtype, units = working_dtype(x), h.shape[1]
    x_nd, h_nu, kernel, recurrent_kernel = (
        a if a.dtype == dtype else a.astype(dtype) for a in (x, h, kernel, recurrent_kernel)
    )
    gates = np.matmul(x_nd, kernel)
    if bias is not None:
        gates += bias[0] if reset_after else bias
    zr, n = gates[:, : 2 * units], gates[:, 2 * units :]
    if reset_after:
        inner = np.matmul(h_nu, recurrent_kernel)
        if bias is not None:
            inner += bias[1]
        zr += inner[:, : 2 * units]
        apply_gates(recurrent_activation, zr)
        inner = inner[:, 2 * units :]
        n += zr[:, units:] * inner
    else:
        zr += np.matmul(h_nu, recurrent_kernel[:, : 2 * units])
        apply_gates(recurrent_activation, zr)
        inner = zr[:, units:] * h_nu
        n += np.matmul(inner, recurrent_kernel[:, 2 * units :])
    np.tanh(n, out=n)
    new_h = h_nu - n
    new_h *= zr[:, :units]
    new_h += n
    output = new_h + x_nd if residual else new_h.copy()
    return (
        output.astype(x.dtype, copy=False),
        new_h.astype(x.dtype, copy=False),
        (x_nd, h_nu, gates, inner),
    )


def gru_step_backward(
    d_output: np.ndarray | None,
    d_h: np.ndarray | None,
    saved: tuple[np.ndarray, ...],
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    *,
    reset_after: bool = True,
    residual: bool = False,
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, ...]:
    """Return the gradients ``(dx, dh, dkernel, drecurrent_kernel, dbias)`` of `gru_step`, in the working dtype."""
    x, h, gates, _ = saved
    d_new = np.zeros_like(h)
    for cotangent in (d_output, d_h):
        if cotangent is not None:
            d_new += cotangent
    dtype, (batch, units) = h.dtype, h.shape
    gates_tgnu = np.ascontiguousarray(gates.reshape(batch, 3, units).swapaxes(0, 1))[None]
    inner = saved[3][None]
    kernel, recurrent_kernel = kernel.astype(dtype, copy=False), recurrent_kernel.astype(dtype, copy=False)
    d_input, d_state = _gradient_buffers(1, batch, units, dtype, reset_after)
    weights = _WeightGradients(d_input, d_state, x[None], h[None], saved[3][None], reset_after)
    for start, end in _gru_loop_backward(
        np.zeros((1, batch, units), dtype), d_new, h[None], gates_tgnu, inner, d_input, d_state, recurrent_kernel, None,
        None, reset_after, recurrent_activation,
    ):  # fmt: skip
        weights.add(start, end)
    d_x = np.matmul(d_input[0], kernel.T)
    if residual and d_output is not None:
        d_x += d_output
    return d_x, d_new, *weights.results()


def _gradient_buffers(
    time: int, batch: int, units: int, dtype: np.dtype, reset_after: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return memory (T, N, 3U) for the gradients by a and, with `reset_after`, by c (else the same array)."""
    d_input = recycled((time, batch, 3 * units), dtype)
    return d_input, recycled((time, batch, 3 * units), dtype) if reset_after else d_input


class _WeightGradients:
    """The gradients of kernel, recurrent kernel and bias, summed block by block."""

    def __init__(
        self, d_input: np.ndarray, d_state: np.ndarray, x: np.ndarray, h: np.ndarray, inner: np.ndarray,
        reset_after: bool,
    ) -> None:  # fmt: skip
        self._reset_after, zr = reset_after, 2 * h.shape[2]
        self._sums = [WeightGradients(d_input, x)]
        if reset_after:
            self._sums += [WeightGradients(d_state, h)]
        else:
            self._sums += [WeightGradients(d_input[..., :zr], h), WeightGradients(d_input[..., zr:], inner)]

    def add(self, start: int, end: int) -> None:
        for each in self._sums:
            each.add(start, end)

    def results(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        (d_kernel, d_bias), *by_state = (each.results() for each in self._sums)
        if self._reset_after:
            ((d_recurrent, d_inner_bias),) = by_state
            return d_kernel, d_recurrent, np.stack([d_bias, d_inner_bias])
        return d_kernel, np.concatenate([d_recurrent for d_recurrent, _ in by_state], axis=1), d_bias


@quiet
def gru_sequence(
    x_tnd: np.ndarray,
    h0: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    reset_after: bool = True,
    mask: np.ndarray | None = None,
    input_mask: np.ndarray | None = None,
    recurrent_mask: np.ndarray | None = None,
    zero_output_for_mask: bool = False,
    go_backwards: bool = False,
    residual: bool = False,
    recurrent_activation: str = "sigmoid",
    save: bool = True,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Run a GRU over a whole sequence, time axis first.

    Parameters: `x_tnd` (T, N, D), `h0` (N, U), weights as in `gru_step`, the other keywords as in `lstm_sequence`.
    `recurrent_mask` multiplies the state that enters the products, not the one that z carries.

    Returns ``(outputs (T, N, U), h (N, U), saved)``, of the dtype of `x_tnd`. Raises ShapeError where widths do not
    fit, StructureError for an unknown gate function.

    >>> outputs, h, _ = gru_sequence(np.zeros((2, 1, 1)), np.ones((1, 1)), np.zeros((1, 3)), np.zeros((1, 3)))
    >>> outputs.ravel()
    array([0.5 , 0.25])
    """
    _check(x_tnd, h0, kernel, recurrent_kernel, bias, residual, reset_after, recurrent_activation)
    dtype, (time, batch, _), units = working_dtype(x_tnd), x_tnd.shape, h0.shape[1]
    inputs = inputs_of(x_tnd, go_backwards, dtype, input_mask)
    ring = time + 1 if save else 2
    kept = time if save else steps_kept(time, 3 * batch * units * dtype.itemsize)
    gates = recycled((kept, 3, batch, units), dtype)
    inner = recycled((time if save else 1, batch, units), dtype)
    h_tnu = recycled((ring, batch, units), dtype)
    h_tnu[0] = h0
    outputs = recycled((time, batch, units), dtype)
    mask = reverse_if(go_backwards, mask)
    weights = _inner_weights(kernel, recurrent_kernel, bias, reset_after, recurrent_activation, dtype, batch)
    _gru_loop(
        inputs, residual, weights, gates, inner, h_tnu, outputs, mask, recurrent_mask, reset_after,
        recurrent_activation,
    )  # fmt: skip
    if mask is not None:
        hold_outputs(outputs, mask, zero_output_for_mask)
    h_last = h_tnu[time % ring].astype(x_tnd.dtype)
    return outputs.astype(x_tnd.dtype, copy=False), h_last, (inputs.x, h_tnu, gates, inner) if save else ()


def _inner_weights(
    kernel: np.ndarray, recurrent_kernel: np.ndarray, bias: np.ndarray | None, reset_after: bool, activation: str,
    dtype: np.dtype, batch: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Return kernel and recurrent kernel in strips, the offset (3, U) and the inner offset (U).

    The columns of z and r are scaled for `finish_gates`; the state's bias of z and r joins the inputs'.
    """
    units, scale = recurrent_kernel.shape[0], gate_scale(activation, dtype)
    strips = (weight_strips(each, batch, dtype, range(3), (scale, scale, 1.0)) for each in (kernel, recurrent_kernel))
    offset_gu, inner_offset_u = np.zeros((3, units), dtype), np.zeros(units, dtype)
    if bias is not None and reset_after:
        offset_gu += bias[0].reshape(3, units)
        offset_gu[:2] += bias[1, : 2 * units].reshape(2, units)
        inner_offset_u += bias[1, 2 * units :]
    elif bias is not None:
        offset_gu += bias.reshape(3, units)
    offset_gu[:2] *= scale
    return *strips, offset_gu, inner_offset_u


def _gru_loop(
    inputs: Inputs, residual: bool, weights: tuple[np.ndarray, ...], gates: np.ndarray, inner: np.ndarray,
    h_tnu: np.ndarray, outputs: np.ndarray, mask: np.ndarray | None, recurrent_mask: np.ndarray | None,
    reset_after: bool, activation: str,
) -> None:  # fmt: skip
    """Run all steps; allocates nothing inside the loop.

    `gates` (T, 3, N, U) receives z, r, n; `inner` (T, N, U) what r multiplied: c_h with `reset_after`, otherwise r h.
    Where nothing is saved they hold fewer steps and `h_tnu` is a ring of 2.
    """
    add, multiply, tanh, matmul = np.add, np.multiply, np.tanh, np.matmul
    kernel, recurrent, offset_gu, inner_offset_u = weights
    entered = recurrent if reset_after else recurrent[:2]
    (time, batch, _), units, ring = inputs.x.shape, gates.shape[3], len(h_tnu)
    saved = ring == time + 1
    product, scratch = recycled((len(entered), batch, units), gates.dtype), recycled((batch, units), gates.dtype)
    dropped = recycled((batch, units), gates.dtype)
    into, into_scratch = in_strips(product, recurrent), in_strips(scratch, recurrent)
    inner_biased = bool(inner_offset_u.any())
    skipped, skips = skipped_rows(mask, time)
    h = h_tnu[0]
    for start, block in projected_blocks(inputs, kernel, offset_gu, gates):
        for t, gate_gnu in enumerate(block, start):
            new_h, kept = h_tnu[(t + 1) % ring], inner[t if saved else 0]
            z, r, n = gate_gnu
            zr = gate_gnu[:2]
            entering = h if recurrent_mask is None else multiply(h, recurrent_mask, dropped)
            matmul(entering, entered, into)
            add(zr, product[:2], zr)
            finish_gates(activation, zr)
            if reset_after:
                add(product[2], inner_offset_u, kept) if inner_biased else np.copyto(kept, product[2])
                multiply(r, kept, scratch)
            else:
                multiply(r, entering, kept)
                matmul(kept, recurrent[2], into_scratch)
            add(n, scratch, n)
            tanh(n, n)
            np.subtract(h, n, new_h)
            multiply(new_h, z, new_h)
            add(new_h, n, new_h)
            if residual:
                add(new_h, inputs.x[t], outputs[t])
            else:
                np.copyto(outputs[t], new_h)
            if skips[t]:
                np.copyto(new_h, h, where=skipped[t])
            h = new_h


def gru_sequence_backward(
    d_outputs: np.ndarray | None,
    d_h_last: np.ndarray | None,
    saved: tuple[np.ndarray, ...],
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    *,
    reset_after: bool = True,
    mask: np.ndarray | None = None,
    input_mask: np.ndarray | None = None,
    recurrent_mask: np.ndarray | None = None,
    zero_output_for_mask: bool = False,
    go_backwards: bool = False,
    residual: bool = False,
    recurrent_activation: str = "sigmoid",
) -> tuple[np.ndarray, ...]:
    """Return ``(dx, dh0, dkernel, drecurrent_kernel, dbias)`` of `gru_sequence`; the keywords are the forward call's.

    Cotangents may be None where none arrived. Gradients have the working dtype. Same bits on every run.
    """
    x, h_tnu, gates, inner = saved
    dtype, (time, _, batch, units) = x.dtype, gates.shape
    mask = reverse_if(go_backwards, mask)
    d_outputs = output_cotangents(d_outputs, (time, batch, units), dtype, mask, zero_output_for_mask)
    d_h = state_cotangent(d_h_last, (batch, units), dtype)
    d_input, d_state = _gradient_buffers(time, batch, units, dtype, reset_after)
    entered = times_mask(x, input_mask), times_mask(h_tnu[:-1], recurrent_mask)
    weights = _WeightGradients(d_input, d_state, *entered, inner, reset_after)
    for start, end in _gru_loop_backward(
        d_outputs, d_h, h_tnu, gates, inner, d_input, d_state, recurrent_kernel, mask, recurrent_mask, reset_after,
        recurrent_activation,
    ):  # fmt: skip
        weights.add(start, end)
    d_x = input_gradients(d_input, kernel, input_mask, d_outputs if residual else None, go_backwards)
    return d_x, d_h, *weights.results()


def _gru_loop_backward(
    d_outputs: np.ndarray, d_h: np.ndarray, h_tnu: np.ndarray, gates: np.ndarray, inner: np.ndarray,
    d_input: np.ndarray, d_state: np.ndarray, recurrent: np.ndarray, mask: np.ndarray | None,
    recurrent_mask: np.ndarray | None, reset_after: bool, activation: str,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield the first and last step of each block when its gradients stand in `d_input` and `d_state`.

    Both are (T, N, 3U): the gradients by a and by c, or one array without `reset_after`. `d_h` becomes dh0.
    """
    time, _, batch, units = gates.shape
    add, multiply, matmul, dtype, zr = np.add, np.multiply, np.matmul, gates.dtype, 2 * units
    d_gates = d_input.reshape(time, batch, 3, units).swapaxes(1, 2)
    d_state_gates = d_state.reshape(time, batch, 3, units).swapaxes(1, 2)
    parts = (recurrent,) if reset_after else (recurrent[:, :zr], recurrent[:, zr:])
    transposed = [weight_strips(part.T, batch, dtype) for part in parts]
    carried, d_reset = recycled((batch, units), dtype), recycled((batch, units), dtype)
    into, into_reset = in_strips(d_h[None], transposed[0]), in_strips(d_reset[None], transposed[-1])
    skipped, _ = skipped_rows(mask, time)
    longest = steps_per_block(time, 5 * batch * units * dtype.itemsize)
    factors = recycled((longest, 4, batch, units), dtype)
    for end in range(time, 0, -longest):
        start = max(0, end - longest)
        block = factors[: end - start]
        kept = _gru_factors(
            gates[start:end], h_tnu[start:end], inner[start:end], recurrent_mask, reset_after, activation, block
        )
        if skipped is not None:
            np.copyto(block, 0.0, where=skipped[start:end, None])
            kept = np.where(skipped[start:end], dtype.type(1.0), kept)
        for t in range(end - 1, start - 1, -1):
            of_n, of_z, of_r, of_c = of = block[t - start]
            add(d_h, d_outputs[t], d_h)
            multiply(d_h, kept[t - start], carried)
            multiply(d_h, of_n, d_gates[t, 2])
            if reset_after:
                multiply(d_h, of[1:], d_state_gates[t])
                np.copyto(d_input[t, :, :zr], d_state[t, :, :zr])
                matmul(d_state[t], transposed[0], into)
            else:
                multiply(d_h, of_z, d_gates[t, 0])
                matmul(d_input[t, :, zr:], transposed[1], into_reset)
                multiply(d_reset, of_r, d_gates[t, 1])
                matmul(d_input[t, :, :zr], transposed[0], into)
                multiply(d_reset, of_c, d_reset)
                add(d_h, d_reset, d_h)
            if recurrent_mask is not None:
                multiply(d_h, recurrent_mask, d_h)
            add(d_h, carried, d_h)
        yield start, end


def _gru_factors(
    gates: np.ndarray, h: np.ndarray, inner: np.ndarray, recurrent_mask: np.ndarray | None, reset_after: bool,
    activation: str, factors: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Fill a block's factors (steps, 4, N, U) and return z, which carries dh to the step before.

    da_z = dh of_z, da_n = dh of_n. With `reset_after` da_r = dh of_r and dc_h = dh of_c; otherwise, for the gradient q
    by the product r h, da_r = q of_r and q of_c is what reaches h through r h.
    """
    z, r, n = (gates[:, gate] for gate in range(3))
    of_n, of_z, of_r, of_c = (factors[:, which] for which in range(4))
    gate_slope(activation, gates[:, :2], factors[:, 1:3])
    np.subtract(h, n, out=of_n)
    np.multiply(of_z, of_n, out=of_z)
    np.multiply(n, n, out=of_c)
    np.subtract(1.0, of_c, out=of_c)
    np.subtract(1.0, z, out=of_n)
    np.multiply(of_n, of_c, out=of_n)
    if reset_after:
        np.multiply(of_n, r, out=of_c)
        np.multiply(of_r, inner, out=of_r)
        np.multiply(of_r, of_n, out=of_r)
    else:
        np.multiply(of_r, h, out=of_r)
        if recurrent_mask is not None:
            np.multiply(of_r, recurrent_mask, out=of_r)
        np.copyto(of_c, r)
    return z
