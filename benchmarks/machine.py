"""What the numbers were measured on: the header of a report, and the sizes that decide a row's floor."""

from __future__ import annotations

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

__all__ = ["class_name", "commit", "cpu_model", "header", "on_chip_bytes"]

ROOT = Path(__file__).resolve().parents[1]


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
        lines["driver"] = f"CUDA {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}"
        lines["CuPy"] = _cupy.cupy().__version__
        lines["NVRTC"] = ".".join(map(str, _cupy.cupy().cuda.nvrtc.getVersion()))
        lines["cold L2"] = (
            "graph: rotating arrays in a captured graph, L2 warm where all of them fit it; "
            "flushed: 256 MB written before a call"
        )
    else:
        lines["threads"] = f"{thread_count()} may be used by each variant"
        lines["load"] = f"{os.getloadavg()[0]:.2f} on average in the last minute before the first row"
        lines["caches"] = f"as the interleaved variants leave them; last level {on_chip_bytes(False) >> 20} MiB"
    lines["Python"] = platform.python_version()
    lines["NumPy"] = f"{np.__version__}, {_blas()}"
    lines["copy of 256 MB"] = f"{copy_bytes_per_second / 1e9:.1f} GB/s, read and written"
    return lines
