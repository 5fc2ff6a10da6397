"""What gpulayers finds on this machine: ``python -m gpulayers.report``; ``--warm-cache`` compiles every kernel."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpulayers import _cupy
from gpulayers.device import current_device, gpu_unavailable_reason
from gpulayers.launch import kernel_list
from gpulayers.launch.source import kernel_folder

__all__ = ["cache_folder", "cupy_wheels", "device_lines", "main", "report", "warm_cache"]

_PACKAGES = ("gpulayers", "numpy", "ml_dtypes", "safetensors", "matplotlib", "tqdm", "torch", "jax", "tensorflow")
_CUPY_WHEEL = re.compile(r"cupy(-cuda\d+x?|-rocm-[\d-]+)?")


def _versions() -> list[str]:
    lines = [f"Python      {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:<11} {version}")
    return lines


def cupy_wheels(names: Iterable[tuple[str, str]] | None = None) -> list[str]:
    """Return the installed distributions that all bring a module called `cupy`, as ``name version``, sorted.

    More than one is a broken installation: they overwrite each other's files. `names`: (name, version) pairs to look
    through instead of what is installed.

    >>> cupy_wheels([("numpy", "2.0"), ("cupy-cuda12x", "14.0"), ("cupy_cuda13x", "14.0"), ("cupy-xarray", "1")])
    ['cupy-cuda12x 14.0', 'cupy-cuda13x 14.0']
    """
    if names is None:
        names = [(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()]
    tidy = {(name.lower().replace("_", "-"), version) for name, version in names}
    return sorted(f"{name} {version}" for name, version in tidy if _CUPY_WHEEL.fullmatch(name))


def _cupy_lines() -> list[str]:
    wheels = cupy_wheels()
    lines = [f"wheels      {', '.join(wheels) or 'none'}"]
    if len(wheels) > 1:
        names = " ".join(wheel.split()[0] for wheel in wheels)
        lines.append(
            f"DUPLICATES  these overwrite each other. Run: pip uninstall --yes {names}, then install one of "
            "gpulayers[cuda12] and gpulayers[cuda13]."
        )
    if _cupy.installed():
        lines += _cupy.configuration().strip().splitlines()
    else:
        lines.append(gpu_unavailable_reason())
    return lines


def device_lines() -> list[str]:
    """Return a line for each GPU, or one that says why there is none, and where new arrays are placed."""
    reason = gpu_unavailable_reason()
    if reason:
        return [f"no GPU: {reason}", f"arrays are placed on {current_device()}"]
    runtime = _cupy.cupy().cuda.runtime
    lines = []
    for number in range(runtime.getDeviceCount()):
        found = runtime.getDeviceProperties(number)
        name = found["name"].decode() if isinstance(found["name"], bytes) else found["name"]
        lines.append(
            f"gpu:{number} {name}, sm_{found['major']}{found['minor']}, {found['totalGlobalMem'] >> 20} MiB, "
            f"{found['multiProcessorCount']} multiprocessors, L2 {found['l2CacheSize'] >> 20} MiB, "
            f"{found['sharedMemPerBlockOptin'] >> 10} KiB shared per block"
        )
    return [*lines, f"arrays are placed on {current_device()}"]


def cache_folder() -> Path:
    """Return where CuPy keeps compiled kernels: ``CUPY_CACHE_DIR``, else ``~/.cupy/kernel_cache``."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _cache_lines() -> list[str]:
    folder = cache_folder()
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return ["in memory (CUPY_CACHE_IN_MEMORY=1): kernels are compiled anew in every process"]
    if not folder.is_dir():
        return [f"{folder}: does not exist yet"]
    files = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    state = "" if os.access(folder, os.W_OK) else ", NOT WRITABLE: set CUPY_CACHE_DIR to a folder of this user"
    return [f"{folder}: {len(files)} files, {sum(files) / 2**20:.1f} MiB{state}"]


def _kernel_lines() -> list[str]:
    specialisations = kernel_list()
    counts = Counter((s.kernel.source or "generated", s.name) for s in specialisations)
    lines = [f"sources in {kernel_folder()}"]
    lines += [f"{name:<28} {source:<16} {count} specialisations" for (source, name), count in sorted(counts.items())]
    return [*lines, f"{len(counts)} kernels, {len(specialisations)} specialisations"]


def report() -> str:
    """Return the whole report as text: versions, CuPy, devices, cache and kernels. Compiles nothing."""
    parts = {
        "Versions": _versions(),
        "CuPy": _cupy_lines(),
        "Devices": device_lines(),
        "Kernel cache": _cache_lines(),
        "Kernels": _kernel_lines(),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items())


def warm_cache(out: Any = None) -> int:
    """Compile every kernel for the current GPU into CuPy's cache; return how many failed. Prints to `out`.

    Kernels for newer GPUs than the current one are left out. Raises DeviceError from the first use of a missing GPU:
    ask `gpu_unavailable_reason` first.
    """
    out = sys.stdout if out is None else out
    module = _cupy.cupy()
    like = module.empty(1, dtype="float32")
    major_minor = module.cuda.runtime.getDeviceProperties(module.cuda.runtime.getDevice())
    arch = 10 * major_minor["major"] + major_minor["minor"]
    wanted = [s for s in kernel_list() if s.minimum_arch <= arch]
    failed, start = 0, time.perf_counter()
    for number, specialisation in enumerate(wanted, 1):
        try:
            specialisation.resident_blocks(like, 32)  # the question that needs the compiled kernel and launches nothing
        except Exception as error:  # go on: one kernel that fails must not hide the others
            failed += 1
            print(f"failed: {error}", file=out)
        if number % 50 == 0 or number == len(wanted):
            seconds = time.perf_counter() - start
            print(f"compiled {number - failed} of {len(wanted)} kernels in {seconds:.0f} s", file=out, flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 1 where ``--warm-cache`` found no GPU or a kernel that fails."""
    parser = argparse.ArgumentParser(prog="python -m gpulayers.report", description=__doc__)
    parser.add_argument("--warm-cache", action="store_true", help="compile every kernel for the current GPU")
    options = parser.parse_args(arguments)
    print(report())
    if not options.warm_cache:
        return 0
    print()
    if reason := gpu_unavailable_reason():
        print(f"--warm-cache: nothing was compiled, because no GPU is usable. {reason}", file=sys.stderr)
        return 1
    return 1 if warm_cache() else 0


if __name__ == "__main__":
    sys.exit(main())
