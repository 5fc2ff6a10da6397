"""Batch normalisation the way Chainer composed it: reductions, then one fused elementwise pass, written here anew.

Forward: mean, variance, one pass for y, one small update of the moving statistics. Backward: the normalised values as
an array, two reductions, one pass for dx. On a GPU the passes are CuPy elementwise kernels, on the host NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.peers.plain_peer import capture, modules, to_numpy, unavailable
from benchmarks.shapes import Case, axis_of
from benchmarks.truth import EPSILON

__all__ = ["capture", "prepare", "to_numpy", "unavailable", "version"]


def version() -> str:
    return "written here on CuPy's elementwise kernels, on NumPy without a GPU"


def _apply_host(x: Any, mean: Any, inverse: Any, gamma: Any, beta: Any) -> Any:
    y = np.subtract(x, mean)
    np.multiply(y, inverse * gamma, out=y)
    return np.add(y, beta, out=y)


def _gradient_host(dy: Any, x_hat: Any, gamma: Any, inverse: Any, dbeta: Any, dgamma: Any, count: int) -> Any:
    dx = np.multiply(x_hat, -dgamma / count)
    np.add(dx, dy, out=dx)
    np.subtract(dx, dbeta / count, out=dx)
    return np.multiply(dx, gamma * inverse, out=dx)


def _device_passes() -> tuple[Any, Any]:
    import cupy

    apply = cupy.ElementwiseKernel(
        "T x, U mean, U inverse, U gamma, U beta", "T y", "y = (T)(((U)x - mean) * inverse * gamma + beta)", "cs_apply"
    )
    gradient = cupy.ElementwiseKernel(
        "T dy, U x_hat, U gamma, U inverse, U dbeta, U dgamma, U count", "T dx",
        "dx = (T)(gamma * inverse * ((U)dy - (dbeta + x_hat * dgamma) / count))", "cs_gradient",
    )  # fmt: skip
    return apply, gradient


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    if case.op not in ("batch_norm", "batch_norm_axes") or case.groups > 1:
        return "Chainer's plain batch normalisation only"
    xp, d = modules(data, on_gpu)
    x, axis = d["x"], axis_of(case)
    apply, gradient = _device_passes() if on_gpu else (_apply_host, _gradient_host)
    reduced = tuple(a for a in range(x.ndim) if a not in axis)
    wide = np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype
    along = [n if a in axis else 1 for a, n in enumerate(x.shape)]
    gamma, beta = d["gamma"].reshape(along), d["beta"].reshape(along)
    count = int(np.prod([x.shape[a] for a in reduced]))
    if case.mode == "inference":
        moving_mean, moving_variance = d["moving_mean"].reshape(along), d["moving_variance"].reshape(along)
        return lambda: {
            "y": apply(x, moving_mean, 1 / xp.sqrt(moving_variance + EPSILON), gamma, beta).astype(x.dtype, copy=False)
        }
    state = {name: d[name].copy() for name in ("moving_mean", "moving_variance")}

    def moments() -> tuple[Any, Any, Any]:
        mean = x.mean(axis=reduced, keepdims=True, dtype=wide)
        variance = x.var(axis=reduced, keepdims=True, dtype=wide)
        return mean, variance, 1 / xp.sqrt(variance + wide.type(EPSILON))

    def forward(mean: Any, variance: Any, inverse: Any) -> dict[str, Any]:
        y = apply(x, mean, inverse, gamma, beta).astype(x.dtype, copy=False)
        for name, value in (("moving_mean", mean), ("moving_variance", variance)):
            state[name] *= 0.99
            state[name] += 0.01 * value.ravel()
        return {"y": y, "mean": mean.ravel(), "variance": variance.ravel()}

    if case.mode == "forward":
        return lambda: forward(*moments())
    dy = d["dy"]

    def backward(mean: Any, variance: Any, inverse: Any) -> dict[str, Any]:
        x_hat = (x - mean) * inverse
        dbeta = dy.sum(axis=reduced, keepdims=True, dtype=wide)
        dgamma = (dy * x_hat).sum(axis=reduced, keepdims=True, dtype=wide)
        dx = gradient(dy, x_hat, gamma, inverse, dbeta, dgamma, wide.type(count) if on_gpu else count)
        return {"dx": dx.astype(x.dtype, copy=False), "dgamma": dgamma.ravel(), "dbeta": dbeta.ravel()}

    def step() -> dict[str, Any]:
        found = moments()
        return {**forward(*found), **backward(*found)}

    return step if case.mode == "step" else functools.partial(backward, *moments())
