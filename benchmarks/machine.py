"""What the numbers were measured on: the header of a report, and the sizes that decide a row's floor."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing_cpu import thread_count
from gpulayers import _cupy

__all__ = ["class_name", "commit", "cpu_model", "cuda_version", "driver_version", "header", "on_chip_bytes"]

ROOT = Path(__file__).resolve().parents[1]
DRIVER_PAGE = Path("/proc/driver/nvidia/version")


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpu_properties() -> dict[str, Any]:
    runtime = _cupy.cupy().cuda.runtime
    return runtime.getDeviceProperties(runtime.getDevice())


def _gpu_name() -> str:
    name = _gpu_properties()["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def driver_version() -> str:
    """Return the version of NVIDIA's driver, from the kernel or, as in some containers, from NVML; or ``unknown``."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", DRIVER_PAGE.read_text(encoding="utf-8"))
        if found:
            return found[1]
    except OSError:
        pass
    try:
        nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
    except OSError:
        return "unknown"
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return "unknown"
    nvml.nvmlShutdown()
    return text.value.decode()


def cuda_version(number: int) -> str:
    """Return a version of CUDA as it is written, from its number.

    >>> cuda_version(12080)
    '12.8'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


def class_name(on_gpu: bool) -> str:
    """Return the folder name of this kind of machine, such as ``cpu-2-core-xeon`` or ``gpu-nvidia-h200``."""
    if on_gpu:
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", _gpu_name().lower()).strip("-")
    model = cpu_model().lower()
    brand = next((word for word in ("epyc", "xeon", "ryzen", "core", "apple", "neoverse") if word in model), "other")
    return f"cpu-{os.cpu_count()}-core-{brand}"


def commit() -> str:
    """Return the commit, with ``+changes`` where files that are measured differ from it.

    Where git cannot say, as in a copy of the files alone, the environment variable COMMIT does; else ``unknown``.
    """
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        measured = ["gpulayers", "kernels", "benchmarks/*.py", "benchmarks/peers"]
        changed = subprocess.run(["git", "status", "--porcelain", "--", *measured], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return head + ("+changes" if changed else "")


def on_chip_bytes(on_gpu: bool) -> int:
    """Return how much of an array can stay on chip between two sweeps.

    GPU: the shared memory that a block may have plus 128 KiB of registers, for every multiprocessor. CPU: the
    last-level cache.
    """
    if on_gpu:
        found = _gpu_properties()
        return int(found["multiProcessorCount"] * (found["sharedMemPerBlockOptin"] + (128 << 10)))
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20}[unit])
    return max(sizes, default=32 << 20)


def _blas() -> str:
    found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found.get('name')} {found.get('version')}"


def header(on_gpu: bool, copy_bytes_per_second: float) -> dict[str, str]:
    """Return the lines above a table, in order."""
    lines = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
    }
    if on_gpu:
        runtime = _cupy.cupy().cuda.runtime
        lines["GPU"] = f"{_gpu_name()}, {on_chip_bytes(True) / 2**20:.0f} MiB on chip"
        lines["driver"] = driver_version()
        versions = cuda_version(runtime.driverGetVersion()), cuda_version(runtime.runtimeGetVersion())
        lines["CUDA"] = "{} of the driver, {} of the runtime".format(*versions)
        lines["CuPy"] = _cupy.cupy().__version__
        lines["NVRTC"] = ".".join(map(str, _cupy.cupy().cuda.nvrtc.getVersion()))
        lines["cold L2"] = (
            "graph: rotating arrays in a captured graph, L2 warm where all of them fit it; flushed: 256 MB written "
            "before a call; clock: the same, from an idle device to the end, by the host's clock"
        )
    else:
        lines["threads"] = f"{thread_count()} may be used by each variant"
        lines["load"] = f"{os.getloadavg()[0]:.2f} on average in the last minute before the first row"
        lines["caches"] = f"as the interleaved variants leave them; last level {on_chip_bytes(False) >> 20} MiB"
    lines["Python"] = platform.python_version()
    lines["NumPy"] = f"{np.__version__}, {_blas()}"
    lines["copy of 256 MB"] = f"{copy_bytes_per_second / 1e9:.1f} GB/s, read and written"
    return lines
