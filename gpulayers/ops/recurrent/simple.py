"""Simple RNN on NumPy: one step, and a whole sequence with one matmul before the loop.

    h' = tanh(x K + b + h R);  output = h' (+ x with `residual`)

Source: Elman 1990; TensorFlow's SimpleRNNCell and, with the kernel cut in two, BasicRNNCell.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpulayers.ops.host.buffers import recycled
from gpulayers.ops.recurrent.common import (
    check_gate_weights,
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
from gpulayers.ops.recurrent.projections import Inputs, inputs_of, projected_blocks

__all__ = [
    "simple_rnn_sequence",
    "simple_rnn_sequence_backward",
    "simple_rnn_step",
    "simple_rnn_step_backward",
]


def simple_rnn_step(
    x: np.ndarray,
    h: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    residual: bool = False,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Compute one step: ``(output, h', saved)`` for `x` (N, D), `h` (N, U), `kernel` (D, U), `recurrent_kernel` (U, U).

    Results have the dtype of `x`; 16-bit data is computed in float32. Raises ShapeError where widths do not fit.

    >>> output, h, _ = simple_rnn_step(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), -np.ones((1, 1)),
    ...                                residual=True)
    >>> output, h
    (array([[1.]]), array([[0.]]))
    """
    check_gate_weights("simple_rnn", 1, x, (h,), kernel, recurrent_kernel, residual)
    dtype = working_dtype(x)
    x_nd, h_nu = x.astype(dtype, copy=False), h.astype(dtype, copy=False)
    new_h = np.matmul(x_nd, kernel.astype(dtype, copy=False))
    new_h += np.matmul(h_nu, recurrent_kernel.astype(dtype, copy=False))
    if bias is not None:
        new_h += bias
    np.tanh(new_h, out=new_h)
    output = new_h + x_nd if residual else new_h.copy()
    return output.astype(x.dtype, copy=False), new_h.astype(x.dtype), (x_nd, h_nu, new_h)


def simple_rnn_step_backward(
    d_output: np.ndarray | None,
    d_h: np.ndarray | None,
    saved: tuple[np.ndarray, ...],
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    *,
    residual: bool = False,
) -> tuple[np.ndarray, ...]:
    """Return the gradients ``(dx, dh, dkernel, drecurrent_kernel, dbias)`` of `simple_rnn_step`, working dtype."""
    x, h, new_h = saved
    d_sum = np.zeros_like(new_h)
    for cotangent in (d_output, d_h):
        if cotangent is not None:
            d_sum += cotangent
    d_sum *= 1.0 - new_h * new_h
    d_x = np.matmul(d_sum, kernel.T.astype(h.dtype, copy=False))
    if residual and d_output is not None:
        d_x += d_output
    d_previous = np.matmul(d_sum, recurrent_kernel.T.astype(h.dtype, copy=False))
    return d_x, d_previous, np.matmul(x.T, d_sum), np.matmul(h.T, d_sum), d_sum.sum(axis=0)


def simple_rnn_sequence(
    x_tnd: np.ndarray,
    h0: np.ndarray,
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
    save: bool = True,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Run a simple RNN over a whole sequence, time axis first: ``(outputs (T, N, U), h (N, U), saved)``.

    Parameters: `x_tnd` (T, N, D), `h0` (N, U), weights as in `simple_rnn_step`, the keywords as in `lstm_sequence`.
    Raises ShapeError where widths do not fit.

    >>> outputs, h, _ = simple_rnn_sequence(np.zeros((2, 1, 1)), np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)))
    >>> outputs.shape, h
    ((2, 1, 1), array([[0.]]))
    """
    check_gate_weights("simple_rnn", 1, x_tnd, (h0,), kernel, recurrent_kernel, residual)
    dtype, (time, batch, _), units = working_dtype(x_tnd), x_tnd.shape, h0.shape[1]
    inputs = inputs_of(x_tnd, go_backwards, dtype, input_mask)
    h_tnu = recycled((time + 1, batch, units), dtype)  # the projections lie where the states will be
    h_tnu[0] = h0
    mask = reverse_if(go_backwards, mask)
    offset_gu = np.zeros((1, units), dtype) if bias is None else bias.astype(dtype, copy=False)[None]
    _simple_loop(inputs, kernel, offset_gu, recurrent_kernel, h_tnu, mask, recurrent_mask)
    outputs = recycled((time, batch, units), dtype)
    if residual:
        np.add(h_tnu[1:], inputs.x, out=outputs)
    else:
        np.copyto(outputs, h_tnu[1:])
    if mask is not None:
        hold_outputs(outputs, mask, zero_output_for_mask)
    return outputs.astype(x_tnd.dtype, copy=False), h_tnu[-1].astype(x_tnd.dtype), (inputs.x, h_tnu) if save else ()


def _simple_loop(
    inputs: Inputs, kernel: np.ndarray, offset_gu: np.ndarray, recurrent_kernel: np.ndarray, h_tnu: np.ndarray,
    mask: np.ndarray | None, recurrent_mask: np.ndarray | None,
) -> None:  # fmt: skip
    """Make the states in ``h_tnu[1:]``, where their projections lie before; allocates nothing inside the loop."""
    (time, batch, _), dtype = inputs.x.shape, inputs.x.dtype
    kernel, recurrent = (weight_strips(each, batch, dtype) for each in (kernel, recurrent_kernel))
    product, dropped = np.empty_like(h_tnu[0]), np.empty_like(h_tnu[0])
    into = in_strips(product[None], recurrent)
    skipped, skips = skipped_rows(mask, time)
    for start, block in projected_blocks(inputs, kernel, offset_gu, h_tnu[1:, None]):
        for t in range(start, start + len(block)):
            h, new_h = h_tnu[t], h_tnu[t + 1]
            entering = h if recurrent_mask is None else np.multiply(h, recurrent_mask, out=dropped)
            np.matmul(entering, recurrent, out=into)
            np.add(new_h, product, out=new_h)
            np.tanh(new_h, out=new_h)
            if skips[t]:
                np.copyto(new_h, h, where=skipped[t])


def simple_rnn_sequence_backward(
    d_outputs: np.ndarray | None,
    d_h_last: np.ndarray | None,
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
) -> tuple[np.ndarray, ...]:
    """Return ``(dx, dh0, dkernel, drecurrent_kernel, dbias)`` of `simple_rnn_sequence`; keywords as in the forward.

    Cotangents may be None where none arrived. Gradients have the working dtype. Same bits on every run.
    """
    x, h_tnu = saved
    dtype, (_, batch, units), time = x.dtype, h_tnu.shape, len(x)
    mask = reverse_if(go_backwards, mask)
    d_outputs = output_cotangents(d_outputs, (time, batch, units), dtype, mask, zero_output_for_mask)
    d_h = state_cotangent(d_h_last, (batch, units), dtype)
    d_sums = recycled((time, batch, units), dtype)
    np.multiply(h_tnu[1:], h_tnu[1:], out=d_sums)
    np.subtract(1.0, d_sums, out=d_sums)
    if mask is not None:
        np.copyto(d_sums, 0.0, where=~mask[:, :, None])
    weights = WeightGradients(d_sums, times_mask(x, input_mask), times_mask(h_tnu[:-1], recurrent_mask))
    for start, end in _simple_loop_backward(d_outputs, d_h, d_sums, recurrent_kernel, mask, recurrent_mask):
        weights.add(start, end)
    d_x = input_gradients(d_sums, kernel, input_mask, d_outputs if residual else None, go_backwards)
    return d_x, d_h, *weights.results()


def _simple_loop_backward(
    d_outputs: np.ndarray, d_h: np.ndarray, d_sums: np.ndarray, recurrent: np.ndarray, mask: np.ndarray | None,
    recurrent_mask: np.ndarray | None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Turn the slopes in `d_sums` into gradients of the sums, in place; yield each block's first and last step.

    `d_h` becomes dh0.
    """
    time, batch, units = d_sums.shape
    transposed = weight_strips(recurrent.T, batch, d_sums.dtype)
    into, carried = in_strips(d_h[None], transposed), np.empty_like(d_h)
    block = steps_per_block(time, batch * units * d_sums.itemsize)
    for end in range(time, 0, -block):
        start = max(0, end - block)
        for t in range(end - 1, start - 1, -1):
            np.add(d_h, d_outputs[t], out=d_h)
            np.multiply(d_sums[t], d_h, out=d_sums[t])
            if mask is not None:
                np.multiply(d_h, ~mask[t, :, None], out=carried)
            np.matmul(d_sums[t], transposed, out=into)
            if recurrent_mask is not None:
                np.multiply(d_h, recurrent_mask, out=d_h)
            if mask is not None:
                np.add(d_h, carried, out=d_h)
        yield start, end
