"""thinc: the dense product and Adam. It has no batch normalisation, and its LSTM begins from one state for all rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.data import split_parameters
from benchmarks.shapes import Case

__all__ = ["prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import thinc  # noqa: F401  (the question is whether it is there)

    return "measured on a CPU only" if on_gpu else ""


def version() -> str:
    import thinc

    return f"thinc {thinc.__version__}"


def to_numpy(value: Any) -> np.ndarray:
    return np.asarray(value)


def _adam(data: dict[str, Any], ops: Any) -> Any:
    weights, gradients = (split_parameters(data[name]) for name in ("parameters", "gradients"))
    slots = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    count = 0

    def step() -> dict[str, Any]:
        nonlocal count
        count += 1
        rate = 0.01 * math.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        for w, g, (m, v) in zip(weights, gradients, slots, strict=True):
            ops.adam(w, g, m, v, 0.9, 0.999, 1e-7, rate)
        return {"parameters": weights}

    return step


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    from thinc.api import NumpyOps

    if case.op not in ("dense", "adam") or case.dtype != "float32":
        return "thinc has no such operation"
    ops = NumpyOps()
    if case.op == "adam":
        return _adam(data, ops)
    weight = np.ascontiguousarray(data["kernel"].T)
    return lambda: {"y": ops.affine(data["x"], weight, data["bias"])}
