"""thinc: it has no batch normalisation, and its LSTM takes packed sequences; what is left is the dense product."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    from thinc.api import NumpyOps

    if case.op != "dense" or case.dtype != "float32":
        return "thinc has no such operation"
    ops = NumpyOps()
    weight = np.ascontiguousarray(data["kernel"].T)
    return lambda: {"y": ops.affine(data["x"], weight, data["bias"])}
