"""Moving statistics of batch normalisation: what is averaged, how, and the NumPy arithmetic of one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["MovingStatistics", "Renorm", "corrections", "update", "update_mean", "update_variance"]


class Renorm(NamedTuple):
    """The old renorm statistics, C values each, and the clips (numbers, 0-d arrays, or None for no clip)."""

    mean: Any
    stddev: Any
    rmin: Any = None
    rmax: Any = None
    dmax: Any = None


class MovingStatistics(NamedTuple):
    """Arrays that a training step updates in place, C values each, contiguous, and how.

    Every update is ``v <- v - (v - value) * decay``. `mean` takes the batch mean; `variance` the biased batch
    variance, or with `unbiased` that times ``N / max(N - 1, 1)``. With renorm, `renorm_mean` and `renorm_stddev` take
    the batch mean and ``s = sqrt(variance + epsilon)`` with `renorm_decay`, `stddev` takes s with `decay`, and
    `variance` becomes ``max(stddev**2 - epsilon, 0)``. With `skip_nonfinite`, a channel whose batch mean or variance
    is not finite keeps its statistics, and `skipped` (one int64, or None) grows by the number of such
    channels.
    """

    mean: Any
    variance: Any
    decay: float
    stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None
    renorm_decay: float = 0.0
    unbiased: bool = False
    skip_nonfinite: bool = False
    skipped: Any = None


def corrections(xp: Any, mean: Any, variance: Any, epsilon: float, renorm: Renorm) -> tuple[Any, Any]:
    """Return renorm's r and d, clipped, from batch moments that are already averaged over sub-batches; shape (C,).

    ``r = sqrt(variance + epsilon) / q``, ``d = (mean - renorm.mean) / q``, ``q = max(renorm.stddev, sqrt(epsilon))``;
    arXiv 1702.03275, algorithm 1, with the reference's floor for q and its lower clip.
    """
    q = xp.maximum(renorm.stddev.reshape(-1), epsilon**0.5)
    r = xp.sqrt(variance + epsilon) / q
    d = (mean - renorm.mean.reshape(-1)) / q
    if renorm.rmin is not None:
        r = xp.maximum(r, renorm.rmin)
    if renorm.rmax is not None:
        r = xp.minimum(r, renorm.rmax)
    if renorm.dmax is not None:
        d = xp.minimum(xp.maximum(d, -renorm.dmax), renorm.dmax)
    return r, d


def _step(xp: Any, variable: Any, value: Any, decay: float, keep: Any) -> None:
    flat = variable if variable.ndim == 1 else variable.reshape(-1)  # a view: the caller's arrays are contiguous
    change = flat - value
    change *= decay
    if keep is not None:
        change = xp.where(keep, 0, change)
    flat -= change if change.dtype == flat.dtype else change.astype(flat.dtype)


def _kept(moving: MovingStatistics, mean: Any, variance: Any, xp: Any) -> Any:
    """Return which channels keep their statistics, or None for none."""
    return ~(xp.isfinite(mean) & xp.isfinite(variance)) if moving.skip_nonfinite else None


def update_mean(moving: MovingStatistics, mean: Any, variance: Any, epsilon: float, count: int, xp: Any = np) -> None:
    """Take the mean's half of a step: renorm's mean where there is one, then the moving mean; counts skipped
    channels.
    """
    keep = _kept(moving, mean, variance, xp)
    if keep is not None and moving.skipped is not None:
        moving.skipped[...] += keep.sum().astype(moving.skipped.dtype)
    if moving.renorm_mean is not None:
        _step(xp, moving.renorm_mean, mean, moving.renorm_decay, keep)
    _step(xp, moving.mean, mean, moving.decay, keep)


def update_variance(
    moving: MovingStatistics, mean: Any, variance: Any, epsilon: float, count: int, xp: Any = np
) -> None:
    """Take the variance's half of a step: with renorm its stddev, the moving stddev, and the variance they imply."""
    keep = _kept(moving, mean, variance, xp)
    if moving.stddev is None:
        if moving.unbiased:
            variance = variance * (count / max(count - 1, 1))
        _step(xp, moving.variance, variance, moving.decay, keep)
        return
    s = xp.sqrt(variance + epsilon)
    _step(xp, moving.renorm_stddev, s, moving.renorm_decay, keep)
    _step(xp, moving.stddev, s, moving.decay, keep)
    stddev, moving_variance = moving.stddev.reshape(-1), moving.variance.reshape(-1)
    derived = xp.maximum(stddev * stddev - epsilon, 0)
    moving_variance[...] = derived if keep is None else xp.where(keep, moving_variance, derived)


def update(moving: MovingStatistics, mean: Any, variance: Any, epsilon: float, count: int, xp: Any = np) -> None:
    """Take one step of `moving` with moments averaged over sub-batches, shape (C,)."""
    update_mean(moving, mean, variance, epsilon, count, xp)
    update_variance(moving, mean, variance, epsilon, count, xp)
