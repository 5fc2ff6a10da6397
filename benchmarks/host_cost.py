"""What the host spends on a call of the sort of which a training has many, on device arrays of (8, 16).

``python -m benchmarks.host_cost`` prints microseconds and the number of function calls beside torch's module on the
CPU, on the GPU if there is one, else on a stub of its driver (see `stub_gpu`).
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

import gpulayers as gl
from benchmarks import stub_gpu
from gpulayers import _cupy
from gpulayers.device import Device
from gpulayers.ops import optimizer_kernels
from gpulayers.ops.batch_norm import arrays as bn
from gpulayers.ops.recurrent.kernels import prepare_step
from gpulayers.ops.residual_kernels import residual_add

__all__ = ["calls_of", "cases", "device_arrays", "main", "peers"]

SHAPE = (8, 16)
PARAMETERS = 161
UNITS = 128


def device_arrays() -> contextlib.AbstractContextManager[Any]:
    """Return a context that gives the array module: CuPy, or CuPy on the stub where no GPU is usable."""
    return contextlib.nullcontext(_cupy.cupy()) if gl.gpu_available() else stub_gpu.stub_gpu()


def _layer(xp: Any, x: Any) -> Any:
    """Return a built layer whose variables are on the device, also where none can be asked for by name."""
    with gl.device("cpu"):
        layer = gl.layers.BatchNormalization()
        layer.build(x.shape)
    layer._device = Device("gpu")
    for variable in layer.variables:
        variable.store(xp.asarray(variable.numpy()))
    return layer


def cases(xp: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls by name; each has been made before, as in the middle of a training."""

    def new(*shape: int) -> Any:
        return xp.ndarray(shape, np.dtype(np.float32))

    x, dy = new(*SHAPE), new(*SHAPE)
    gamma, beta, mean, variance = (new(SHAPE[1]) for _ in range(4))
    moving = bn.MovingStatistics(mean, variance, 0.01)
    saved = bn.forward(x, gamma, beta, axis=(1,), moving=moving).saved
    layer = _layer(xp, x)
    lists = [[new(100) for _ in range(PARAMETERS)] for _ in range(3)]
    states = [new(32, UNITS) for _ in range(5)]
    step = dict(zip(("c", "new_c", "h", "new_h", "output"), states, strict=True))
    step["gates"] = new(32, 4 * UNITS)
    step.update(dict.fromkeys(("bias", "mask", "x", "previous", "recurrent_mask", "dropped")))
    launch = prepare_step("gl_lstm_forward", 32, UNITS, list(step.values()), order=(0, 1, 2, 3))
    found: dict[str, Callable[[], Any]] = {
        "batch norm forward": lambda: bn.forward(x, gamma, beta, axis=(1,), moving=moving),
        "batch norm backward": lambda: bn.backward(dy, x, gamma, saved, axis=(1,)),
        "batch norm inference": lambda: bn.inference(x, gamma, beta, mean, variance, axis=(1,)),
        "layer training": lambda: layer(x, training=True),
        "layer inference": lambda: layer(x, training=False),
        "residual add": lambda: residual_add([x], [dy]),
        "LSTM step's kernel": lambda: launch(step),
        "momentum, 161 parameters": lambda: optimizer_kernels.momentum_update(*lists, (0.1, 0.9)),
    }
    for call in found.values():
        call()
        call()
    return found


def peers() -> dict[str, Callable[[], Any]]:
    """Return torch's module calls on the CPU, one thread, without a tape, where torch is installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    x, found = torch.randn(SHAPE), {}
    for mode in ("training", "inference"):
        module = torch.nn.BatchNorm1d(SHAPE[1]).train(mode == "training")
        found[f"torch module {mode}"] = torch.no_grad()(lambda module=module: module(x))
    return found


def calls_of(function: Callable[[], Any]) -> int:
    """Return how many functions, of Python and of C, one call of `function` calls: a busy machine changes nothing."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count - 1  # the way out of the profile is a call too


def main(rounds: int = 200) -> int:
    """Print the table: medians of the faster half of interleaved rounds of 10 calls."""
    with device_arrays() as xp:
        functions = {**cases(xp), **peers()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(timeit.timeit(function, number=10) * 1e5)
        print(f"{'host us':>9}  {'calls':>5}  on {'the GPU' if gl.gpu_available() else 'a stub of the driver'}")
        for name, function in functions.items():
            quick = sorted(times[name])[: rounds // 2 + 1]
            print(f"{statistics.median(quick):9.1f}  {calls_of(function):5}  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
