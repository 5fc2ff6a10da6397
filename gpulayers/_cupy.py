"""The only file that imports CuPy; says why a GPU is not usable.

CuPy is imported at the first question, never by ``import gpulayers``: it costs a quarter of a second, and the driver
must stay untouched until somebody wants a GPU. "CuPy imports" is not "a GPU is usable": usable means that a small
allocation on the current device succeeded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

__all__ = [
    "Cublas",
    "SUM_IN_FULL_PRECISION",
    "StreamCublas",
    "configuration",
    "cublas",
    "cupy",
    "installed",
    "is_device_array",
    "unusable_reason",
    "using",
]


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
    """Return cuBLAS for arrays of `module`, None for modules without it and where its ``gemmEx`` is missing.

    Inside `using` it is the one that was given there.
    """
    if module is not sys.modules.get("cupy"):
        return getattr(module, "cublas", None)
    own: StreamCublas | None = getattr(_own, "cublas", None)
    return (None if own is None else own.get()) or _cublas()


@functools.cache
def _cublas() -> Cublas | None:
    functions = _cublas_module()
    if not hasattr(functions, "gemmEx"):
        return None
    return Cublas(functions, importlib.import_module("cupy.cuda.device").get_cublas_handle)


def _cublas_module() -> Any:
    """Return CuPy's module of cuBLAS, or None.

    `cupy.cublas` knows no 16-bit types and no rows with gaps: this is the module below it. It is asked for as an
    attribute, because that loads the library first; the import alone fails where the library comes from a wheel.
    """
    try:
        return importlib.import_module("cupy_backends.cuda.libs").cublas
    except (ImportError, AttributeError, RuntimeError):  # a CUDA without cuBLAS: CuPy's products say what to install
        return None


# --- cuBLAS in a capture ----------------------------------------------------------------------------------------------

_own = threading.local()
# Bytes by compute capability: what the manual of cuBLAS recommends under cublasSetWorkspace, 4 MiB for all others.
_WORKSPACE = {9: 32 << 20, 10: 32 << 20, 12: 12 << 20}


SUM_IN_FULL_PRECISION = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, a flag of the math mode that CuPy does not name."""


class StreamCublas:
    """cuBLAS on one stream, with a handle and a workspace of its own, for steps that become CUDA graphs.

    cuBLAS can be captured. CuPy's wrappers cannot: before each call they give the handle the current stream, and that
    function refuses a stream that is capturing (CuPy 14.2, ``cupy_backends/cuda/libs/cublas.pyx``, ``setStream``). So
    the handle gets its stream before the capture, through CuPy, and ``gemmEx`` is called in the library itself. The
    workspace is ours, because cuBLAS would allocate one inside the graph.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._tried = stream, False
        self._found: Cublas | None = None
        self.workspace: Any = None
        self.may_create = True  # not while the stream is capturing

    def get(self) -> Cublas | None:
        """Return the functions and the handle, made at the first call; None where they cannot be had."""
        if not self._tried and self.may_create:
            self._tried = True
            self._found = self._make()
        return self._found

    def _make(self) -> Cublas | None:
        wrapped, library = _cublas(), _cublas_library()
        if wrapped is None or library is None:
            return None
        functions = wrapped.functions
        handle = functions.create()
        weakref.finalize(self, functions.destroy, handle)
        functions.setStream(handle, self._stream.ptr)  # which forgets the workspace: first the stream, then that
        functions.setMathMode(handle, functions.getMathMode(handle) | SUM_IN_FULL_PRECISION)
        major = cupy().cuda.runtime.getDeviceProperties(cupy().cuda.runtime.getDevice())["major"]
        self.workspace = cupy().empty(_WORKSPACE.get(major, 4 << 20), dtype="uint8")
        size = self.workspace.nbytes
        functions.check_status(library.cublasSetWorkspace_v2(handle, self.workspace.data.ptr, size))
        return Cublas(_Direct(functions, library), lambda: handle)


class _Direct:
    """CuPy's module of cuBLAS, but for ``gemmEx``, which is called in the library without setting a stream."""

    def __init__(self, functions: Any, library: Any) -> None:
        self._functions, self._library = functions, library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def gemmEx(self, *arguments: int) -> None:  # noqa: N802
        """Call ``cublasGemmEx``. Raises CuPy's CUBLASError for a status that is none of success."""
        self._functions.check_status(self._library.cublasGemmEx(*arguments))


@functools.cache
def _cublas_library() -> Any:
    """Return cuBLAS itself, or None: CuPy's extension module is linked to it, so its symbols are found through that."""
    functions = _cublas_module()
    if functions is None:
        return None
    try:
        library = ctypes.CDLL(functions.__file__)
        gemm, workspace = library.cublasGemmEx, library.cublasSetWorkspace_v2
    except (OSError, AttributeError):
        return None
    number: Any = ctypes.c_int
    address: Any = ctypes.c_void_p
    matrix = [address, number, number]  # with its type and the distance of its lines
    gemm.argtypes = [address, *[number] * 5, address, *matrix, *matrix, address, *matrix, number, number]
    workspace.argtypes = [address, address, ctypes.c_size_t]
    return library


@contextlib.contextmanager
def using(own: StreamCublas) -> Iterator[None]:
    """Let `cublas` give this one to the block, in this thread."""
    outer = getattr(_own, "cublas", None)
    _own.cublas = own
    try:
        yield
    finally:
        _own.cublas = outer


def is_device_array(value: Any) -> bool:
    """Say whether `value` is a CuPy array, without importing CuPy."""
    module = sys.modules.get("cupy")
    return module is not None and isinstance(value, getattr(module, "ndarray", ()))
