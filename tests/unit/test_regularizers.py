"""Regularizers: TensorFlow's recorded values, the forms they work in, names and errors."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import regularizers
from gpulayers.regularizers import L1, L1L2, L2, OrthogonalRegularizer
from gpulayers.trace import GradientTape, Graph, Session, placeholder
from gpulayers.variables import Variable
from tests.reference.cases import case

MADE = {
    "L1(0.1)": lambda: L1(0.1),
    "L2(0.1)": lambda: L2(0.1),
    "L1L2(0.1,0.2)": lambda: L1L2(0.1, 0.2),
    "L1()": L1,
    "L2()": L2,
    "L1L2()": L1L2,
    "OrthogonalRegularizer(0.1,rows)": lambda: OrthogonalRegularizer(0.1, "rows"),
    "OrthogonalRegularizer(0.1,columns)": lambda: OrthogonalRegularizer(0.1, "columns"),
}
RECORDED = case("regularizers")


@pytest.mark.parametrize("entry", RECORDED.expect, ids=lambda entry: entry["regularizer"])
def test_recorded_values(entry):
    value = MADE[entry["regularizer"]]()(RECORDED.arrays["w"])
    assert value.shape == () and value.dtype == np.float32
    assert abs(float(value) - entry["value"]) <= RECORDED.tolerance


def test_every_recorded_regularizer_is_tested():
    assert {entry["regularizer"] for entry in RECORDED.expect} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_graph_variable_and_tape_agree_with_eager(name):
    regularizer, w = MADE[name](), RECORDED.arrays["w"]
    eager = float(regularizer(w))
    assert float(regularizer(Variable(w))) == eager
    with GradientTape() as tape:
        recorded = regularizer(tape.watch(w))
    assert float(recorded) == eager
    with Graph().as_default():
        x = placeholder("float32", w.shape)
        penalty = regularizer(x)
        assert np.isclose(Session().run(penalty, {x: w}), eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in MADE if name != "L1L2()"])
def test_gradient_against_differences(name):
    regularizer = MADE[name]()
    w = RECORDED.arrays["w"].astype(np.float64)
    variable = Variable(w)
    with GradientTape() as tape:
        penalty = regularizer(variable)
    direction = np.random.default_rng(1).standard_normal(w.shape)
    slope = (regularizer(w + 1e-6 * direction) - regularizer(w - 1e-6 * direction)) / 2e-6
    assert np.isclose((tape.gradient(penalty, variable) * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_coefficients_are_float32_and_configurations_round_trip():
    assert L2().get_config() == {"l2": 0.009999999776482582}
    for make in MADE.values():
        regularizer = make()
        again = regularizers.deserialize(regularizers.serialize(regularizer))
        assert type(again) is type(regularizer) and again.get_config() == regularizer.get_config()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "0.1", [0.1], True])
def test_unusable_coefficients(bad):
    for make in (L1, L2, lambda v: L1L2(v, 0.0), lambda v: L1L2(0.0, v), OrthogonalRegularizer):
        with pytest.raises(ValueError, match="coefficient cannot be used"):
            make(bad)


def test_none_means_the_default_and_negative_is_allowed():
    assert L2(None).get_config() == L2().get_config()
    assert L1(None).get_config() == L1().get_config()
    assert float(L1(-1.0)(np.ones(3))) == -3.0


def test_get():
    assert regularizers.get(None) is None
    assert regularizers.get("l1_l2").get_config() == L1L2(0.01, 0.01).get_config()
    assert regularizers.get("L1L2").get_config() == {"l1": 0.0, "l2": 0.0}
    assert isinstance(regularizers.get(L1), L1)
    own = lambda w: 3.0
    assert regularizers.get(own) is own
    for wrong in ("unknown", 3, np.ones(2)):
        with pytest.raises(ValueError):
            regularizers.get(wrong)


def test_orthogonal_needs_a_matrix_and_a_mode():
    with pytest.raises(ValueError, match="2 axes"):
        OrthogonalRegularizer()(np.ones(3))
    with pytest.raises(ValueError, match="'rows' or 'columns'"):
        OrthogonalRegularizer(mode="diagonals")
    assert float(OrthogonalRegularizer()(np.ones((1, 3)))) == 0.0


def test_zero_coefficients_ignore_infinite_weights():
    assert float(L1L2()(np.array([np.inf]))) == 0.0
