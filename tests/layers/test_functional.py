"""The functions of ``gl.layers``: TensorFlow's order of arguments, sharing by name, the same values as the classes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import gpulayers as gl

L = gl.layers
WEIGHTED = (
    "activation use_bias kernel_initializer bias_initializer kernel_regularizer bias_regularizer "
    "activity_regularizer kernel_constraint bias_constraint trainable name"
)
WINDOW = "filters kernel_size strides padding data_format dilation_rate"
POOL = "pool_size strides padding data_format name"
ORDER = {
    "dense": f"inputs units {WEIGHTED} reuse",
    "conv1d": f"inputs {WINDOW} {WEIGHTED} reuse",
    "conv2d": f"inputs {WINDOW} {WEIGHTED} reuse",
    "dropout": "inputs rate noise_shape seed training name",
    "flatten": "inputs name data_format",
    **{f"{kind}_pooling{rank}d": f"inputs {POOL}" for kind in ("max", "average") for rank in (1, 2)},
}
CLASSES = {
    "Dense": f"units {WEIGHTED}",
    "Conv1D": f"{WINDOW} {WEIGHTED}",
    "Conv2D": f"{WINDOW} {WEIGHTED}",
    "Dropout": "rate noise_shape seed name",
    **{f"{kind}Pooling{rank}D": POOL for kind in ("Max", "Average") for rank in (1, 2)},
}


@pytest.mark.parametrize(("name", "order"), [*ORDER.items(), *CLASSES.items()])
def test_positional_order(name, order):
    parameters = inspect.signature(getattr(L, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order.split()


def test_sharing_by_name_in_a_graph():
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, (None, 3))
        first, second = L.dense(x, 4, name="fc"), L.dense(x, 4, name="fc", reuse=True)
        assert [v.name for v in gl.global_variables()] == ["fc/kernel:0", "fc/bias:0"]
        assert [first.name, second.name] == ["fc/BiasAdd:0", "fc_1/BiasAdd:0"]
        with pytest.raises(ValueError, match="already exists"):
            L.dense(x, 4, name="fc")
        with pytest.raises(ValueError, match="does not exist"):
            L.dense(x, 4, name="other", reuse=True)
        with pytest.raises(ValueError, match="share"):
            L.dense(x, 5, name="fc", reuse=True)
        with gl.variable_scope("scope", reuse=gl.AUTO_REUSE):
            L.conv2d(gl.placeholder(gl.float32, (None, 5, 5, 2)), 3, 2, name="c")
            L.conv2d(gl.placeholder(gl.float32, (None, 9, 9, 2)), 3, 2, name="c")
        assert [v.name for v in gl.global_variables()][2:] == ["scope/c/kernel:0", "scope/c/bias:0"]


def test_unnamed_calls_make_new_variables():
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, (None, 3))
        L.dense(L.dense(x, 4), 2)
        names = [v.name for v in gl.global_variables()]
    assert names == ["dense/kernel:0", "dense/bias:0", "dense_1/kernel:0", "dense_1/bias:0"]


def test_eager_values():
    ones = gl.ones_initializer()
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 1)).astype("float32")
    np.testing.assert_allclose(L.flatten(x), x.reshape(2, 36))
    np.testing.assert_allclose(L.flatten(x, data_format="channels_first"), x.transpose(0, 2, 3, 1).reshape(2, 36))
    windows = x[..., 0].reshape(2, 3, 2, 3, 2)
    np.testing.assert_allclose(L.max_pooling2d(x, 2, 2)[..., 0], windows.max((2, 4)))
    np.testing.assert_allclose(L.average_pooling2d(x, 2, 2)[..., 0], windows.mean((2, 4)), rtol=1e-5, atol=1e-6)
    summed = L.conv2d(x, 1, 2, 2, kernel_initializer=ones)[..., 0]
    np.testing.assert_allclose(summed, windows.sum((2, 4)), rtol=1e-5, atol=1e-5)
    row = x[:, 0]
    np.testing.assert_allclose(L.max_pooling1d(row, 2, 2), row.reshape(2, 3, 2, 1).max(2))
    np.testing.assert_allclose(L.average_pooling1d(row, 3, 3), row.reshape(2, 2, 3, 1).mean(2), rtol=1e-5)
    np.testing.assert_allclose(L.conv1d(row, 1, 6, kernel_initializer=ones)[:, 0], row.sum(1), rtol=1e-5, atol=1e-6)
    assert L.dropout(x) is x
    dropped = L.dropout(x, 0.25, seed=1, training=True)
    assert set(np.round(np.unique(dropped / x), 4)) == {0.0, np.float32(1.3333)}


def test_dropout_draws_anew_at_each_call_and_follows_its_seed():
    x = np.ones((1, 50), "float32")
    first, second = gl.keras.layers.Dropout(0.5, seed=4), gl.keras.layers.Dropout(0.5, seed=4)
    masks = [first(x, training=True) for _ in range(3)]
    for mask in masks:
        np.testing.assert_array_equal(second(x, training=True), mask)
    assert not np.array_equal(masks[0], masks[1])
    shared = gl.keras.layers.Dropout(0.5, noise_shape=(None, 1, 3))(np.ones((2, 4, 3)), training=True)
    assert (shared == shared[:, :1]).all()
    for wrong in (-0.1, 1.0, 2):
        with pytest.raises(ValueError, match="rate"):
            L.Dropout(wrong)


def test_dropout_in_a_graph_obeys_a_tensor():
    with gl.Graph().as_default(), gl.Session() as session:
        training = gl.placeholder(gl.bool, ())
        y = L.dropout(gl.constant(np.ones((1, 100), "float32")), training=training)
        np.testing.assert_array_equal(session.run(y, {training: False}), np.ones((1, 100)))
        runs = [session.run(y, {training: True}) for _ in range(2)]
        assert set(np.unique(runs[0])) == {0.0, 2.0} and not np.array_equal(*runs)


@pytest.mark.parametrize("training", ["no", "", 2, [1], np.ones(2, "bool")])
@pytest.mark.parametrize("layer", [gl.keras.layers.Dropout, L.Dropout])
def test_dropout_takes_a_bool_only(layer, training):
    with pytest.raises(TypeError, match="training is not a bool"):
        layer(0.5)(np.ones((2, 3), "float32"), training=training)


@pytest.mark.parametrize("training", [1, np.bool_(True), np.ones((), "int32"), gl.Variable(True)], ids=repr)
def test_what_counts_as_true_for_dropout(training):
    y = L.Dropout(0.5)(np.ones((1, 100), "float32"), training=training)
    assert set(np.unique(y)) == {0.0, 2.0}


def test_dropout_in_a_graph_checks_the_value_of_a_tensor_of_integers():
    with gl.Graph().as_default(), gl.Session() as session:
        training = gl.placeholder(gl.int32, ())
        y = L.dropout(gl.constant(np.ones((1, 100), "float32")), training=training)
        assert set(np.unique(session.run(y, {training: 1}))) == {0.0, 2.0}
        with pytest.raises(TypeError, match="training is not a bool"):
            session.run(y, {training: 2})


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda: L.MaxPooling1D(5, 1), 1),
        (lambda: L.AveragePooling2D((1, 3), 2), 2),
        (lambda: gl.keras.layers.MaxPooling2D(5, 2), 2),
        (lambda: L.Conv1D(2, 3), 1),
        (lambda: gl.keras.layers.Conv1D(2, 2, dilation_rate=2), 1),
        (lambda: gl.keras.layers.Conv2D(2, (3, 1), strides=2), 2),
    ],
)
def test_a_window_longer_than_the_input_is_refused(make, rank):
    shape = (2, *[2] * rank, 3)
    layer = make()
    with pytest.raises(ValueError, match="the window is longer than the input"):
        layer(np.ones(shape, "float32"))
    assert layer.weights == []
    with pytest.raises(ValueError, match="the window is longer than the input"):
        make().compute_output_shape(shape)
    with gl.Graph().as_default(), pytest.raises(ValueError, match="the window is longer than the input"):
        make()(gl.placeholder(gl.float32, (None, *shape[1:])))
    layer = make()
    assert layer.compute_output_shape((None, *[None] * rank, 3)).as_list()[1:-1] == [None] * rank
    layer.padding = "same"
    assert layer(np.ones(shape, "float32")).size


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: L.Dense(0), ValueError),
        (lambda: L.Dense("3"), TypeError),
        (lambda: L.Dense(3, activation="nope"), ValueError),
        (lambda: L.Conv2D(3, 0), ValueError),
        (lambda: L.Conv2D(3, (2, 2, 2)), ValueError),
        (lambda: L.Conv2D(3, 2.5), ValueError),
        (lambda: gl.keras.layers.Conv1D(3, 2, strides=None), ValueError),
        (lambda: L.MaxPooling1D("2", 1), ValueError),
        (lambda: L.Conv2D(3, 2, padding="causal"), ValueError),
        (lambda: L.Conv2D(3, 2, data_format="NHCW"), ValueError),
        (lambda: L.MaxPooling2D(2, 2, padding="full"), ValueError),
        (lambda: gl.keras.layers.Conv2D(4, 2, groups=3), ValueError),
        (lambda: gl.keras.layers.Permute((0, 1)), ValueError),
        (lambda: gl.keras.layers.Reshape((-1, -1)), ValueError),
        (lambda: gl.keras.layers.Reshape((5,))(np.ones((2, 3))), ValueError),
        (lambda: gl.keras.layers.Add()(np.ones((2, 3))), ValueError),
        (lambda: gl.keras.layers.Add()([np.ones((2, 3)), np.ones((2, 4))]), ValueError),
        (lambda: gl.keras.layers.Concatenate()([np.ones((2, 3)), np.ones((3, 3))]), ValueError),
        (lambda: L.dense(np.ones((2, 3), "int32"), 3), TypeError),
        (lambda: L.BatchNormalization(epsilon=None), ValueError),
        (lambda: gl.keras.layers.BatchNormalization(epsilon="small"), ValueError),
        (lambda: L.Layer().add_weight(None, (2,)), TypeError),
        (lambda: gl.get_variable(None, (2,)), TypeError),
        (lambda: L.Dense(3, units_=2), TypeError),
    ],
)
def test_bad_arguments(make, error):
    with pytest.raises(error):
        make()
