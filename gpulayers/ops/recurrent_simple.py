"""Simple RNN on NumPy: one step, and a whole sequence with one matmul before the loop.

    h' = tanh(x K + b + h R);  output = h' (+ x with `residual`)

Source: Elman 1990; TensorFlow's SimpleRNNCell and, with the kernel cut in two, BasicRNNCell.
"""

from __future__ import annotations

import numpy as np

from gpulayers.ops.host_buffers import recycled
from gpulayers.ops.recurrent_common import (
    check_gate_weights,
    gates_apart,
    hold_outputs,
    hold_outputs_backward,
    reverse_if,
    skipped_rows,
    working_dtype,
)

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
    dtype, (time, batch, depth), units = working_dtype(x_tnd), x_tnd.shape, h0.shape[1]
    x = np.ascontiguousarray(reverse_if(go_backwards, x_tnd), dtype)
    dropped = x if input_mask is None else x * input_mask.astype(dtype, copy=False)
    h_tnu = recycled((time + 1, batch, units), dtype)  # the projections lie where the states will be
    h_tnu[0] = h0
    kernel, recurrent_kernel = kernel.astype(dtype, copy=False), recurrent_kernel.astype(dtype, copy=False)
    np.matmul(dropped.reshape(time * batch, depth), kernel, out=h_tnu[1:].reshape(time * batch, units))
    if bias is not None:
        h_tnu[1:] += bias
    mask = reverse_if(go_backwards, mask)
    _simple_loop(h_tnu, gates_apart(recurrent_kernel, 1, dtype)[0], mask, recurrent_mask)
    outputs = recycled((time, batch, units), dtype)
    if residual:
        np.add(h_tnu[1:], x, out=outputs)
    else:
        np.copyto(outputs, h_tnu[1:])
    if mask is not None:
        hold_outputs(outputs, mask, zero_output_for_mask)
    return outputs.astype(x_tnd.dtype, copy=False), h_tnu[-1].astype(x_tnd.dtype), (x, h_tnu) if save else ()


def _simple_loop(
    h_tnu: np.ndarray, recurrent: np.ndarray, mask: np.ndarray | None, recurrent_mask: np.ndarray | None
) -> None:
    """Turn the projections in ``h_tnu[1:]`` into states, in place; allocates nothing inside the loop."""
    product, dropped = np.empty_like(h_tnu[0]), np.empty_like(h_tnu[0])
    skipped, skips = skipped_rows(mask, len(h_tnu) - 1)
    for t, skip in enumerate(skips):
        h, new_h = h_tnu[t], h_tnu[t + 1]
        entering = h if recurrent_mask is None else np.multiply(h, recurrent_mask, out=dropped)
        np.matmul(entering, recurrent, out=product)
        np.add(new_h, product, out=new_h)
        np.tanh(new_h, out=new_h)
        if skip:
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
    if d_outputs is None:
        d_outputs = np.zeros((time, batch, units), dtype)
    d_outputs = d_outputs.astype(dtype, copy=False)
    if mask is not None:
        d_outputs = hold_outputs_backward(d_outputs, mask, zero_output_for_mask)
    d_h = np.zeros((batch, units), dtype) if d_h_last is None else d_h_last.astype(dtype)
    d_sums = recycled((time, batch, units), dtype)
    np.multiply(h_tnu[1:], h_tnu[1:], out=d_sums)
    np.subtract(1.0, d_sums, out=d_sums)
    if mask is not None:
        np.copyto(d_sums, 0.0, where=~mask[:, :, None])
    _simple_loop_backward(d_outputs, d_h, d_sums, recurrent_kernel.astype(dtype, copy=False), mask, recurrent_mask)
    rows = d_sums.reshape(time * batch, units)
    d_x = recycled(x.shape, dtype)
    np.matmul(rows, kernel.T.astype(dtype, copy=False), out=d_x.reshape(time * batch, x.shape[2]))
    dropped = x
    if input_mask is not None:
        dropped = x * input_mask.astype(dtype, copy=False)
        d_x *= input_mask
    if residual:
        d_x += d_outputs
    entering = h_tnu[:-1] if recurrent_mask is None else h_tnu[:-1] * recurrent_mask.astype(dtype, copy=False)
    d_kernel = np.matmul(dropped.reshape(time * batch, x.shape[2]).T, rows)
    d_recurrent = np.matmul(entering.reshape(time * batch, units).T, rows)
    d_bias = np.matmul(np.ones(time * batch, dtype), rows)
    return np.ascontiguousarray(reverse_if(go_backwards, d_x)), d_h, d_kernel, d_recurrent, d_bias


def _simple_loop_backward(
    d_outputs: np.ndarray, d_h: np.ndarray, d_sums: np.ndarray, recurrent: np.ndarray, mask: np.ndarray | None,
    recurrent_mask: np.ndarray | None,
) -> None:  # fmt: skip
    """Turn the slopes in `d_sums` into gradients of the sums, in place; `d_h` becomes dh0."""
    transposed = gates_apart(recurrent, 1, recurrent.dtype, transposed=True)[0]
    carried = np.empty_like(d_h)
    for t in range(len(d_sums) - 1, -1, -1):
        np.add(d_h, d_outputs[t], out=d_h)
        np.multiply(d_sums[t], d_h, out=d_sums[t])
        if mask is not None:
            np.multiply(d_h, ~mask[t, :, None], out=carried)
        np.matmul(d_sums[t], transposed, out=d_h)
        if recurrent_mask is not None:
            np.multiply(d_h, recurrent_mask, out=d_h)
        if mask is not None:
            np.add(d_h, carried, out=d_h)
