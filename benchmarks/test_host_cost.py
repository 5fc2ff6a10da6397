"""The host's part of small calls beside torch's module on the CPU, on the GPU or on a stub of its driver.

Run with ``pytest benchmarks/test_host_cost.py``; ``python -m benchmarks.host_cost`` interleaves them, which is steadier
on a busy machine.
"""

import pytest

import gpulayers as gl
from benchmarks import host_cost, stub_gpu

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(not gl.gpu_available() and bool(stub_gpu.missing()), reason=stub_gpu.missing())

NAMES = (
    "batch norm forward",
    "batch norm backward",
    "batch norm inference",
    "layer training",
    "layer inference",
    "residual add",
    "LSTM step's kernel",
    "momentum, 161 parameters",
)


@pytest.fixture(scope="module")
def functions():
    with host_cost.device_arrays() as xp:
        yield host_cost.cases(xp)


@pytest.mark.parametrize("name", NAMES)
def test_ours(benchmark, functions, name):
    benchmark.group = "host"
    benchmark(functions[name])


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_torch(benchmark, mode):
    peers = host_cost.peers()
    if not peers:
        pytest.skip("torch is not installed")
    benchmark.group = "host"
    benchmark(peers[f"torch module {mode}"])
