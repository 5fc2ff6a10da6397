"""Gradients of the gradients of fused recurrent steps and sequences, against differences of the first ones."""

from __future__ import annotations

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.errors import GradientError
from gpulayers.ops.recurrent.composed import composed_sequence
from gpulayers.ops.recurrent.operations import recurrent_sequence, recurrent_step
from tests.kernels.emulation.build import compiler
from tests.kernels.strict_array import xp
from tests.ops.test_recurrent_arrays import Case, variants

CELLS = ["lstm", "lstm_legacy", "gru_after", "gru_before", "simple"]


def operands(case):
    return [case.x, *case.states, *case.weights]


def run(case, values, keywords, whole=True):
    """Call the operation; one list of results."""
    count = len(case.states)
    x, states, weights = values[0], values[1 : 1 + count], values[1 + count :]
    call = recurrent_sequence if whole else recurrent_step
    y, new = call(case.name, x, states, *weights, **case.keywords, **case.forward_only, **keywords)
    return [y, *new]


def objective(results):
    """A number that is not linear in the results, so that first gradients depend on them."""
    return sum(gl.reduce_sum(gl.sin(2 * r)) for r in results)


def first_gradients(case, values, keywords, whole=True):
    with gl.GradientTape() as tape:
        tensors = [tape.watch(v) for v in values]
        total = objective(run(case, tensors, keywords, whole))
    return tape.gradient(total, tensors)


def second_gradients(case, values, weights, keywords, whole=True):
    """Differentiate sum(weights * first gradients) by every operand."""
    with gl.GradientTape() as tape:
        tensors = [tape.watch(v) for v in values]
        slopes = first_gradients(case, tensors, keywords, whole)
        total = sum(gl.reduce_sum(s * w) for s, w in zip(slopes, weights, strict=True))
    return tape.gradient(total, tensors)


def check(case, keywords, whole=True):
    rng, values = np.random.default_rng(7), operands(case)
    weights = [rng.normal(size=v.shape) for v in values]
    found = second_gradients(case, values, weights, keywords, whole)
    for index, gradient in enumerate(found):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(values)
            moved[index] = moved[index] + step * direction
            slopes = first_gradients(case, moved, keywords, whole)
            ends.append(sum(np.sum(s * w) for s, w in zip(slopes, weights, strict=True)))
        np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", ["plain", "mask", "lengths", "backwards", "all"])
def test_sequences(cell, variant):
    case = Case(cell, time=3)
    check(case, dict(variants(case))[variant])


@pytest.mark.parametrize("cell", CELLS)
def test_steps(cell):
    case = Case(cell)
    case.x = case.x[0]
    check(case, {"residual": True}, whole=False)


@pytest.mark.parametrize("cell", ["lstm", "gru_after", "gru_before"])
def test_hard_sigmoid(cell):
    case = Case(cell, time=2)
    case.weights[0] *= 2
    check(case, {"recurrent_activation": "hard_sigmoid"})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", ["residual", "mask", "lengths", "backwards", "dropout", "all"])
def test_the_composition_is_the_fused_operation(cell, variant):
    """What second gradients differentiate has the fused operation's values and first gradients."""
    case = Case(cell, time=4)
    keywords = dict(variants(case))[variant]
    cotangents = [np.random.default_rng(1).normal(size=r.shape) for r in run(case, operands(case), keywords)]
    found = []
    for composed in (False, True):
        with gl.GradientTape() as tape:
            x, *rest = (tape.watch(v) for v in operands(case))
            if composed:
                states, weights = rest[: len(case.states)], rest[len(case.states) :]
                settings = {**case.keywords, **case.forward_only, **keywords}
                results = composed_sequence(case.name, x, states, *weights, **settings)
            else:
                results = run(case, [x, *rest], keywords)
        gradients = tape.gradient(results, [x, *rest], output_gradients=cotangents)
        found.append([r.numpy() for r in results] + gradients)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_the_same_array_for_two_operands():
    """Zeros given for both states: each gets its own gradient, not the sum of both."""
    case, weights = Case("lstm", time=2), None
    zeros = np.zeros_like(case.states[0])
    found = []
    for states in ([zeros, zeros], [zeros, zeros.copy()]):
        with gl.GradientTape() as outer:
            k = outer.watch(case.weights[0])
            with gl.GradientTape() as inner:
                inner.watch(k)
                y, _ = recurrent_sequence("lstm", case.x, states, k, *case.weights[1:])
                total = objective([y])
            (slope,) = inner.gradient(total, [k])
            weights = np.ones_like(case.weights[0]) if weights is None else weights
            total = gl.reduce_sum(slope * slope)
        found.append(outer.gradient(total, k))
    np.testing.assert_array_equal(*found)


def test_third_gradients():
    case, rng = Case("gru_after", time=2, batch=2, depth=2, units=2), np.random.default_rng(0)
    a, b = rng.normal(size=case.x.shape), rng.normal(size=case.x.shape)

    def second(x):
        with gl.GradientTape() as tape:
            t = tape.watch(x)
            values = [t, *operands(case)[1:]]
            with gl.GradientTape() as inner:
                inner.watch(t)
                total = objective(run(case, values, {}))
            s = gl.reduce_sum(inner.gradient(total, t) * a)
        return tape.gradient(s, t)

    with gl.GradientTape() as tape:
        x = tape.watch(case.x)
        total = gl.reduce_sum(second(x) * b)
    third, direction = tape.gradient(total, x), rng.normal(size=case.x.shape)
    ends = [np.sum(second(case.x + e * direction) * b) for e in (1e-5, -1e-5)]
    np.testing.assert_allclose(np.sum(third * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru_after", "simple"])
def test_in_a_graph(cell):
    """A session gives the tape's second gradients; a graph without the number of steps says what is missing."""
    case = Case(cell, time=3)
    values = operands(case)
    weights = [np.random.default_rng(1).normal(size=v.shape) for v in values]
    expected = second_gradients(case, values, weights, {"residual": True})
    for time in (3, None):
        graph = gl.Graph()
        with graph.as_default():
            shapes = [(time, 3, 4), *(v.shape for v in values[1:])]
            feeds = [gl.placeholder("float64", shape) for shape in shapes]
            slopes = gl.gradients(objective(run(case, feeds, {"residual": True})), feeds)
            total = sum(gl.reduce_sum(s * w) for s, w in zip(slopes, weights, strict=True))
            if time is None:
                with pytest.raises(GradientError, match="number of steps"):
                    gl.gradients(total, feeds)
                continue
            again = gl.gradients(total, feeds)
        with gl.Session(graph=graph) as session:
            found = session.run(again, dict(zip(feeds, values, strict=True)))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_narrow_data_is_differentiated_in_float32(cell):
    case = Case(cell, time=2)
    weights = [np.random.default_rng(1).normal(size=v.shape) for v in operands(case)]
    wide = second_gradients(case, operands(case), weights, {"residual": True})
    values = [v.astype(np.float16) for v in operands(case)]
    narrow = second_gradients(case, values, [w.astype(np.float16) for w in weights], {"residual": True})
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == np.float16
        np.testing.assert_allclose(a.astype(float), b, atol=0.03 * np.abs(b).max())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("where", ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_on_a_device(cell, where):
    if where == "emulated" and compiler() is None:
        pytest.skip("needs g++")
    case = Case(cell, time=3)
    keywords = dict(variants(case))["mask"]
    weights = [np.random.default_rng(1).normal(size=v.shape) for v in operands(case)]
    expected = second_gradients(case, operands(case), weights, keywords)
    module = xp
    if where == "gpu":
        import cupy as module
    keywords["mask"] = module.asarray(keywords["mask"])
    found = second_gradients(
        case, [module.asarray(v) for v in operands(case)], [module.asarray(w) for w in weights], keywords
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.get(), b, atol=1e-11)


def test_a_sequence_of_no_steps():
    case = Case("lstm", time=0)
    weights = [np.ones(v.shape) for v in operands(case)]
    found = second_gradients(case, operands(case), weights, {})
    assert [a.shape for a in found] == [v.shape for v in operands(case)]
