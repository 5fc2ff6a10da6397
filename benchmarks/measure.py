"""One row: prepare every variant, check it against float64, time all of them beside a copy of the same bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gpulayers as gl
from benchmarks import data as case_data
from benchmarks import own, timing_cpu
from benchmarks.bytes_moved import copy_function, minimum_bytes, regime_bytes
from benchmarks.peers import Peer, said
from benchmarks.shapes import Case
from benchmarks.truth import truth
from gpulayers import _cupy
from gpulayers.device import array_module

__all__ = ["PEER_TOLERANCE", "TOLERANCE", "Row", "Variant", "error_of", "errors_of", "measure"]

TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 8e-2}
PEER_TOLERANCE = 0.01
"""Norm of a peer's error that is no mistake (five times ours where that is more): the few elements whose ReLU decides
otherwise, because their sum is zero but for rounding, are worth a thousandth in the sums of a channel."""


class Variant(NamedTuple):
    """What was measured of one variant of a row. Times in seconds; a `reason` and no times if it was skipped.

    `method` says how `times` were taken (on a GPU, see `benchmarks.timing_gpu`), and `uncaptured` why it is no graph.
    `ways` has the times by method, where there are several: of ours, those by the method of every peer.
    """

    times: timing_cpu.Quantiles | None
    error: float | None = None
    reason: str = ""
    method: str = ""
    uncaptured: str = ""
    ways: dict[str, timing_cpu.Quantiles] = {}  # noqa: RUF012  (a default that nobody changes)

    def by(self, method: str) -> timing_cpu.Quantiles | None:
        """Return the times that were taken by this method."""
        return self.ways.get(method, self.times if method == self.method else None)


class Row(NamedTuple):
    """A case with its bytes and its variants; ``variants["gpulayers"]`` and ``variants["copy"]`` are always there."""

    case: Case
    minimum: int
    regime: int
    variants: dict[str, Variant]
    launches: int | None = None
    host: timing_cpu.Quantiles | None = None


class Errors(NamedTuple):
    """Distances from float64: the largest difference over the largest value, and the same of Euclidean norms.

    The norm forgives a peer what is no mistake: a ReLU's mask that differs where its input is zero but for rounding.
    """

    largest: float
    norm: float


def errors_of(results: dict[str, Any], wanted: dict[str, Any], to_numpy: Callable[[Any], Any]) -> Errors:
    """Return the errors of the worst result, computed where `wanted` is: `to_numpy` may return such an array, too.

    Raises ValueError where nothing can be compared, or for another shape: a row must never pass by having no result.
    """
    largest, norm, compared = 0.0, 0.0, 0
    for name, true in wanted.items():
        if name not in results:
            continue
        xp, value = array_module(true), results[name]
        parts = value if isinstance(value, list) else [value]
        found = [xp.asarray(to_numpy(part)).astype(np.float64) for part in parts]
        found = xp.concatenate([part.ravel() for part in found]) if isinstance(value, list) else found[0]
        if found.shape != true.shape:
            raise ValueError(f"benchmarks: {name} has the wrong shape. Expected {true.shape}; got {found.shape}.")
        compared += 1
        if not bool(xp.isfinite(found).all()):
            return Errors(float("inf"), float("inf"))
        if true.size:
            difference = found - true
            norm = max(norm, (_sum_of_squares(difference) / max(_sum_of_squares(true), 1e-60)) ** 0.5)
            largest = max(largest, float(abs(difference).max()) / max(float(abs(true).max()), 1e-30))
    if not compared:
        raise ValueError(f"benchmarks: nothing to compare. Expected some of {list(wanted)}; got {list(results)}.")
    return Errors(largest, norm)


def _sum_of_squares(array: Any) -> float:
    return float((array * array).sum())


def error_of(results: dict[str, Any], wanted: dict[str, Any], to_numpy: Callable[[Any], Any]) -> float:
    """Return the largest difference from float64, as a fraction of the largest value of the same array.

    Raises ValueError as `errors_of` does.
    """
    return errors_of(results, wanted, to_numpy).largest


def _prepared_peers(case: Case, host: dict[str, Any], peers: list[Peer], on_gpu: bool) -> dict[str, Any]:
    """Return for each peer its function, or why there is none."""
    found: dict[str, Any] = {}
    for peer in peers:
        if peer.module is None:
            found[peer.name] = peer.reason
            continue
        try:
            found[peer.name] = peer.module.prepare(case, case_data.place(case, host, np), on_gpu)
        except Exception as error:  # a peer that fails is a skipped entry with its reason, like one that is missing
            found[peer.name] = said(error)
    return found


def _beside(wanted: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what brings our results to where the truth is."""
    there = array_module(next(iter(wanted.values())))
    return gl.asnumpy if there is np else lambda value: value


def _checked(functions: dict[str, Any], wanted: Any, peers: list[Peer], limit: float) -> dict[str, float | str]:
    """Return the error of every variant, or why it failed; for peers, limited by `limit`, that is no failure here."""
    errors: dict[str, float | str] = {"gpulayers": error_of(functions["gpulayers"](), wanted, _beside(wanted))}
    for peer in peers:
        function = functions.get(peer.name)
        if callable(function):
            try:
                found = errors_of(function(), wanted, peer.module.to_numpy)
                wrong = f"its result is wrong: the norm of the error is {found.norm:.3g} of the result's"
                errors[peer.name] = found.largest if found.norm <= limit else wrong
            except Exception as error:
                errors[peer.name] = said(error)
    return errors


def measure(case: Case, peers: list[Peer], on_gpu: bool, on_chip: int, seconds: float, least: int = 5) -> Row:
    """Measure one row. Raises ValueError if our own result is wrong by more than TOLERANCE."""
    host = case_data.make(case)
    xp = _cupy.cupy() if on_gpu else np
    own_data = case_data.place(case, host, xp)
    wanted = truth(case, own_data if case.op.startswith("batch_norm") else host)  # before anybody may write
    functions: dict[str, Any] = {"gpulayers": own.prepare(case, own_data, xp)}
    prepared = _prepared_peers(case, host, peers, on_gpu)
    functions.update({name: function for name, function in prepared.items() if callable(function)})
    errors = _checked(functions, wanted, peers, max(PEER_TOLERANCE, 5 * TOLERANCE[case.dtype]))
    del wanted
    if on_gpu:
        xp.get_default_memory_pool().free_all_blocks()  # the truth takes many times a row's memory, which peers need
    if not errors["gpulayers"] <= TOLERANCE[case.dtype]:
        raise ValueError(
            f"{case.name}: the result is wrong. Expected an error of {TOLERANCE[case.dtype]:g} at most; "
            f"got {errors['gpulayers']:.3g}."
        )
    for name, error in errors.items():
        if isinstance(error, str):
            prepared[name] = error
            del functions[name]
    minimum = minimum_bytes(case)
    functions["copy"] = copy_function(minimum, on_gpu)
    modules = {peer.name: peer.module for peer in peers if peer.name in functions}
    uncaptured: dict[str, str] = {}
    launches = host_times = None
    if on_gpu:
        from benchmarks import measure_gpu, timing_gpu

        launches = measure_gpu.launches(functions["gpulayers"], next(iter(own_data.values())))
        capturers = measure_gpu.capturers(case, host, functions["gpulayers"], modules)
        row_bytes = sum(value.nbytes for value in host.values())
        ways, uncaptured = measure_gpu.timed(functions, capturers, modules, (row_bytes, minimum), seconds, least)
        host_times = timing_gpu.host_seconds(functions["gpulayers"], launches=launches)
    else:
        finish = {name: module.finish for name, module in modules.items() if hasattr(module, "finish")}
        times = timing_cpu.interleaved(functions, finish, seconds, least)
        ways = {name: {"": found} for name, found in times.items()}
    variants = {}
    for name, found in ways.items():
        method, first = next(iter(found.items()))
        variants[name] = Variant(first, errors.get(name), "", method, uncaptured.get(name, ""), found)
    variants.update({name: Variant(None, None, reason) for name, reason in prepared.items() if isinstance(reason, str)})
    gc.collect()
    return Row(case, minimum, regime_bytes(case, on_chip), variants, launches, host_times)
