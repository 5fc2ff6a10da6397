"""Kernel tests run on the emulated device, and on a GPU where there is one (``-m gpu``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tests.kernels.bfloat16  # noqa: F401 - gives NumPy the name of the dtype, where ml_dtypes is installed


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def arrays(request: pytest.FixtureRequest) -> Any:
    """Return the array module to test with; its arrays have ``get()``."""
    if request.param == "gpu":
        from gpulayers import _cupy

        return _cupy.cupy()
    from tests.kernels.emulation.build import compiler
    from tests.kernels.strict_array import xp

    if compiler() is None:
        pytest.skip("needs g++")
    return xp


@pytest.fixture
def emulated_gpu() -> Iterator[Any]:
    """Return the emulated launcher with an empty record; puts it and its device back afterwards."""
    from gpulayers.launch import register_launcher
    from tests.kernels.emulation import H200_LIKE
    from tests.kernels.strict_array import launcher

    launcher.record.clear()
    yield launcher
    launcher.device = H200_LIKE
    register_launcher("emulated", launcher)
