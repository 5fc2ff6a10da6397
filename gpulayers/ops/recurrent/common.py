"""What the recurrent sequence functions share: working dtype, direction, masks, gate functions, blocks of time steps.

Everything here works on plain NumPy arrays with the time axis first: ``x_tnd`` is (time T, batch N, depth D), states
are ``h_nu`` (batch N, units U), a mask is ``mask_tn`` (time, batch), True where a step counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers.errors import ShapeError, StructureError, message

__all__ = [
    "RECURRENT_ACTIVATIONS",
    "apply_gates",
    "check_choice",
    "check_gate_weights",
    "finish_gates",
    "gate_scale",
    "gate_slope",
    "hold_outputs",
    "mask_from_lengths",
    "output_cotangents",
    "reverse_if",
    "skipped_rows",
    "state_cotangent",
    "steps_per_block",
    "times_mask",
    "working_dtype",
]

RECURRENT_ACTIVATIONS = ("sigmoid", "hard_sigmoid")
"""Gate functions with a fused form: the logistic function, and clip(0.2 x + 0.5, 0, 1)."""

# The gates' columns of the weights are scaled by this before the loop, exactly for sigmoid, so that in the loop
# sigma(x) = 1 / (1 + exp(-x)) costs no change of sign. A tanh would serve all gates at once, but takes longer than an
# exponential, and loses the digits of a gate that is nearly closed.
_SCALE = {"sigmoid": -1.0, "hard_sigmoid": 0.2}

_BLOCK_BYTES = 1 << 20  # what fits, with its inputs, in the second-level cache of the processors seen


def working_dtype(*arrays: Any) -> np.dtype:
    """Return the dtype of the arithmetic: float64 if an array is float64, otherwise float32 (16-bit data too).

    >>> working_dtype(np.zeros(1, np.float16)).name
    'float32'
    """
    wide = any(array is not None and array.dtype == np.float64 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def check_choice(name: str, what: str, value: str, known: Sequence[str]) -> None:
    """Raise StructureError unless `value` is one of `known`."""
    if value not in known:
        raise StructureError(message(name, f"unknown {what}", " or ".join(map(repr, known)), repr(value)))


def check_gate_weights(
    name: str, gates: int, x: Any, states: Sequence[Any], kernel: Any, recurrent_kernel: Any, residual: bool
) -> None:
    """Raise ShapeError unless the widths of one step fit together.

    `x` ends in (N, D), every state is (N, U), `kernel` (D, gates*U), `recurrent_kernel` (U, gates*U); a residual
    addition needs D = U.
    """
    units = recurrent_kernel.shape[0]
    rows, depth = x.shape[-2:]
    for what, array, shape in (
        ("kernel", kernel, (depth, gates * units)),
        ("recurrent_kernel", recurrent_kernel, (units, gates * units)),
        *((f"state {index}", state, (rows, units)) for index, state in enumerate(states)),
    ):
        if array.shape != shape:
            raise ShapeError(message(name, f"the shape of the {what} does not fit", shape, array.shape))
    if residual and depth != units:
        raise ShapeError(
            message(
                name,
                "the inputs cannot be added to the outputs",
                f"inputs of depth {units}",
                depth,
                "Use as many units as the inputs are deep, or a residual_fn that projects.",
            )
        )


def reverse_if(backwards: bool, array: Any) -> Any:
    """Return `array` with its time axis (the first) reversed if `backwards`; None stays None. A view."""
    return array[::-1] if backwards and array is not None else array


def mask_from_lengths(sequence_length: Any, time: int) -> np.ndarray:
    """Return the mask (T, N) that is True at the first ``sequence_length[n]`` steps of each row.

    Together with ``zero_output_for_mask`` this is `dynamic_rnn`: beyond its length a row's output is 0 and its state is
    carried.

    >>> mask_from_lengths(np.array([2, 0]), 3).astype(int).T
    array([[1, 1, 0],
           [0, 0, 0]])
    """
    return np.arange(time)[:, None] < np.asarray(sequence_length)[None, :]


def skipped_rows(mask_tn: np.ndarray | None, time: int) -> tuple[Any, list[bool]]:
    """Return where rows skip their step, (T, N, 1) bool or None without a mask, and for each step whether any does."""
    if mask_tn is None:
        return None, [False] * time
    skipped = ~mask_tn[:, :, None]
    steps: np.ndarray = np.any(skipped, axis=(1, 2))
    return skipped, steps.tolist()


def gate_scale(recurrent_activation: str, dtype: np.dtype) -> Any:
    """Return the factor that a gate's pre-activation is scaled by before `finish_gates`."""
    return dtype.type(_SCALE[recurrent_activation])


_HALF, _ONE = (  # arrays: numbers cost more a call
    {np.dtype(name): np.array(value, name) for name in ("float32", "float64")} for value in (0.5, 1.0)
)


def finish_gates(recurrent_activation: str, gates: np.ndarray) -> None:
    """Turn scaled pre-activations into gate values, in place. An exponential may overflow, to the right gate value."""
    if recurrent_activation == "sigmoid":
        np.exp(gates, gates)
        np.add(gates, _ONE[gates.dtype], gates)
        np.reciprocal(gates, gates)
    else:
        np.add(gates, _HALF[gates.dtype], gates)
        np.clip(gates, 0.0, 1.0, out=gates)


def apply_gates(recurrent_activation: str, gates: np.ndarray) -> None:
    """Turn unscaled pre-activations into gate values, in place."""
    np.multiply(gates, gate_scale(recurrent_activation, gates.dtype), out=gates)
    finish_gates(recurrent_activation, gates)


def gate_slope(recurrent_activation: str, gates: np.ndarray, out: np.ndarray) -> None:
    """Write the derivative of the gate function by its unscaled argument, seen from its value, into `out`.

    sigmoid: s (1 - s). hard_sigmoid: 0.2 where 0 < s < 1, else 0 (on the two corners TensorFlow says 0.2).
    """
    if recurrent_activation == "sigmoid":
        np.subtract(1.0, gates, out=out)
        np.multiply(out, gates, out=out)
    else:
        np.multiply((gates > 0.0) & (gates < 1.0), out.dtype.type(0.2), out=out)


def steps_per_block(time: int, step_bytes: int) -> int:
    """Return how many time steps to treat together so that their factors stay in cache (at least one)."""
    return max(1, min(time, _BLOCK_BYTES // max(step_bytes, 1)))


def hold_outputs(outputs: np.ndarray, mask_tn: np.ndarray, zero: bool) -> None:
    """Replace the outputs (T, N, U) of steps that do not count, in place.

    Zeros with `zero`; otherwise the row's previous output, zeros before its first step that counts.
    """
    skipped = ~mask_tn[:, :, None]
    if zero:
        np.copyto(outputs, 0.0, where=skipped)
        return
    for t in np.flatnonzero(skipped.any(axis=(1, 2))):
        np.copyto(outputs[t], outputs[t - 1] if t else 0.0, where=skipped[t])


def output_cotangents(
    d_outputs: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype, mask_tn: np.ndarray | None, zero: bool
) -> np.ndarray:
    """Return the cotangent of the outputs before `hold_outputs`, zeros where none arrived.

    A step that does not count gets 0; what arrived at an output that was repeated goes to the one it repeats.
    """
    if d_outputs is None:
        return np.zeros(shape, dtype)
    if mask_tn is None:
        return d_outputs.astype(dtype, copy=False)
    d_outputs, skipped = d_outputs.astype(dtype), ~mask_tn[:, :, None]
    if not zero:
        for t in np.flatnonzero(skipped.any(axis=(1, 2)))[::-1]:
            if t:
                np.add(d_outputs[t - 1], d_outputs[t], out=d_outputs[t - 1], where=skipped[t])
    np.copyto(d_outputs, 0.0, where=skipped)
    return d_outputs


def state_cotangent(d_state: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the cotangent of a last state, an array of its own, zeros where none arrived."""
    return np.zeros(shape, dtype) if d_state is None else d_state.astype(dtype)


def times_mask(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return `array` times a dropout mask, in the array's dtype; the array itself where there is none."""
    return array if mask is None else array * mask.astype(array.dtype, copy=False)
