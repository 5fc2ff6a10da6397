"""Timing on a GPU with cold caches: CUDA events, medians, variants interleaved, the host measured by itself.

Two ways to a cold L2. `rotating`: several copies of a row's arrays, together larger than the L2, are worked on in turn
inside one captured graph, so that no launch gap is measured; for what can be captured. `flushed`: a 256 MB buffer is
written before every call, several times where that is needed to keep the host ahead of the device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.timing_cpu import Quantiles, quantiles
from gpulayers import _cupy

__all__ = ["capture", "copies_needed", "host_seconds", "interleaved", "make_flush", "samples_flushed"]

FLUSH_BYTES = 256 << 20
WARM_UP = 0.2  # seconds: clocks rise by then
CALLS_PER_GRAPH = 64  # at least as many as sets of arrays, so that each has its turn


def copies_needed(row_bytes: int, l2_bytes: int, most: int = CALLS_PER_GRAPH) -> int:
    """Return how many sets of arrays rotate so that a set has left the L2 when its turn comes again; `most` at most.

    >>> copies_needed(10 << 20, 50 << 20), copies_needed(400 << 20, 50 << 20), copies_needed(1 << 10, 50 << 20)
    (11, 2, 64)
    """
    return max(2, min(most, -(-2 * l2_bytes // max(row_bytes, 1)) + 1))


def is_cold(row_bytes: int, l2_bytes: int, copies: int) -> bool:
    """Say whether so many sets are larger than the L2: those of the smallest rows stay in it, and are reported so.

    >>> is_cold(10 << 20, 50 << 20, 11), is_cold(1 << 10, 50 << 20, 64)
    (True, False)
    """
    return (copies - 1) * row_bytes > l2_bytes


def make_flush() -> Callable[[], None]:
    """Return a function that writes 256 MB on the current stream."""
    cupy = _cupy.cupy()
    buffer = cupy.empty(FLUSH_BYTES, dtype="uint8")
    return lambda: buffer.data.memset_async(0, FLUSH_BYTES)


def capture(functions: Sequence[Callable[[], Any]]) -> Callable[[], Any] | None:
    """Return a function that launches CALLS_PER_GRAPH calls, round and round, as one graph; None if CuPy refuses."""
    cuda = _cupy.cupy().cuda
    stream, pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
    with cuda.using_allocator(pool.malloc), stream:
        for function in functions:
            function()
        stream.synchronize()
        held = []
        stream.begin_capture()
        try:
            for number in range(CALLS_PER_GRAPH):
                held.append(functions[number % len(functions)]())
            graph = stream.end_capture()
        except Exception:
            try:
                stream.end_capture()
            except Exception:  # the capture is invalid already: there is nothing left to end
                pass
            return None
    keep = (graph, pool, held, list(functions))  # a graph reads and writes memory that nobody else holds for it
    return lambda: keep[0].launch()


def _event_seconds(start: Any, end: Any) -> float:
    return float(_cupy.cupy().cuda.get_elapsed_time(start, end)) / 1e3


def samples_flushed(function: Callable[[], Any], flush: Callable[[], None], flushes: int, count: int) -> list[float]:
    """Return `count` samples of one call each, between two events, after `flushes` writes of 256 MB."""
    cuda = _cupy.cupy().cuda
    pairs = []
    for _ in range(count):
        for _ in range(flushes):
            flush()
        start, end = cuda.Event(), cuda.Event()
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    pairs[-1][1].synchronize()
    return [_event_seconds(start, end) for start, end in pairs]


def host_seconds(function: Callable[[], Any], seconds: float = 0.1) -> Quantiles:
    """Return what the host spends on a call, without waiting for the device inside a batch of calls.

    A batch is at most 50 calls, fewer than the driver queues before it blocks; the device is drained between batches.
    """
    cupy = _cupy.cupy()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(50):
            function()
        found.append((time.perf_counter() - start) / 50)
    cupy.cuda.Device().synchronize()
    return quantiles(found)


def _warm_up(function: Callable[[], Any]) -> None:
    cupy, end = _cupy.cupy(), time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        function()
        cupy.cuda.Device().synchronize()


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rotations: Mapping[str, Sequence[Callable[[], Any]]],
    finish: Mapping[str, Callable[[Any], None]],
    seconds: float = 0.3,
    least: int = 10,
) -> tuple[dict[str, Quantiles], dict[str, str]]:
    """Time every function in turn; return the quantiles and how each was measured.

    `rotations` holds, for those that may be captured, the same function on several sets of arrays. `finish` marks what
    runs on streams of its own (JAX): it is timed by the clock, from an idle device to a finished result.
    """
    cuda, flush = _cupy.cupy().cuda, make_flush()
    graphs = {name: graph for name, sets in rotations.items() if (graph := capture(sets)) is not None}
    methods, flushes = {}, {}
    for name, function in functions.items():
        _warm_up(function)
        host = host_seconds(function, 0.02).p50
        flushes[name] = max(1, min(40, round(host / 50e-6) + 1))  # a flush keeps the device busy for 50 us or more
        methods[name] = "graph" if name in graphs else "clock" if name in finish else "flushed"
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds * len(functions), 0
    while rounds < least or time.perf_counter() < end:
        shuffle(order)
        rounds += 1
        for name in order:
            if methods[name] == "graph":
                start, stop = cuda.Event(), cuda.Event()
                flush()  # keeps the device busy while the host launches the graph, and makes its first call cold, too
                start.record()
                graphs[name]()
                stop.record()
                stop.synchronize()
                samples[name].append(_event_seconds(start, stop) / CALLS_PER_GRAPH)
            elif methods[name] == "clock":
                flush()
                cuda.Device().synchronize()
                begin = time.perf_counter()
                finish[name](functions[name]())
                samples[name].append(time.perf_counter() - begin)
            else:
                samples[name] += samples_flushed(functions[name], flush, flushes[name], 5)
    return {name: quantiles(found) for name, found in samples.items()}, methods
