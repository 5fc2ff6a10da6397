"""The arrays of a row, the same for every variant: drawn from the row's name, so that processes agree."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import numpy as np

from benchmarks.shapes import Case, axis_of

__all__ = ["PARAMETERS", "make", "place", "split_parameters"]


DRAWN = (1 << 22) + 1  # larger arrays repeat what was drawn; odd, so that every channel sees other values


def _random(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0, mean: float = 0.0
) -> np.ndarray:
    size = math.prod(shape)
    drawn = rng.standard_normal(min(size, DRAWN), dtype=np.float32)
    if scale != 1.0:
        drawn *= np.float32(scale)
    if mean:
        drawn += np.float32(mean)
    drawn = drawn.astype(dtype, copy=False)
    return np.resize(drawn, shape) if size > DRAWN else drawn.reshape(shape)


def _norm(case: Case, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    channels = int(np.prod([case.shape[a] for a in axis_of(case)]))
    wide = np.float32 if dtype.itemsize == 2 else dtype
    found = {"x": _random(rng, case.shape, dtype, mean=0.5)}
    for name in ("gamma", "moving_variance", "renorm_stddev"):
        found[name] = (1 + 0.5 * rng.random(channels)).astype(wide)
    for name in ("beta", "moving_mean", "renorm_mean"):
        found[name] = _random(rng, (channels,), wide, 0.5)
    if case.mode in ("backward", "step"):
        found["dy"] = _random(rng, case.shape, dtype)
    if case.op.endswith("residual"):
        found["residual"] = _random(rng, case.shape, dtype)
    return found


def _recurrent(case: Case, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    *times, batch, depth, units = case.shape
    gates = 4 if case.op.startswith("lstm") else 3
    found = {
        "x": _random(rng, (*times, batch, depth), dtype),
        "h": _random(rng, (batch, units), dtype, 0.3),
        "kernel": _random(rng, (depth, gates * units), dtype, depth**-0.5),
        "recurrent_kernel": _random(rng, (units, gates * units), dtype, 0.5 * units**-0.5),
        "bias": _random(rng, (4 * units,) if gates == 4 else (2, 3 * units), dtype, 0.1),
    }
    if gates == 4:
        found["c"] = _random(rng, (batch, units), dtype, 0.3)
    if case.mode == "backward":
        found["dy"] = _random(rng, (*times, batch, units), dtype)
    return found


def _digits(case: Case, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    from gpulayers.data import load_digits

    digits = load_digits()
    rows = case.shape[0]
    return {
        "x": (digits.train_images[:rows].reshape(rows, 64) / 16).astype(dtype),
        "labels": digits.train_labels[:rows].astype(np.int64),
        "kernel_1": _random(rng, (64, 128), dtype, 0.125),
        "gamma": np.ones(128, dtype),
        "beta": np.zeros(128, dtype),
        "kernel_2": _random(rng, (128, 10), dtype, 128**-0.5),
        "bias_2": np.zeros(10, dtype),
    }


PARAMETERS = [9408, 64, 64] + [4096, 64, 64, 36864, 64, 64, 16384, 256, 256] * 17


def split_parameters(flat: np.ndarray) -> list[np.ndarray]:
    """Cut a flat array into 161 pieces, of sizes found in residual networks; five equal ones hold what is left."""
    ends = [min(end, flat.size) for end in itertools.accumulate(PARAMETERS)]
    rest = flat.size - ends[-1]
    ends += [ends[-1] + rest * k // 5 for k in range(1, 6)]
    return [flat[start:end] for start, end in itertools.pairwise([0, *ends]) if end > start]


def place(case: Case, host: dict[str, np.ndarray], xp: Any) -> dict[str, Any]:
    """Return copies of a row's arrays as arrays of `xp`, where the row wants them in memory."""

    def copied(value: np.ndarray) -> Any:
        if case.regime != "unaligned":
            return xp.array(value)
        whole = xp.empty(value.size + 1, dtype=value.dtype)
        whole[1:] = xp.asarray(value.ravel())
        return whole[1:].reshape(value.shape)

    return {name: copied(value) for name, value in host.items()}


def make(case: Case) -> dict[str, Any]:
    """Return the arrays of a row by name, on the host."""
    rng = np.random.default_rng(zlib.crc32(repr(case[:5]).encode()))
    if case.dtype == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(case.dtype)
    if case.op.startswith("batch_norm"):
        return _norm(case, rng, dtype)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, rng, dtype)
    if case.op == "residual_add":
        return {"x": _random(rng, case.shape, dtype), "residual": _random(rng, case.shape, dtype)}
    if case.op == "dense":
        batch, depth, units = case.shape
        return {
            "x": _random(rng, (batch, depth), dtype),
            "kernel": _random(rng, (depth, units), dtype, depth**-0.5),
            "bias": _random(rng, (units,), dtype),
        }
    if case.op == "conv2d":
        *image, depth, filters = case.shape
        kernel = _random(rng, (3, 3, depth, filters), dtype, (9 * depth) ** -0.5)
        return {"x": _random(rng, (*image, depth), dtype), "kernel": kernel}
    if case.op == "digits":
        return _digits(case, rng, dtype)
    return {"parameters": _random(rng, case.shape, dtype), "gradients": _random(rng, case.shape, dtype)}
