"""The design probes: their kernels on the emulated device and through NVRTC, their questions on a double."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import gpu_design, gpu_probe
from gpulayers import _cupy
from gpulayers.ops import batch_norm_arrays, batch_norm_plan
from gpulayers.ops.batch_norm_arrays import MovingStatistics
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
def test_forced_plans_compute_the_same_and_end_with_the_block():
    host = np.random.default_rng(1).standard_normal((4, 6, 6, 16)).astype(np.float32)
    x, gamma, beta = xp.asarray(host), xp.ones(16, "float32"), xp.zeros(16, "float32")

    def run():
        moving = MovingStatistics(xp.zeros(16, "float32"), xp.ones(16, "float32"), 0.1)
        return batch_norm_arrays.forward(x, gamma, beta, moving=moving, axis=(3,), epsilon=1e-3).y.get()

    chosen = []
    with batch_norm_plan.forcing(lambda plan: chosen.append(plan) or plan):
        truth = run()
    regimes = set()
    for name, plan in gpu_design._variants(chosen[0]):
        launcher.record.clear()
        with batch_norm_plan.forcing(lambda _, plan=plan: plan):
            np.testing.assert_allclose(run(), truth, rtol=1e-5, atol=1e-6)
        regimes.add((name, len(launcher.record)))
    launcher.record.clear()
    np.testing.assert_array_equal(run(), truth)
    assert len(launcher.record) == 1 and all(count == 2 for _, count in regimes), "two sweeps inside, as chosen outside"


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
        (gpu_design.forced_plans, {"shapes": ((2, 4, 4, 16),)}),
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
    assert all(value > 0 for name, value in found.items() if not name.startswith("answer: "))
    assert len(found) > 1
    json.dumps(found)


def test_design_questions_are_asked_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_probe.gl, "gpu_available", lambda: True)
    asked = []

    def good(elapsed):
        asked.append(elapsed)
        return {"GB/s: a thing": 12.5, "answer: a thing": "it is"}

    def bad(elapsed):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu_design, "MEASURES", (good, bad))
    assert gpu_probe.main(["--design", "--out", str(tmp_path / "design.json")]) == 1
    printed = capsys.readouterr().out
    assert "answer: a thing: it is" in printed and "bad failed: RuntimeError: no such luck" in printed
    assert json.loads((tmp_path / "design.json").read_text())["GB/s: a thing"] == 12.5
    assert asked == [gpu_probe._elapsed]
