"""Constraints: TensorFlow's recorded values, names and errors."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import constraints
from gpulayers.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from gpulayers.trace import Graph, Session, placeholder
from gpulayers.variables import Variable
from tests.reference.cases import case

RECORDED = case("constraints")
MADE = {
    "MaxNorm(1.0, axis=0)": MaxNorm(1.0, axis=0),
    "MaxNorm(1.0, axis=1)": MaxNorm(1.0, axis=1),
    "NonNeg()": NonNeg(),
    "UnitNorm(axis=0)": UnitNorm(axis=0),
    "MinMaxNorm(0.8, 1.2, rate=0.5, axis=0)": MinMaxNorm(0.8, 1.2, rate=0.5, axis=0),
}


@pytest.mark.parametrize("name", RECORDED.config["constructors"])
def test_recorded_values(name):
    constraint = MADE[RECORDED.config["constructors"][name]]
    w, expected = RECORDED.arrays["w"], RECORDED.arrays[name]
    value = constraint(w)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=0, atol=RECORDED.tolerance)
    np.testing.assert_allclose(constraint(Variable(w)), expected, rtol=0, atol=RECORDED.tolerance)
    with Graph().as_default():
        x = placeholder("float32", w.shape)
        np.testing.assert_allclose(Session().run(constraint(x), {x: w}), expected, rtol=0, atol=RECORDED.tolerance)


def test_every_recorded_constraint_is_tested():
    assert set(RECORDED.config["constructors"].values()) == set(MADE)


@pytest.mark.parametrize("constraint", MADE.values(), ids=list(MADE))
def test_configurations_round_trip(constraint):
    again = constraints.deserialize(constraints.serialize(constraint))
    assert type(again) is type(constraint) and again.get_config() == constraint.get_config()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtype_is_kept(dtype):
    for constraint in MADE.values():
        assert constraint(RECORDED.arrays["w"].astype(dtype)).dtype == dtype


def test_several_axes():
    w = np.random.default_rng(0).standard_normal((3, 3, 2, 4))
    norms = np.sqrt((UnitNorm(axis=[0, 1, 2])(w) ** 2).sum(axis=(0, 1, 2)))
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_get():
    assert constraints.get(None) is None
    assert isinstance(constraints.get("non_neg"), NonNeg)
    assert isinstance(constraints.get(UnitNorm), UnitNorm)
    assert constraints.get(abs) is abs
    assert constraints.get({"class_name": "MaxNorm", "config": {"max_value": 3, "axis": 1}}).max_value == 3
    for wrong in ("unknown", 3, np.ones(2)):
        with pytest.raises(ValueError):
            constraints.get(wrong)
