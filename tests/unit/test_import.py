"""What ``import gpulayers`` costs, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Imported before the clock starts: NumPy, and what of the standard library its import would have brought anyway.
COST = """
import time, numpy
start = time.perf_counter()
import gpulayers
print(time.perf_counter() - start)
"""

QUIET = """
import sys
before = set(sys.modules)
import gpulayers
gpulayers.layers.Dense, gpulayers.nn.relu, gpulayers.reduce_mean
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(brought & {"cupy", "cupyx", "cupy_backends", "torch", "scipy", "ml_dtypes", "matplotlib", "safetensors"}))
device = sys.modules["gpulayers.device"]
print(device._default)
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_import_is_quick():
    # The smallest of several: a busy machine makes single runs slow, never fast.
    seconds = []
    for _ in range(8):
        seconds.append(float(run(COST)[0]))
        if seconds[-1] < 0.15:
            break
    assert min(seconds) < 0.15, seconds


def test_import_touches_no_driver_and_no_optional_package():
    assert run(QUIET) == ["", "None"]


def test_every_name_of_the_faces_can_be_had():
    names = run(
        "import gpulayers as gl\n"
        "for face in (gl, gl.layers, gl.nn, gl.keras, gl.keras.layers, gl.compat.v1, gl.train):\n"
        "    [getattr(face, name) for name in dir(face)]\n"
        "print(len(dir(gl)))"
    )
    assert int(names[0]) > 150


def test_an_unknown_name_is_an_attribute_error():
    code = "import gpulayers as gl\nfor face in (gl, gl.nn, gl.layers, gl.keras):\n    print(hasattr(face, 'no_such'))"
    assert run(code) == ["False"] * 4
