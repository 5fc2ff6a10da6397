"""Metrics against NumPy, eagerly, under a tape, in a function and in a graph."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.metrics import (
    Accuracy,
    BinaryAccuracy,
    CategoricalAccuracy,
    Mean,
    MeanMetricWrapper,
    SparseCategoricalAccuracy,
    Sum,
)
from gpulayers.trace import GradientTape, Graph, Session, function, placeholder
from gpulayers.variables import Variable, global_variables_initializer

RANDOM = np.random.default_rng(0)


def test_mean_over_calls():
    mean, batches = Mean(), [RANDOM.standard_normal((size, 3)) for size in (4, 1, 7)]
    for batch in batches:
        mean.update_state(batch)
    assert np.isclose(float(mean.result()), np.concatenate(batches).mean(), atol=1e-6)
    mean.reset_state()
    assert float(mean.result()) == 0.0 and float(mean.count.numpy()) == 0.0


@pytest.mark.parametrize("weights_shape", [(), (4,), (4, 1), (4, 3)])
def test_weighted_mean(weights_shape):
    values = RANDOM.standard_normal((4, 3))
    weights = RANDOM.uniform(1, 2, weights_shape)
    full = np.broadcast_to(weights[:, None] if weights_shape == (4,) else weights, (4, 3))
    mean = Mean(dtype="float64")
    assert np.isclose(float(mean(values, sample_weight=weights)), np.average(values, weights=full), rtol=1e-12)


def test_sum():
    total = Sum(name="lost")
    total.update_state([1.0, 2.0], sample_weight=[0.5, 1.0])
    total.update_state(4.0)
    assert float(total.result()) == 6.5 and total.name == "lost"


def test_weighted_sum_of_several_values_a_sample():
    for weights in (np.array([2.0, 0.5]), np.array([[2.0], [0.5]])):
        total = Sum()
        total.update_state(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]), sample_weight=weights)
        assert float(total.result()) == 2.0 * 6.0 + 0.5 * 16.0


def test_each_value_counts_in_a_weighted_mean():
    mean = Mean()
    mean.update_state(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), sample_weight=np.array([1.0, 0.5]))
    mean.update_state(np.array([10.0, 20.0]), sample_weight=np.array([1.0, 0.0]))
    np.testing.assert_allclose(mean.result(), (6.0 + 7.5 + 10.0) / (3.0 + 1.5 + 1.0), rtol=1e-6)
    images = Mean()
    images.update_state(np.arange(8.0).reshape(2, 2, 2), sample_weight=np.array([1.0, 3.0]))
    np.testing.assert_allclose(images.result(), (1.5 + 3.0 * 5.5) / 4.0, rtol=1e-6)


@pytest.mark.parametrize("kind", [Mean, Sum])
def test_weights_in_a_column_belong_to_values_in_a_row(kind):
    flat, column = kind(), kind()
    flat.update_state([1.0, 2.0, 4.0], sample_weight=[1.0, 0.0, 2.0])
    column.update_state([1.0, 2.0, 4.0], sample_weight=[[1.0], [0.0], [2.0]])
    assert float(column.result()) == float(flat.result())


def test_accuracies():
    labels = RANDOM.integers(0, 5, 40)
    scores = RANDOM.standard_normal((40, 5)).astype(np.float32)
    expected = (scores.argmax(-1) == labels).mean()
    assert np.isclose(float(SparseCategoricalAccuracy()(labels, scores)), expected)
    assert np.isclose(float(SparseCategoricalAccuracy()(labels[:, None].astype(np.float32), scores)), expected)
    assert np.isclose(float(CategoricalAccuracy()(np.eye(5)[labels], scores)), expected)
    assert np.isclose(float(Accuracy()(labels, scores.argmax(-1))), expected)
    truth = RANDOM.integers(0, 2, (40, 3))
    assert np.isclose(
        float(BinaryAccuracy(threshold=0.2)(truth, scores[:, :3])), ((scores[:, :3] > 0.2) == truth).mean()
    )


def test_weights_of_samples():
    found = SparseCategoricalAccuracy()([1, 0], np.array([[0.2, 0.8], [0.1, 0.9]]), sample_weight=[3.0, 1.0])
    assert float(found) == 0.75


def test_in_a_graph():
    with Graph().as_default():
        x = placeholder("float32", (None,))
        mean = Mean()
        result = mean(x)
        before = mean.result()
        reset = mean.reset_state()
        session = Session()
        session.run(global_variables_initializer())
        assert session.run(result, {x: [1.0, 3.0]}) == 2.0
        assert session.run(result, {x: [5.0]}) == 3.0
        assert session.run(before) == 3.0  # reading alone does not update
        session.run(reset)
        assert session.run(before) == 0.0


def test_update_state_in_a_graph_is_a_node():
    with Graph().as_default():
        x = placeholder("float32", (None,))
        mean = Mean()
        update = mean.update_state(x)
        session = Session()
        session.run(global_variables_initializer())
        assert session.run(update, {x: [4.0]}) is None
        assert session.run(mean.total) == 4.0


def test_in_a_function():
    mean = Mean()

    @function
    def step(x):
        return mean(x * 2.0)

    assert float(step(np.ones(3, np.float32))) == 2.0
    assert float(step(np.full(3, 3.0, np.float32))) == 4.0
    assert float(mean.result()) == 4.0


def test_under_a_tape_nothing_is_recorded():
    variable = Variable([1.0, 2.0])
    mean = Mean()
    with GradientTape() as tape:
        loss = ops.sum(variable * variable)
        value = mean(loss)
    assert isinstance(value, np.ndarray) and float(value) == 5.0
    assert np.array_equal(tape.gradient(loss, variable), [2.0, 4.0])


def test_names_configurations_and_variables():
    for made in (Mean, Sum, Accuracy, BinaryAccuracy, CategoricalAccuracy, SparseCategoricalAccuracy):
        metric = made()
        again = made.from_config(metric.get_config())
        assert again.name == metric.name and again.dtype == metric.dtype
    assert SparseCategoricalAccuracy().name == "sparse_categorical_accuracy"
    mean = Mean(name="loss", dtype="float64")
    assert [v.name for v in mean.variables] == ["loss/total:0", "loss/count:0"]
    assert all(v.dtype == np.float64 and not v.trainable for v in mean.variables)


def test_a_wrapped_function():
    metric = MeanMetricWrapper(lambda a, b, power: ops.absolute(a - b) ** power, name="error", power=2)
    assert float(metric([1.0], [3.0])) == 4.0


def test_on_symbolic_tensors_of_the_graph_of_inputs():
    from gpulayers.trace import Plan, execute, symbolic_graph
    from gpulayers.trace.graph import new_placeholder

    x = new_placeholder(symbolic_graph(), "float32", (None, 2))
    mean = Mean(name="max")
    result = mean(ops.max(x))  # recorded, although nothing was entered: the totals are read when it runs
    plan = Plan([result], [x])
    assert execute(plan, {x: np.array([[1, 2]], np.float32)})[0] == 2.0
    assert execute(plan, {x: np.array([[3, 4]], np.float32)})[0] == 3.0
