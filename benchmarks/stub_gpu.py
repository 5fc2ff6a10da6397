"""A GPU that does nothing, under a CuPy that is real: what the host spends on a call, measured where there is no GPU.

CuPy's own arrays lie in host memory, and its own ``driver.launchKernel`` calls a stub of libcuda, which keeps the last
argument. Nothing computes: no contents are written, and every kernel counts as compiled. Not CuPy's own are the memory
pool and the questions for the current device and stream, which the CUDA runtime, linked into CuPy, would answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpulayers import _cupy
from gpulayers.device import _by_kind, _modules, register_array_type
from gpulayers.launch import CupyLauncher, register_launcher
from gpulayers.launch.launcher import _launchers

__all__ = ["last_argument", "launches", "missing", "stub_gpu"]

# The argument struct of the last launch is kept: a driver copies it before it returns, and so does this one.
_DRIVER = """
#include <string.h>
static char kept[4096];
static unsigned long long last[10];
static long count = 0;
static int keep(void* function, const unsigned* sizes, void* stream, void** parameters, int cooperative) {
    last[0] = (unsigned long long)function;  /* a function's handle is the size of its argument */
    for (int i = 0; i < 7; ++i) last[1 + i] = sizes[i];
    last[8] = (unsigned long long)stream;
    last[9] = cooperative;
    memcpy(kept, parameters[0], last[0]);
    ++count;
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    const unsigned sizes[7] = {gx, gy, gz, bx, by, bz, shared};
    return keep(function, sizes, stream, parameters, 0);
}
int cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, void* stream, void** parameters) {
    const unsigned sizes[7] = {gx, gy, gz, bx, by, bz, shared};
    return keep(function, sizes, stream, parameters, 1);
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
long stub_launches(void) { return count; }
const char* stub_argument(void) { return kept; }
const unsigned long long* stub_last(void) { return last; }
"""
_MEMORY = 64 << 20
_PROPERTIES = {
    "name": b"stub", "major": 9, "minor": 0, "multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448,
    "sharedMemPerMultiprocessor": 233472, "regsPerMultiprocessor": 65536, "maxThreadsPerMultiProcessor": 2048,
    "maxThreadsPerBlock": 1024, "l2CacheSize": 50 << 20,
}  # fmt: skip


def missing() -> str:
    """Return why the stub cannot be used, or an empty string."""
    if not _cupy.installed():
        return "CuPy is not installed"
    if ctypes.util.find_library("cuda") is not None:
        return "a CUDA driver is installed, which the stub would stand in the way of"
    return "" if _compiler() else "no C compiler"


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


@functools.cache
def _library() -> ctypes.CDLL:
    """Build the stub and load it under the name by which CuPy looks for the driver."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
        source.write_text(_DRIVER, encoding="utf-8")
        command = [str(_compiler()), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", target, source]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.stub_launches.restype = ctypes.c_long
    library.stub_argument.restype = ctypes.c_void_p
    library.stub_last.restype = ctypes.POINTER(ctypes.c_ulonglong)
    return library


def launches() -> int:
    """Return how many launches the stub has seen."""
    return int(_library().stub_launches())


def last_argument() -> tuple[tuple[int, ...], bytes]:
    """Return (function, grid, block, shared bytes, stream, cooperative), flat, and the struct of the last launch."""
    facts = tuple(int(word) for word in _library().stub_last()[:10])
    return facts, ctypes.string_at(_library().stub_argument(), facts[0])


class _StubCupy(types.ModuleType):
    """CuPy with the calls replaced that the runtime, which cannot be stubbed, would have to answer."""

    def __init__(self, cupy: types.ModuleType) -> None:
        super().__init__("cupy")
        self._cupy, self.compiled, self.cublas = cupy, 0, None
        runtime = types.SimpleNamespace(
            getDevice=lambda: 0, getDeviceProperties=lambda number: _PROPERTIES, memGetInfo=lambda: (1, 1)
        )
        cuda = types.ModuleType("cupy.cuda")
        cuda.__dict__.update({name: getattr(cupy.cuda, name) for name in dir(cupy.cuda) if name[:2] != "__"})
        cuda.runtime = runtime  # type: ignore[attr-defined]
        stream = types.SimpleNamespace(ptr=0)
        cuda.get_current_stream = lambda *number: stream  # type: ignore[attr-defined]
        cuda.Device = contextlib.nullcontext  # type: ignore[attr-defined]
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cupy, name)

    def RawKernel(self, text: str, name: str, options: tuple[str, ...]) -> Any:  # noqa: N802
        """Count a compilation; the size of the argument struct is asserted in the text."""
        self.compiled += 1
        size = int(text.split(f"static_assert(sizeof({name}_arguments) == ")[1].split(",")[0])
        return types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=size), shared_size_bytes=0)

    def asarray(self, value: Any, dtype: Any = None, **keywords: Any) -> Any:
        """Return the array itself, or memory as large as a host array."""
        if isinstance(value, self._cupy.ndarray):
            return value
        host = np.asarray(value, dtype)
        return self._cupy.empty(host.shape, host.dtype)

    def zeros(self, shape: Any, dtype: Any = float) -> Any:
        """Return memory that nobody reads."""
        return self._cupy.empty(shape, dtype)


@contextlib.contextmanager
def stub_gpu() -> Iterator[Any]:
    """Make CuPy's arrays live on the stub, and give their module. Once used, no driver can be loaded in the process."""
    _library()
    real = _cupy.cupy()
    memory = np.zeros(_MEMORY, np.uint8)
    start = -memory.ctypes.data % 512
    block = real.cuda.memory.UnownedMemory(memory.ctypes.data + start, _MEMORY - start, memory, device_id=0)
    place = 0

    def allocate(size: int) -> Any:  # round and round: what is freed is never asked about
        nonlocal place
        place = 0 if place + size > _MEMORY - start else place
        pointer = real.cuda.memory.MemoryPointer(block, place)
        place += -(-size // 512) * 512
        return pointer

    module, names = _StubCupy(real), dict(_modules)
    kept = _cupy.cupy, _launchers["gpu"]
    _cupy.cupy = lambda: module  # type: ignore[assignment, return-value]
    register_array_type(real.ndarray, module, "gpu")
    register_launcher("gpu", CupyLauncher())
    try:
        with real.cuda.using_allocator(allocate):
            yield module
    finally:
        _cupy.cupy = kept[0]
        register_launcher("gpu", kept[1])
        _modules.clear()
        _modules.update(names)
        _by_kind.pop("gpu", None)
