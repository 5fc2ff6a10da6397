"""Recurrent array functions and layers on NumPy beside torch's CPU build, in one process: compare the two of a group.

Run with ``pytest benchmarks/test_recurrent_cpu.py``; compare medians within a group. Torch gets the same residual
addition. Forward alone means inference on both sides: nothing is saved for a backward pass.
"""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.ops.recurrent import arrays as ra

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

BATCH, TIME, UNITS = 32, 100, 128
KINDS = {"lstm": ("LSTM", 4), "gru": ("GRU", 3), "simple_rnn": ("RNN", 1)}


def data(kind, time, batch, units):
    """Inputs, zero states and small weights for one kind."""
    rng = np.random.default_rng(0)
    gates = KINDS[kind][1]
    bias = (2, 3 * units) if kind == "gru" else (gates * units,)
    shapes = [(units, gates * units), (units, gates * units), bias]
    weights = [rng.uniform(-0.1, 0.1, shape).astype(np.float32) for shape in shapes]
    states = [np.zeros((batch, units), np.float32) for _ in range(2 if kind == "lstm" else 1)]
    return rng.standard_normal((time, batch, units)).astype(np.float32), states, weights


def ours(kind, backward):
    x, states, weights = data(kind, TIME, BATCH, UNITS)
    forward, back = getattr(ra, f"{kind}_sequence"), getattr(ra, f"{kind}_sequence_backward")
    cotangent, absent = np.ones_like(x), [None] * len(states)

    def run():
        *results, saved = forward(x, *states, *weights, residual=True, save=backward)
        return back(cotangent, *absent, saved, *weights[:2], residual=True) if backward else results

    return run


def theirs(kind, backward, batch_first=False):
    x = torch.tensor(data(kind, TIME, BATCH, UNITS)[0])
    module = getattr(torch.nn, KINDS[kind][0])(UNITS, UNITS, batch_first=batch_first)
    x = (x.swapaxes(0, 1).contiguous() if batch_first else x).requires_grad_(backward)
    cotangent = torch.ones_like(x)

    def run():
        with torch.set_grad_enabled(backward):
            y = module(x)[0] + x
        if backward:
            y.backward(cotangent)
        return y

    return run


@pytest.mark.parametrize("library", [ours, theirs], ids=["gpulayers", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_sequence(benchmark, kind, backward, library):
    benchmark.group = f"residual {kind} ({BATCH}, {TIME}, {UNITS}) {'forward+backward' if backward else 'forward'}"
    benchmark.pedantic(library(kind, backward), rounds=30, warmup_rounds=3)


def our_step(kind):
    x, states, weights = data(kind, 1, 8, 16)
    step, x = getattr(ra, f"{kind}_step"), x[0]
    return lambda: step(x, *states, *weights, residual=True)


def their_step(kind):
    x, states, _ = data(kind, 1, 8, 16)
    module = getattr(torch.nn, KINDS[kind][0] + "Cell")(16, 16)
    x, states = torch.tensor(x[0]), tuple(map(torch.tensor, states))

    def run():
        with torch.no_grad():
            new = module(x, states if kind == "lstm" else states[0])
            return (new[0] if kind == "lstm" else new) + x

    return run


@pytest.mark.parametrize("library", [our_step, their_step], ids=["gpulayers", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_step(benchmark, kind, library):
    benchmark.group = f"residual {kind} step (8, 16)"
    benchmark(library(kind))


def wrapped(units):
    return gl.nn.RNNCellResidualWrapper(gl.keras.layers.LSTMCell(units))


def our_layer(backward):
    x = np.ascontiguousarray(data("lstm", TIME, BATCH, UNITS)[0].swapaxes(0, 1))
    layer, cotangent = gl.keras.layers.RNN(wrapped(UNITS), return_sequences=True), np.ones_like(x)
    layer(x)

    def run():
        if not backward:
            return layer(x)
        with gl.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, *layer.trainable_variables], output_gradients=cotangent)

    return run


def their_layer(backward):
    return theirs("lstm", backward, batch_first=True)


@pytest.mark.parametrize("library", [our_layer, their_layer], ids=["gpulayers", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_layer(benchmark, backward, library):
    benchmark.group = f"layer residual lstm ({BATCH}, {TIME}, {UNITS}) {'forward+backward' if backward else 'forward'}"
    with gl.device("cpu"):
        benchmark.pedantic(library(backward), rounds=30, warmup_rounds=3)


def our_wrapped_cell():
    x, states, _ = data("lstm", 1, 8, 16)
    cell = wrapped(16)
    return lambda: cell(x[0], states)


@pytest.mark.parametrize("library", [our_wrapped_cell, lambda: their_step("lstm")], ids=["gpulayers", "torch"])
def test_wrapped_cell(benchmark, library):
    benchmark.group = "layer residual lstm cell (8, 16)"
    with gl.device("cpu"):
        benchmark(library())
