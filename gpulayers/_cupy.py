"""The only file that imports CuPy; says why a GPU is not usable.

CuPy is imported at the first question, never by ``import gpulayers``: it costs a quarter of a second, and the driver
must stay untouched until somebody wants a GPU. "CuPy imports" is not "a GPU is usable": usable means that a small
allocation on the current device succeeded.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["Cublas", "configuration", "cublas", "cupy", "installed", "is_device_array", "unusable_reason"]


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("cupy"), ""
    except ImportError as error:
        return None, (
            f"CuPy is not installed ({error}). Install gpulayers[cuda12] or gpulayers[cuda13], "
            "whichever matches the NVIDIA driver."
        )
    except Exception as error:  # a broken CUDA installation raises anything: it is reported, never hidden
        return None, f"CuPy is installed but cannot be imported ({type(error).__name__}: {error})."


def installed() -> bool:
    """Say whether CuPy can be imported. Imports it; does not touch the driver."""
    return _import()[0] is not None


def cupy() -> ModuleType:
    """Return the CuPy module. Raises ImportError with the reason where there is none."""
    module, reason = _import()
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def unusable_reason() -> str:
    """Return why no GPU can be used, or an empty string where one can.

    The answer is found once per process by allocating one element, because drivers, containers and permissions all fail
    later than the import.
    """
    module, reason = _import()
    if module is None:
        return reason
    try:
        module.empty(1, dtype="float32")
    except Exception as error:  # CUDA errors derive from RuntimeError, MemoryError and private types
        text = " ".join(str(error).split())
        return f"CuPy {module.__version__} is installed, but no GPU answers ({type(error).__name__}: {text})."
    return ""


def configuration() -> str:
    """Return CuPy's description of its configuration, a line for each component. Raises ImportError without CuPy."""
    cupy()
    with warnings.catch_warnings():  # it warns where no driver answers: `unusable_reason` says that
        warnings.simplefilter("ignore")
        return str(importlib.import_module("cupyx").get_runtime_info())


class Cublas(NamedTuple):
    """cuBLAS as CuPy wraps it: its functions and constants, and what gives the current device's handle."""

    functions: Any
    handle: Callable[[], int]


def cublas(module: Any) -> Cublas | None:
    """Return cuBLAS for arrays of `module`, None for modules without it and where its ``gemmEx`` is missing."""
    return _cublas() if module is sys.modules.get("cupy") else getattr(module, "cublas", None)


@functools.cache
def _cublas() -> Cublas | None:
    try:  # `cupy.cublas` knows no 16-bit types and no rows with gaps: this is the module below it
        functions = importlib.import_module("cupy_backends.cuda.libs.cublas")
    except ImportError:  # a CUDA without cuBLAS: CuPy's own products say how to install it
        return None
    if not hasattr(functions, "gemmEx"):
        return None
    return Cublas(functions, importlib.import_module("cupy.cuda.device").get_cublas_handle)


def is_device_array(value: Any) -> bool:
    """Say whether `value` is a CuPy array, without importing CuPy."""
    module = sys.modules.get("cupy")
    return module is not None and isinstance(value, getattr(module, "ndarray", ()))
