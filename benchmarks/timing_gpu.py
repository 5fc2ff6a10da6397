"""Timing on a GPU with cold caches: CUDA events, medians, variants interleaved, the host measured by itself.

Three ways, and two variants are compared only by one that both can be timed by:

* ``graph``: several copies of a row's arrays, together larger than the L2, are worked on in turn inside one captured
  graph, so that no launch gap is measured;
* ``flushed``: one call between two events, after a 256 MB buffer was written, several times where that is needed to
  keep the host ahead of the device; for what cannot be captured;
* ``clock``: one call after such a write, by the host's clock, from an idle device to a finished result; for what runs
  on streams of its own or in another process.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.peers import said
from benchmarks.timing_cpu import Quantiles, quantiles, time_once
from gpulayers import _cupy

__all__ = [
    "CALLS_PER_GRAPH", "Graph", "capture", "chosen_ways", "copies_needed", "flushes_needed", "host_seconds",
    "interleaved", "make_flush", "samples_flushed",
]  # fmt: skip

FLUSH_BYTES = 256 << 20
WARM_UP = 0.1  # seconds, of all variants of a row in turn: clocks rise by then
CALLS_PER_GRAPH = 64  # at least as many as sets of arrays, so that each has its turn
MOST_QUEUED = 256  # launches of ours; other libraries' come on top, and the driver blocks after a thousand or so
WAYS = ("graph", "flushed", "clock")  # the best first


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


def flushes_needed(host: float) -> int:
    """Return how many flushes keep the device busy while the host spends so many seconds: each takes 50 us or more.

    >>> flushes_needed(1e-6), flushes_needed(200e-6), flushes_needed(1.0)
    (1, 5, 40)
    """
    return max(1, min(40, round(host / 50e-6) + 1))


class Graph:
    """Captured calls, with the memory they work on, which nobody else has until `close`."""

    def __init__(self, graph: Any, pool: Any, *held: Any) -> None:
        self._graph, self._pool, self._held = graph, pool, held

    def launch(self) -> None:
        """Run all calls once, on the current stream."""
        self._graph.launch()

    def close(self) -> None:
        """Give the memory back. A pool that is merely dropped keeps the free blocks of its streams for ever."""
        self._graph, self._held = None, ()
        self._pool.free_all_blocks()


@functools.cache
def _side() -> tuple[Any, Any]:
    """Return the stream on which everything is captured, and the library's own cuBLAS on it.

    There is one for all rows, as the launcher's workspaces and that of cuBLAS are kept for each stream.
    """
    stream = _cupy.cupy().cuda.Stream(non_blocking=True)
    return stream, _cupy.StreamCublas(stream)


def capture(functions: Sequence[Callable[[], Any]], calls: int = CALLS_PER_GRAPH) -> Graph | str:
    """Return `calls` calls, round and round, as one graph; or why there is none.

    The results of as many calls are kept as there are functions: the next ones are written over the oldest, so that
    they have left the L2 as the inputs have, and the graph's memory stays a few times that of one call.
    """
    cuda = _cupy.cupy().cuda
    pool, held = cuda.MemoryPool(), deque(maxlen=len(functions))
    cuda.get_current_stream().synchronize()  # the arrays are there: the side stream waits for nothing by itself
    try:
        with cuda.using_allocator(pool.malloc):
            return Graph(_recorded(functions, calls, held), pool, held, list(functions))
    except Exception as error:  # refusals have many types; a row too large for so many sets is one
        refusal = said(error)
    held.clear()
    pool.free_all_blocks()
    return refusal


def _recorded(functions: Sequence[Callable[[], Any]], calls: int, held: deque[Any]) -> Any:
    """Return CuPy's graph of the calls, after one of each that compiles and allocates what it needs."""
    stream, cublas = _side()
    with _cupy.using(cublas), stream:
        cublas.may_create = True
        held.extend(function() for function in functions)
        stream.synchronize()
        cublas.may_create = False
        stream.begin_capture()
        try:
            for number in range(calls):
                held.append(functions[number % len(functions)]())
        except Exception:
            with contextlib.suppress(Exception):  # where the capture is invalid already there is nothing left to end
                stream.end_capture()
            raise
        return stream.end_capture()


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


def _sample_of_graph(graph: Any, flush: Callable[[], None]) -> list[float]:
    """Return one sample: the time of a call, averaged over a graph's."""
    flush()  # keeps the device busy while the host launches the graph, and makes its first call cold, too
    cuda = _cupy.cupy().cuda
    start, stop = cuda.Event(), cuda.Event()
    start.record()
    graph.launch()
    stop.record()
    stop.synchronize()
    return [_event_seconds(start, stop) / CALLS_PER_GRAPH]


def _sample_by_clock(function: Callable[[], Any], flush: Callable[[], None], finish: Any) -> list[float]:
    """Return one sample from an idle device to a finished result, by the clock of the process that computes it."""
    flush()
    _wait()
    return [time_once(function, 1, finish)]


def _wait(result: Any = None) -> None:
    _cupy.cupy().cuda.Device().synchronize()


def host_seconds(function: Callable[[], Any], seconds: float = 0.1, launches: int = 1) -> Quantiles:
    """Return what the host spends on a call, without waiting for the device inside a batch of calls.

    A batch is at most 50 calls, and of functions with many `launches` fewer than the driver queues before it blocks;
    the device is drained between batches.
    """
    calls = max(1, min(50, MOST_QUEUED // max(1, launches)))
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        _wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        found.append((time.perf_counter() - start) / calls)
    _wait()
    return quantiles(found)


def _warm_up(calls: Sequence[Callable[[], Any]]) -> None:
    end = time.perf_counter() + WARM_UP
    while True:
        for call in calls:
            call()
        _wait()
        if time.perf_counter() > end:
            return


def chosen_ways(able: Mapping[str, Sequence[str]], yardstick: str) -> dict[str, list[str]]:
    """Return the ways in which each variant is timed; `able` has those that are possible.

    Each is timed by the best way that the yardstick can be timed by as well; the yardstick by its own best way first,
    and by every way in which another is timed, so that there is a time of the same kind beside each.

    >>> chosen_ways({"ours": ["graph", "flushed", "clock"], "a": ["flushed", "clock"], "b": ["clock"]}, "ours")
    {'ours': ['graph', 'flushed', 'clock'], 'a': ['flushed'], 'b': ['clock']}
    >>> chosen_ways({"ours": ["flushed", "clock"], "a": ["graph", "flushed", "clock"]}, "ours")
    {'ours': ['flushed'], 'a': ['flushed']}
    """
    best = {name: next(way for way in WAYS if way in ways and way in able[yardstick]) for name, ways in able.items()}
    found = {name: [way] for name, way in best.items()}
    found[yardstick] = [way for way in WAYS if way in best.values()]
    return found


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    graphs: Mapping[str, Any],
    clocked: Mapping[str, Callable[[Any], None] | None],
    seconds: float = 0.3,
    least: int = 10,
    yardstick: str = "gpulayers",
) -> dict[str, dict[str, Quantiles]]:
    """Time every function in turn; return its quantiles by the way they were measured, the best way first.

    `graphs` holds those that were captured (see `capture`). `clocked` names what runs on streams of its own or
    elsewhere, with the function that waits for its results. `chosen_ways` says what is timed how.
    """
    flush = make_flush()
    able = {name: WAYS[2:] if name in clocked else WAYS if name in graphs else WAYS[1:] for name in functions}
    turns = [(name, way) for name, ways in chosen_ways(able, yardstick).items() for way in ways]
    calls = [functools.partial(time_once, function, 1, clocked.get(name)) for name, function in functions.items()]
    _warm_up([*calls, *(graphs[name].launch for name, way in turns if way == "graph")])
    samplers: dict[tuple[str, str], Callable[[], list[float]]] = {}
    for name, way in turns:
        function = functions[name]
        if way == "graph":
            samplers[name, way] = functools.partial(_sample_of_graph, graphs[name], flush)
        elif way == "clock":
            finish = clocked.get(name, _wait)
            samplers[name, way] = functools.partial(_sample_by_clock, function, flush, finish)
        else:
            flushes = flushes_needed(host_seconds(function, 0.02, MOST_QUEUED // 5).p50)
            samplers[name, way] = functools.partial(samples_flushed, function, flush, flushes, 5)
    samples: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    shuffle, rounds, end = random.Random(0).shuffle, 0, time.perf_counter() + seconds * len(turns)
    while rounds < least or time.perf_counter() < end:
        shuffle(turns)
        rounds += 1
        for turn in turns:
            samples[turn] += samplers[turn]()
    found: dict[str, dict[str, Quantiles]] = {name: {} for name in functions}
    for (name, way), values in samples.items():
        found[name][way] = quantiles(values)
    return found
