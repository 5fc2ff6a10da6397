"""The benchmark harness: byte counts by hand, the float64 truth, tables, missing peers, timing, the GPU script."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import gpulayers as gl
from benchmarks import data, machine, measure, measure_gpu, own, peers, report, shapes, timing_cpu, timing_gpu
from benchmarks.__main__ import main
from benchmarks.bytes_moved import minimum_bytes, regime_bytes
from benchmarks.measure import Row, Variant, error_of
from benchmarks.peers import exchange, remote, worker
from benchmarks.shapes import Case, small, suite_cases
from benchmarks.timing_cpu import Quantiles
from benchmarks.truth import truth
from gpulayers import _cupy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"

BN = Case("batch_norm", "forward", "NHWC", (32, 56, 56, 64), "float16")
SIZE = 32 * 56 * 56 * 64  # 6,422,528 elements


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (BN, 2 * SIZE * 2),
        (BN._replace(mode="inference"), 2 * SIZE * 2),
        (BN._replace(mode="backward"), 3 * SIZE * 2),
        (BN._replace(mode="step"), 5 * SIZE * 2),
        (BN._replace(op="batch_norm_relu_residual", mode="step"), 7 * SIZE * 2 + SIZE // 8),
        (BN._replace(op="batch_norm_renorm", mode="backward", dtype="float32"), 3 * SIZE * 4),
        (BN._replace(op="batch_norm_relu_residual"), 3 * SIZE * 2),
        (BN._replace(op="batch_norm_relu_residual", mode="backward"), 4 * SIZE * 2 + SIZE // 8),
        (Case("residual_add", "forward", "ND", (3, 5), "float64"), 3 * 15 * 8),
        # x 2x3, h and c in and out 4 * 2x5, output 2x5, weights (3 + 5) * 20
        (Case("lstm_cell", "forward", "ND", (2, 3, 5), "float32"), (6 + 40 + 10 + 160) * 4),
        # x 7x2x3, h in and out, outputs 7x2x5, weights (3 + 5) * 15; backward again dy, dx and the weights' gradients
        (Case("gru_sequence", "forward", "TND", (7, 2, 3, 5), "float32"), (42 + 20 + 70 + 120) * 4),
        (Case("gru_sequence", "backward", "TND", (7, 2, 3, 5), "float32"), (42 + 20 + 70 + 120 + 112 + 120) * 4),
        (Case("dense", "forward", "NC", (2, 3, 5), "float32"), (6 + 15 + 10) * 4),
        (Case("conv2d", "forward", "NHWC", (2, 4, 4, 3, 5), "float32"), (96 + 160 + 135) * 4),
        (Case("momentum", "step", "parameters", (10,), "float32"), 200),
        (Case("adam", "step", "parameters", (10,), "float32"), 280),
        (BN._replace(dtype="bfloat16"), 2 * SIZE * 2),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_minimum_bytes(case, expected):
    assert minimum_bytes(case) == expected


def test_regime_bytes():
    tensor = SIZE * 2
    assert regime_bytes(BN, tensor) == 2 * tensor  # fits: read once
    assert regime_bytes(BN, 0) == 3 * tensor
    assert regime_bytes(BN, tensor // 4) == 3 * tensor - tensor // 4
    assert regime_bytes(BN._replace(mode="backward"), tensor) == 4 * tensor  # x and dy would have to stay
    assert regime_bytes(BN._replace(mode="step"), tensor) == 6 * tensor
    assert regime_bytes(BN._replace(mode="inference"), 0) == 2 * tensor
    add = Case("residual_add", "forward", "ND", (3, 5), "float32")
    assert regime_bytes(add, 0) == minimum_bytes(add)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_the_resnet50_list_is_the_network(layout):
    """Against the network built from its blocks: 1x1, 3x3, 1x1 and, in the first of a stage, a projection."""
    wanted = Counter({(112, 64): 1})
    for side, width, blocks in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        wanted[side, width] += 2 * blocks
        wanted[side, 4 * width] += blocks + 1
    found = {}
    for case in shapes.resnet50(32, layout):
        batch, *image = case.shape
        side, channels = (image[0], image[2]) if layout == "NHWC" else (image[1], image[0])
        assert batch == 32
        assert found.setdefault((side, channels), case.count) == case.count
    assert found == wanted and sum(found.values()) == 53


def test_row_names_are_unique():
    names = [case.name for case in shapes.cases([32, 256])]
    assert len(set(names)) == len(names)
    assert {"resnet50 N=256"} == {case.regime for case in shapes.resnet50(256)}


def test_virtual_batches_are_of_128_rows():
    ghosts = [case for case in shapes.norm_cases() if case.groups > 1]
    assert {case.shape for case in ghosts} == {(1024, 512), (8192, 1024), (65536, 256)}
    assert all(case.shape[0] == 128 * case.groups for case in ghosts)


def test_suites_cover_every_operation_and_are_small_when_quick():
    quick, full = suite_cases(True), suite_cases(False)
    assert {case.op for case in quick} == {case.op for case in full} == {case.op for case in shapes.cases([8])}
    assert {(c.op, c.mode, c.layout) for c in quick} == {(c.op, c.mode, c.layout) for c in full}
    assert max(np.prod(case.shape) for case in quick) < 10_000


def test_large_arrays_repeat_what_was_drawn():
    drawn = data._random(np.random.default_rng(0), (3, data.DRAWN), np.float16, mean=0.5)
    assert drawn.shape == (3, data.DRAWN) and drawn.dtype == np.float16 and np.array_equal(drawn[0], drawn[2])
    assert drawn[0].mean(dtype=float) == pytest.approx(0.5, abs=0.01) and np.unique(drawn[0, :1000]).size > 500
    whole = data._random(np.random.default_rng(0), (data.DRAWN // 64, 64), np.float32)
    assert len(np.unique(whole[:, 0])) > 0.9 * len(whole), "the channels' values differ"


def test_data_depend_on_the_row_alone():
    case = small(BN)
    first, second = data.make(case), data.make(case)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["x"], data.make(case._replace(mode="inference"))["x"])
    assert data.make(case._replace(dtype="bfloat16"))["x"].dtype.name == "bfloat16"


@pytest.mark.parametrize("size", [10, 20_000, 2_000_000])
def test_parameters_are_cut_without_loss(size):
    pieces = data.split_parameters(np.arange(size))
    assert np.array_equal(np.concatenate(pieces), np.arange(size))
    assert all(piece.size for piece in pieces) or size < 20


def test_a_parameter_list_like_a_network():
    assert len(data.split_parameters(np.zeros(25_557_032, np.int8))) == 161


@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_relu_residual", "batch_norm_renorm", "batch_norm_ghost"])
def test_a_step_is_its_forward_and_its_backward(op):
    """The truth and our results: all of both passes, on the step's own data."""
    case = small(next(c for c in shapes.cases([8], "float64") if (c.op, c.mode, c.layout[0]) == (op, "step", "N")))
    host = data.make(case)
    passes = [truth(case._replace(mode=mode), host) for mode in ("forward", "backward")]
    wanted = truth(case, host)
    assert wanted.keys() == passes[0].keys() | passes[1].keys() and {"y", "mean", "dx", "dgamma"} <= wanted.keys()
    for name, value in {**passes[0], **passes[1]}.items():
        np.testing.assert_array_equal(wanted[name], value)
    found = own.prepare(case, data.place(case, host, np), np)()
    assert wanted.keys() <= found.keys()
    assert all(error_of({name: found[name]}, {name: wanted[name]}, np.asarray) < 1e-9 for name in wanted)


GRADIENT_CASES = [case for case in suite_cases(True) if case.mode == "backward" and case.dtype == "float32"]
GRADIENT_CASES = list({(c.op, c.layout): c._replace(dtype="float64") for c in GRADIENT_CASES}.values())


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: f"{case.op}-{case.layout}")
def test_true_gradients_agree_with_finite_differences(case):
    host = data.make(case)
    gradient = truth(case, host)["dx"]
    direction = np.random.default_rng(1).standard_normal(host["x"].shape)
    renorm_limits = case.op == "batch_norm_renorm"
    if renorm_limits:  # r and d are constants of the gradient: clip them, so that they are constants of the value, too
        host["renorm_stddev"] = np.full_like(host["renorm_stddev"], 1e-3)
        host["renorm_mean"] = np.full_like(host["renorm_mean"], 100.0)
        gradient = truth(case, host)["dx"]

    def value(step):
        moved = {**host, "x": host["x"] + step * direction}
        found = truth(case._replace(mode="forward"), moved)
        return float(np.sum(found.get("y", found.get("output")) * host["dy"]))

    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(np.sum(gradient * direction)) == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_error_of_sees_what_is_wrong():
    true = {"y": np.array([1.0, -4.0]), "mean": np.array([2.0])}
    assert error_of({"y": np.array([1.0, -4.0])}, true, np.asarray) == 0.0
    assert error_of({"y": np.array([1.0, -3.0])}, true, np.asarray) == 0.25
    assert error_of({"y": [np.array([1.0]), np.array([-3.0])]}, true, np.asarray) == 0.25  # in pieces
    assert error_of({"y": np.array([1.0, np.nan])}, true, np.asarray) == float("inf")
    with pytest.raises(ValueError, match="wrong shape"):
        error_of({"y": np.array([1.0])}, true, np.asarray)
    with pytest.raises(ValueError, match="nothing to compare"):
        error_of({"z": np.array([1.0])}, true, np.asarray)


def test_a_wrong_result_of_ours_fails_the_row(monkeypatch):
    case = small(BN._replace(mode="inference", dtype="float32"))
    prepare = own.prepare

    def wrong(case, given, xp):
        function = prepare(case, given, xp)
        return lambda: {"y": function()["y"] * np.float32(1.001)}

    measure.measure(case, [], False, 1 << 20, 0.001)
    monkeypatch.setattr(own, "prepare", wrong)
    with pytest.raises(ValueError, match="the result is wrong"):
        measure.measure(case, [], False, 1 << 20, 0.001)


def test_a_missing_peer_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (peer,) = peers.find(["tensorflow"])
    assert peer.module is None and peer.reason.startswith("not installed")
    with pytest.raises(ValueError, match="no such peer.*'keras'"):
        peers.find(["keras"])
    case = small(BN._replace(dtype="float32"))
    row = measure.measure(case, [peer], False, 1 << 20, 0.001)
    assert row.variants["tensorflow"].times is None and row.variants["tensorflow"].reason == peer.reason
    assert report.record(row)["skipped"] == {"tensorflow": peer.reason}


def test_a_peer_that_cannot_begin_is_a_reason(monkeypatch):
    """JAX, for one, has its GPU library raise when it is first asked for it."""
    def broken(on_gpu):
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setitem(sys.modules, "benchmarks.peers.jax_jit_peer", types.SimpleNamespace(unavailable=broken))
    (peer,) = peers.find(["jax_jit"])
    assert peer.module is None and peer.reason == "RuntimeError: Unable to initialize backend 'cuda'"


def test_a_peer_that_fails_or_has_no_such_row_is_skipped_with_its_reason():
    def failing(case, given, on_gpu):
        raise RuntimeError("out of luck")

    module = types.SimpleNamespace(prepare=failing, to_numpy=np.asarray)
    nothing = types.SimpleNamespace(prepare=lambda *_: "no such operation", to_numpy=np.asarray)
    late = types.SimpleNamespace(prepare=lambda *_: lambda: {}, to_numpy=np.asarray)
    found = [peers.Peer("torch", module, ""), peers.Peer("plain", nothing, ""), peers.Peer("jax_jit", late, "")]
    row = measure.measure(small(BN._replace(dtype="float32")), found, False, 1 << 20, 0.001)
    assert row.variants["torch"].reason == "RuntimeError: out of luck"
    assert row.variants["plain"].reason == "no such operation"
    assert row.variants["jax_jit"].reason.startswith("ValueError: benchmarks: nothing to compare")
    assert row.variants["gpulayers"].times.samples >= 5 and row.variants["copy"].times.samples >= 5


@pytest.mark.parametrize("name", [name for name in peers.NAMES if name != "torch_compile"])  # which needs a compiler
def test_peers_compute_the_same(name):
    (peer,) = peers.find([name])
    if peer.module is None:
        pytest.skip(peer.reason)
    computed = 0
    for case in {(c.op, c.mode, c.layout): c for c in suite_cases(True) if c.dtype == "float32"}.values():
        host = data.make(case)
        function = peer.module.prepare(case, {key: value.copy() for key, value in host.items()}, False)
        if not isinstance(function, str):
            computed += 1
            limit = 1e-4 if case.op == "adam" else 1e-5  # PyTorch's epsilon is added to the corrected root
            assert error_of(function(), truth(case, host), peer.module.to_numpy) < limit, case.name
    assert computed >= (2 if name == "thinc" else 9)


def test_a_wrong_result_of_a_peer_is_a_reason_and_a_flipped_mask_is_none():
    case = Case("batch_norm", "inference", "NC", (2000, 100))
    true = truth(case, data.make(case))["y"]
    flipped = true.copy()
    flipped[0, 0] += 0.5  # one of 200,000: as when a sum is zero but for rounding
    errors = measure.errors_of({"y": flipped}, {"y": true}, np.asarray)
    assert errors.largest == pytest.approx(0.5 / np.abs(true).max())
    assert errors.norm == pytest.approx(0.5 / np.sqrt(np.sum(true * true)))
    found = [
        peers.Peer(name, types.SimpleNamespace(prepare=lambda *_, y=y: lambda: {"y": y}, to_numpy=np.asarray), "")
        for name, y in (("torch", true * 1.02), ("plain", flipped), ("jax_jit", true * np.nan))
    ]
    variants = measure.measure(case, found, False, 1 << 20, 0.001).variants
    assert variants["torch"].reason.startswith("its result is wrong") and variants["torch"].times is None
    assert variants["jax_jit"].reason.startswith("its result is wrong")
    assert variants["plain"].times is not None and variants["plain"].error == errors.largest


@pytest.fixture
def own_python():
    """A function that starts a peer in a Python of its own; it is ended after the test."""
    found = []

    def start(name, python=sys.executable):
        found.extend(peers.find([name], pythons={name: python}))
        return found[-1]

    yield start
    peers.close(found)


def test_a_peer_in_a_python_of_its_own_computes_and_times_the_same(own_python):
    peer, here = own_python("plain"), peers.find(["plain"])[0]
    assert not peer.reason and f"NumPy {np.__version__}, threads" in peer.module.version()
    for case in [c for c in suite_cases(True) if c.op in ("batch_norm", "residual_add", "momentum", "gru_cell")]:
        host = data.make(case)
        there = peer.module.prepare(case, host, False)
        function = here.module.prepare(case, {name: value.copy() for name, value in host.items()}, False)
        found, wanted = there(), function()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            pairs = zip(found[name], value, strict=True) if isinstance(value, list) else [(found[name], value)]
            assert all(np.array_equal(a, b) and a.dtype == np.asarray(b).dtype for a, b in pairs), case.name
    times = timing_cpu.interleaved({"there": there, "here": function}, {}, 0.01)
    assert times["there"].samples == times["here"].samples >= 5 and 0 < times["there"].p50 < 1


def test_a_row_with_a_peer_in_a_python_of_its_own(own_python):
    """The worker stays behind when a row fails, and an operation that it has not is a reason as in this process."""
    peer = own_python("chainer_style")
    case = small(BN._replace(dtype="float32"))
    for op, reason in (("batch_norm", ""), ("batch_norm_renorm", "Chainer's plain batch normalisation only")):
        variant = measure.measure(case._replace(op=op), [peer], False, 1 << 20, 0.001).variants["chainer_style"]
        assert variant.reason == reason and (variant.times is None) == bool(reason)
        assert reason or variant.error < 1e-5
    with pytest.raises(RuntimeError, match=r"AttributeError: .*no attribute 'nothing'"):
        peer.module.ask("nothing")
    assert peer.module.ask("hello", on_gpu=False)["reason"] == ""


def test_a_python_that_cannot_serve_is_a_reason(own_python, tmp_path):
    assert "No such file" in own_python("plain", str(tmp_path / "python")).reason
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of luck >&2; exit 1\n")
    broken.chmod(0o755)
    assert own_python("plain", str(broken)).reason == f"{broken}: its process ended: out of luck"
    with pytest.raises(ValueError, match="no such peer.*'keras'"):
        own_python("keras")
    (on_gpu,) = peers.find(["plain"], on_gpu=True, pythons={"plain": sys.executable})
    assert on_gpu.reason.startswith("nothing here waits for its results")


def test_a_worker_on_a_gpu_is_timed_to_the_end_of_its_results(monkeypatch):
    """It prepares for the GPU, waits for what it computes, and counts among what only a clock can time."""
    seen = []
    module = types.SimpleNamespace(
        unavailable=lambda on_gpu: seen.append(("asked", on_gpu)) or "", version=lambda: "one", to_numpy=np.asarray,
        prepare=lambda case, given, on_gpu: seen.append(("prepared", on_gpu)) or (lambda: {"y": given["x"]}),
        finish=lambda results: seen.append(("waited", list(results))),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "benchmarks.peers.torch_peer", module)
    monkeypatch.setattr(exchange, "load", lambda folder, dtypes: {"x": np.ones(2)})
    served = worker.Worker("torch")
    assert served.hello(True)["reason"] == "" and served.prepare(list(BN), "", {}, True) == {"reason": ""}
    assert served.seconds(1)["seconds"] > 0
    assert seen == [("asked", True), ("prepared", True), ("waited", ["y"])]
    assert remote.Remote.OWN_STREAMS


def test_jax_leaves_the_memory_to_the_others():
    code = "import os, benchmarks.peers.jax_jit_peer; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "false\n", done.stderr


def test_a_worker_that_dies_or_sleeps_is_a_reason(own_python, monkeypatch):
    peer = own_python("plain")
    peer.module._process.kill()
    case = small(BN._replace(dtype="float32"))
    row = measure.measure(case, [peer], False, 1 << 20, 0.001)
    assert row.variants["plain"].reason.startswith("RuntimeError: its process ended")
    row = measure.measure(case, [peer], False, 1 << 20, 0.001)
    assert row.variants["plain"].reason == "RuntimeError: its process has ended"
    monkeypatch.setattr(remote, "PATIENCE", 0.001)
    assert own_python("plain").reason == f"{sys.executable}: no answer within 0 s"


def test_a_worker_says_which_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    answers = io.StringIO()
    worker.serve(worker.Worker("tensorflow"), ['{"do": "hello", "on_gpu": false}'], answers)
    assert json.loads(answers.getvalue())["failed"].startswith("not installed (import of tensorflow")


def test_arrays_pass_through_files(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    narrow = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    arrays = {"x": narrow, "labels": np.arange(3), "parameters": [np.ones(2, np.float32), np.zeros((0, 4))]}
    found = exchange.load(tmp_path, json.loads(json.dumps(exchange.save(tmp_path, arrays))))
    assert found["x"].dtype == narrow.dtype and np.array_equal(found["x"].astype(float), narrow.astype(float))
    assert np.array_equal(found["labels"], arrays["labels"]) and len(found["parameters"]) == 2
    for a, b in zip(found["parameters"], arrays["parameters"], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


def test_the_command_line_starts_a_peers_python(tmp_path, capsys):
    arguments = ["--device", "cpu", "--only", "forward NC 8x16", "--peers", "plain,thinc", "--seconds", "0.01"]
    arguments += ["--peer-python", f"plain={sys.executable}", "--peer-python", "thinc=/no/python"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    written = report.load(tmp_path)
    assert "a process of its own: Python" in written["header"]["peers"]
    assert "plain" in written["rows"][0]["ratios"] and "No such file" in written["skipped"]["thinc"]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["--peer-python", "tensorflow"])
    assert "expected NAME=PYTHON" in capsys.readouterr().err


def test_interleaved_times_every_function_in_every_round():
    calls = {"a": 0, "b": 0, "finished": 0}

    def make(name):
        def function():
            calls[name] += 1
        return function

    def finished(result):
        calls["finished"] += 1

    found = timing_cpu.interleaved({"a": make("a"), "b": make("b")}, {"b": finished}, 0.0, least=5)
    assert found["a"].samples == found["b"].samples == 5
    assert calls["a"] >= 5 and calls["finished"] == 2 + 5
    assert 0 <= found["a"].p20 <= found["a"].p50 <= found["a"].p80


def test_quantiles():
    assert timing_cpu.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Quantiles(2.0, 3.5, 5.0, 6)


def test_rotation_leaves_the_cache():
    for row_bytes in (1 << 10, 10 << 20, 1 << 30):
        copies = timing_gpu.copies_needed(row_bytes, 50 << 20)
        assert 2 <= copies <= timing_gpu.CALLS_PER_GRAPH
        assert (copies == 64 and row_bytes == 1 << 10) or (copies - 1) * row_bytes >= 2 * (50 << 20)
        assert timing_gpu.is_cold(row_bytes, 50 << 20, copies) == (row_bytes > 1 << 10)


def row(case, time, copy=50e-6, peers=None, launches=None):
    def quantiles(t):
        return Quantiles(t * 0.9, t, t * 1.1, 7)

    variants = {"gpulayers": Variant(quantiles(time), 1e-7), "copy": Variant(quantiles(copy))}
    for name, value in (peers or {}).items():
        variants[name] = Variant(None, None, value) if isinstance(value, str) else Variant(quantiles(value), 1e-7)
    return Row(case, 1_000_000, 1_500_000, variants, launches)


def test_a_record_by_hand():
    one = report.record(row(BN, 100e-6, peers={"torch": 250e-6, "jax_jit": "not installed"}, launches=2))
    assert one["p50_us"] == pytest.approx(100) and one["p20_us"] == pytest.approx(90)
    assert one["gb_per_s"] == pytest.approx(10.0)  # 1 MB in 100 us
    assert one["percent_of_copy"] == pytest.approx(50) and one["percent_of_floor"] == pytest.approx(75)
    assert one["ratios"] == {"torch": pytest.approx(2.5)} and one["skipped"] == {"jax_jit": "not installed"}


def test_totals_weigh_by_count_and_leave_out_what_is_incomplete():
    cases = [case for case in shapes.resnet50(32) if case.mode == "forward"][:2]  # counts 1 and 4
    records = [
        report.record(row(cases[0], 100e-6, peers={"torch": 200e-6, "plain": 300e-6})),
        report.record(row(cases[1], 50e-6, peers={"torch": 50e-6, "plain": "too slow"})),
    ]
    (total,) = report.totals(records)
    assert total["layers"] == 5 and total["total_us"] == pytest.approx(300)
    assert total["ratios"] == {"torch": pytest.approx((200 + 4 * 50) / 300)}
    assert total["percent_of_copy"] == pytest.approx(100 * 250 / 300)
    assert "| forward | NHWC | 5 | 0.3 | 83 | 1.33 |" in report.markdown(records, ["torch"])


def test_tables_and_files(tmp_path):
    records = [report.record(row(BN, 100e-6, peers={"torch": 250e-6})), report.record(row(small(BN), 1e-6))]
    text = report.table(records, ["torch"])
    lines = text.splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["op", "pass", "layout"] and lines[0].endswith("/ torch")
    assert lines[1].endswith("2.50") and lines[2].endswith("-") and "32x56x56x64" in lines[1]
    report.write(tmp_path / "new", {"commit": "abc", "date": "today"}, records, {"jax_jit": "not installed"})
    loaded = report.load(tmp_path / "new")
    assert loaded["rows"] == json.loads(json.dumps(records)) and loaded["skipped"] == {"jax_jit": "not installed"}
    with (tmp_path / "new" / "report.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == 3 and table[0][-1] == "/ torch" and table[1][-1] == "2.50"
    written = (tmp_path / "new" / "report.txt").read_text()
    assert "commit: abc" in written and "skipped: jax_jit: not installed" in written


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import picture

    records = [report.record(row(case, 1e-4, peers={"torch": 2e-4})) for case in shapes.resnet50(4, dtype="float16")]
    made = picture.draw(tmp_path, {"commit": "abc", "date": "today", "processor": "one"}, records)
    assert [path.name for path in made] == ["roofline.png", "ratios.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_header_and_machine():
    header = machine.header(False, 10e9)
    assert {"date", "commit", "processor", "threads", "load", "NumPy", "copy of 256 MB"} <= set(header)
    assert machine.class_name(False).startswith(f"cpu-{os.cpu_count()}-core-")
    assert machine.on_chip_bytes(False) >= 1 << 18


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U22-I3)",
    ],
)
def test_the_driver_has_a_version_of_its_own(monkeypatch, tmp_path, line):
    """NVIDIA's, from the kernel's page or from NVML; what CuPy calls the driver's version is that of the CUDA API."""
    monkeypatch.setattr(machine, "DRIVER_PAGE", tmp_path / "version")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert machine.driver_version() == "unknown"

    class Nvml:
        def nvmlSystemGetDriverVersion(self, text, size):  # noqa: N802
            text.value = b"999.1"
            return 0

        nvmlInit_v2 = nvmlShutdown = lambda self: 0  # noqa: N815

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Nvml())
    assert machine.driver_version() == "999.1"
    (tmp_path / "version").write_text(line + "\nGCC version: gcc version 12.2.0\n")
    assert machine.driver_version() == "550.54.15"
    assert [machine.cuda_version(number) for number in (12080, 13000)] == ["12.8", "13.0"]


def test_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--device", "cpu", "--only", "8x16", "--peers", "plain", "--seconds", "0.01", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("8x16") == 4 and "/ plain" in printed
    assert len(report.load(tmp_path)["rows"]) == 4
    assert main(["--device", "cpu", "--only", "no such row"]) == 1
    assert main(["--list"]) == 0
    assert "batch_norm forward NHWC 32x112x112x64 float32" in capsys.readouterr().out


def test_a_row_that_fails_is_named_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    """Whatever the error is: CuPy's compiler, for one, has a type of its own."""
    prepare = own.prepare

    def failing(case, given, xp):
        if case.mode == "forward":
            raise type("CompileError", (Exception,), {})("no such instruction")
        return prepare(case, given, xp)

    monkeypatch.setattr(own, "prepare", failing)
    arguments = ["--device", "cpu", "--only", "8x16", "--peers", "none", "--seconds", "0.01", "--out", str(tmp_path)]
    assert main(arguments) == 1
    printed, errors = capsys.readouterr()
    name = "batch_norm forward NC 8x16 float32"
    written = report.load(tmp_path)
    assert [row["mode"] for row in written["rows"]] == ["inference", "backward", "step"]
    assert written["failed"] == {name: "CompileError: no such instruction"}
    line = f"failed: {name}: CompileError: no such instruction"
    assert line in printed and line in (tmp_path / "report.txt").read_text() and "Traceback" in errors


@pytest.mark.parametrize(
    "arguments",
    [["--peers", "nosuch"], ["--peers", "torch,nosuch"], ["--peers", ""], ["--peer-python", "nosuch=python"]],
)
def test_an_unknown_peer_is_refused_with_the_names_there_are(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", *arguments])
    said = capsys.readouterr().err
    assert "no such peer: " in said and "torch_other_layout" in said and "Traceback" not in said


@pytest.mark.parametrize("text", ["", "32,", "0", "a"])
def test_a_batch_is_a_positive_number(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--batch", text])
    assert "expected positive numbers by commas" in capsys.readouterr().err


@pytest.mark.parametrize(("on_gpu", "batches"), [(True, {"32", "256"}), (False, {"32"})])
def test_the_batches_of_a_device(on_gpu, batches, monkeypatch, capsys):
    monkeypatch.setattr(gl, "gpu_available", lambda: on_gpu)
    monkeypatch.setattr(gl, "set_device", lambda name: None)
    assert main(["--list", "--only", "resnet50"]) == 0
    assert {name.split()[3].split("x")[0] for name in capsys.readouterr().out.splitlines()} == batches


def test_several_batches_are_lists_of_their_own(capsys):
    assert main(["--list", "--batch", "32,256", "--only", "resnet50"]) == 0
    names = capsys.readouterr().out.split()
    assert [sum(name.startswith(batch) for name in names) for batch in ("32x", "256x")] == [2 * 36, 2 * 36]


def test_progress_without_tqdm(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = ["--device", "cpu", "--only", "forward NC 8x16", "--peers", "none", "--seconds", "0.01"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "1/1 batch_norm forward NC 8x16 float32" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inference", "forward", "backward"])
def test_unaligned_arrays_begin_inside_their_memory(name):
    (case,) = (case for case in shapes.norm_cases() if (case.regime, case.mode) == ("unaligned", name))
    case = small(case)
    host = data.make(case)
    placed = data.place(case, host, np)
    assert case.regime == "unaligned" and placed.keys() == host.keys()
    for key, value in placed.items():
        assert np.array_equal(value, host[key]) and value.ctypes.data % 16 == 4 and value.flags.c_contiguous
    assert all(value.ctypes.data % 16 == 0 for value in data.place(case._replace(regime=""), host, np).values())
    row = measure.measure(case, peers.find(["torch", "plain"]), False, 1 << 20, 0.001)
    assert row.variants["plain"].times is not None


@pytest.mark.skipif(not _cupy.unusable_reason(), reason="a GPU answers here")
def test_without_a_gpu_the_report_says_so(capsys):
    assert main(["--device", "gpu"]) == 1
    assert "no GPU is usable" in capsys.readouterr().err


def run_script(*arguments, out):
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_the_gpu_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("arguments", [[], ["--full"], ["--full", "nothing"], ["--full", "norm32 norm256"]])
def test_the_gpu_script_explains_itself(arguments, tmp_path):
    done = run_script(*arguments, out=tmp_path / "out")
    assert done.returncode == 2 and "--full PART" in done.stderr and not (tmp_path / "out").exists()


def unpacked(out):
    """Return the folder that a run of the script has packed, its summary being the one beside it."""
    assert sorted(path.name for path in out.iterdir()) == ["run.tar.gz", "summary.txt"]
    subprocess.run(["tar", "-xzf", out / "run.tar.gz", "-C", out], check=True)
    assert (out / "run" / "summary.txt").read_text() == (out / "summary.txt").read_text()
    return out / "run"


@pytest.mark.skipif(not _cupy.unusable_reason(), reason="a GPU answers here")
def test_the_gpu_script_without_a_gpu(tmp_path):
    done = run_script("--quick", out=tmp_path / "out")
    assert done.returncode == 3 and "no GPU: CuPy" in done.stdout
    assert "no GPU" in (unpacked(tmp_path / "out") / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("status", "text"), [(0, "== design: passed"), (3, "no GPU: no driver Nothing"), (1, "no GPU: a warning")]
)
def test_the_status_says_whether_there_is_a_gpu(tmp_path, status, text):
    """Whatever an import warns of is no reason; where nothing is printed, the last of the errors is."""
    reason = "no driver" if status == 3 else ""
    answer = f"echo {reason}; echo a warning >&2; exit {status}"
    python = f'#!/usr/bin/env bash\ncase "$*" in *unavailable*) {answer} ;; esac\n'
    found, summary, _ = run_pretending(tmp_path, python, "--full", "probes")
    assert text in summary and found == (3 if status else 0)


def test_what_an_earlier_run_left_is_kept(tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "report.txt").write_text("rows")
    done = run_script("--quick", out=tmp_path / "out")
    assert done.returncode == 2 and "left behind" in done.stderr
    assert (tmp_path / "out" / "run" / "report.txt").read_text() == "rows"


def test_a_relative_folder_is_where_the_caller_is(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\necho\n")
    python.chmod(0o755)
    environment = {**os.environ, "OUT": "some/where", "PYTHON": str(python)}
    done = subprocess.run(["bash", SCRIPT, "--full", "probes"], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and (unpacked(tmp_path / "some" / "where") / "design.txt").exists()


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *gpu_unavailable_reason*) echo ;;
    *gpu_probe*) sleep 60 ;;
    *"-m pytest"*) echo "3 failed"; exit 1 ;;
    *) for i in $(seq 500); do echo "line $i of $*"; done ;;
esac
"""


@pytest.mark.parametrize("stop", [False, True], ids=["whole", "stopped"])
def test_the_gpu_script_keeps_what_it_has(tmp_path, stop):
    """With a Python that pretends: a failing step, a long output, and a run that is stopped in the middle."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE_PYTHON if stop else FAKE_PYTHON.replace("sleep 60", "echo probed"))
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", SCRIPT, "--quick"],
        env={**os.environ, "OUT": str(out), "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if stop:
        text = out / "summary.txt"
        while not (text.exists() and "report: passed" in text.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, 15)
    printed = process.communicate(timeout=60)[0]
    summary = (out / "summary.txt").read_text()
    assert process.returncode == (130 if stop else 1), printed
    assert "== report: passed" in summary and (unpacked(out) / "report.txt").read_text().count("line") == 500
    assert len(summary.splitlines()) <= 100
    if not stop:
        assert "== gpu_tests: FAILED with status 1" in summary and "3 failed" in summary


def test_a_step_that_is_stopped_says_what_it_has(tmp_path):
    """As pytest does, which then needs a moment."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("""#!/usr/bin/env bash
case "$*" in
    *unavailable*) ;;
    *) trap 'sleep 0.7; echo so far; exit' TERM; echo begun; while true; do sleep 0.1; done ;;
esac
""")
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python)}
    process = subprocess.Popen(["bash", SCRIPT, "--full", "probes"], env=environment, stdout=subprocess.DEVNULL)
    text = out / "run" / "design.txt"
    while not (text.exists() and "begun" in text.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 130 and "so far" in (unpacked(out) / "design.txt").read_text()


def run_pretending(tmp_path, text, *arguments, **environment):
    """Run the script with a Python that pretends; return (status, summary, folder)."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(text)
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "OUT": str(out), "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, (out / "summary.txt").read_text(), out


PARTS = (
    "norm32 norm256-nhwc norm256-nchw compiled-nhwc compiled-nchw compiled256-nhwc compiled256-nchw shapes recurrent "
    "probes tests sanitizer"
).split()


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_what_its_name_says(tmp_path, part):
    """The commands of a dry run; those that measure rows are then asked for the rows, by the real program."""
    text = '#!/usr/bin/env bash\ncase "$*" in *unavailable*) ;; *) echo "asked: $*" ;; esac\n'
    status, summary, out = run_pretending(tmp_path, text, "--full", part)
    assert status == 0 and part in SCRIPT.read_text().split("set -uo")[0]
    asked = [line.split()[1:] for line in summary.splitlines() if line.startswith("asked: -m benchmarks ")]
    assert bool(asked) == (part not in ("probes", "tests", "sanitizer"))
    for words in asked:
        listed = subprocess.run(
            [sys.executable, *words, "--list", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        modes, layouts, shapes_of = ({name.split()[k] for name in listed} for k in (1, 2, 3))
        if part.startswith(("norm", "compiled")):
            assert modes == {"inference", "forward", "backward", "step"}
            assert layouts == ({part[-4:].upper()} if "-" in part else {"NHWC", "NCHW"})
            assert {shape.split("x")[0] for shape in shapes_of} == {"256" if "256" in part else "32"}
            assert len(listed) == 36 * len(layouts)
        assert listed


def test_the_gpu_script_asks_the_design_questions(tmp_path):
    text = '#!/usr/bin/env bash\ncase "$*" in *unavailable*) echo ;; *) echo "asked: $*" ;; esac\n'
    status, summary, out = run_pretending(tmp_path, text, "--full", "probes")
    assert status == 0 and f"asked: -m benchmarks.gpu_probe --design --out {out}/run/design.json" in summary


def test_a_report_that_failed_shows_the_rows_it_wrote(tmp_path):
    text = """#!/usr/bin/env bash
case "$*" in
    *unavailable*) echo ;;
    *) while [ $# -gt 0 ]; do [ "$1" = --out ] && mkdir -p "$2" && echo "the rows so far" >"$2/report.txt"; shift; done
       echo progress >&2; exit 143 ;;
esac
"""
    status, summary, _ = run_pretending(tmp_path, text, "--full", "recurrent")
    assert status == 1 and "recurrent: FAILED with status 143" in summary and "the rows so far" in summary


@pytest.mark.parametrize(("runs", "on_path"), [(False, True), (True, True), (True, False)])
def test_the_sanitizer_is_used_where_it_runs(tmp_path, runs, on_path):
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    tool = tools / "compute-sanitizer"
    tool.write_text("#!/usr/bin/env bash\n" + ("echo no errors\n" if runs else "echo no access; exit 1\n"))
    tool.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}" if on_path else os.environ["PATH"]
    text = "#!/usr/bin/env bash\necho\n"
    status, summary, _ = run_pretending(
        tmp_path, text, "--full", "sanitizer", PATH=path, CUDA_HOME=str(tools.parent)
    )
    assert status == 0
    if runs:
        assert "== memcheck: passed" in summary and "== racecheck: passed" in summary and "not run" not in summary
    else:
        assert "compute-sanitizer does not run here: no access" in summary and "memcheck:" not in summary


def test_the_steps_of_a_quick_run_fit_its_five_minutes():
    """Every step's limit, with the grace of one that hangs, and something left for the sanitizer."""
    script = SCRIPT.read_text()
    text = script.split("    quick)")[1].split(";;")[0]
    limits = [int(found) for found in re.findall(r"^ +(?:(?:step|report) \w+|gpu_tests) (\d+)", text, re.MULTILINE)]
    limit, grace = (int(re.search(pattern, script)[1]) for pattern in (r"quick limit=(\d+)", r"kill-after=(\d+) \"\$s"))
    assert len(limits) == 4 and sum(limits) + 40 <= limit and limit + grace <= 290
    full = int(re.search(r"\} limit=(\d+)", script)[1])
    assert full + grace <= 480 and all(int(n) < full for n in re.findall(r"report \S+ (\d+) ", script))


def test_the_most_important_comes_first(tmp_path):
    """A machine may go at any time: the tests, the list beside PyTorch, and only then what explains them."""
    python = FAKE_PYTHON.replace("sleep 60", "echo probed")
    _, summary, _ = run_pretending(tmp_path, python, "--quick", PATH="/usr/bin:/bin", CUDA_HOME="/none")
    steps = re.findall(r"^== (\w+): ", summary, re.MULTILINE)
    assert steps == ["report", "gpu_tests", "resnet50", "probe", "sanitizer", "quick"]


def test_a_killed_run_leaves_an_archive_of_the_steps_before(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python)}
    with subprocess.Popen(["bash", SCRIPT, "--quick"], env=environment, start_new_session=True) as process:
        text = out / "summary.txt"
        while not (text.exists() and "== resnet50" in text.read_text() and not (out / "part.tar.gz").exists()):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.5)
        os.killpg(process.pid, 9)
    with tarfile.open(out / "run.tar.gz") as archive:
        names = archive.getnames()
        kept = archive.extractfile("run/summary.txt").read().decode()
    assert "run/resnet50.txt" in names and "run/gpu_tests.txt" in names and "gpu_tests: FAILED" in kept


def test_the_probes_kernels_do_what_they_say():
    from benchmarks.gpu_probe import BARRIERS, EMPTY
    from tests.kernels.emulation.build import compiler

    if compiler() is None:
        pytest.skip("needs g++")
    from tests.kernels.strict_array import xp

    counter, passed, x = xp.zeros(16, dtype="uint32"), xp.zeros(3, dtype="uint32"), xp.zeros(1, dtype="float32")
    BARRIERS.launch(
        {"counter": counter, "passed": passed, "times": 4}, grid=(3,), block=(32,), cooperative=True
    )
    assert passed.get().tolist() == [4, 4, 4] and not counter.get().any()
    EMPTY.launch({"x": x, "count": 1}, grid=(1,), block=(32,))
    assert x.get().tolist() == [0.0]


def test_the_probe_without_a_gpu_says_so(monkeypatch, capsys):
    from benchmarks import gpu_probe

    monkeypatch.setattr(gpu_probe.gl, "gpu_available", lambda: False)
    assert gpu_probe.main([]) == 1
    assert "no GPU is usable" in capsys.readouterr().err


class FakeCuda:
    """What `timing_gpu.capture` asks CuPy for, in a log; `refuse` makes captures fail as CuPy's do for cuBLAS."""

    def __init__(self, refuse=False):
        self.log, self.pools, self.refuse, self.capturing = [], [], refuse, False

    def Stream(self, non_blocking=False):  # noqa: N802
        return self

    ptr = 7
    __enter__ = __exit__ = lambda *_: None

    def synchronize(self):
        self.log.append("synchronize")

    def get_current_stream(self):
        return types.SimpleNamespace(synchronize=lambda: self.log.append("inputs are there"))

    def begin_capture(self):
        self.capturing = True
        self.log.append("begin")

    def end_capture(self):
        self.capturing = False
        self.log.append("end")
        if self.refuse:
            raise RuntimeError("the capture is invalid")
        return types.SimpleNamespace(launch=lambda: self.log.append("launch"))

    def MemoryPool(self):  # noqa: N802
        return types.SimpleNamespace(malloc=None, free_all_blocks=lambda: self.log.append(f"freed beside {LIVE[0]}"))

    def using_allocator(self, allocator):
        return self


LIVE = [0]  # results that somebody holds


class Result:
    """A result, counted while it lives."""

    def __init__(self):
        LIVE[0] += 1

    def __del__(self):
        LIVE[0] -= 1


@pytest.fixture
def side():
    """Forget the stream of captures, before a double's and after it."""
    timing_gpu._side.cache_clear()
    yield
    timing_gpu._side.cache_clear()


@pytest.mark.parametrize("refuse", [False, True])
def test_rotating_sets_are_captured_or_left(monkeypatch, side, refuse):
    """Inputs are waited for, as many results as sets are kept, and the pool is emptied when nobody holds any."""
    cuda, calls, most = FakeCuda(refuse), [], []
    LIVE[0] = 0

    def make(number):
        def function():
            if refuse and cuda.capturing:
                raise NotImplementedError("cuBLAS")
            calls.append(number)
            cuda.log.append("call")
            most.append(LIVE[0])
            return {"y": Result()}

        return function

    monkeypatch.setattr(_cupy, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    graph = timing_gpu.capture([make(0), make(1), make(2)])
    assert cuda.log[:5] == ["inputs are there", "call", "call", "call", "synchronize"] and max(most) <= 3
    assert [what for what in cuda.log if what in ("begin", "end")] == ["begin", "end"]
    if refuse:
        assert graph == "NotImplementedError: cuBLAS" and calls == [0, 1, 2]
    else:
        assert calls == [0, 1, 2] + [number % 3 for number in range(timing_gpu.CALLS_PER_GRAPH)]
        graph.launch()
        assert cuda.log[-1] == "launch" and LIVE[0] == 3
        graph.close()
    assert cuda.log[-1] == "freed beside 0"


def test_samples_are_interleaved_and_cold(monkeypatch):
    """The protocol, on a double: order of flushes, events and calls; events are in milliseconds."""
    log, clock = [], [0.0]

    class Event:
        def record(self):
            self.time = clock[0]
            log.append("event")

        def synchronize(self):
            log.append("wait")

    def call(name, milliseconds):
        def function():
            log.append(name)
            clock[0] += milliseconds

        return function

    cuda = types.SimpleNamespace(
        Event=Event,
        Device=lambda: types.SimpleNamespace(synchronize=lambda: None),
        get_elapsed_time=lambda start, end: end.time - start.time,
    )
    monkeypatch.setattr(_cupy, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing_gpu, "make_flush", lambda: call("flush", 100.0))
    monkeypatch.setattr(timing_gpu, "WARM_UP", 0.01)
    monkeypatch.setattr(timing_gpu, "time_once", lambda function, repeats, finish: finish and finish(function()) or 9.0)
    functions = {"ours": call("ours", 3.0), "theirs": call("theirs", 5.0), "elsewhere": call("elsewhere", 7.0)}
    functions["captured"] = call("captured", 4.0)
    graphs = {name: types.SimpleNamespace(launch=call("graph", 64 * 2.0)) for name in ("ours", "captured")}
    finished = []
    found = timing_gpu.interleaved(functions, graphs, {"elsewhere": finished.append}, 0.0, 4, "ours")
    assert {name: list(ways) for name, ways in found.items()} == {
        "ours": ["graph", "flushed", "clock"], "theirs": ["flushed"], "elsewhere": ["clock"], "captured": ["graph"],
    }  # fmt: skip
    assert found["ours"]["graph"].p50 == found["captured"]["graph"].p50 == pytest.approx(2e-3)
    assert found["ours"]["flushed"].p50 == pytest.approx(3e-3) and found["theirs"]["flushed"].p50 == pytest.approx(5e-3)
    assert found["ours"]["clock"].p50 == found["elsewhere"]["clock"].p50 == 9.0 and len(finished) >= 4
    assert {way: times.samples for way, times in found["ours"].items()} == {"graph": 4, "flushed": 20, "clock": 4}
    measured = [i for i, what in enumerate(log) if what == "graph" and log[i - 1] == "event"]
    assert len(measured) == 8 and all(log[i - 2] == "flush" for i in measured)
    measured = [i for i, what in enumerate(log) if what == "theirs" and log[i - 1] == "event"]
    assert len(measured) == 20 and all(log[i - 2] == "flush" for i in measured)
    first_rounds = [what for what in log if what in ("graph", "theirs", "elsewhere")]
    assert first_rounds != sorted(first_rounds), "variants take turns"


def test_the_host_is_ahead_of_what_is_timed(monkeypatch):
    """A launch that takes the host longer than the kernel runs: the device is kept busy meanwhile."""
    from benchmarks import gpu_probe

    log = []

    class Event:
        def record(self):
            log.append("event")

        def synchronize(self):
            pass

    cuda = types.SimpleNamespace(
        Event=Event,
        Device=lambda: types.SimpleNamespace(synchronize=lambda: None),
        get_elapsed_time=lambda start, end: 3.0,
    )
    monkeypatch.setattr(_cupy, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(gpu_probe, "_flush", lambda: lambda: log.append("flush"))

    def work():
        time.sleep(1e-3)
        log.append("work")

    assert gpu_probe._elapsed(work, 2) == pytest.approx(1500)
    ends = [i for i, what in enumerate(log) if what == "event"][1::2]
    assert len(ends) == 7
    for end in ends:
        assert log[end - 3 : end] == ["event", "work", "work"] and set(log[end - 33 : end - 3]) == {"flush"}


def test_the_hosts_time_is_taken_of_few_calls_where_each_launches_much(monkeypatch):
    log = []
    monkeypatch.setattr(timing_gpu, "_wait", lambda: log.append("wait"))
    for launches, calls in ((0, 50), (1, 50), (100, 2), (10_000, 1)):
        log.clear()
        timing_gpu.host_seconds(lambda: log.append("call"), 0.0, launches)
        assert log == ["wait", *["call"] * calls] * 5 + ["wait"]


def test_a_peer_in_another_process_is_timed_by_its_own_clock(monkeypatch):
    """Nothing of its results is fetched for a sample or for warming up."""
    from benchmarks.peers.remote import RemoteFunction

    asked = []

    def ask(request, **arguments):
        asked.append((request, arguments))
        return {"seconds": 0.25}

    monkeypatch.setattr(timing_gpu, "_wait", lambda: None)
    function = RemoteFunction(types.SimpleNamespace(ask=ask))
    assert timing_gpu._sample_by_clock(function, lambda: None, None) == [0.25]
    assert asked == [("seconds", {"repeats": 1})]


def test_a_ratio_is_of_times_by_one_method():
    """The record compares each peer, and the copy, with our time by the same method; totals do, too."""
    def times(p50):
        return Quantiles(p50, p50, p50, 5)

    ours = {"graph": times(10e-6), "flushed": times(14e-6), "clock": times(50e-6)}
    variants = {
        "gpulayers": Variant(ours["graph"], 1e-7, "", "graph", "", ours),
        "copy": Variant(times(7e-6), None, "", "flushed"),
        "torch": Variant(times(20e-6), 1e-7, "", "graph"),
        "plain": Variant(times(28e-6), 1e-7, "", "flushed", "NotImplementedError: cuBLAS"),
        "jax_jit": Variant(times(60e-6), 1e-7, "", "clock"),
    }
    (case, *_) = (case for case in shapes.resnet50(32) if case.mode == "forward")
    one = report.record(Row(case, 1_000_000, 1_000_000, variants))
    assert one["ratios"] == {"torch": pytest.approx(2), "plain": pytest.approx(2), "jax_jit": pytest.approx(1.2)}
    assert one["percent_of_copy"] == pytest.approx(50)
    assert one["methods"] == {
        "gpulayers": "graph", "copy": "flushed", "torch": "graph", "plain": "flushed", "jax_jit": "clock",
    }  # fmt: skip
    assert one["own_us"]["clock"] == pytest.approx([50] * 3)
    assert one["uncaptured"] == {"plain": "NotImplementedError: cuBLAS"}
    (total,) = report.totals([one, one])
    assert total["ratios"] == one["ratios"] and total["percent_of_copy"] == pytest.approx(50)
    text = report.text_report({}, [one, one], {})
    assert "jax_jit: clock 2 rows" in text and "those of cuBLAS and CuPy are not counted" in text


def test_torch_is_captured_on_the_stream_that_prepared_it(monkeypatch):
    """A gradient runs on the stream of its forward pass; a graph that is closed gives its memory back."""
    torch = pytest.importorskip("torch")
    from benchmarks.peers import torch_compile_peer, torch_other_layout_peer, torch_peer

    log, current = [], ["default"]

    class On:
        def __init__(self, name, *more):
            self.name, self.more = name, more

        def __enter__(self):
            self.outer, current[0] = current[0], self.name
            log.extend(self.more[:1])

        def __exit__(self, *_):
            current[0] = self.outer
            log.extend(self.more[1:])

    def prepare():
        number = log.count("prepare on side")
        log.append(f"prepare on {current[0]}")
        return lambda: log.append(f"call {number} on {current[0]}")

    graph = types.SimpleNamespace(replay=lambda: log.append("replay"), reset=lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, **mode: On(stream, "begin", "end"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    captured = torch_peer.capture(prepare, 2, 5)
    calls = [f"call {number} on side" for number in (0, 1, 0, 1)]
    assert log == ["prepare on side"] * 2 + calls + ["synchronize", "begin", *calls, calls[0], "end"]
    log.clear()
    captured.launch()
    captured.close()
    assert log == ["replay", "synchronize", "reset", "empty"]
    assert torch_compile_peer.capture is torch_other_layout_peer.capture is torch_peer.capture


@pytest.fixture
def emulated_gpu(monkeypatch, side):
    """CuPy's part of a measurement on the emulated device: streams and graphs are doubles, kernels run."""
    from tests.kernels.emulation.build import compiler

    if compiler() is None:
        pytest.skip("needs g++")
    from tests.kernels import fake_cuda, strict_array

    class Event:
        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

    monkeypatch.setattr(strict_array.launcher, "runs", strict_array.launcher.runs[:1])
    with fake_cuda.emulated_cuda(monkeypatch) as machine:
        cuda = strict_array.xp.cuda
        pools = []

        def pool():
            pools.append(types.SimpleNamespace(malloc=None, freed=False))
            pools[-1].free_all_blocks = lambda found=pools[-1]: setattr(found, "freed", True)
            return pools[-1]

        cuda.Event, cuda.MemoryPool = Event, pool
        monkeypatch.setattr(strict_array.xp, "get_default_memory_pool", pool, raising=False)
        cuda.get_elapsed_time = lambda start, end: (end.time - start.time) * 1e3
        cuda.Device = lambda: types.SimpleNamespace(synchronize=lambda: None, attributes={"L2CacheSize": 1024})
        monkeypatch.setattr(timing_gpu, "make_flush", lambda: lambda: None)
        monkeypatch.setattr(timing_gpu, "WARM_UP", 0.0)
        monkeypatch.setattr(timing_gpu, "CALLS_PER_GRAPH", 4)
        for module in (measure, measure_gpu):
            monkeypatch.setattr(module, "copy_function", lambda total, on_gpu: lambda: None)
        machine.pools = pools
        yield machine


@pytest.mark.parametrize(
    ("case", "launches", "plain"),
    [
        (Case("batch_norm", "forward", "NHWC", (4, 5, 5, 6), "float32"), 1, "graph"),
        (Case("batch_norm_relu_residual", "step", "NHWC", (4, 5, 5, 6), "float16"), 2, "graph"),
        (Case("batch_norm_ghost", "step", "NC", (8, 12), "float32", "ghost", 1, 2), 2, "graph"),
        (Case("batch_norm_renorm", "backward", "NHWC", (4, 5, 5, 6), "float32"), 1, "graph"),
        (Case("momentum", "step", "parameters", (4099,), "float32"), 1, "graph"),
        (Case("dense", "forward", "NC", (8, 12, 10), "float32"), 0, "flushed"),
    ],
    ids=lambda value: getattr(value, "op", None),
)
def test_a_whole_row_on_an_emulated_gpu(emulated_gpu, case, launches, plain):
    """Ours is captured, products and optimizers too; a peer of CuPy's is where it can be; memory is given back."""
    from benchmarks.peers import plain_peer

    def elsewhere(case, given, on_gpu):
        function = plain_peer.prepare(case, given, on_gpu)
        return lambda: function()

    streams = types.SimpleNamespace(
        prepare=elsewhere, to_numpy=plain_peer.to_numpy, finish=lambda _: None, OWN_STREAMS=True
    )
    found = [peers.Peer("plain", plain_peer, ""), peers.Peer("jax_jit", streams, "")]
    with gl.device("emulated"):
        one = report.record(measure.measure(case, found, True, 1 << 20, 0.001))
    assert one["launches"] == launches and one["host_us"] > 0
    assert one["methods"] == {"gpulayers": "graph", "copy": "graph", "plain": plain, "jax_jit": "clock"}
    assert set(one["ratios"]) == {"plain", "jax_jit"} and not one["skipped"]
    assert emulated_gpu.pools and all(pool.freed for pool in emulated_gpu.pools)


def test_the_sanitizer_sees_every_family_and_regime(emulated_gpu, monkeypatch, capsys):
    from benchmarks import gpu_probe
    from gpulayers.ops.batch_norm.layout import collapse
    from gpulayers.ops.batch_norm.plan import choose
    from tests.kernels.emulation import H200_LIKE
    from tests.kernels.strict_array import launcher

    for regime, shape in gpu_probe.LARGE:
        plans = [choose(collapse(shape, (1,)), 2, 16, H200_LIKE, kept) for kept in (1, 2)]
        assert [plan.regime for plan in plans] == [regime] * 2
    monkeypatch.setattr(gpu_probe, "LARGE", (("sweeps", (5000, 16)),))  # the emulation of others takes minutes
    launcher.record.clear()
    with gl.device("emulated"):
        gpu_probe.sanitizer_subset()
    names = {specialisation.name for specialisation, *_ in launcher.record}
    for part in ("bn_sums", "bn_forward", "residual", "lstm", "gru", "momentum", "adam"):
        assert any(part in name for name in names), part
    assert re.search(r"^\d\d calls$", capsys.readouterr().out.strip())
