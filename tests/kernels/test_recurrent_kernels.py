"""The recurrent kernels through the whole chain (checks, packing, geometry, kernel text) on the emulated launcher."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gpulayers.launch import register_launcher
from gpulayers.launch import source as kernel_source
from gpulayers.ops.recurrent import kernels as recurrent_kernels
from gpulayers.ops.recurrent import run as recurrent_run
from tests.kernels import strict_array
from tests.kernels.bfloat16 import BFLOAT16, finfo
from tests.kernels.emulation import EmulatedLauncher, EmulationError
from tests.kernels.fake_cublas import fake_cublas
from tests.kernels.strict_array import StrictArray, launcher, xp
from tests.ops.test_recurrent_arrays import CELLS, Case, variants

pytestmark = pytest.mark.emulated
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
    assert all(g.dtype == case.x.dtype for g in gradients[: 1 + len(states)])
    wide = np.float32 if case.x.dtype.itemsize == 2 else case.x.dtype
    assert all(g.dtype == wide for g in gradients[1 + len(states) :])
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
@pytest.mark.parametrize(("units", "packet"), [(5, 1), (6, 2), (12, 4), (16, 8)])
def test_every_dtype_and_packet(cell, dtype, units, packet, monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "_BUSY", 0)
    case = Case(cell, time=3, batch=3, depth=units, units=units, dtype=np.dtype(dtype))
    launcher.record.clear()
    compare(case, variants_of(case)["mask"], DTYPES[dtype])
    found = {(s.defines["STORAGE"], s.defines["PACKET"]) for s, *_ in launcher.record}
    assert found == {(dtype, min(packet, 16 // np.dtype(dtype).itemsize))}


@pytest.mark.parametrize(("offset", "packet"), [(0, 8), (1, 1), (2, 2), (4, 4), (6, 2), (8, 8)])
def test_addresses_decide_on_the_packet(offset, packet, monkeypatch):
    """A single step reads the caller's states where they are."""
    monkeypatch.setattr(recurrent_kernels, "_BUSY", 0)
    case = Case("gru_after", time=1, batch=2, depth=16, units=16, dtype=np.float16)
    around = xp.zeros(2 * 16 + 8, np.float16)
    inside = around[offset : offset + 2 * 16].reshape(2, 16)
    inside[...] = xp.asarray(case.states[0])
    launcher.record.clear()
    _, found, _ = case.forward(xp.asarray(case.x), [inside], on_device(case.weights))
    assert [s.defines["PACKET"] for s, *_ in launcher.record] == [packet]
    np.testing.assert_allclose(found.get().astype("d"), case.forward()[1].astype("d"), atol=1e-2)


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
    ("time", "batch", "depth", "units"),
    [(0, 3, 2, 4), (2, 0, 2, 4), (1, 0, 2, 4), (1, 1, 1, 1), (2, 5, 7, 3), (2, 70, 3, 36)],
)
def test_sizes(cell, time, batch, depth, units):
    compare(Case(cell, time=time, batch=batch, depth=depth, units=units, dtype=np.float32), {}, 2e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_accumulated_by_cublas(cell, dtype, monkeypatch):
    """With cuBLAS the products go straight into the gate buffer, and back into what goes around them."""
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    case = Case(cell, time=4, dtype=np.dtype(dtype))
    for name in ("residual", "mask", "all"):
        compare(case, variants_of(case)[name], DTYPES[dtype])
    functions.calls.clear()
    run(case, {})
    forward = {"gru_after": [0, 0] + 4 * [1], "gru_before": [0] + 8 * [1]}.get(cell, [0] + 4 * [1])
    loop = {"gru_after": 4 * [1], "gru_before": 4 * [0, 1]}.get(cell, 4 * [0])
    assert [call["beta"] for call in functions.calls][: len(forward + loop)] == forward + loop
    assert len(functions.calls) == len(forward + loop) + {"gru_after": 6, "gru_before": 5}.get(cell, 4)
    of_bias = [call for call in functions.calls if call["sizes"][1] == 1 and call["sizes"][2] == 4 * case.x.shape[1]]
    columns, wide = case.states[0].shape[1] * (4 if cell == "gru_after" else case.count), int(dtype == "float64")
    assert [(call["sizes"][0], call["types"][2]) for call in of_bias] == [(columns, wide)]


# Fields that a launch reads and writes; columns of `gates` and `d_gates` that a launch touches where it is not all;
# fields that only rows which skip their step read.
BOTH = {"carry", "d_c"}
PARTS = {"gl_gru_reset_forward": 1, "gl_gru_reset_backward": 1, "gl_gru_candidate_forward": 2,
         "gl_gru_candidate_backward": 2}  # fmt: skip
UNREAD = {("gl_lstm_forward", "h"), ("gl_simple_rnn_forward", "h")}


@pytest.mark.parametrize(("cell", "residual", "floors"), [
    ("lstm", False, (7, 13)), ("lstm", True, (9, 13)), ("gru_after", False, (6, 12)), ("gru_after", True, (8, 12)),
    ("gru_before", False, (7, 14)), ("gru_before", True, (9, 14)), ("simple", False, (2, 4)), ("simple", True, (4, 4)),
])  # fmt: skip
def test_bytes_of_a_step(cell, residual, floors, monkeypatch):
    """A launch is given no more than the streams that the kernel file counts."""
    moved = {"forward": 0, "backward": 0}
    original = recurrent_run.prepare_step

    def prepare(name, rows, units, arrays, **settings):
        prepared, way = original(name, rows, units, arrays, **settings), name.rsplit("_", 1)[1]

        def launch(fields):
            for field, value in fields.items():
                if value is None or field == "bias" or (name, field) in UNREAD:
                    continue
                streams = PARTS.get(name) if field in ("gates", "d_gates") else None
                twice = field in BOTH or (name, field) == ("gl_simple_rnn_forward", "new_h")
                moved[way] += (streams or value.size // (rows * units)) * (2 if twice else 1)
            prepared(fields)

        return launch

    _, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    monkeypatch.setattr(recurrent_run, "prepare_step", prepare)
    run(Case(cell, time=6), {"residual": residual})
    last = {"lstm": 1, "simple": 1}.get(cell, 0)  # the last step reads and the kernel keeps dh of the end in `carry`
    assert moved == {"forward": 6 * floors[0], "backward": 6 * floors[1] + last}


@pytest.mark.parametrize(("threads", "blocks"), [(1, 64), (131 * 128, 64), (132 * 128, 128), (132 * 256, 256)])
def test_small_steps_get_small_blocks(threads, blocks):
    assert recurrent_kernels.threads_per_block(threads, 132) == blocks


def test_threads_follow_the_multiprocessors(monkeypatch):
    """The same step on the emulated device with more and fewer multiprocessors."""
    case = Case("simple", time=1, batch=8, depth=64, units=64, dtype=np.float32)  # 128 threads of 16 bytes
    blocks = []
    for count in (1, 2, 16):
        monkeypatch.setattr(launcher, "device", launcher.device._replace(multiprocessors=count))
        launcher.record.clear()
        compare(case, {}, 2e-5)
        blocks.append({(s.defines["PACKET"], grid[0], block[0]) for s, grid, block, *_ in launcher.record})
    assert blocks == [{(4, 1, 128)}, {(2, 2, 128)}, {(1, 8, 64)}]


def test_outputs_that_are_the_states_are_not_written_twice():
    case = Case("lstm", time=3)
    outputs, _, _, saved = case.forward(xp.asarray(case.x), on_device(case.states), on_device(case.weights))
    assert outputs.data.ptr == saved[1].after().data.ptr
    outputs, _, _, saved = case.forward(
        xp.asarray(case.x), on_device(case.states), on_device(case.weights), residual=True
    )
    assert outputs.data.ptr != saved[1].after().data.ptr


def test_one_launch_a_step_and_its_geometry():
    case = Case("lstm", time=3, batch=40, depth=64, units=64, dtype=np.float16)
    launcher.record.clear()
    run(case, {"residual": True})
    names = [specialisation.name for specialisation, *_ in launcher.record]
    assert names == ["gl_lstm_forward"] * 3 + ["gl_lstm_backward"] * 3
    assert {(tuple(grid), tuple(block)) for _, grid, block, *_ in launcher.record} == {((40, 1, 1), (64, 1, 1))}


class Work:
    """Counts what a device does besides kernels and cuBLAS: copies, fills and arithmetic, but no views."""

    def __init__(self):
        self.count = 0

    def record(self, function, inputs, written):
        result = function()
        found = getattr(result, "_memory", None)
        arrays = [i for i in inputs if isinstance(i, np.ndarray)]
        is_view = found is not None and any(np.may_share_memory(found, i) for i in arrays)
        self.count += bool(written) or not is_view
        return result

    def hold(self, memory):
        """An allocation is no work."""


def work_of(monkeypatch, case, keywords):
    """Return how many pieces of work (forward, backward) of a case are."""
    keywords = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
    given, states, weights = xp.asarray(case.x), on_device(case.states), on_device(case.weights)
    with monkeypatch.context() as patch:
        patch.setattr(xp, "cublas", fake_cublas()[1], raising=False)
        forward = Work()
        patch.setattr(strict_array, "capture", forward)
        *results, saved = case.forward(given, states, weights, **keywords)
        backward, case.weights = Work(), weights
        patch.setattr(strict_array, "capture", backward)
        case.backward(results, saved, **keywords)
    return forward.count, backward.count


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", ["plain", "mask", "dropout", "all"])
def test_a_step_is_a_product_and_a_kernel(cell, variant, monkeypatch):
    """What else there is to do is done once for the sequence, however long it is."""
    found = set()
    for time in (4, 7):
        case = Case(cell, time=time)
        found.add(work_of(monkeypatch, case, variants_of(case)[variant]))
    assert len(found) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_a_single_step_copies_no_state(cell, monkeypatch):
    case = Case(cell, time=1)
    case.forward_only = {}  # the forget bias is added to the bias
    forward, backward = work_of(monkeypatch, case, {})
    # GRU: the columns of the state's candidate are set to 0, and the bias is put in the order of the buffer.
    assert forward == (5 if cell == "gru_after" else 0)
    # Copies of the cotangents that the kernel writes, and ones for the bias. GRU: its bias's gradient in two rows.
    assert backward == 1 + len(case.states) + (2 if cell == "gru_after" else 0)
    outputs, h, *_ = case.forward(xp.asarray(case.x), on_device(case.states), on_device(case.weights))
    assert not np.may_share_memory(outputs._memory, h._memory)


def as_cupy_chooses(condition, x, y):
    """CuPy's ``where`` has no loop for bfloat16: it takes the one for float32."""
    found = np.where(condition._memory, x._memory, y._memory)
    return StrictArray._wrap(found.astype(np.float32) if found.dtype == "bfloat16" else found)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_masked_bfloat16_states_are_bfloat16(cell, monkeypatch):
    monkeypatch.setattr(xp, "where", as_cupy_chooses)
    case = Case(cell, time=3, dtype=np.dtype(BFLOAT16))
    compare(case, variants_of(case)["mask"], DTYPES["bfloat16"])


@pytest.mark.parametrize(("cell", "gates"), [("lstm", (-20, 20, 0, 0)), ("gru_after", (20, 0, 0))])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_gradients_add_up_over_many_steps(cell, gates, dtype):
    """Gates that keep the state: each step adds to its gradient what 16 bits would round away."""
    time = 64
    case = Case(cell, time=time, batch=2, depth=1, units=8, dtype=np.dtype(dtype))
    eps = float(finfo(case.x.dtype).eps)
    case.weights = [np.zeros_like(w) for w in case.weights]
    case.weights[2].reshape(-1, len(gates), 8)[0] = np.array(gates)[:, None]
    case.states = [np.zeros_like(s) for s in case.states]
    *_, saved = case.forward(xp.asarray(case.x), on_device(case.states), on_device(case.weights))
    like = xp.asarray(np.ones((2, 8), case.x.dtype))
    each = eps / 2 if cell == "lstm" else eps / 4  # the output gate lets half of it through
    d_outputs = xp.asarray(np.full((time, 2, 8), each, case.x.dtype))
    zero = xp.zeros((2, 8), case.x.dtype)
    cotangents = [d_outputs, *([zero, like] if cell == "lstm" else [like])]
    case.weights = on_device(case.weights)
    found = case.backward(cotangents, saved)[len(case.states)]
    np.testing.assert_allclose(found.get().astype("d"), 1 + time * eps / 4, rtol=eps)


def test_infinities_do_not_become_nan():
    """Gates far outside reach 0 and 1 exactly."""
    case = Case("lstm", time=1, dtype=np.float32)
    case.weights[2][...] = np.tile([1e30, -1e30, 1e30, 1e30], 4)
    _, got = run(case, {})
    assert all(np.isfinite(a).all() for a in got)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_under_the_address_sanitizer(cell, monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "_BUSY", 0)
    register_launcher("emulated", EmulatedLauncher(build="address", runs=((0, 0xFF, 1),)))
    try:
        for units in (5, 12):
            case = Case(cell, time=2, batch=3, depth=units, units=units, dtype=np.float16)
            compare(case, variants_of(case)["all"], DTYPES["float16"])
    finally:
        register_launcher("emulated", launcher)


MUTANTS = [
    ("gl_lstm_forward", "gate(s[1][i]) * c[i]", "gate(s[0][i]) * c[i]"),
    ("gl_lstm_forward", "h[i] += more[i]", "h[i] -= more[i]"),
    ("gl_lstm_forward", "load_here(arguments.h + p.at, values);", "load_here(arguments.h, values);"),
    ("gl_lstm_forward", "s[k][i] += more[i]", "s[k][i] -= more[i]"),
    ("gl_lstm_forward", "buffer + p.row * width + columns[k]", "buffer + columns[k]"),
    ("gl_lstm_forward", "store<N>(arguments.new_c + p.at, c);\n        return", "return"),
    ("gl_lstm_forward", "p.row = row;", "p.row = 0;"),
    ("gl_lstm_forward", "more[i] *= widen(narrow<STORAGE>(h[i]));", "more[i] = h[i];"),
    ("gl_lstm_backward", "d_c[i] = d_new_c * keep;", "d_c[i] = d_new_c;"),
    ("gl_lstm_backward", "(A(1) - t * t)", "(A(1) - t)"),
    ("gl_lstm_backward", "if (held && arguments.pending)", "if (!held && arguments.pending)"),
    ("gl_lstm_backward", "(held || arguments.always || !arguments.later)", "(!arguments.later)"),
    ("gl_lstm_backward", "store<N>(arguments.carry + p.at, d_h);\n        if", "if"),
    ("gl_lstm_backward", "put_zeros(arguments.d_counted + p.at);", "store<N>(arguments.d_counted + p.at, d_h);"),
    ("gl_lstm_backward", "slope = y >= A(0) && y <= A(1) ? A(0.2) : A(0);", "slope = A(0.2);"),
    ("gl_gru_forward", "candidate + keep * (h[i] - candidate)", "candidate + keep * h[i]"),
    ("gl_gru_backward", "s[2][i] = d_candidate * reset;", "s[2][i] = d_candidate;"),
    ("gl_gru_backward", "s[1][i] = d_candidate * s[2][i] * slope_r;", "s[1][i] = d_candidate * s[2][i];"),
    ("gl_gru_backward", "(held || arguments.always || !arguments.later)", "(held || !arguments.later)"),
    ("gl_gru_reset_forward", "h[i] *= gate(r[0][i]", "h[i] *= gate(h[i]"),
    ("gl_gru_candidate_backward", "d_h[i] *= keep;", ""),
    ("gl_gru_reset_backward", "q[i] *= h[i];", "q[i] *= A(1);"),
    ("gl_gru_reset_backward", "r[0][i] = q[i] * h[i] * slope;", "r[0][i] = q[i] * slope;"),
    ("gl_simple_rnn_backward", "h[i] = d_h[i] * (A(1) - h[i] * h[i]);", "h[i] = d_h[i];"),
    ("gl_simple_rnn_forward", "load_here(arguments.previous + p.at, values);", "set_zero(values);"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS, ids=lambda v: re.sub(r"\W+", "_", v)[:40])
def test_mutants_are_noticed(name, old, new, monkeypatch):
    """A kernel text with one fault gives other numbers than the truth."""
    original = recurrent_kernels.KERNELS[name]
    path = kernel_source.kernel_folder() / "recurrent.cu"
    text = path.read_text()
    assert old in text
    mutant = recurrent_kernels._kernel(name, ("float64",), body=text.replace(old, new), listed=False)
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
