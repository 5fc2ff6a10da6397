"""The recurrent sequence functions against float64 loops, finite differences, torch and recorded TensorFlow cases."""

import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

from gpulayers.errors import ShapeError, StructureError
from gpulayers.ops.host import buffers as host_buffers
from gpulayers.ops.recurrent import arrays as ra

DATA = Path(__file__).parents[1] / "reference" / "data"
CELLS = ["lstm", "lstm_legacy", "gru_after", "gru_before", "simple"]


def sigma(x, kind):
    return 1 / (1 + np.exp(-x)) if kind == "sigmoid" else np.clip(0.2 * x + 0.5, 0, 1)


def naive_step(cell, x, states, kernel, recurrent, bias, kind="sigmoid", recurrent_mask=None):
    """One step in float64, written from the equations, a gate at a time."""
    h = states[0]
    entering = h if recurrent_mask is None else h * recurrent_mask
    u = h.shape[1]
    k = [kernel[:, j * u : (j + 1) * u] for j in range(kernel.shape[1] // u)]
    r = [recurrent[:, j * u : (j + 1) * u] for j in range(kernel.shape[1] // u)]
    if cell == "simple":
        return (np.tanh(x @ kernel + entering @ recurrent + bias),)
    if cell.startswith("lstm"):
        s = [x @ k[j] + entering @ r[j] + bias[j * u : (j + 1) * u] for j in range(4)]
        i, f, g, o = s if cell == "lstm" else (s[0], s[2] + 1.5, s[1], s[3])
        c = sigma(f, kind) * states[1] + sigma(i, kind) * np.tanh(g)
        return sigma(o, kind) * np.tanh(c), c
    if cell == "gru_after":
        a = [x @ k[j] + bias[0, j * u : (j + 1) * u] for j in range(3)]
        b = [entering @ r[j] + bias[1, j * u : (j + 1) * u] for j in range(3)]
        z, reset = sigma(a[0] + b[0], kind), sigma(a[1] + b[1], kind)
        n = np.tanh(a[2] + reset * b[2])
    else:
        a = [x @ k[j] + bias[j * u : (j + 1) * u] for j in range(3)]
        z, reset = sigma(a[0] + entering @ r[0], kind), sigma(a[1] + entering @ r[1], kind)
        n = np.tanh(a[2] + (reset * entering) @ r[2])
    return (z * h + (1 - z) * n,)


def naive_sequence(cell, x, states, weights, *, mask=None, zero_output_for_mask=False, go_backwards=False,
                   residual=False, input_mask=None, recurrent_mask=None, kind="sigmoid"):  # fmt: skip
    if go_backwards:
        x, mask = x[::-1], None if mask is None else mask[::-1]
    outputs, previous = [], np.zeros_like(states[0])
    for t in range(len(x)):
        entering = x[t] if input_mask is None else x[t] * input_mask
        new = naive_step(cell, entering, states, *weights, kind, recurrent_mask)
        output = new[0] + x[t] if residual else new[0]
        if mask is not None:
            on = mask[t][:, None]
            new = tuple(np.where(on, a, b) for a, b in zip(new, states, strict=True))
            output = np.where(on, output, 0 if zero_output_for_mask else previous)
        outputs.append(output)
        previous, states = output, new
    return np.array(outputs).reshape(len(x), *states[0].shape), *states


class Case:
    """Random weights and data for one cell, and the calls under test with the right arguments."""

    def __init__(self, cell, seed=0, time=5, batch=3, depth=4, units=4, dtype=np.float64):
        rng = np.random.default_rng(seed)
        self.cell, self.count = cell, {"lstm": 4, "gru_": 3, "simp": 1}[cell[:4]]
        draw = lambda *shape: rng.uniform(-1, 1, shape).astype(dtype)
        self.x, self.states = draw(time, batch, depth), [draw(batch, units) for _ in range(1 + cell.startswith("lstm"))]
        bias = (2, 3 * units) if cell == "gru_after" else (self.count * units,)
        self.weights = [draw(depth, self.count * units), draw(units, self.count * units), draw(*bias)]
        self.keywords = {"gru_after": {"reset_after": True}, "gru_before": {"reset_after": False}}.get(cell, {})
        self.forward_only = {}
        if cell == "lstm_legacy":
            self.keywords, self.forward_only = {"gate_order": "ijfo"}, {"forget_bias": 1.5}
        self.name = {"lstm": "lstm", "gru_": "gru", "simp": "simple_rnn"}[cell[:4]]
        self.rng = rng

    def forward(self, x=None, states=None, weights=None, **keywords):
        return getattr(ra, f"{self.name}_sequence")(
            self.x if x is None else x, *(states or self.states), *(weights or self.weights),
            **self.keywords, **self.forward_only, **keywords,
        )  # fmt: skip

    def backward(self, cotangents, saved, **keywords):
        return getattr(ra, f"{self.name}_sequence_backward")(
            *cotangents, saved, *self.weights[:2], **self.keywords, **keywords
        )

    def naive(self, x=None, states=None, weights=None, **keywords):
        wide = lambda arrays: [np.asarray(a, np.float64) for a in arrays]
        return naive_sequence(
            self.cell, *wide([self.x if x is None else x]), wide(states or self.states), wide(weights or self.weights),
            **keywords,
        )  # fmt: skip


def variants(case, seed=1):
    """Every keyword the sequences know, alone and together."""
    rng = np.random.default_rng(seed)
    time, batch, depth = case.x.shape
    mask = rng.random((time, batch)) < 0.6
    drops = {
        "input_mask": (rng.random((batch, depth)) < 0.7) / 0.7,
        "recurrent_mask": (rng.random(case.states[0].shape) < 0.7) / 0.7,
    }
    yield "plain", {}
    yield "residual", {"residual": True}
    yield "mask", {"mask": mask, "residual": True}
    yield "lengths", {"mask": ra.mask_from_lengths([0, time, 2][:batch], time), "zero_output_for_mask": True}
    yield "backwards", {"go_backwards": True, "mask": mask, "residual": True}
    yield "dropout", {**drops, "residual": True}
    yield "all", {**drops, "mask": mask, "residual": True, "go_backwards": True, "zero_output_for_mask": True}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("index", range(7))
def test_forward_is_the_float64_loop(cell, index):
    case = Case(cell, seed=index)
    _, keywords = list(variants(case))[index]
    *results, saved = case.forward(**keywords)
    for got, want in zip(results, case.naive(**keywords), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)
    *lean, nothing = case.forward(**keywords, save=False)
    assert nothing == () and saved
    for got, want in zip(lean, results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cell", ["lstm", "lstm_legacy", "gru_after", "gru_before"])
def test_hard_sigmoid_gates(cell):
    case = Case(cell)
    case.weights[0] *= 3  # some gates reach 0 and 1
    *results, saved = case.forward(recurrent_activation="hard_sigmoid", residual=True)
    for got, want in zip(results, case.naive(kind="hard_sigmoid", residual=True), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)
    check_gradients(case, {"residual": True}, {"recurrent_activation": "hard_sigmoid"}, {"kind": "hard_sigmoid"})


def check_gradients(case, keywords, ours=None, theirs=None):
    """Compare every gradient with central differences of the float64 loop along random directions."""
    *results, saved = case.forward(**keywords, **(ours or {}))
    cotangents = [case.rng.uniform(-1, 1, r.shape) for r in results]
    gradients = case.backward(cotangents, saved, **keywords, **(ours or {}))
    arguments = [case.x, *case.states, *case.weights]
    assert [g.shape for g in gradients] == [a.shape for a in arguments]
    split = 1 + len(case.states)

    def objective(values):
        out = case.naive(values[0], values[1:split], values[split:], **keywords, **(theirs or {}))
        return sum(np.sum(a * b) for a, b in zip(out, cotangents, strict=True))

    for index, gradient in enumerate(gradients):
        direction = case.rng.uniform(-1, 1, gradient.shape)
        ends = []
        for step in (1e-6, -1e-6):
            values = list(arguments)
            values[index] = values[index] + step * direction
            ends.append(objective(values))
        np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("index", range(7))
def test_gradients_are_finite_differences(cell, index):
    case = Case(cell, seed=index)
    _, keywords = list(variants(case))[index]
    check_gradients(case, keywords)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_absent_cotangents_are_zeros(cell, present):
    case = Case(cell)
    *results, saved = case.forward(residual=True)
    given = [case.rng.uniform(-1, 1, r.shape) if p else None for r, p in zip(results, [*present, False], strict=False)]
    full = [np.zeros(r.shape) if g is None else g for r, g in zip(results, given, strict=True)]
    for got, want in zip(
        case.backward(given, saved, residual=True), case.backward(full, saved, residual=True), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("time", "batch", "depth", "units"),
    [(0, 3, 2, 4), (3, 0, 2, 4), (1, 1, 1, 1), (2, 5, 7, 3), (1, 2, 3, 17), (40, 2, 3, 5), (9, 33, 130, 129)],
)
def test_sizes(cell, time, batch, depth, units):
    case = Case(cell, time=time, batch=batch, depth=depth, units=units)
    case.weights[:2] = [w / np.sqrt(max(depth, units)) for w in case.weights[:2]]
    *results, saved = case.forward()
    for got, want in zip(results, case.naive(), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    gradients = case.backward([np.ones_like(r) for r in results], saved)
    assert [g.shape for g in gradients] == [a.shape for a in (case.x, *case.states, *case.weights)]
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("block", [1, 2, 3])
def test_block_length_does_not_matter(cell, block, monkeypatch):
    """Blocks of steps are a matter of cache: several of them, the last one ragged, give what one gives."""
    case = Case(cell, time=7)
    keywords = dict(list(variants(case))[4][1])
    *results, saved = case.forward(**keywords)
    cotangents = [case.rng.uniform(-1, 1, r.shape) for r in results]
    gradients = case.backward(cotangents, saved, **keywords)
    for module in (ra.recurrent_lstm, ra.recurrent_gru):
        monkeypatch.setattr(module, "steps_per_block", lambda time, step_bytes: min(block, time))
    *again, saved = case.forward(**keywords)
    for got, want in zip((*again, *case.backward(cotangents, saved, **keywords)), (*results, *gradients), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)
    *lean, _ = case.forward(**keywords, save=False)
    for got, want in zip(lean, results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("float16", 2e-3), ("bfloat16", 2e-2), ("float64", 1e-13)]
)
def test_dtypes(cell, dtype, tolerance):
    """Results keep the dtype of the inputs; 16-bit data differs from float64 by its own rounding only."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    case = Case(cell, dtype=dtype)
    *results, saved = case.forward(residual=True)
    for got, want in zip(results, case.naive(residual=True), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance)
    gradients = case.backward([np.ones_like(r) for r in results], saved, residual=True)
    assert {g.dtype for g in gradients} == {np.dtype(np.float64 if dtype == "float64" else np.float32)}


@pytest.mark.parametrize("cell", CELLS)
def test_layouts_do_not_matter(cell):
    """Transposed, strided and reversed views give what contiguous copies give, and nothing given is changed."""
    case = Case(cell)
    views = [np.repeat(w, 2, axis=-1)[..., ::2] for w in case.weights]
    x = np.ascontiguousarray(case.x.transpose(1, 0, 2)).transpose(1, 0, 2)
    states = [np.asfortranarray(s) for s in case.states]
    mask = np.asfortranarray(np.random.default_rng(0).random(x.shape[:2]) < 0.5)
    before = [a.copy() for a in (x, *states, *views, mask)]
    *results, saved = case.forward(x, states, views, mask=mask)
    for got, want in zip(results, case.forward(mask=mask.copy())[:-1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-14)
    case.backward([np.asfortranarray(np.ones_like(r)) for r in results], saved, mask=mask)
    for now, then in zip((x, *states, *views, mask), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("cell", CELLS)
def test_results_can_be_changed_without_harm(cell):
    """What is saved is not what is returned: a caller may write into the results before the backward pass."""
    case = Case(cell)
    *results, saved = case.forward()
    want = case.backward([np.ones_like(r) for r in results], saved)
    *results, saved = case.forward()
    for result in results:
        result[...] = 7
    for got, expected in zip(case.backward([np.ones_like(r) for r in results], saved), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["sigmoid", "hard_sigmoid"])
def test_a_step_is_a_sequence_of_one(cell, kind):
    case = Case(cell, time=1, batch=4, depth=5, units=5)
    gates = {} if cell == "simple" else {"recurrent_activation": kind}
    *results, saved = case.forward(residual=True, **gates)
    step = getattr(ra, f"{case.name}_step")
    *one, one_saved = step(
        case.x[0], *case.states, *case.weights, residual=True, **case.keywords, **case.forward_only, **gates
    )
    cotangents = [case.rng.uniform(-1, 1, r.shape) for r in one]
    want = case.backward([cotangents[0][None], *cotangents[1:]], saved, residual=True, **gates)
    got = getattr(ra, f"{case.name}_step_backward")(
        *cotangents, one_saved, *case.weights[:2], residual=True, **case.keywords, **gates
    )
    for a, b in zip((one[0][None], *one[1:], got[0][None], *got[1:]), (*results, *want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("cell", ["lstm", "gru_after", "simple"])
def test_torch_agrees(cell):
    torch = pytest.importorskip("torch")
    case = Case(cell, time=6, dtype=np.float32)
    kind = {"lstm": torch.nn.LSTM, "gru_after": torch.nn.GRU, "simple": torch.nn.RNN}[cell]
    # torch: LSTM i f g o as here; GRU r z n; weights transposed.
    order = {"lstm": [0, 1, 2, 3], "gru_after": [1, 0, 2], "simple": [0]}[cell]
    columns = lambda w: w.reshape(*w.shape[:-1], len(order), -1)[..., order, :].reshape(w.shape)
    kernel, recurrent, bias = (columns(w) for w in case.weights)
    module = kind(4, 4)
    bias_ih, bias_hh = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
    with torch.no_grad():
        for name, value in (
            ("weight_ih_l0", kernel.T), ("weight_hh_l0", recurrent.T), ("bias_ih_l0", bias_ih), ("bias_hh_l0", bias_hh),
        ):  # fmt: skip
            getattr(module, name).copy_(torch.tensor(np.ascontiguousarray(value)))
    x = torch.tensor(case.x, requires_grad=True)
    states = [torch.tensor(s[None], requires_grad=True) for s in case.states]
    y, last = module(x, tuple(states) if len(states) == 2 else states[0])
    (y + x).sum().backward()
    *results, saved = case.forward(residual=True)
    np.testing.assert_allclose(results[0], (y + x).detach().numpy(), atol=2e-6)
    last = last if isinstance(last, tuple) else (last,)
    for got, want in zip(results[1:], last, strict=True):
        np.testing.assert_allclose(got, want[0].detach().numpy(), atol=2e-6)
    gradients = case.backward([np.ones_like(results[0]), *[None] * len(states)], saved, residual=True)
    np.testing.assert_allclose(gradients[0], x.grad.numpy(), atol=1e-5)
    for got, state in zip(gradients[1:], states, strict=False):
        np.testing.assert_allclose(got, state.grad[0].numpy(), atol=1e-5)
    split = 1 + len(states)
    np.testing.assert_allclose(columns(gradients[split]), module.weight_ih_l0.grad.numpy().T, atol=2e-5)
    np.testing.assert_allclose(columns(gradients[split + 1]), module.weight_hh_l0.grad.numpy().T, atol=2e-5)


@pytest.mark.parametrize("preactivation", [-300.0, -60.0, -20.0, 20.0, 300.0])
def test_gates_nearly_closed_or_open(preactivation):
    x, state, ones = np.ones((1, 1, 1), "f"), np.zeros((1, 3), "f"), np.ones(3, "f")
    kernel = np.concatenate([preactivation * ones, 0 * ones, ones, 300 * ones])[None].astype("f")
    outputs, _, c, _ = ra.lstm_sequence(x, state, state, kernel, np.zeros((3, 12), "f"))
    wanted = sigma(preactivation, "sigmoid") * np.tanh(1.0)
    np.testing.assert_allclose(c, np.full((1, 3), wanted), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(outputs, np.full((1, 1, 3), np.tanh(wanted)), rtol=1e-6, atol=1e-37)
    kernel = np.concatenate([preactivation * ones, 0 * ones, ones])[None].astype("f")
    outputs, h, _ = ra.gru_sequence(x, state, kernel, np.zeros((3, 9), "f"))
    wanted = sigma(-preactivation, "sigmoid") * np.tanh(1.0)
    np.testing.assert_allclose(h, np.full((1, 3), wanted), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(outputs[0], h)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_every_time(cell):
    case = Case(cell, time=12, batch=7, dtype=np.float32)
    runs = []
    for _ in range(3):
        *results, saved = case.forward(residual=True)
        runs.append([*results, *case.backward([np.ones_like(r) for r in results], saved, residual=True)])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_bad_shapes_are_refused(cell):
    case = Case(cell, depth=3, units=4)
    with pytest.raises(ShapeError, match="cannot be added to the outputs"):
        case.forward(residual=True)
    with pytest.raises(ShapeError, match="kernel does not fit"):
        case.forward(x=case.x[..., :2])
    with pytest.raises(ShapeError, match="state 0 does not fit"):
        case.forward(states=[s[:2] for s in case.states])
    if cell != "simple":
        with pytest.raises(StructureError, match="unknown recurrent_activation"):
            case.forward(recurrent_activation="swish")
    if cell == "lstm":
        with pytest.raises(StructureError, match="unknown gate_order"):
            case.forward(gate_order="fico")
    if cell.startswith("gru"):
        with pytest.raises(ShapeError, match="bias does not fit reset_after"):
            case.forward(weights=[*case.weights[:2], np.zeros(5)])


def test_memory_is_used_again_only_when_free():
    host_buffers.release()
    first = host_buffers.recycled((300, 400), np.float32)
    place, view = first.ctypes.data, first[3:5]
    second = host_buffers.recycled((300, 400), np.float32)
    assert not np.shares_memory(first, second)
    del first
    third = host_buffers.recycled((300, 400), np.float32)  # `view` still lives in the first
    assert not np.shares_memory(third, view)
    del view
    assert host_buffers.recycled((300, 390), np.float32).ctypes.data == place
    assert host_buffers.recycled((5,), np.float64).ctypes.data % 64 == 0
    host_buffers.release()


def test_kept_memory_is_bounded(monkeypatch):
    host_buffers.release()
    monkeypatch.setattr(host_buffers, "KEPT_BYTES", 1 << 20)
    held = [host_buffers.recycled((1 << 18,), np.uint8) for _ in range(20)]
    assert sum(block.size for block, _ in host_buffers._blocks) <= 1 << 20
    for index, array in enumerate(held):
        array[...] = index
    assert [int(array[-1]) for array in held] == list(range(20))
    host_buffers.release()


# --- recorded TensorFlow cases ----------------------------------------------------------------------------------------


def recorded(kind):
    cases = json.loads((DATA / "examples.json").read_text())["cases"]
    skip = ("stack", "multi", "lstm_full", "lstm_proj", "relu", "_fn", "residual_of")  # not one fused cell
    return [pytest.param(c, id=c["name"]) for c in cases if c["kind"] == kind and not any(s in c["name"] for s in skip)]


def arrays_of(case):
    with np.load(DATA / "examples.npz") as file:
        return {name: file[entry["key"]] for name, entry in case["arrays"].items()}


MODERN = {"SimpleRNNCell": "simple_rnn", "GRUCell": "gru", "LSTMCell": "lstm"}


@pytest.mark.parametrize("case", recorded("rnn_cell_step"))
def test_recorded_steps(case):
    arrays, config, tolerance = arrays_of(case), case["config"], case["tolerance"]
    name = MODERN[config["cell"]]
    weights = [arrays[f"weight.{w}"] for w in ("kernel", "recurrent_kernel", "bias")]
    states = [arrays[k] for k in ("state0", "state1") if k in arrays]
    keywords = {"residual": bool(config.get("wrappers"))}
    if "reset_before" in case["name"]:
        keywords["reset_after"] = False
    output, *new, saved = getattr(ra, f"{name}_step")(arrays["x"], *states, *weights, **keywords)
    np.testing.assert_allclose(output, arrays["y"], atol=tolerance)
    for index, state in enumerate(new):
        np.testing.assert_allclose(state, arrays[f"new_state{index}"], atol=tolerance)
    gradients = getattr(ra, f"{name}_step_backward")(
        arrays["w"], *[None] * len(states), saved, *weights[:2], **keywords
    )
    names = ["x", *[f"state{i}" for i in range(len(states))], "kernel", "recurrent_kernel", "bias"]
    for key, gradient in zip(names, gradients, strict=True):
        np.testing.assert_allclose(gradient, arrays[f"grad.{key}"], atol=tolerance, err_msg=key)


@pytest.mark.parametrize("case", recorded("rnn_layer"))
def test_recorded_layers(case):
    arrays, config, tolerance = arrays_of(case), case["config"], case["tolerance"]
    name, layer = MODERN[config["cell"]], config["layer_args"]
    weights = [arrays[f"weight0.{w}"] for w in ("kernel", "recurrent_kernel", "bias")]
    first = (lambda a: a) if layer.get("time_major") else (lambda a: a.swapaxes(0, 1))
    count = 2 if name == "lstm" else 1
    zeros = np.zeros((first(arrays["x0"]).shape[1], config["units"]), np.float32)
    states = [arrays.get(f"initial_state{i}", zeros) for i in range(count)]
    keywords = {"residual": True, "go_backwards": layer.get("go_backwards", False)}
    keywords |= {"zero_output_for_mask": layer.get("zero_output_for_mask", False)}
    if "mask" in arrays:
        keywords["mask"] = first(arrays["mask"])
    for call in range(2 if layer.get("stateful") else 1):
        x = first(arrays[f"x{call}"])
        outputs, *states, saved = getattr(ra, f"{name}_sequence")(x, *states, *weights, **keywords)
        want = arrays[f"y{call}"]
        np.testing.assert_allclose(first(outputs) if want.ndim == 3 else outputs[-1], want, atol=tolerance)
        for index, state in enumerate(states):
            np.testing.assert_allclose(state, arrays[f"state{call}.{index}"], atol=tolerance)
    if "w0" in arrays:
        gradients = getattr(ra, f"{name}_sequence_backward")(
            first(arrays["w0"]), *[None] * count, saved, *weights[:2], **keywords
        )
        np.testing.assert_allclose(first(gradients[0]), arrays["grad.x0"], atol=tolerance)


def legacy(config, arrays, units, prefix="weight.rnn/"):
    """Return the sequence function's name, its weights and its keywords for a legacy cell's variables."""
    get = lambda name: arrays[prefix + name]
    if "GRU" in config["cell"]:
        parts = [get(f"gru_cell/{p}") for p in ("gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias")]
        return "gru", list(ra.legacy_gru_weights(*parts)), {"reset_after": False}
    name, cell, keywords = "simple_rnn", "basic_rnn_cell", {}
    if "LSTM" in config["cell"]:
        name, cell, keywords = "lstm", "basic_lstm_cell", {"gate_order": "ijfo"}
    kernel = get(f"{cell}/kernel")
    return name, [kernel[:-units], kernel[-units:], get(f"{cell}/bias")], keywords


@pytest.mark.parametrize("case", recorded("dynamic_rnn"))
def test_recorded_dynamic_rnn(case):
    arrays, config, tolerance = arrays_of(case), case["config"], case["tolerance"]
    first = (lambda a: a) if config["time_major"] else (lambda a: a.swapaxes(0, 1))
    x, units = first(arrays["x"]), config["num_units"]
    name, weights, keywords = legacy(config, arrays, units)
    count = 2 if name == "lstm" else 1
    states = [arrays.get(f"initial_state{i}") for i in range(count)]
    if states[0] is not None and states[0].shape[1] == 2 * units:
        states = np.split(states[0], 2, axis=1)
    states = [np.zeros((x.shape[1], units), np.float32) if s is None else s for s in states]
    states = states[::-1]  # legacy LSTM states are (c, h)
    keywords["residual"] = config.get("residual_wrapped", False)
    if config["sequence_length"] is not None:
        keywords |= {
            "mask": ra.mask_from_lengths(config["sequence_length"], len(x)),
            "zero_output_for_mask": True,
        }
    bias = {"forget_bias": config["forget_bias"]} if name == "lstm" else {}
    outputs, *new, saved = getattr(ra, f"{name}_sequence")(x, *states, *weights, **keywords, **bias)
    np.testing.assert_allclose(first(outputs), arrays["y"], atol=tolerance)
    final = [arrays[k] for k in ("final_state0", "final_state1") if k in arrays]
    if final[0].shape[1] == 2 * units:
        final = np.split(final[0], 2, axis=1)
    for got, want in zip(new[::-1], final, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance)
    d_x, *rest = getattr(ra, f"{name}_sequence_backward")(
        first(arrays["w"]), *[None] * count, saved, *weights[:2], **keywords
    )
    d_kernel, d_recurrent, d_bias = rest[count:]
    np.testing.assert_allclose(first(d_x), arrays["grad.x"], atol=tolerance)
    if name == "gru":
        got = dict(
            zip(
                ("gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias"),
                ra.legacy_gru_gradients(d_kernel, d_recurrent, d_bias),
                strict=True,
            )
        )
    else:
        got = {"kernel": np.concatenate([d_kernel, d_recurrent]), "bias": d_bias}
    cell = {"gru": "gru_cell", "lstm": "basic_lstm_cell", "simple_rnn": "basic_rnn_cell"}[name]
    for key, gradient in got.items():
        np.testing.assert_allclose(gradient, arrays[f"grad.rnn/{cell}/{key}"], atol=tolerance, err_msg=key)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_can_have_memory_though_a_thread_of_its_parent_was_taking_some():
    with host_buffers._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about threads and fork
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that hangs dies of it
            host_buffers.recycled((300, 400), np.float32)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
