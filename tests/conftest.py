"""What every test shares: GPU tests skip with their reason, hypothesis runs the same examples everywhere."""

from __future__ import annotations

import os

import pytest

try:
    from hypothesis import settings
except ImportError:  # a borrowed GPU machine may have no more than pytest: what needs hypothesis then fails by itself
    settings = None

# generate.py records from TensorFlow, which has an environment of its own.
collect_ignore = ["reference/generate.py"]

if settings is not None:
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=40, database=None)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _gpu_count() -> int:
    from gpulayers import _cupy

    return 0 if _cupy.unusable_reason() else _cupy.cupy().cuda.runtime.getDeviceCount()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests with the reason that a user of the library would read."""
    needs = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if not needs:
        return
    from gpulayers import _cupy

    if reason := _cupy.unusable_reason():
        pytest.skip(f"no GPU: {reason}")
    if (count := _gpu_count()) < needs:
        pytest.skip(f"needs {needs} GPUs, found {count}")
