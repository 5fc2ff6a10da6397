"""What ``import gpulayers`` costs, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COST = """
import time
start = time.process_time()
import numpy
between = time.process_time()
import gpulayers
print(time.process_time() - between, between - start)
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


def run(code: str, **environment: str) -> list[str]:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    return done.stdout.splitlines()


def test_import_is_quick(tmp_path):
    # The processor's time, and the best of several: a busy machine makes single runs slow, never fast. NumPy's own
    # import, some 0.1 s on an idle machine, says how busy it is. Python keeps what it has compiled, as it does for
    # users, also where the environment of the tests says that it should not.
    pairs = []
    for _ in range(8):
        ours, numpys = map(float, run(COST, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))[0].split())
        pairs.append((ours, numpys))
        if ours < 0.15 * max(1.0, numpys / 0.1):
            return
    raise AssertionError(f"(import gpulayers, import numpy), seconds: {pairs}")


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
