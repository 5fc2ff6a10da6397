"""What is measured of a row on a GPU: captured graphs of every variant that can be one, launches, and times."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import data as case_data
from benchmarks import own, timing_gpu
from benchmarks.bytes_moved import copy_function, minimum_bytes
from benchmarks.peers import said
from benchmarks.shapes import Case
from benchmarks.timing_cpu import Quantiles
from benchmarks.timing_gpu import CALLS_PER_GRAPH, capture
from gpulayers import _cupy
from gpulayers.device import kind_of
from gpulayers.launch import launcher

__all__ = ["capturers", "launches", "timed"]

Function = Callable[[], Any]


class _Counting:
    """A launcher that counts the launches of another."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.count = inner, 0

    def prepare(self, *args: Any) -> Any:
        launch = self._inner.prepare(*args)

        def counted(*args: Any) -> None:
            self.count += 1
            launch(*args)

        return counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def launches(function: Function, like: Any) -> int:
    """Return how many kernels of ours one call launches."""
    inner, kind = launcher.launcher_of(like), kind_of(like)
    counting = _Counting(inner)
    launcher.register_launcher(kind, counting)
    try:
        function()
    finally:
        launcher.register_launcher(kind, inner)
    return counting.count


def capturers(case: Case, host: dict[str, Any], function: Function, modules: dict[str, Any]) -> dict[str, Any]:
    """Return for what may be captured the function that does so, given the number of sets of arrays to work on."""
    cupy = _cupy.cupy()

    def ours(copies: int) -> Any:
        sets = [case_data.place(case, host, cupy) for _ in range(copies - 1)]
        return capture([function, *(own.prepare(case, given, cupy) for given in sets)])

    def copy(copies: int) -> Any:
        return capture([copy_function(minimum_bytes(case), True) for _ in range(copies)])

    def theirs(module: Any, copies: int) -> Any:
        prepare = lambda: module.prepare(case, case_data.place(case, host, np), True)
        return module.capture(prepare, copies, CALLS_PER_GRAPH)

    able = {name: module for name, module in modules.items() if hasattr(module, "capture")}
    return {"gpulayers": ours, "copy": copy, **{name: functools.partial(theirs, m) for name, m in able.items()}}


def timed(
    functions: dict[str, Any], capturers: dict[str, Any], modules: dict[str, Any], sizes: tuple[int, int],
    seconds: float, least: int,
) -> tuple[dict[str, dict[str, Quantiles]], dict[str, str]]:  # fmt: skip
    """Return the quantiles of every variant by the way they were measured, and why some could not be captured.

    `capturers` has, for each variant that may be captured, the function that does so, of the number of sets of arrays;
    `sizes` the bytes of a row's arrays, and those that it must move.
    """
    l2_bytes = _cupy.cupy().cuda.Device().attributes["L2CacheSize"]
    copies = timing_gpu.copies_needed(sizes[0], l2_bytes)
    clocked = {name: getattr(m, "finish", None) for name, m in modules.items() if getattr(m, "OWN_STREAMS", False)}
    graphs, refusals = {}, {}
    with contextlib.ExitStack() as stack:
        for name, captured in capturers.items():
            try:
                graph = captured(copies)
            except Exception as error:  # what cannot be prepared so often, or on another stream, is timed by calls
                graph = said(error)
            if isinstance(graph, str):
                refusals[name] = graph
            else:
                graphs[name] = graph
                stack.callback(graph.close)
        ways = timing_gpu.interleaved(functions, graphs, clocked, seconds, least)
    if not timing_gpu.is_cold(min(sizes), l2_bytes, copies):
        warm = {"graph": "graph, L2 warm"}
        ways = {name: {warm.get(way, way): times for way, times in found.items()} for name, found in ways.items()}
    return ways, refusals
