"""The recurrent kernels through the whole chain (checks, packing, geometry, kernel text) on the emulated launcher."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gpulayers.launch import Kernel
from gpulayers.launch import source as kernel_source
from gpulayers.ops import recurrent_kernels
from tests.kernels.emulation import EmulationError
from tests.kernels.emulation.build import compiler
from tests.kernels.fake_cublas import fake_cublas
from tests.kernels.strict_array import StrictArray, launcher, xp
from tests.ops.test_recurrent_arrays import CELLS, Case, variants

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")
ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-2, "bfloat16": 8e-2}


def on_device(values):
    return [None if v is None else xp.asarray(v) for v in values]


def run(case, keywords, gates=None):
    """Forward and backward on the emulated device; everything comes back as float64 host arrays."""
    extra = gates or {}
    keywords = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
    states, weights = on_device(case.states), on_device(case.weights)
    *results, saved = case.forward(xp.asarray(case.x), states, weights, **keywords, **extra)
    assert all(isinstance(r, StrictArray) and r.dtype == case.x.dtype for r in results)
    rng = np.random.default_rng(3)
    cotangents = [rng.uniform(-1, 1, r.shape).astype(case.x.dtype) for r in results]
    host, case.weights = case.weights, weights
    try:
        gradients = case.backward(on_device(cotangents), saved, **keywords, **extra)
    finally:
        case.weights = host
    return cotangents, [np.asarray(a.get(), np.float64) for a in (*results, *gradients)]


def truth(case, keywords, cotangents, gates=None):
    """The same in float64 on NumPy, which its own tests compare with loops and finite differences."""
    wide = Case(case.cell, time=1)
    wide.x, wide.states, wide.weights = (
        case.x.astype(np.float64),
        [s.astype(np.float64) for s in case.states],
        [w.astype(np.float64) for w in case.weights],
    )
    *results, saved = wide.forward(**keywords, **(gates or {}))
    return [
        *results,
        *wide.backward([c.astype(np.float64) for c in cotangents], saved, **keywords, **(gates or {})),
    ]


def compare(case, keywords, tolerance, gates=None):
    cotangents, got = run(case, keywords, gates)
    for a, b in zip(got, truth(case, keywords, cotangents, gates), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [5, 8])
def test_every_dtype_scalar_and_vector(cell, dtype, units):
    case = Case(cell, time=3, batch=3, depth=units, units=units, dtype=np.dtype(dtype))
    launcher.record.clear()
    compare(case, variants_of(case)["mask"], DTYPES[dtype])
    assert {s.defines["STORAGE"] for s, *_ in launcher.record} == {dtype}


def variants_of(case):
    return dict(variants(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", ["plain", "residual", "mask", "lengths", "backwards", "dropout", "all"])
def test_every_keyword(cell, variant):
    case = Case(cell, seed=5, time=4)
    compare(case, variants_of(case)[variant], 1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru_after", "gru_before"])
def test_hard_sigmoid(cell):
    case = Case(cell, time=3)
    case.weights[0] *= 3
    compare(case, {"residual": True}, 1e-12, {"recurrent_activation": "hard_sigmoid"})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("time", "batch", "depth", "units"), [(0, 3, 2, 4), (2, 0, 2, 4), (1, 1, 1, 1), (2, 5, 7, 3), (2, 70, 3, 36)]
)
def test_sizes(cell, time, batch, depth, units):
    compare(Case(cell, time=time, batch=batch, depth=depth, units=units, dtype=np.float32), {}, 2e-5)


@pytest.mark.parametrize("cell", ["lstm", "simple"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_accumulated_into_the_gates(cell, dtype, monkeypatch):
    """With cuBLAS the product goes straight into the gate buffer, and the kernel only reads the gates."""
    case = Case(cell, time=4, dtype=np.dtype(dtype))
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    for name in ("mask", "all"):
        compare(case, variants_of(case)[name], DTYPES[dtype])
    assert [call["beta"] for call in functions.calls] == [1.0] * 8


def test_one_launch_a_step_and_its_geometry():
    case = Case("lstm", time=3, batch=40, depth=64, units=64, dtype=np.float16)
    launcher.record.clear()
    run(case, {"residual": True})
    names = [specialisation.name for specialisation, *_ in launcher.record]
    assert names == ["gl_lstm_forward"] * 3 + ["gl_lstm_backward"] * 3
    assert {(tuple(grid), tuple(block)) for _, grid, block, *_ in launcher.record} == {((2, 1, 1), (256, 1, 1))}


def test_infinities_do_not_become_nan():
    """Gates far outside reach 0 and 1 exactly."""
    case = Case("lstm", time=1, dtype=np.float32)
    case.weights[2][...] = np.tile([1e30, -1e30, 1e30, 1e30], 4)
    _, got = run(case, {})
    assert all(np.isfinite(a).all() for a in got)


MUTANTS = [
    ("gl_lstm_forward", "gate(s[1][i], arguments.hard) * c[i]", "gate(s[0][i], arguments.hard) * c[i]"),
    ("gl_lstm_forward", "h[i] += x[i]", "h[i] -= x[i]"),
    ("gl_lstm_forward", "load<N>(arguments.h + p.at, h);", ""),
    ("gl_lstm_forward", "if (more || bias) store<N>(sums, s);", ""),
    ("gl_lstm_forward", "p.row * 4 * units + column", "p.row * 3 * units + column"),
    ("gl_lstm_backward", "d_c[i] = on ? d_new_c * keep : d_c[i];", "d_c[i] = d_new_c * keep;"),
    ("gl_lstm_backward", "(A(1) - t * t)", "(A(1) - t)"),
    ("gl_lstm_backward", "part[i] = on || arguments.zero_output ?", "part[i] = on ?"),
    ("gl_lstm_backward", "d_h[i] = on ? A(0) : d_h[i];", "d_h[i] = A(0);"),
    ("gl_lstm_backward", "slope = y >= A(0) && y <= A(1) ? A(0.2) : A(0);", "slope = A(0.2);"),
    ("gl_gru_forward", "candidate + keep * (h[i] - candidate)", "candidate + keep * h[i]"),
    ("gl_gru_backward", "r[i] = on ? n[i] * r[i] : A(0);", "r[i] = n[i];"),
    ("gl_gru_backward", "inner[i] *= slope;", ""),
    ("gl_gru_reset_forward", "h[i] *= gate(r[i]", "h[i] *= gate(z[i]"),
    ("gl_gru_candidate_backward", "d_h[i] = on ? d_h[i] * keep", "d_h[i] = on ? d_h[i]"),
    ("gl_gru_reset_backward", "reset * factor", "reset"),
    ("gl_simple_rnn_backward", "d_h[i] = on ? A(0) : d_h[i];", "d_h[i] = A(0);"),
    ("gl_simple_rnn_forward", "load_or_zero<N>(behind(arguments.previous, p.at), h);", "for (auto& v : h) v = 0;"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS, ids=lambda v: re.sub(r"\W+", "_", v)[:40])
def test_mutants_are_noticed(name, old, new, monkeypatch):
    """A kernel text with one fault gives other numbers than the truth."""
    original = recurrent_kernels.KERNELS[name]
    path = kernel_source.kernel_folder() / "recurrent.cu"
    text = path.read_text()
    assert old in text
    mutant = Kernel(
        "recurrent.cu",
        name,
        recurrent_kernels._FIELDS[name],
        defines={"STORAGE": ("float64",)},
        body=text.replace(old, new),
        listed=False,
    )
    monkeypatch.setitem(recurrent_kernels.KERNELS, name, mutant)
    cell = {"gl_l": "lstm", "gl_s": "simple", "gl_g": "gru_before"}[name[:4]]
    cell = "gru_after" if name in ("gl_gru_forward", "gl_gru_backward") else cell
    case = Case(cell, seed=5, time=4)
    case.weights[0] *= 4
    gates = {} if cell == "simple" else {"recurrent_activation": "hard_sigmoid"}
    noticed = "Not equal to tolerance|depends on the order of threads"
    with pytest.raises((AssertionError, EmulationError), match=noticed):
        for variant in ("mask", "lengths", "all"):
            compare(case, variants_of(case)[variant], 1e-10, gates)
    monkeypatch.setitem(recurrent_kernels.KERNELS, name, original)
    for variant in ("mask", "lengths", "all"):
        compare(case, variants_of(case)[variant], 1e-10, gates)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "mask", "all"])
def test_on_a_gpu(cell, dtype, variant, monkeypatch):
    """The same comparison on CuPy arrays, through CuPy's launcher and cuBLAS."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setitem(globals(), "xp", cupy)
    monkeypatch.setitem(globals(), "StrictArray", cupy.ndarray)
    case = Case(cell, time=4, batch=5, depth=16, units=16, dtype=np.dtype(dtype))
    compare(case, variants_of(case)[variant], DTYPES[dtype])
