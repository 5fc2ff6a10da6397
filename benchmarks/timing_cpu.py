"""Timing on the host: variants interleaved, medians; a sample repeats a short function until it takes long enough."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Quantiles", "interleaved", "quantiles", "thread_count", "time_once"]

SHORTEST_SAMPLE = 200e-6  # seconds: a thousand times what the clock resolves


class Quantiles(NamedTuple):
    """Seconds: the 20th, 50th and 80th percentile, and how many samples there were."""

    p20: float
    p50: float
    p80: float
    samples: int


def quantiles(samples: list[float]) -> Quantiles:
    """Return the quantiles of at least one sample.

    >>> quantiles([3.0, 1.0, 2.0])
    Quantiles(p20=1.0, p50=2.0, p80=3.0, samples=3)
    """
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Quantiles(
        ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)], len(ordered)
    )


def thread_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def time_once(function: Callable[[], Any], repeats: int, finish: Callable[[Any], None] | None) -> float:
    """Return the seconds of one call, averaged over `repeats` calls in a row.

    A function in another process has a method `seconds`, which does the same there.
    """
    if hasattr(function, "seconds"):
        return function.seconds(repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    if finish is not None:
        finish(result)
    return (time.perf_counter() - start) / repeats


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    finish: Mapping[str, Callable[[Any], None]],
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
) -> dict[str, Quantiles]:
    """Time every function in turn, in a new order each round, until `seconds` for each are spent on the average.

    `finish` waits for the result of those that return before they are done. At least `least` rounds, at most `most`.
    """
    repeats = {}
    for name, function in functions.items():
        time_once(function, 1, finish.get(name))  # whatever the first call makes
        once = time_once(function, 1, finish.get(name))
        repeats[name] = max(1, min(1000, round(SHORTEST_SAMPLE / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(functions)
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            samples[name].append(time_once(functions[name], repeats[name], finish.get(name)))
    return {name: quantiles(found) for name, found in samples.items()}
