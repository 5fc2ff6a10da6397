"""One row: prepare every variant, check it against float64, time all of them beside a copy of the same bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gpulayers as gl
from benchmarks import data as case_data
from benchmarks import own, timing_cpu
from benchmarks.bytes_moved import minimum_bytes, regime_bytes
from benchmarks.peers import Peer
from benchmarks.shapes import Case
from benchmarks.truth import truth
from gpulayers import _cupy
from gpulayers.launch import launcher

__all__ = ["PEER_TOLERANCE", "TOLERANCE", "Row", "Variant", "copy_function", "error_of", "errors_of", "measure"]

TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 8e-2}
PEER_TOLERANCE = 0.01
"""Norm of a peer's error that is no mistake (five times ours where that is more): the few elements whose ReLU decides
otherwise, because their sum is zero but for rounding, are worth a thousandth in the sums of a channel."""


class Variant(NamedTuple):
    """What was measured of one way to compute a row. Times in seconds; a `reason` and no times if it was skipped."""

    times: timing_cpu.Quantiles | None
    error: float | None = None
    reason: str = ""
    method: str = ""


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


def errors_of(results: dict[str, Any], wanted: dict[str, Any], to_numpy: Callable[[Any], np.ndarray]) -> Errors:
    """Return the errors of the worst result.

    Raises ValueError where nothing can be compared, or for another shape: a row must never pass by having no result.
    """
    largest, norm, compared = 0.0, 0.0, 0
    for name, true in wanted.items():
        if name not in results:
            continue
        value = results[name]
        parts = value if isinstance(value, list) else [value]
        found = [np.asarray(to_numpy(part), dtype=np.float64) for part in parts]
        found = np.concatenate([part.ravel() for part in found]) if isinstance(value, list) else found[0]
        if found.shape != true.shape:
            raise ValueError(f"benchmarks: {name} has the wrong shape. Expected {true.shape}; got {found.shape}.")
        compared += 1
        if not np.isfinite(found).all():
            return Errors(float("inf"), float("inf"))
        if true.size:
            difference = found - true
            norm = max(norm, float(np.linalg.norm(difference) / max(float(np.linalg.norm(true)), 1e-30)))
            largest = max(largest, float(np.max(np.abs(difference)) / max(float(np.max(np.abs(true))), 1e-30)))
    if not compared:
        raise ValueError(f"benchmarks: nothing to compare. Expected some of {list(wanted)}; got {list(results)}.")
    return Errors(largest, norm)


def error_of(results: dict[str, Any], wanted: dict[str, Any], to_numpy: Callable[[Any], np.ndarray]) -> float:
    """Return the largest difference from float64, as a fraction of the largest value of the same array.

    Raises ValueError as `errors_of` does.
    """
    return errors_of(results, wanted, to_numpy).largest


def copy_function(total: int, on_gpu: bool) -> Callable[[], Any]:
    """Return a copy that reads and writes `total` bytes together."""
    xp = _cupy.cupy() if on_gpu else np
    source = xp.ones(max(total // 8, 1), dtype="float32")
    target = xp.empty_like(source)
    if on_gpu:
        return lambda: target.data.copy_from_device_async(source.data, source.nbytes)
    return lambda: np.copyto(target, source)


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


def _launches(function: Callable[[], Any], like: Any) -> int:
    """Return how many kernels of ours one call launches."""
    inner = launcher.launcher_of(like)
    counting = _Counting(inner)
    launcher.register_launcher("gpu", counting)
    try:
        function()
    finally:
        launcher.register_launcher("gpu", inner)
    return counting.count


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
            found[peer.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def _checked(functions: dict[str, Any], wanted: Any, peers: list[Peer], limit: float) -> dict[str, float | str]:
    """Return the error of every variant, or why it failed; for peers, limited by `limit`, that is no failure here."""
    errors: dict[str, float | str] = {"gpulayers": error_of(functions["gpulayers"](), wanted, gl.asnumpy)}
    for peer in peers:
        function = functions.get(peer.name)
        if callable(function):
            try:
                found = errors_of(function(), wanted, peer.module.to_numpy)
                wrong = f"its result is wrong: the norm of the error is {found.norm:.3g} of the result's"
                errors[peer.name] = found.largest if found.norm <= limit else wrong
            except Exception as error:
                errors[peer.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return errors


def measure(case: Case, peers: list[Peer], on_gpu: bool, on_chip: int, seconds: float, least: int = 5) -> Row:
    """Measure one row. Raises ValueError if our own result is wrong by more than TOLERANCE."""
    host = case_data.make(case)
    xp = _cupy.cupy() if on_gpu else np
    own_data = case_data.place(case, host, xp)
    functions: dict[str, Any] = {"gpulayers": own.prepare(case, own_data, xp)}
    prepared = _prepared_peers(case, host, peers, on_gpu)
    functions.update({name: function for name, function in prepared.items() if callable(function)})
    wanted = truth(case, host)
    errors = _checked(functions, wanted, peers, max(PEER_TOLERANCE, 5 * TOLERANCE[case.dtype]))
    del wanted
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
    times, methods, launches, host_times = _timed(case, functions, peers, host, own_data, on_gpu, seconds, least)
    variants = {name: Variant(times[name], errors.get(name), "", methods.get(name, "")) for name in functions}
    variants.update({name: Variant(None, None, reason) for name, reason in prepared.items() if isinstance(reason, str)})
    gc.collect()
    return Row(case, minimum, regime_bytes(case, on_chip), variants, launches, host_times)


def _timed(
    case: Case, functions: dict[str, Any], peers: list[Peer], host: dict[str, Any], own_data: dict[str, Any],
    on_gpu: bool, seconds: float, least: int,
) -> tuple[Any, ...]:  # fmt: skip
    finish = {
        peer.name: peer.module.finish for peer in peers if peer.name in functions and hasattr(peer.module, "finish")
    }
    if not on_gpu:
        return timing_cpu.interleaved(functions, finish, seconds, least), {}, None, None
    from benchmarks import timing_gpu

    cupy = _cupy.cupy()
    row_bytes = sum(value.nbytes for value in host.values())
    l2_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
    copies = timing_gpu.copies_needed(row_bytes, l2_bytes)
    rotations = {"copy": [copy_function(minimum_bytes(case), True) for _ in range(copies)]}
    if case.op.startswith(("batch_norm", "residual_add")):  # CuPy captures no cuBLAS, and optimizers count on the host
        sets = [case_data.place(case, host, cupy) for _ in range(copies - 1)]
        rotations["gpulayers"] = [functions["gpulayers"], *(own.prepare(case, given, cupy) for given in sets)]
    launches = _launches(functions["gpulayers"], own_data["x"]) if "x" in own_data else None
    times, methods = timing_gpu.interleaved(functions, rotations, finish, seconds, least)
    if not timing_gpu.is_cold(min(row_bytes, minimum_bytes(case)), l2_bytes, copies):
        methods = {name: "graph, L2 warm" if way == "graph" else way for name, way in methods.items()}
    return times, methods, launches, timing_gpu.host_seconds(functions["gpulayers"])
