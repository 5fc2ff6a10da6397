"""The design probes: their kernels on the emulated device and through NVRTC, their questions on a double."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu_design, gpu_probe
from gpulayers import _cupy
from gpulayers.launch import DeviceProperties
from gpulayers.ops.batch_norm import arrays as batch_norm_arrays
from gpulayers.ops.batch_norm import plan as batch_norm_plan
from gpulayers.ops.batch_norm.arrays import MovingStatistics
from tests.kernels.emulation.build import compiler
from tests.kernels.nvrtc import compile_for, unusable_reason
from tests.kernels.strict_array import launcher, xp

emulated = pytest.mark.emulated


def numbers(*shape):
    return np.random.default_rng(0).integers(0, 2**31, shape, dtype=np.uint32)


def total(host):
    return int(host.sum(dtype=np.uint32))


@emulated
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_sweep_reads_everything_once_and_copies(reverse, stream):
    host = numbers(4 * 1777)
    x, y, out = xp.asarray(host), xp.zeros(host.size, "uint32"), xp.zeros(1, "uint32")
    gpu_design.sweep(x, None, out, 2, reverse, stream)
    assert out.get()[0] == total(host) and not y.get().any()
    gpu_design.sweep(x, y, out, 2, reverse, stream)
    np.testing.assert_array_equal(y.get(), host)


@emulated
@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
def test_slabs_read_every_element_once(lanes):
    host, out = numbers(301, 4 * 40), xp.zeros(1, "uint32")
    gpu_design.slab(xp.asarray(host), out, lanes, 3)
    assert out.get()[0] == total(host)


@emulated
@pytest.mark.parametrize("loads", [1, 2, 4, 8])
def test_copies_with_loads_ahead(loads):
    host = numbers(4 * 3001)
    y = xp.zeros(host.size, "uint32")
    gpu_design.ahead(xp.asarray(host), y, loads, 2)
    np.testing.assert_array_equal(y.get(), host)


@emulated
@pytest.mark.parametrize(("pieces", "blocks"), [(1, 1), (5, 2), (23, 3), (2, 4)])
def test_bulk_copies_bring_every_piece_once(pieces, blocks):
    host, out = numbers(pieces * 1024 // 4), xp.zeros(1, "uint32")
    gpu_design.bulk(xp.asarray(host), out, blocks, 64, stage_bytes=1024)
    assert out.get()[0] == total(host)


@emulated
@pytest.mark.parametrize("cluster", [1, 8])
def test_blocks_that_are_alive_are_counted(cluster, monkeypatch):
    # How many are alive at a time is what a device decides, so runs may differ in it, as only this kernel may.
    monkeypatch.setattr(launcher, "runs", launcher.runs[:1])
    most, widths = gpu_design.alive(xp.empty(1, "uint32"), 16, cluster, 0, 3)
    assert 1 <= most <= 16 and widths == [cluster]


@pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason())
@pytest.mark.parametrize("kernel", gpu_design.KERNELS, ids=lambda kernel: kernel.name)
def test_every_specialisation_compiles(kernel):
    for specialisation in kernel.specialisations():
        report = compile_for(specialisation.text, specialisation.name, 90)
        assert not report.spill_stores and not report.stack and report.registers <= 64


@emulated
@pytest.mark.parametrize(("axis", "shape"), [(1, (3000, 16)), (1, (2000, 64)), (1, (21, 3, 40, 44))])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_forced_plans_compute_the_same_and_end_with_the_block(axis, shape, mode, monkeypatch):
    small = DeviceProperties("emulated", 90, 8, 164 << 10, 164 << 10, 65536, 1024, 1024, 1 << 20)
    monkeypatch.setattr(launcher, "device", small)
    monkeypatch.setattr(launcher, "runs", launcher.runs[:1])
    rng = np.random.default_rng(1)
    x, dy = (xp.asarray(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    gamma, beta = xp.ones(shape[axis], "float32"), xp.zeros(shape[axis], "float32")
    moving = MovingStatistics(xp.zeros(shape[axis], "float32"), xp.ones(shape[axis], "float32"), 0.1)
    forward = batch_norm_arrays.forward(x, gamma, beta, moving=moving, axis=(axis,), epsilon=1e-3)

    def run():
        if mode == "backward":
            return batch_norm_arrays.backward(dy, x, gamma, forward.saved, axis=(axis,)).dx.get()
        return batch_norm_arrays.forward(x, gamma, beta, moving=moving, axis=(axis,), epsilon=1e-3).y.get()

    truth, kept = run(), {"forward": 1, "backward": 2}[mode]
    plans = gpu_design._plans(shape, axis, x, kept)
    assert {plan.regime for plan in plans.values()} >= {"grid", "sweeps"} and len(plans) > 4
    for plan in plans.values():
        launcher.record.clear()
        with batch_norm_plan.forcing(lambda _, plan=plan: plan):
            np.testing.assert_allclose(run(), truth, rtol=1e-5, atol=1e-5)
        assert len(launcher.record) == (2 if plan.regime == "sweeps" else 1)
    np.testing.assert_array_equal(run(), truth)


def test_the_driver_is_asked_with_its_own_structs(tmp_path):
    """Against NVIDIA's header, where a wheel brings it: a library that answers with what it was asked."""
    header = next(iter(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/cuda.h")), None)
    if header is None or compiler() is None:
        pytest.skip("needs cuda.h and a compiler")
    source, library = tmp_path / "ask.cpp", tmp_path / "libask.so"
    source.write_text("""
#include <cuda.h>
extern "C" CUresult CUDAAPI cuOccupancyMaxActiveClusters(int* most, CUfunction function, const CUlaunchConfig* c) {
    const CUlaunchAttribute& a = c->attrs[0];
    const bool right = c->gridDimX == 8 && c->gridDimY == 1 && c->gridDimZ == 1 && c->blockDimX == 256
        && c->blockDimY == 1 && c->blockDimZ == 1 && c->sharedMemBytes == 1000 && c->hStream == nullptr
        && c->numAttrs == 1 && a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && a.value.clusterDim.x == 8
        && a.value.clusterDim.y == 1 && a.value.clusterDim.z == 1;
    *most = right ? 17 : -1;
    return function == (CUfunction)4096 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8, "");
static_assert(CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH == 11 && CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT == 12, "");
static_assert(CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH == 13, "");
""")
    command = ["g++", "-shared", "-fPIC", "-I", header.parent, source, "-o", library]
    subprocess.run(command, check=True)
    assert gpu_design.active_clusters(4096, 8, 256, 1000, str(library)) == 17
    with pytest.raises(RuntimeError, match="says 400"):
        gpu_design.active_clusters(1, 8, 256, 1000, str(library))


def test_the_width_of_clusters_is_set_with_height_and_depth(device, monkeypatch):
    """CUDA takes the three together; the driver is also asked how many clusters fit beside so much shared memory."""
    calls, asked = [], []
    driver = SimpleNamespace(funcSetAttribute=lambda *given: calls.append(given))
    monkeypatch.setattr(device, "cuda", SimpleNamespace(driver=driver), raising=False)
    monkeypatch.setattr(gpu_design, "_function", lambda like, cluster: cluster)
    monkeypatch.setattr(gpu_design, "active_clusters", lambda *given: asked.append(given) or 13)
    found = gpu_design.clusters(None)
    assert [call for call in calls if call[0] == 1] == [(1, 11, 4), (1, 12, 1), (1, 13, 1)]
    assert [given[3] >> 10 for given in asked][:2] == [100, 120] and {given[:3] for given in asked} == {(8, 8, 256)}
    assert found["clusters of 8, by the driver"].startswith("13 with 100 KiB; 13 with 120 KiB; 13 with 225 KiB")
    assert found["answer: cluster width at run time"] == "set to 4, blocks saw [1]"


@pytest.fixture
def device(monkeypatch):
    if compiler() is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(_cupy, "cupy", lambda: xp)
    monkeypatch.setattr(launcher, "runs", launcher.runs[:1])
    return xp


@pytest.mark.parametrize(
    ("measure", "sizes"),
    [
        (gpu_design.sweep_order, {"megabytes": (1,)}),
        (gpu_design.slab_width, {"rows": 64}),
        (gpu_design.bulk_copies, {"megabytes": 1}),
        (gpu_design.loads_ahead, {"megabytes": 1}),
        (gpu_design.clusters, {}),
        (gpu_design.forced_plans, {"shapes": ((3, (2, 4, 4, 16)), (1, (3, 4, 5, 5)))}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_question_has_figures_and_one_answer(device, measure, sizes):
    times = iter(np.linspace(100.0, 1.0, 40))

    def elapsed(work):
        work()
        return float(next(times))

    found = measure(elapsed, **sizes)
    answers = [value for name, value in found.items() if name.startswith("answer: ")]
    assert len(answers) == 1 and "\n" not in answers[0] and len(answers[0]) < 400
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    assert len(found) > 1
    json.dumps(found)


def test_design_questions_are_asked_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_probe.gl, "gpu_available", lambda: True)
    asked = []

    def good(elapsed):
        asked.append(elapsed)
        return {"answer: a thing": "it is", "GB/s: a thing": 12.5}

    def bad(elapsed):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu_design, "MEASURES", (good, bad))
    assert gpu_probe.main(["--design", "--out", str(tmp_path / "design.json")]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines().index("GB/s: a thing: 12.5") == 1, "shown before the next is asked"
    assert printed.splitlines()[-1] == "answer: a thing: it is" and "bad failed: RuntimeError: no such luck" in printed
    assert json.loads((tmp_path / "design.json").read_text())["GB/s: a thing"] == 12.5
    assert asked == [gpu_probe._elapsed]
