"""How many bytes an operation must move at least, how many given what stays on chip, and a copy that moves as many.

E is the number of elements, s the bytes of one. Per-channel vectors are left out: they are below a tenth of a per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shapes import Case, elements
from gpulayers import _cupy

__all__ = ["copy_function", "itemsize", "minimum_bytes", "regime_bytes"]


def itemsize(case: Case) -> int:
    """Return the bytes of one element."""
    return 2 if case.dtype == "bfloat16" else np.dtype(case.dtype).itemsize


def _norm(case: Case) -> dict[str, tuple[int, int]]:
    """Return, for each pass, the sweeps that must be made and those that a second sweep over memory adds."""
    if case.op == "batch_norm_relu_residual":
        return {"inference": (3, 0), "forward": (3, 1), "backward": (4, 2)}
    return {"inference": (2, 0), "forward": (2, 1), "backward": (3, 2)}


def _gates(case: Case) -> int:
    return 4 if case.op.startswith("lstm") else 3


def _recurrent(case: Case) -> int:
    """Return the elements of one step or sequence: inputs, weights, states in and out, outputs; twice, backward."""
    *times, batch, depth, units = case.shape
    steps, gates = math.prod(times), _gates(case)
    weights = (depth + units) * gates * units
    states = 2 if case.op.startswith("lstm") else 1
    moved = steps * batch * (depth + units) + weights + 2 * states * batch * units
    if case.mode == "forward":
        return moved
    return moved + steps * batch * (depth + units) + weights  # cotangents in, gradients out


def minimum_bytes(case: Case) -> int:
    """Return the bytes that no implementation can avoid: every input read once, every output written once.

    A ReLU's mask counts as one bit for each element. Backward passes of sequences are given their forward's outputs
    and no saved gates. A step of a batch normalisation is its two passes: a network works in between.
    """
    if case.mode == "step" and case.op.startswith("batch_norm"):
        return sum(minimum_bytes(case._replace(mode=mode)) for mode in ("forward", "backward"))
    e, s = elements(case), itemsize(case)
    if case.op.startswith("batch_norm"):
        mask = e // 8 if case.op.endswith("residual") and case.mode == "backward" else 0
        return _norm(case)[case.mode][0] * e * s + mask
    if case.op == "residual_add":
        return 3 * e * s
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case) * s
    if case.op == "dense":
        batch, depth, units = case.shape
        return (batch * depth + depth * units + batch * units) * s
    if case.op == "conv2d":
        batch, height, width, depth, filters = case.shape
        return (batch * height * width * (depth + filters) + 9 * depth * filters) * s
    if case.op == "digits":  # images in; of every parameter: value and momentum in and out
        return (e + 4 * (64 * 128 + 128 * 10 + 10 + 2 * 128)) * s
    return {"momentum": 5, "adam": 7}[case.op] * e * s


def regime_bytes(case: Case, on_chip: int) -> int:
    """Return the bytes to move where `on_chip` bytes of the inputs can be kept between two sweeps.

    Twice-read arrays that fit cost the minimum; of larger ones, the part that does not fit is read again.
    """
    if case.mode == "step" and case.op.startswith("batch_norm"):
        return sum(regime_bytes(case._replace(mode=mode), on_chip) for mode in ("forward", "backward"))
    least = minimum_bytes(case)
    if not case.op.startswith("batch_norm"):
        return least
    again = _norm(case)[case.mode][1] * elements(case) * itemsize(case)
    return least + max(0, again - on_chip) if again else least


def copy_function(total: int, on_gpu: bool) -> Callable[[], Any]:
    """Return a copy that reads and writes `total` bytes together."""
    xp = _cupy.cupy() if on_gpu else np
    source = xp.ones(max(total // 8, 1), dtype="float32")
    target = xp.empty_like(source)
    if on_gpu:
        return lambda: target.data.copy_from_device_async(source.data, source.nbytes)
    return lambda: np.copyto(target, source)
