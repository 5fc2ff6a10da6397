"""What a GPU and its driver cost per launch, per barrier and per graph node: ``python -m benchmarks.gpu_probe``.

Each is measured by itself, and one that fails is reported and does not stop the others. ``--design`` asks the open
questions of the kernel designs instead (`benchmarks.gpu_design`), with an answer in one line each.
``--sanitizer-subset`` runs one small call of every kernel family, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpulayers as gl
from benchmarks import gpu_design, host_cost
from benchmarks.timing_gpu import flushes_needed, host_seconds, make_flush, samples_flushed
from gpulayers import _cupy
from gpulayers.launch import Kernel, device_properties

__all__ = ["BARRIERS", "EMPTY", "main"]

EMPTY = Kernel(
    "", "gl_probe_empty", [("x", "float32*"), ("count", "int64")], listed=False,
    body="GL_KERNEL(gl_probe_empty, 256) { if (arguments.count < 0) arguments.x[0] = 0.0f; }",
)  # fmt: skip
BARRIERS = Kernel(
    "", "gl_probe_barriers", [("counter", "uint32*"), ("passed", "uint32*"), ("times", "int64")], listed=False,
    body="""GL_KERNEL(gl_probe_barriers, 256) {
    for (int64 i = 0; i < arguments.times; ++i) grid_barrier(arguments.counter, gridDim.x, blockIdx.x == 0);
    if (thread_number() == 0) arguments.passed[blockIdx.x] = static_cast<uint32>(arguments.times);
}""",
)  # fmt: skip


# Of batch normalisation, by the regime that a GPU of 132 multiprocessors takes for 16-bit data.
LARGE = (("cluster", (2200, 576)), ("grid", (40000, 24)), ("sweeps", (5000, 16)))
FAMILIES = ("batch_norm", "residual", "lstm", "gru", "momentum", "adam")  # whose kernels are ours


@functools.cache
def _flush() -> Callable[[], None]:
    return make_flush()


def _elapsed(work: Callable[[], Any], repeats: int = 1) -> float:
    """Return microseconds on the device, the best of 7 after one for warming up, each from a cold L2.

    The device is kept busy until the host has launched everything, so that the host's time is no part of it.
    """

    def whole() -> None:
        for _ in range(repeats):
            work()

    whole()
    _cupy.cupy().cuda.Device().synchronize()
    start = time.perf_counter()
    whole()
    flushes = flushes_needed(time.perf_counter() - start)
    return min(samples_flushed(whole, _flush(), flushes, 7)) * 1e6 / repeats


def host_costs() -> dict[str, float]:
    """Return microseconds of the host per call, without waiting for the device."""
    cupy = _cupy.cupy()
    x = cupy.ones(1024, dtype="float32")
    raw = cupy.RawKernel('extern "C" __global__ void probe(float* x, long long n) { if (n < 0) x[0] = 0; }', "probe")
    count = np.int64(1)
    calls: dict[str, Callable[[], Any]] = {
        "CuPy RawKernel, 2 arguments": lambda: raw((1,), (32,), (x, count)),
        "our launch, 2 fields": lambda: EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,)),
        "our launch, cooperative": lambda: EMPTY.launch(
            {"x": x, "count": 1}, grid=(1,), block=(32,), cooperative=True
        ),
        "cupy.add": lambda: cupy.add(x, x),
    }
    images = cupy.ones((32, 128), dtype="float32")
    layer = gl.layers.BatchNormalization()
    calls["layer call, inference"] = lambda: layer(images, training=False)
    calls["layer call, training"] = lambda: layer(images, training=True)
    calls.update({f"small, {name}": call for name, call in host_cost.cases(cupy).items()})
    try:
        import torch

        module, tensor = torch.nn.BatchNorm1d(128).cuda(), torch.ones(32, 128, device="cuda")
        with torch.no_grad():
            module(tensor)
        calls["torch.nn.BatchNorm1d, training, no_grad"] = torch.no_grad()(lambda: module(tensor))
    except Exception as error:
        print(f"torch: {type(error).__name__}: {error}", file=sys.stderr)
    return {f"host us: {name}": host_seconds(call).p50 * 1e6 for name, call in calls.items()}


def graph_costs() -> dict[str, float]:
    """Return microseconds of a replay with 1 and with 200 empty kernels."""
    cupy = _cupy.cupy()
    x, found = cupy.ones(1, dtype="float32"), {}
    stream = cupy.cuda.Stream(non_blocking=True)
    for nodes in (1, 200):
        with stream:
            EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,))
            stream.synchronize()
            stream.begin_capture()
            for _ in range(nodes):
                EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,))
            graph = stream.end_capture()
        found[f"device us: graph of {nodes} empty kernels"] = _elapsed(graph.launch)
    return found


def barrier_costs() -> dict[str, float]:
    """Return microseconds of one barrier of a whole grid, with one and two blocks per multiprocessor."""
    cupy = _cupy.cupy()
    like = cupy.empty(1, dtype="float32")
    processors, found = device_properties(like).multiprocessors, {}
    for per_processor in (1, 2):
        blocks = processors * per_processor
        counters = cupy.zeros(1, dtype="uint32")  # of its own: the barrier leaves its top bit behind
        passed = cupy.zeros(blocks, dtype="uint32")

        def run(times: int, blocks: int = blocks, counters: Any = counters, passed: Any = passed) -> None:
            values = {"counter": counters, "passed": passed, "times": times}
            BARRIERS.launch(values, grid=(blocks,), block=(256,), cooperative=True)

        few, many = _elapsed(lambda: run(10)), _elapsed(lambda: run(1010))
        if not bool((passed == 1010).all()):
            raise RuntimeError("the barrier kernel did not finish in every block")
        found[f"device us: barrier of {blocks} blocks"] = (many - few) / 1000
    return found


def cooperative_capture() -> dict[str, str]:
    """Say whether a cooperative launch can be captured into a graph."""
    cupy = _cupy.cupy()
    x, stream = cupy.ones(1, dtype="float32"), cupy.cuda.Stream(non_blocking=True)
    with stream:
        EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,), cooperative=True)
        stream.synchronize()
        stream.begin_capture()
        EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,), cooperative=True)
        graph = stream.end_capture()
    graph.launch()
    cupy.cuda.Device().synchronize()
    return {"cooperative launch in a captured graph": "works"}


def copy_bandwidth() -> dict[str, float]:
    """Return TB/s, read and written, of device copies of several sizes, back to back."""
    cupy, found = _cupy.cupy(), {}
    for megabytes in (2, 8, 20, 50, 100, 400):
        source = cupy.ones(megabytes << 18, dtype="float32")
        target = cupy.empty_like(source)
        time_us = _elapsed(lambda s=source, t=target: t.data.copy_from_device_async(s.data, s.nbytes), 20)
        found[f"TB/s: copy of {megabytes} MiB, caches as they are"] = 2 * source.nbytes / time_us / 1e6
    return found


def sanitizer_subset() -> None:
    """Call a small case of every kernel family once, for tools that make kernels a hundred times slower.

    Batch normalisation comes first, in the regimes that are not for small arrays.
    """
    from benchmarks import data, own
    from benchmarks.shapes import Case, suite_cases

    cupy, seen = _cupy.cupy(), set()
    large = [Case("batch_norm_relu_residual", "step", "NC", shape, "float16", regime) for regime, shape in LARGE]
    for case in large:
        own.prepare(case, data.place(case, data.make(case), cupy), cupy)()
    for case in suite_cases(quick=True):
        twice = case.mode == "step" and case.op.startswith("batch_norm")  # its passes are cases of their own
        if (case.op, case.mode) not in seen and case.op.startswith(FAMILIES) and not twice:
            seen.add((case.op, case.mode))
            own.prepare(case, data.place(case, data.make(case), cupy), cupy)()
    cupy.cuda.Device().synchronize()
    print(f"{len(large) + len(seen)} calls")


def _show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything and print it; return 1 without a GPU or if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_probe", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--design", action="store_true", help="the open questions of the kernel designs")
    parser.add_argument("--sanitizer-subset", action="store_true", help="one small call of every kernel family")
    options = parser.parse_args(arguments)
    if not gl.gpu_available():
        print(f"gpu_probe: no GPU is usable. {gl.gpu_unavailable_reason()}", file=sys.stderr)
        return 1
    if options.sanitizer_subset:
        sanitizer_subset()
        return 0
    found: dict[str, Any] = {}
    measures: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (measure.__name__, functools.partial(measure, _elapsed)) for measure in gpu_design.MEASURES
    ]
    if not options.design:
        costs = (host_costs, graph_costs, barrier_costs, cooperative_capture, copy_bandwidth)
        measures = [(measure.__name__, measure) for measure in costs]
    for name, measure in measures:
        start = time.perf_counter()
        try:
            answers = measure()
        except Exception as error:  # the next question is asked all the same
            answers = {f"{name} failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        found.update(answers)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _show(answers)  # at once: a run may be cut off
        print(f"# {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if options.design:
        _show({name: value for name, value in found.items() if name.startswith("answer")})  # where a tail shows them
    return 1 if any(name.endswith("failed") for name in found) else 0


if __name__ == "__main__":
    sys.exit(main())
