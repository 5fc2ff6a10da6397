"""python -m gpulayers.report: what it lists, duplicates of CuPy, and --warm-cache with and without a GPU."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpulayers import _cupy, report
from gpulayers.launch import kernel_list

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "gpulayers.report", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_report_names_everything(tmp_path):
    done = run(CUPY_CACHE_DIR=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    for title in ("Versions", "CuPy", "Devices", "Kernel cache", "Kernels"):
        assert f"\n{title}\n" in f"\n{done.stdout}"
    assert f"{tmp_path / 'none'}: " in done.stdout  # CuPy may have made the folder already
    for name in {specialisation.name for specialisation in kernel_list()}:
        assert name in done.stdout
    assert f"{len(kernel_list())} specialisations" in done.stdout


@pytest.mark.skipif(not _cupy.unusable_reason(), reason="a GPU answers here")
def test_warm_cache_without_a_gpu_says_so():
    done = run("--warm-cache")
    assert done.returncode == 1
    assert "nothing was compiled, because no GPU is usable" in done.stderr
    assert _cupy.unusable_reason() in done.stdout + done.stderr


def test_duplicates_are_named(monkeypatch):
    monkeypatch.setattr(report, "cupy_wheels", lambda: ["cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"])
    (line,) = [line for line in report._cupy_lines() if line.startswith("DUPLICATES")]
    assert "pip uninstall --yes cupy-cuda12x cupy-cuda13x" in line


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([("CuPy", "13"), ("cupy_cuda11x", "13")], ["cupy 13", "cupy-cuda11x 13"]),
        ([("cupy-cuda12x", "14"), ("cupy_cuda12x", "14")], ["cupy-cuda12x 14"]),
        ([("cupy-xarray", "1"), ("cupyx", "1"), ("mycupy", "1")], []),
        ([("cupy-rocm-7-0", "14")], ["cupy-rocm-7-0 14"]),
    ],
)
def test_wheels_that_bring_cupy(names, found):
    assert report.cupy_wheels(names) == found


def test_cache_folder_and_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    (tmp_path / "a.cubin").write_bytes(bytes(3 << 19))
    assert report._cache_lines() == [f"{tmp_path}: 1 files, 1.5 MiB"]
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "none"))
    assert report._cache_lines() == [f"{tmp_path / 'none'}: does not exist yet"]
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert report._cache_lines()[0].startswith("in memory")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    assert report.cache_folder() == Path.home() / ".cupy" / "kernel_cache"


def gpu(monkeypatch, compile_one):
    """Pretend a GPU of compute capability 7.5, whose compiler is `compile_one`."""
    properties = {
        "name": b"Pretended", "major": 7, "minor": 5, "totalGlobalMem": 2**30, "multiProcessorCount": 2,
        "l2CacheSize": 2**20, "sharedMemPerBlockOptin": 2**16,
    }  # fmt: skip
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1, getDevice=lambda: 0, getDeviceProperties=lambda number: properties
    )
    module = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), empty=lambda n, dtype: "an array")
    monkeypatch.setattr(_cupy, "cupy", lambda: module)
    monkeypatch.setattr(report, "gpu_unavailable_reason", lambda: "")
    launcher = SimpleNamespace(resident_blocks=compile_one)
    monkeypatch.setattr("gpulayers.launch.kernel.launcher_of", lambda like: launcher)


def test_warm_cache_compiles_what_the_gpu_can_run(monkeypatch):
    compiled = []
    gpu(monkeypatch, lambda specialisation, threads, shared: compiled.append(specialisation))
    out = io.StringIO()
    assert report.warm_cache(out) == 0
    assert compiled == [s for s in kernel_list() if s.minimum_arch <= 75] and len(compiled) < len(kernel_list())
    assert f"compiled {len(compiled)} of {len(compiled)} kernels" in out.getvalue()


def test_warm_cache_goes_on_after_a_failure_and_fails(monkeypatch, capsys):
    broken = next(s for s in kernel_list() if s.minimum_arch <= 75)

    def compile_one(specialisation, threads, shared):
        if specialisation is broken:
            raise RuntimeError("no such instruction")

    gpu(monkeypatch, compile_one)
    monkeypatch.setattr(report, "report", lambda: "")
    assert report.main(["--warm-cache"]) == 1
    printed = capsys.readouterr().out
    assert "failed: no such instruction" in printed
    total = len([s for s in kernel_list() if s.minimum_arch <= 75])
    assert f"compiled {total - 1} of {total} kernels" in printed


def test_devices_of_a_gpu_machine(monkeypatch):
    gpu(monkeypatch, None)
    assert report.device_lines()[0] == (
        "gpu:0 Pretended, sm_75, 1024 MiB, 2 multiprocessors, L2 1 MiB, 64 KiB shared per block"
    )


@pytest.mark.gpu
def test_warm_cache_on_a_gpu():
    out = io.StringIO()
    assert report.warm_cache(out) == 0, out.getvalue()
