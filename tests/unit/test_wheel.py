"""An installed gpulayers works outside the checkout: from a wheel, and editable."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Run with the installed package in a folder that is not the checkout.
LOADER = """
import pathlib, sys
import gpulayers
from gpulayers import data, launch
from gpulayers.launch.source import kernel_folder

package = pathlib.Path(gpulayers.__file__).parent
assert "cupy" not in sys.modules, "importing gpulayers imported CuPy"
assert (package / "py.typed").is_file()
assert data.load_digits().test_images.shape == (360, 8, 8)
print(package)
print(kernel_folder())
print(",".join(sorted(path.name for path in kernel_folder().iterdir() if path.suffix in (".cu", ".cuh"))))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command with no trace of the checkout in its environment; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GPULAYERS"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kernel_names() -> set[str]:
    return {path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh")}


def build(target: str, folder: Path) -> Path:
    """Build a wheel or an sdist with the build backend itself, offline where hatchling is installed."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: install gpulayers[test]")
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_package_kernels_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gpulayers/_kernels/{name}" for name in kernel_names()} <= names
    assert {"gpulayers/py.typed", "gpulayers/data/digits.npz", "gpulayers/data/README.md"} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gpulayers").rglob("*.py")}
    assert sources <= names
    strangers = [name for name in names if not name.startswith(("gpulayers/", "gpulayers-"))]
    assert not strangers
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]


def test_sdist_holds_what_a_wheel_needs(tmp_path):
    names = tarfile.open(build("sdist", tmp_path)).getnames()
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    assert {f"kernels/{name}" for name in kernel_names()} <= inside
    assert {"pyproject.toml", "LICENSE", "gpulayers/__init__.py", "tests/conftest.py"} <= inside


def test_the_wheel_needs_numpy_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    required = [line for line in archive.read(name).decode().splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: numpy>=2"]
    for cuda in ("12", "13"):
        assert f"Requires-Dist: cupy-cuda{cuda}x[ctk]>=14; extra == 'cuda{cuda}'" in required
    assert not [line for line in required if line.startswith("Requires-Dist: cupy>")]


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_fresh_environment(editable, wheel, tmp_path):
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", environment, cwd=elsewhere)
    python = environment / "bin" / "python"
    what = ["--editable", ROOT] if editable else [wheel]
    run(python, "-m", "pip", "install", "--quiet", *what, cwd=elsewhere)
    package, kernels, names = run(python, "-c", LOADER, cwd=elsewhere).splitlines()
    assert set(names.split(",")) == kernel_names()
    if editable:
        assert (Path(package), Path(kernels)) == (ROOT / "gpulayers", ROOT / "kernels")
    else:
        assert Path(package).is_relative_to(environment)
        assert Path(kernels) == Path(package) / "_kernels"
    assert "usage" in run(python, "-m", "gpulayers", "--help", cwd=elsewhere).lower()
    assert "gpulayers" in run(python, "-m", "gpulayers.report", cwd=elsewhere)
