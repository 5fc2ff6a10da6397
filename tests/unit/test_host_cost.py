"""What the host does per call, counted; and launches through CuPy's own arrays and driver functions.

Both need no GPU: below CuPy lies a stub of the driver (benchmarks/stub_gpu.py). It is loaded in a process of its own,
since no other driver can be loaded after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(bool(stub_gpu.missing()), reason=stub_gpu.missing())

# Function calls of Python and C. Before launches were prepared they were 233, 200, 142, 94, 152 and 715 (of the layer:
# not counted). A new call here and there is no harm; a doubling is.
BOUNDS = {
    "batch norm forward": 100,
    "batch norm backward": 90,
    "batch norm inference": 65,
    "layer training": 120,
    "layer inference": 72,
    "residual add": 65,
    "LSTM step's kernel": 20,
    "momentum, 161 parameters": 80,
}

COUNT = """
import json
from benchmarks import host_cost, stub_gpu
with stub_gpu.stub_gpu() as xp:
    functions, found = host_cost.cases(xp), {}
    compiled = xp.compiled
    for name, function in functions.items():
        before = stub_gpu.launches()
        found[name] = host_cost.calls_of(function), stub_gpu.launches() - before
    print(json.dumps([found, xp.compiled - compiled]))
"""

LAUNCH = """
import json
import numpy as np
from benchmarks import stub_gpu
from gpulayers.errors import DTypeError, KernelError
from gpulayers.launch import Kernel
kernel = Kernel(
    "", "gl_probe", [("x", "const float32*"), ("small", "int32"), ("ratio", "float64"), ("table", "float32*[3]")],
    body="GL_KERNEL(gl_probe, 64) {}", listed=False,
)
with stub_gpu.stub_gpu() as xp:
    x = xp.empty((4, 6), "float32")
    for small in (5, 6):
        for cooperative in (False, True):
            values = {"x": x, "small": small, "ratio": 0.25, "table": [x[2:], None]}
            kernel.launch(values, grid=(3, np.int64(2)), block=(64,), shared=96, cooperative=cooperative)
            facts, packed = stub_gpu.last_argument()
            assert facts == (kernel.packer.size, 3, 2, 1, 64, 1, 1, 96, 0, int(cooperative)), facts
            start = x.data.ptr
            assert packed == kernel.packer.pack(start, small, 0.25, start + 48, 0, 0), packed
    before = stub_gpu.launches()
    for wrong, error in ((x[:, :2], KernelError), (x.view("int32"), DTypeError)):
        try:
            kernel.launch({**values, "x": wrong}, grid=(3,), block=(64,))
        except error:
            continue
        raise AssertionError(f"launched with {wrong.dtype}, {wrong.strides}")
    assert stub_gpu.launches() == before
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_per_call_are_bounded():
    found, compiled = json.loads(run(COUNT))
    assert set(found) == set(BOUNDS) and compiled == 0
    assert {name: count for name, (count, _) in found.items() if count > BOUNDS[name]} == {}
    assert {launches for _, launches in found.values()} == {1}


def test_cupys_driver_gets_the_struct():
    run(LAUNCH)
