"""Batch normalisation in float64, written from the formulas: plain loops over sub-batches, no pivots, no blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def reduced_axes(x: np.ndarray, axis: tuple[int, ...]) -> tuple[int, ...]:
    kept = {a % x.ndim for a in axis}
    return tuple(a for a in range(x.ndim) if a not in kept)


def along(values: Any, x: np.ndarray, axis: tuple[int, ...]) -> Any:
    """Shape per-channel values to broadcast against x."""
    if np.ndim(values) == 0:
        return values
    kept = {a % x.ndim for a in axis}
    return values.reshape([x.shape[a] if a in kept else 1 for a in range(x.ndim)])


def normalised(x: np.ndarray, mean: Any, variance: Any, axis: tuple[int, ...], epsilon: float) -> np.ndarray:
    return (x - along(mean, x, axis)) / np.sqrt(along(variance, x, axis) + epsilon)


def finish(value: np.ndarray, residual: Any, relu: bool) -> np.ndarray:
    value = value if residual is None else value + residual
    return np.maximum(value, 0) if relu else value


def _moments(x: np.ndarray, axis: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    reduced = reduced_axes(x, axis)
    mean = x.mean(axis=reduced, keepdims=True)
    return mean.ravel(), ((x - mean) ** 2).mean(axis=reduced).ravel()


def forward(x, gamma, beta, axis, epsilon, groups=1, r=1.0, d=0.0, residual=None, relu=False) -> SimpleNamespace:
    y = np.empty_like(x)
    means, variances = [], []
    for group in range(groups):
        part = x[group::groups] if groups > 1 else x
        mean, variance = _moments(part, axis)
        n = normalised(part, mean, variance, axis, epsilon) * along(r, part, axis) + along(d, part, axis)
        value = n * along(gamma, part, axis) + along(beta, part, axis)
        if groups > 1:
            y[group::groups] = value
        else:
            y = value
        means.append(mean)
        variances.append(variance)
    return SimpleNamespace(
        y=finish(y, residual, relu), mean=np.mean(means, axis=0), variance=np.mean(variances, axis=0)
    )


def backward(dy, x, gamma, axis, epsilon, groups=1, r=1.0, d=0.0, mask=None) -> SimpleNamespace:
    g_all = dy if mask is None else dy * mask
    dx = np.empty_like(x)
    dgamma, dbeta = 0.0, 0.0
    for group in range(groups):
        rows = slice(group, None, groups) if groups > 1 else slice(None)
        part, g = x[rows], g_all[rows]
        reduced = reduced_axes(part, axis)
        mean, variance = _moments(part, axis)
        n = normalised(part, mean, variance, axis, epsilon)
        scaled = g * along(gamma * r, part, axis)
        centred = scaled - scaled.mean(axis=reduced, keepdims=True) - n * (scaled * n).mean(axis=reduced, keepdims=True)
        dx[rows] = centred / np.sqrt(along(variance, part, axis) + epsilon)
        dgamma = dgamma + (g * (n * along(r, part, axis) + along(d, part, axis))).sum(axis=reduced).ravel()
        dbeta = dbeta + g.sum(axis=reduced).ravel()
    return SimpleNamespace(dx=dx, dgamma=dgamma, dbeta=dbeta)


def renorm(x, axis, epsilon, groups, old, clips, decay, renorm_decay) -> tuple[Any, Any, dict[str, Any]]:
    """Return r, d and the statistics after the step."""
    parts = [_moments(x[g::groups] if groups > 1 else x, axis) for g in range(groups)]
    mean, variance = (np.mean([p[i] for p in parts], axis=0) for i in (0, 1))
    s = np.sqrt(variance + epsilon)
    q = np.maximum(old["renorm_stddev"], np.sqrt(epsilon))
    rmin, rmax, dmax = (
        default if clip is None else float(clip) for clip, default in zip(clips, (0, np.inf, np.inf), strict=True)
    )
    r, d = np.clip(s / q, rmin, rmax), np.clip((mean - old["renorm_mean"]) / q, -dmax, dmax)
    stddev = old["stddev"] - (old["stddev"] - s) * decay
    after = {
        "renorm_mean": old["renorm_mean"] - (old["renorm_mean"] - mean) * renorm_decay,
        "renorm_stddev": old["renorm_stddev"] - (old["renorm_stddev"] - s) * renorm_decay,
        "mean": old["mean"] - (old["mean"] - mean) * decay,
        "stddev": stddev,
        "variance": np.maximum(stddev**2 - epsilon, 0),
    }
    return r, d, after
