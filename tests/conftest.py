"""What every test shares: GPU tests skip with their reason, hypothesis runs the same examples everywhere."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import threading
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # a borrowed GPU machine may have no more than NumPy, CuPy and pytest
    settings = None

# What whole files of tests are written with.
PACKAGES = ("hypothesis", "ml_dtypes", "scipy")

ROOT = Path(__file__).resolve().parents[1]

# generate.py records from TensorFlow, which has an environment of its own.
collect_ignore = ["reference/generate.py"]

if settings is not None:
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=40, database=None)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure() -> None:
    """Let whoever stops the run, such as `timeout`, do so as Ctrl-C does: what failed so far is reported."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@functools.cache
def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@functools.cache
def _missing_package(path: Path) -> str:
    """Return a missing package that a file of tests imports at its top, by itself or through another one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    for name in PACKAGES:
        if re.search(rf"^(?:import|from) {name}\b", text, re.MULTILINE) and _is_missing(name):
            return name
    others = re.findall(r"^from (tests\.[\w.]+) import", text, re.MULTILINE)
    return next(filter(None, (_missing_package(ROOT / (other.replace(".", "/") + ".py")) for other in others)), "")


_left_out: dict[str, str] = {}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that need a package which is not installed; `pytest_terminal_summary` names them."""
    missing = _missing_package(collection_path) if collection_path.suffix == ".py" else ""
    if missing:
        _left_out[str(collection_path.relative_to(ROOT))] = missing
    return True if missing else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which files were left out, and why."""
    for name in sorted(set(_left_out.values())):
        files = ", ".join(file for file, missing in sorted(_left_out.items()) if missing == name)
        terminalreporter.write_line(f"LEFT OUT, {name} is not installed (gpulayers[test]): {files}")


@functools.cache
def _has_compiler() -> bool:
    from tests.kernels.emulation.build import compiler

    return compiler() is not None


def _gpu_count() -> int:
    from gpulayers import _cupy

    return 0 if _cupy.unusable_reason() else _cupy.cupy().cuda.runtime.getDeviceCount()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Answer `-n auto`: one process where there is a GPU, whose memory every process would take a part of."""
    return 1 if _gpu_count() else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests with the reason that a user of the library would read."""
    if "bfloat16" in item.name and _is_missing("ml_dtypes"):
        pytest.skip("bfloat16 needs ml_dtypes")
    needs = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if not needs:
        if item.get_closest_marker("emulated") and not _has_compiler():
            pytest.skip("needs g++")
        return
    from gpulayers import _cupy

    if reason := _cupy.unusable_reason():
        pytest.skip(f"no GPU: {reason}")
    if (count := _gpu_count()) < needs:
        pytest.skip(f"needs {needs} GPUs, found {count}")
