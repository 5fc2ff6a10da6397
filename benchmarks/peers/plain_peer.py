"""The formulas as array expressions, as one would write them in NumPy or CuPy: the baseline without a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shapes import Case, axis_of
from benchmarks.truth import EPSILON, LIMITS

__all__ = ["capture", "prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    return ""


def version() -> str:
    return f"expressions in NumPy {np.__version__} or CuPy"


def to_numpy(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.get()


def capture(prepare: Callable[[], Any], copies: int, calls: int) -> Any:
    """Return the calls as one graph of CuPy, or why it refuses: products are such a reason."""
    from benchmarks import timing_gpu  # a worker has no CuPy

    return timing_gpu.capture([prepare() for _ in range(copies)], calls)


def modules(data: dict[str, Any], on_gpu: bool) -> tuple[Any, dict[str, Any]]:
    """Return the array module and the data in it; 16-bit arrays stay so."""
    if not on_gpu:
        return np, data
    import cupy

    return cupy, {name: cupy.asarray(value) for name, value in data.items()}


def _norm(case: Case, d: dict[str, Any], xp: Any) -> Any:
    axis = axis_of(case)
    x = d["x"]
    if case.groups > 1:  # row i belongs to sub-batch i mod groups
        x = x.reshape(x.shape[0] // case.groups, case.groups, *x.shape[1:])
        axis = (1, *(a + 1 for a in axis))
    reduced = tuple(a for a in range(x.ndim) if a not in axis)
    wide = np.float32 if x.dtype.itemsize == 2 else x.dtype
    along = [n if a in axis and not (case.groups > 1 and a == 1) else 1 for a, n in enumerate(x.shape)]
    gamma, beta, moving_mean, moving_variance = (
        d[n].reshape(along) for n in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    residual = d["residual"] if case.op.endswith("residual") else None

    def finish(y: Any) -> Any:
        if residual is not None:
            y = xp.maximum(y + residual, 0)
        return y.astype(x.dtype, copy=False).reshape(d["x"].shape)

    if case.mode == "inference":
        return lambda: {"y": finish((x - moving_mean) / xp.sqrt(moving_variance + EPSILON) * gamma + beta)}
    state = [moving_mean.copy(), moving_variance.copy()]

    def moments() -> tuple[Any, Any, Any, Any]:
        mean = x.mean(axis=reduced, keepdims=True, dtype=wide)
        variance = x.var(axis=reduced, keepdims=True, dtype=wide)
        r, shift = 1.0, 0.0
        if case.op == "batch_norm_renorm":
            old = d["renorm_stddev"].reshape(along)
            r = xp.clip(xp.sqrt(variance + EPSILON) / old, LIMITS["rmin"], LIMITS["rmax"])
            shift = xp.clip((mean - d["renorm_mean"].reshape(along)) / old, -LIMITS["dmax"], LIMITS["dmax"])
        return mean, variance, r, shift

    def forward(found: Any) -> dict[str, Any]:
        mean, variance, r, shift = found
        n = (x - mean) / xp.sqrt(variance + EPSILON)
        if case.op == "batch_norm_renorm":
            n = n * r + shift
        y = finish(n * gamma + beta)
        batch = [mean, variance]
        if case.groups > 1:
            batch = [value.mean(axis=1, keepdims=True) for value in batch]
        for k in range(2):
            state[k] = state[k] - (state[k] - batch[k]) * 0.01
        return {"y": y, "mean": batch[0].ravel(), "variance": batch[1].ravel()}

    if case.mode == "forward":
        return lambda: forward(moments())
    dy_all = d["dy"].reshape(x.shape)
    over = tuple(a for a, n in enumerate(along) if n == 1)

    def backward(found: Any, y: Any) -> dict[str, Any]:
        mean, variance, r, shift = found
        dy = dy_all * (y > 0) if residual is not None else dy_all
        inverse = 1 / xp.sqrt(variance + EPSILON)
        n = (x - mean) * inverse
        g = dy * gamma * r
        g_mean = g.mean(axis=reduced, keepdims=True)
        dx = (g - g_mean - n * (g * n).mean(axis=reduced, keepdims=True)) * inverse
        if case.op == "batch_norm_renorm":
            n = n * r + shift
        gradients = {
            "dx": dx.astype(x.dtype, copy=False).reshape(d["x"].shape),
            "dgamma": (dy * n).sum(axis=over).ravel(),
            "dbeta": dy.sum(axis=over, dtype=wide).ravel(),
        }
        return {**gradients, "dresidual": dy} if residual is not None else gradients

    def step() -> dict[str, Any]:
        found = moments()
        first = forward(found)
        return {**first, **backward(found, first["y"])}

    if case.mode == "step":
        return step
    found = moments()
    y = forward(found)["y"]
    return lambda: backward(found, y)


def _sigmoid(xp: Any, x: Any) -> Any:
    return 1 / (1 + xp.exp(-x))


def _recurrent(case: Case, d: dict[str, Any], xp: Any) -> Any:
    if case.mode == "backward":
        return "a gradient of a loop is no expression"
    w, r, b = d["kernel"], d["recurrent_kernel"], d["bias"]
    sequence = case.op.endswith("sequence")

    def lstm() -> dict[str, Any]:
        h, c, outputs = d["h"], d["c"], []
        for x in d["x"] if sequence else [d["x"]]:
            i, f, g, o = xp.split(x @ w + h @ r + b, 4, axis=1)
            c = _sigmoid(xp, f) * c + _sigmoid(xp, i) * xp.tanh(g)
            h = _sigmoid(xp, o) * xp.tanh(c)
            outputs.append(h + x)
        return {"output": xp.stack(outputs) if sequence else outputs[0], "h": h, "c": c}

    def gru() -> dict[str, Any]:
        h, outputs = d["h"], []
        for x in d["x"] if sequence else [d["x"]]:
            xz, xr, xn = xp.split(x @ w + b[0], 3, axis=1)
            hz, hr, hn = xp.split(h @ r + b[1], 3, axis=1)
            z = _sigmoid(xp, xz + hz)
            h = z * h + (1 - z) * xp.tanh(xn + _sigmoid(xp, xr + hr) * hn)
            outputs.append(h + x)
        return {"output": xp.stack(outputs) if sequence else outputs[0], "h": h}

    return lstm if case.op.startswith("lstm") else gru


def _optimizer(case: Case, d: dict[str, Any], xp: Any) -> Any:
    from benchmarks.data import split_parameters

    w, g = split_parameters(d["parameters"].copy()), split_parameters(d["gradients"])
    m, v = [xp.zeros_like(p) for p in w], [xp.zeros_like(p) for p in w]
    count = [0]

    def step() -> dict[str, Any]:
        count[0] += 1
        rate = 0.01 * (1 - 0.999 ** count[0]) ** 0.5 / (1 - 0.9 ** count[0])
        for k in range(len(w)):
            if case.op == "momentum":
                m[k] = 0.9 * m[k] + g[k]
                w[k] -= 0.01 * m[k]
            else:
                m[k] = 0.9 * m[k] + 0.1 * g[k]
                v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
                w[k] -= rate * m[k] / (xp.sqrt(v[k]) + 1e-7)
        return {"parameters": w}

    return step


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    xp, d = modules(data, on_gpu)
    if case.op.startswith("batch_norm"):
        return _norm(case, d, xp)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, d, xp)
    if case.op == "residual_add":
        return lambda: {"y": d["x"] + d["residual"]}
    if case.op == "dense":
        return lambda: {"y": d["x"] @ d["kernel"] + d["bias"]}
    if case.op in ("adam", "momentum"):
        return _optimizer(case, d, xp)
    return "no short expression for it"
