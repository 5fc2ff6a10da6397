"""BatchNormalization beyond the recorded cases: arguments, variables, modes, adjustment, masks, extensions, devices."""

import contextlib
import math
import tracemalloc
import warnings

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.device import asnumpy
from gpulayers.ops.host import buffers as host_buffers
from tests.kernels.strict_array import StrictArray

RNG = np.random.default_rng(3)
X = RNG.normal(1.0, 2.0, (6, 3)).astype("float32")
X4 = RNG.normal(size=(4, 3, 2, 5)).astype("float32")
BOTH = pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])
DEPRECATED = pytest.mark.filterwarnings("ignore:batch_normalization is a legacy function:DeprecationWarning")
BN = gl.layers.BatchNormalization


def plain(x, axes=(0,), epsilon=1e-3, gamma=1.0, beta=0.0):
    """Return the normalised x, by the definition in float64."""
    x = np.asarray(x, np.float64)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def close(actual, expected, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(np.asarray(asnumpy(actual), np.float64), expected, rtol=rtol, atol=atol)


# --- arguments --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("axis", ["a", 1.0, None, np.int64(1), [1.0], {1}])
def test_axis_of_a_wrong_type_is_refused_by_the_constructor(family, axis):
    with pytest.raises(TypeError, match="axis"):
        family.BatchNormalization(axis=axis)


@BOTH
def test_numpy_integers_in_a_list_of_axes(family):
    layer = family.BatchNormalization(axis=list(np.arange(1, 2)))
    layer(np.ones((2, 3, 4), "float32"))
    assert layer.axis == [1] and type(layer.axis[0]) is int


@BOTH
@pytest.mark.parametrize(
    ("keywords", "shape", "error", "text"),
    [
        ({"axis": []}, (2, 3), IndexError, "axis"),
        ({"axis": 2}, (2, 3), ValueError, "Expected 0 <= axis < inputs.rank"),
        ({"axis": -3}, (2, 3), ValueError, "Expected 0 <= axis < inputs.rank"),
        ({"axis": [2, -1]}, (2, 3, 4), ValueError, r"Duplicate axis: \(2, 2\)"),
        ({}, None, ValueError, "Input has undefined rank"),
        ({}, (), ValueError, "Input has undefined rank"),
        ({}, (2, None), ValueError, "Input has undefined `axis` dimension"),
        ({"virtual_batch_size": 0}, (4, 3), ValueError, "must be a positive integer that divides the true batch size"),
        ({"virtual_batch_size": -2}, (4, 3), ValueError, "must be a positive integer"),
        ({"virtual_batch_size": 2, "axis": [0, 1]}, (4, 3), ValueError, "axis cannot include 0"),
        (
            {"virtual_batch_size": 2, "adjustment": lambda s: (1.0, 0.0)},
            (4, 3),
            ValueError,
            "adjustment cannot be specified",
        ),
    ],
)
def test_what_build_refuses(family, keywords, shape, error, text):
    layer = family.BatchNormalization(**keywords)
    with pytest.raises(error, match=text):
        layer.build(gl.TensorShape(shape))


@BOTH
def test_unknown_clips_are_refused_by_the_constructor_where_they_count(family):
    with pytest.raises(ValueError, match="[Ii]nvalid keys.*r_max"):
        family.BatchNormalization(renorm=True, renorm_clipping={"r_max": 3.0})
    family.BatchNormalization(renorm=False, renorm_clipping={"r_max": 3.0})


@BOTH
def test_sub_batch_size_that_is_no_integer_is_a_type_error_of_the_call(family):
    layer = family.BatchNormalization(virtual_batch_size=2.0)
    with pytest.raises(TypeError):
        layer(np.ones((4, 3), "float32"), training=True)


@BOTH
@pytest.mark.parametrize("size", [4, 12])
def test_a_batch_that_sub_batches_do_not_divide(family, size):
    layer = family.BatchNormalization(virtual_batch_size=size)
    with pytest.raises(ValueError):
        layer(X, training=True)
    with gl.Graph().as_default(), gl.Session() as session:
        with pytest.raises(ValueError):
            family.BatchNormalization(virtual_batch_size=size)(gl.placeholder(gl.float32, (6, 3)), training=True)
        x = gl.placeholder(gl.float32, (None, 3))
        y = family.BatchNormalization(virtual_batch_size=size)(x, training=True)
        session.run(gl.global_variables_initializer())
        with pytest.raises(ValueError):
            session.run(y, {x: X})


def test_integer_input_and_unknown_keywords():
    with pytest.raises(TypeError, match="floating"):
        BN()(np.ones((2, 3), "int32"))
    with pytest.raises(TypeError, match="floating"):
        BN(dtype="int32")(X)
    with pytest.raises(TypeError, match="not understood"):
        BN(no_such_keyword=1)
    BN(synchronized=True)


@BOTH
def test_a_later_call_with_another_rank_or_size(family):
    layer = family.BatchNormalization()
    layer(X)
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        layer(np.ones((2, 3, 3), "float32"))
    with pytest.raises(ValueError, match="expected axis .* to have value 3"):
        layer(np.ones((2, 4), "float32"))


@BOTH
def test_names_and_callables_for_initializers_regularizers_and_constraints(family):
    layer = family.BatchNormalization(
        beta_initializer="ones",
        gamma_initializer=gl.constant_initializer(2.0),
        moving_mean_initializer=gl.constant_initializer(3.0),
        moving_variance_initializer=gl.constant_initializer(4.0),
        beta_regularizer="l2",
        gamma_regularizer=gl.regularizers.l2(0.1),
        beta_constraint="non_neg",
        gamma_constraint=gl.constraints.NonNeg(),
        renorm=True,
    )
    layer(X)
    values = {v.name.rpartition("/")[2]: float(v.numpy().flat[0]) for v in layer.variables}
    assert values == {
        "gamma:0": 2.0,
        "beta:0": 1.0,
        "moving_mean:0": 3.0,
        "moving_variance:0": 4.0,
        "moving_stddev:0": 2.0,
        "renorm_mean:0": 3.0,
        "renorm_stddev:0": 2.0,
    }
    assert [float(v) for v in layer.losses] == [pytest.approx(0.1 * 12), pytest.approx(0.01 * 3)]
    assert isinstance(layer.beta.constraint, gl.constraints.NonNeg) and layer.gamma.constraint is not None


# --- axes, shapes, names ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("keywords", "input_shape", "axis", "shape"),
    [
        ({}, (6, 3), [1], (3,)),
        ({"axis": 1}, (6, 3, 2), [1], (3,)),
        ({"axis": 0}, (6, 3), [0], (6,)),
        ({"axis": [1, 3]}, (5, 3, 2, 2), [1, 3], (1, 3, 1, 2)),
        ({"axis": [-1, 0]}, (5, 3, 2), [2, 0], (5, 1, 2)),
        ({"axis": (1,)}, (6, 3), [1], (3,)),
        ({"virtual_batch_size": 3}, (6, 3), [2], (1, 1, 3)),
        ({"virtual_batch_size": 3, "axis": 1}, (6, 3, 5), [2], (1, 1, 3, 1)),
    ],
)
def test_axis_and_shapes(family, keywords, input_shape, axis, shape):
    layer = family.BatchNormalization(renorm=True, **keywords)
    layer.build(gl.TensorShape(input_shape))
    assert layer.axis == axis
    assert {v.shape for v in layer.variables} == {shape}
    in_config = [a - ("virtual_batch_size" in keywords) for a in axis]  # numbered as the inputs of the copy are
    assert layer.get_config()["axis"] == in_config
    twin = family.BatchNormalization.from_config(layer.get_config())
    twin.build(gl.TensorShape(input_shape))
    assert twin.axis == axis and {v.shape for v in twin.variables} == {shape}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("renorm", [True, False])
def test_variables_their_names_and_order(center, scale, renorm):
    with gl.Graph().as_default():
        layer = BN(center=center, scale=scale, renorm=renorm)
        layer(gl.placeholder(gl.float32, (None, 3)))
        trainable = ["gamma"] * scale + ["beta"] * center
        fixed = ["moving_mean", "moving_variance"] + ["moving_stddev", "renorm_mean", "renorm_stddev"] * renorm
        assert [v.name for v in gl.global_variables()] == [f"batch_normalization/{n}:0" for n in trainable + fixed]
        assert [v.name for v in layer.variables] == [f"batch_normalization/{n}:0" for n in trainable + fixed]
        assert len(layer.trainable_variables) == len(trainable) == len(gl.trainable_variables())
        assert (layer.gamma is None) == (not scale) and (layer.beta is None) == (not center)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "parameters"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_dtypes_of_parameters_and_outputs(family, dtype, parameters):
    layer = family.BatchNormalization(dtype=dtype)
    for given in ("float32", dtype):
        y = layer(X.astype(given), training=True)
        assert y.dtype == dtype
    assert {v.dtype.name for v in layer.variables} == {parameters}
    close(y, plain(X), rtol=2e-3 if dtype == "float16" else 2e-5, atol=2e-3 if dtype == "float16" else 2e-6)


def test_statistics_of_a_mixed_policy_are_read_in_float32():
    layer = gl.keras.layers.BatchNormalization(dtype="mixed_float16", epsilon=0.0)
    layer.build((None, 3))
    layer.moving_variance.assign(np.full(3, 1e6))  # infinite in float16
    for _ in range(2):
        y = layer(X * 1000)
        assert y.dtype == np.float16
        close(y, X, rtol=2e-3)


def test_the_first_input_settles_the_dtype_of_a_legacy_layer():
    layer = BN()
    assert layer(X.astype("float64")).dtype == np.float64 and layer.gamma.dtype == np.float64


# --- which path TensorFlow would take ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "shape", "dtype", "fused"),
    [
        ({}, (2, 3, 3, 4), "float32", True),
        ({"fused": True}, (2, 3, 3, 4), "float32", True),
        ({"fused": False}, (2, 3, 3, 4), "float32", False),
        ({"axis": 1}, (2, 3, 3, 4), "float32", True),
        ({"axis": 2}, (2, 3, 3, 4), "float32", False),
        ({"axis": -1}, (2, 3, 3, 4, 2), "float32", True),
        ({"axis": 1}, (2, 3, 3, 4, 2), "float32", True),
        ({"axis": 3}, (2, 3, 3, 4, 2), "float32", False),
        ({}, (2, 3, 3, 4), "float16", True),
        ({}, (2, 3, 3, 4), "float64", False),
        ({}, (2, 3), "float32", False),
        ({}, (2, 3, 4), "float32", False),
        ({"axis": [1, 3]}, (2, 3, 3, 4), "float32", False),
        ({"renorm": True}, (2, 3, 3, 4), "float32", False),
        ({"virtual_batch_size": 1}, (2, 3, 3, 4), "float32", False),
        ({"adjustment": lambda s: (1.0, 0.0)}, (2, 3, 3, 4), "float32", False),
    ],
)
def test_fused_is_decided_at_build_and_decides_the_estimator(keywords, shape, dtype, fused):
    layer = BN(momentum=0.0, **keywords)
    x = RNG.normal(size=shape).astype(dtype)
    layer(x, training=True)
    assert layer.fused is fused
    if "renorm" in keywords or "virtual_batch_size" in keywords:
        return
    kept = [a % len(shape) for a in layer.axis]
    reduced = tuple(a for a in range(len(shape)) if a not in kept)
    count = math.prod(shape[a] for a in reduced)
    expected = x.astype("float64").var(reduced) * (count / max(count - 1, 1) if fused else 1.0)
    close(layer.moving_variance.numpy().reshape(expected.shape), expected, rtol=1e-3 if dtype == "float16" else 1e-5)


# --- training, inference, trainable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, 0, np.bool_(False), np.array(False)])
def test_inference_uses_and_keeps_the_moving_statistics(training):
    layer = BN()
    layer.build((None, 3))
    layer.set_weights([np.full(3, v) for v in (2.0, 1.0, 0.5, 4.0)])
    close(layer(X, training=training), (X - 0.5) / np.sqrt(4.001) * 2 + 1)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.full(3, 0.5, "float32"))


@pytest.mark.parametrize("training", [True, 1, np.bool_(True), np.array(True)])
def test_training_uses_the_batch_and_moves_the_statistics(training):
    layer = BN(momentum=0.9)
    close(layer(X, training=training), plain(X))
    close(layer.moving_mean, 0.1 * X.mean(0, dtype="float64"))
    close(layer.moving_variance, 0.9 + 0.1 * X.var(0, dtype="float64"))


def test_training_on_a_device_scalar_and_without_saying_so():
    with gl.device("emulated"):
        layer = BN()
        flag = gl.asarray(np.array(True))
        assert isinstance(flag, StrictArray)
        close(layer(X, training=flag), plain(X))
    close(BN(epsilon=0.0)(X), X, rtol=1e-6)
    close(BN(epsilon=0.0)(X, training=None), X, rtol=1e-6)


@BOTH
@pytest.mark.parametrize(
    "training",
    ["a", b"a", [True], {"a": 1}, 2, -1, 0.5, object(), np.array([True, False]), np.array([True]), np.array(2),
     np.float32(0.5), np.array(np.nan)],
)  # fmt: skip
def test_training_of_another_kind(family, training):
    with pytest.raises(TypeError, match="training is not a bool"):
        family.BatchNormalization(trainable=False)(X, training=training)


def test_training_of_another_kind_in_a_variable_or_on_a_device():
    with pytest.raises(TypeError, match="training is not a bool"):
        BN()(X, training=gl.Variable(2.0, trainable=False))
    close(BN()(X, training=gl.Variable(1, trainable=False)), plain(X))
    with gl.device("emulated"), pytest.raises(TypeError, match="training is not a bool"):
        BN()(X, training=gl.asarray(np.array(2)))


@BOTH
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (None,), (1, 1)])
def test_a_tensor_with_axes_as_training(family, trainable, shape):
    with gl.Graph().as_default():
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, shape)
        with pytest.raises(TypeError, match="training is not a bool"):
            family.BatchNormalization(trainable=trainable)(x, training=flag)


@pytest.mark.parametrize("dtype", [gl.bool, gl.int32, gl.float32])
@pytest.mark.parametrize("shape", [(), None])
def test_what_a_graph_is_fed_as_training(dtype, shape):
    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(dtype, shape)
        layer = BN(epsilon=0.0)
        y = layer(x, training=flag)
        session.run(gl.global_variables_initializer())
        for value, expected in ((0, X), (1, plain(X, epsilon=0.0))):
            close(session.run(y, {x: X, flag: value}), expected)
        wrong = [] if shape == () else [np.ones(1), np.zeros((2, 1))]
        if dtype is not gl.bool:
            wrong += [2] if dtype is gl.int32 else [2, 0.5, np.nan]
        for value in wrong:
            with pytest.raises(TypeError, match="training is not a bool"):
                session.run([y, layer.updates], {x: X, flag: value})
        np.testing.assert_array_equal(session.run(layer.moving_mean), np.zeros(3))


def test_a_variable_as_training_is_read_when_the_graph_runs():
    with gl.Graph().as_default(), gl.Session() as session:
        flag = gl.Variable(True, trainable=False, dtype="bool")
        x = gl.placeholder(gl.float32, (None, 3))
        layer = BN(epsilon=0.0)
        y = layer(x, training=flag)
        assert len(layer.updates) == 2
        session.run(gl.global_variables_initializer())
        close(session.run(y, {x: X}), plain(X, epsilon=0.0))
        session.run(flag.assign(np.array(False)))
        close(session.run(y, {x: X}), X)


def test_a_modern_layer_that_is_not_trainable_infers_whatever_a_tensor_says():
    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, ())
        layer = gl.keras.layers.BatchNormalization(trainable=False, epsilon=0.0)
        y = layer(x, training=flag)
        session.run(gl.global_variables_initializer())
        close(session.run(y, {x: X, flag: True}), X)
        assert layer.updates == []


@BOTH
@pytest.mark.parametrize("tensor", [False, True])
def test_a_training_call_in_a_branch_of_a_graph_is_refused_with_what_to_write(family, tensor):
    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, ())
        layer = family.BatchNormalization(name="here")
        with pytest.raises(ValueError, match=r"here.*branch of `cond`.*layer\(x, training=tensor\)"):
            gl.cond(flag, lambda: layer(x, training=flag if tensor else True), lambda: layer(x, training=False))
        with gl.no_state_updates():
            y = gl.cond(flag, lambda: layer(x, training=True), lambda: layer(x, training=False))
        session.run(gl.global_variables_initializer())
        close(session.run(y, {x: X, flag: True}), plain(X))
        assert layer.updates == []


def test_a_training_call_in_a_branch_of_a_function_updates_where_the_branch_is_taken():
    layer = BN(momentum=0.0)

    @gl.function
    def step(x, flag):
        return gl.cond(flag, lambda: layer(x, training=True), lambda: layer(x, training=False))

    step(X, np.array(False))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(3))
    close(step(X, np.array(True)), plain(X))
    close(layer.moving_mean, X.mean(0, dtype="float64"))


@pytest.mark.parametrize("keywords", [{}, {"renorm": True}, {"virtual_batch_size": 3}])
def test_a_graph_tensor_as_training(keywords):
    eager = {}
    for flag in (True, False):
        layer = BN(**keywords)
        eager[flag] = (layer(X, training=flag), layer.get_weights())
    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, ())
        layer = BN(**keywords)
        y = layer(x, training=flag)
        assert len(layer.updates) == 2 == len(gl.get_collection(gl.GraphKeys.UPDATE_OPS))
        for value in (False, True):
            session.run(gl.global_variables_initializer())
            found, _ = session.run([y, layer.updates], {x: X, flag: value})
            close(found, asnumpy(eager[value][0]))
            for mine, expected in zip(session.run(layer.variables), eager[value][1], strict=True):
                close(mine, expected)


def test_graph_updates_run_only_when_asked_and_output_uses_the_batch_regardless():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float32, (None, 3))
        layer = BN(momentum=0.9)
        y = layer(x, training=True)
        layer(x, training=True)
        assert len(layer.updates) == 4
        session.run(gl.global_variables_initializer())
        close(session.run(y, {x: X}), plain(X))
        np.testing.assert_array_equal(session.run(layer.moving_mean), np.zeros(3))
        session.run(layer.updates[:2], {x: X})
        close(session.run(layer.moving_mean), 0.1 * X.mean(0, dtype="float64"))


def test_the_first_update_of_a_graph_is_the_means_and_the_second_the_variances():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float32, (None, 3))
        layer = BN(momentum=0.0)
        layer(x, training=True)
        session.run(gl.global_variables_initializer())
        session.run(layer.updates[0], {x: X})
        close(session.run(layer.moving_mean), X.mean(0, dtype="float64"))
        np.testing.assert_array_equal(session.run(layer.moving_variance), np.ones(3))
        session.run(layer.updates[1], {x: X})
        close(session.run(layer.moving_variance), X.var(0, dtype="float64"))


def test_not_trainable_normalises_by_the_batch_without_updates_in_the_legacy_layer_and_infers_in_the_modern_one():
    x = np.array([[3.0], [5.0]], "float32")
    legacy, modern = BN(trainable=False), gl.keras.layers.BatchNormalization(trainable=False)
    close(legacy(x, training=True), [[-0.9995], [0.9995]], atol=1e-4)
    close(modern(x, training=True), [[2.9985], [4.9975]], atol=1e-4)
    for layer in (legacy, modern):
        np.testing.assert_array_equal(layer.moving_mean.numpy(), [0.0])
        assert layer.trainable_variables == []
    modern.trainable = legacy.trainable = True
    assert modern.trainable_variables == [modern.gamma, modern.beta] and legacy.trainable_variables == []
    with gl.Graph().as_default():
        layer = BN(trainable=False)
        layer(gl.placeholder(gl.float32, (None, 3)), training=True)
        assert layer.updates == [] == gl.get_collection(gl.GraphKeys.UPDATE_OPS)


@pytest.mark.parametrize("at_first", [True, False])
def test_updates_of_a_call_that_was_not_trainable_show_again_when_it_is(at_first):
    with gl.Graph().as_default(), gl.Session() as session:
        x, layer = gl.placeholder(gl.float32, (None, 3)), BN(momentum=0.0, trainable=at_first)
        layer.trainable = False
        layer(x, training=True)
        assert layer.updates == [] == gl.get_collection(gl.GraphKeys.UPDATE_OPS)
        layer.trainable = True
        assert len(layer.updates) == 2 == len(layer.get_updates_for(x))
        session.run(gl.global_variables_initializer())
        session.run(layer.updates, {x: X})
        close(session.run(layer.moving_mean), X.mean(0))


def test_toggling_trainable_moves_gamma_and_beta_and_stops_updates():
    layer = BN(momentum=0.0)
    layer(X, training=True)
    before = layer.moving_mean.numpy()
    layer.trainable = False
    assert [v.name.rpartition("/")[2] for v in layer.non_trainable_variables][:2] == ["gamma:0", "beta:0"]
    layer(X + 1, training=True)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)
    layer.trainable = True
    layer(X + 1, training=True)
    close(layer.moving_mean, before + 1.0)


def test_the_modern_layer_follows_the_enclosing_training():
    model = gl.keras.Sequential([gl.keras.layers.BatchNormalization()])
    close(model(X, training=True), plain(X))
    close(model(X, training=False), model(X))


@BOTH
@pytest.mark.parametrize("order", [(False, True), (True, False), (True, False, True)])
def test_inference_and_training_of_a_layer_on_one_tape(family, order):
    """The moving statistics are constants of an inference call, whatever the layer makes of them afterwards."""
    x = np.random.default_rng(3).normal(size=(6, 3)).astype("float32")
    layer = family.BatchNormalization(momentum=0.5)
    layer(x, training=True)
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        outputs = []
        for training in order:
            if not training:
                inference = layer.moving_mean.numpy(), layer.moving_variance.numpy()
            outputs.append(layer(t, training=training))
        loss = sum(gl.reduce_sum(y * y) for y in outputs)
    dx, dgamma = tape.gradient(loss, [x, layer.gamma])
    trained = sum(order)
    alone = family.BatchNormalization(momentum=0.5)
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        loss = trained * gl.reduce_sum(gl.square(alone(t, training=True)))
    dx_trained, dgamma_trained = tape.gradient(loss, [x, alone.gamma])
    inverse = 1 / np.sqrt(inference[1] + 1e-3)
    n = (x - inference[0]) * inverse
    close(dx, dx_trained + 2 * n * inverse)
    close(dgamma, dgamma_trained + (2 * n * n).sum(axis=0))


def test_no_state_updates():
    layer = BN()
    with gl.no_state_updates():
        close(layer(X, training=True), plain(X))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(3))
    np.testing.assert_array_equal(layer.moving_variance.numpy(), np.ones(3))
    with gl.Graph().as_default(), gl.no_state_updates():
        layer = BN()
        layer(gl.placeholder(gl.float32, (None, 3)), training=True)
        assert layer.updates == []


# --- renorm -----------------------------------------------------------------------------------------------------------


def renorm_truth(x, mean, stddev, rmin=0.0, rmax=np.inf, dmax=np.inf, epsilon=1e-3):
    s = np.sqrt(x.var(0) + epsilon)
    q = np.maximum(stddev, np.sqrt(epsilon))
    r, d = np.clip(s / q, rmin, rmax), np.clip((x.mean(0) - mean) / q, -dmax, dmax)
    return (x - x.mean(0)) / s * r + d


@BOTH
def test_renorm_in_float64(family):
    x = X.astype("float64")
    layer = family.BatchNormalization(renorm=True, renorm_momentum=0.5, momentum=0.75, dtype="float64")
    close(layer(x, training=True), renorm_truth(x, 0.0, 1.0), rtol=1e-12)
    s = np.sqrt(x.var(0) + 1e-3)
    close(layer.renorm_mean, 0.5 * x.mean(0), rtol=1e-12)
    close(layer.renorm_stddev, 0.5 + 0.5 * s, rtol=1e-12)
    close(layer.moving_mean, 0.25 * x.mean(0), rtol=1e-12)
    moving = 1 + (s - 1) * 0.25
    close(layer.moving_stddev, moving, rtol=1e-12)
    close(layer.moving_variance, np.maximum(moving**2 - 1e-3, 0), rtol=1e-12)


def test_clips_given_as_functions_are_asked_at_each_call():
    limits = iter([1.0, 1.5, 4.0])
    asked = []

    def rmax():
        asked.append(next(limits))
        return asked[-1]

    layer = BN(renorm=True, renorm_clipping={"rmax": rmax, "rmin": lambda: 0.9, "dmax": lambda: 0.25})
    layer.build((6, 3))
    for limit in (1.0, 1.5, 4.0):
        layer.renorm_mean.assign(np.zeros(3))
        layer.renorm_stddev.assign(np.ones(3))
        close(layer(X, training=True), renorm_truth(X.astype("float64"), 0.0, 1.0, 0.9, limit, 0.25), rtol=1e-4)
    assert asked == [1.0, 1.5, 4.0]


def renormed(layer):
    """Give the layer the renorm statistics with which `renorm_truth(X, 0.0, 1.0)` computes."""
    values = dict.fromkeys(("gamma", "moving_variance", "moving_stddev", "renorm_stddev"), np.ones(3, "float32"))
    layer.set_weights([values.get(v.name.split("/")[-1][:-2], np.zeros(3, "float32")) for v in layer.variables])


@pytest.mark.parametrize("scalar", [float, np.float64, lambda value: gl.asarray(np.array(value, "float32"))])
@pytest.mark.parametrize("training", [True, "tensor"])
@pytest.mark.parametrize("mode", ["session", "function", "model"])
def test_clips_given_as_functions_are_asked_whenever_what_was_recorded_runs(mode, training, scalar):
    limit = [1.0]
    layer = gl.keras.layers.BatchNormalization(
        renorm=True, renorm_clipping={"rmax": lambda: scalar(limit[0]), "dmax": lambda: scalar(limit[0] / 4)}
    )
    values = (1.0, 1.5, 0.7)
    expected = [renorm_truth(X.astype("float64"), 0.0, 1.0, rmax=value, dmax=value / 4) for value in values]
    if mode == "session":
        with gl.Graph().as_default(), gl.Session() as session:
            x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, ())
            y = layer(x, training=flag if training == "tensor" else training)
            session.run(gl.global_variables_initializer())
            for limit[0], truth in zip(values, expected, strict=True):
                close(session.run(y, {x: X, flag: True}), truth, 1e-4)
        return
    layer.build((6, 3))
    if mode == "function":
        step = gl.function(lambda x, flag: layer(x, training=flag if training == "tensor" else True))
        run = lambda: step(X, np.array(True))  # noqa: E731
    else:
        start = gl.keras.Input((3,))
        model = gl.keras.Model(start, layer(start, training=True))
        run = lambda: model(X, training=True)  # noqa: E731
    for limit[0], truth in zip(values, expected, strict=True):
        renormed(layer)
        close(run(), truth, 1e-4)
        renormed(layer)
        with gl.GradientTape() as tape:
            loss = gl.reduce_sum(run())
        close(loss.numpy(), truth.sum(), 1e-4, 1e-4)
        close(tape.gradient(loss, layer.beta), np.full(3, 6.0))


def test_a_function_that_gives_a_graphs_tensor_as_a_clip():
    with gl.Graph().as_default(), gl.Session() as session:
        limit, x = gl.placeholder(gl.float32, ()), gl.placeholder(gl.float32, (None, 3))
        y = BN(renorm=True, renorm_clipping={"rmax": lambda: 2 * limit})(x, training=True)
        session.run(gl.global_variables_initializer())
        for value in (1.0, 1.3):
            close(
                session.run(y, {x: X, limit: value / 2}), renorm_truth(X.astype("float64"), 0.0, 1.0, rmax=value), 1e-4
            )


def test_clips_may_be_arrays_and_graph_tensors():
    clipping = {"rmax": np.float32(1.1), "rmin": np.array(0.9, "float32"), "dmax": gl.Variable(0.1, trainable=False)}
    expected = renorm_truth(X.astype("float64"), 0.0, 1.0, 0.9, 1.1, 0.1)
    close(BN(renorm=True, renorm_clipping=clipping)(X, training=True), expected, rtol=1e-4)
    with gl.Graph().as_default(), gl.Session() as session:
        limit, x = gl.placeholder(gl.float32, ()), gl.placeholder(gl.float32, (None, 3))
        y = BN(renorm=True, renorm_clipping={"rmax": limit})(x, training=True)
        session.run(gl.global_variables_initializer())
        for value in (1.0, 1.3):
            close(session.run(y, {x: X, limit: value}), renorm_truth(X.astype("float64"), 0.0, 1.0, rmax=value), 1e-4)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("clip", [lambda v: v, lambda v: lambda: v], ids=["number", "function"])
def test_clips_are_not_rounded_to_bfloat16(clip, in_graph):
    bfloat16 = gl.as_dtype("bfloat16")
    x = (X * 8).astype(bfloat16)
    clipping = {"rmax": clip(1.205), "dmax": clip(0.3)}  # 1.203125 in bfloat16

    def normalised(inputs):
        layer = BN(renorm=True, renorm_clipping=clipping)
        if not in_graph:
            return layer(inputs, training=True)
        with gl.Graph().as_default(), gl.Session() as session:
            y = layer(gl.constant(inputs), training=True)
            session.run(gl.global_variables_initializer())
            return session.run(y)

    np.testing.assert_array_equal(normalised(x), normalised(x.astype("float32")).astype(bfloat16))


# --- adjustment -------------------------------------------------------------------------------------------------------


def test_adjustment_is_called_once_a_call_with_the_dynamic_shape_and_only_in_training():
    shapes = []

    def adjustment(shape):
        shapes.append(asnumpy(shape))
        return 1.0, 0.0

    layer = BN(adjustment=adjustment)
    layer(X, training=False)
    assert shapes == []
    for _ in range(2):
        layer(X, training=True)
    assert len(shapes) == 2
    np.testing.assert_array_equal(shapes[0], [6, 3])
    assert shapes[0].dtype == np.int32


def test_adjustment_in_a_graph_is_called_while_it_is_built_and_is_neutral_in_inference():
    calls = []

    def adjustment(shape):
        calls.append(1)
        assert shape.shape == (2,)
        return 2.0, gl.ops.cast(shape[1], "float32") + 2.0

    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, (None, 3)), gl.placeholder(gl.bool, ())
        y = BN(adjustment=adjustment, epsilon=0.0)(x, training=flag)
        assert calls == [1]
        session.run(gl.global_variables_initializer())
        close(session.run(y, {x: X, flag: True}), plain(X, epsilon=0.0) * 2 + 5, rtol=1e-4)
        close(session.run(y, {x: X, flag: False}), X)
        assert calls == [1]


def test_adjustment_broadcasts_and_leaves_the_statistics():
    scale, bias = np.array([[1.1], [0.9], [1.0]], "float32"), np.array([[0.1], [0.0], [-0.1]], "float32")
    x = RNG.normal(size=(4, 3, 5)).astype("float32")
    layer = BN(axis=1, momentum=0.0, adjustment=lambda shape: (scale, bias))
    layer.build((None, 3, 5))
    gamma, beta = np.array([2.0, 1.0, 0.5]), np.array([0.0, 1.0, 2.0])
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    expected = (plain(x, (0, 2)) * scale + bias) * gamma[:, None] + beta[:, None]
    close(layer(x, training=True), expected)
    close(layer.moving_mean, x.mean((0, 2), dtype="float64"), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_adjusted_is_rounded_to_16_bits_once(dtype):
    x = X.astype(dtype)
    bias = -plain(x)[0].astype("float32")  # takes away the leading digits of the first row
    y = BN(adjustment=lambda shape: (1.0, bias))(x, training=True)
    assert y.dtype == dtype
    np.testing.assert_allclose(y[0].astype("float64"), np.zeros(3), rtol=0, atol=5e-6)


MEMORY = {
    "plain": ({}, False),
    "mask": ({}, True),
    "axes apart": ({"axis": [1, 3]}, False),
    "sub-batches": ({"virtual_batch_size": 8}, True),
    "adjustment": ({"adjustment": lambda shape: (np.full((16, 1, 1, 1), 2.0, "float32"), 0.5)}, False),
}


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize(("keywords", "masked"), MEMORY.values(), ids=MEMORY)
def test_a_training_call_holds_its_output_and_what_gradients_need(keywords, masked, taped):
    """25 MB in: no temporary grows with the input. Gradients of an adjustment need the normalised values."""
    x = np.zeros((16, 40, 40, 256), "float32")
    x[...] = np.arange(256)
    call = {"mask": np.ones(x.shape[:3], bool)} if masked else {}
    layer = BN(fused=False, **keywords)
    layer.build(x.shape)
    host_buffers.release()  # memory that is kept for reuse would hide an output
    tracemalloc.start()
    try:
        with gl.GradientTape() if taped else contextlib.nullcontext() as tape:
            if taped:
                tape.watch(x)
            y = layer(x, training=True, **call)
        held = x.nbytes * (2 if taped and layer.adjustment else 1)
        assert held <= tracemalloc.get_traced_memory()[1] < held + 8 * 2**20
        del y
    finally:
        tracemalloc.stop()


def test_a_full_sized_adjustment_keeps_its_dtype_and_gradients():
    """What is wider than the normalised values is not squeezed into their memory, and gradients reach all parts."""
    scale, bias = RNG.normal(size=(2, 6, 3))
    layer = BN(adjustment=lambda shape: (scale, bias))
    y = layer(X, training=True)
    assert y.dtype == "float32"
    close(y, plain(X) * scale + bias, 1e-5, 1e-6)
    with gl.GradientTape() as tape:
        tape.watch([scale, bias])
        loss = gl.reduce_sum(gl.square(layer(X, training=True)))
    dscale, dbias, dgamma, dbeta = tape.gradient(loss, [scale, bias, layer.gamma, layer.beta])
    n = plain(X)
    g = 2 * (n * scale + bias)
    close(dscale, g * n, 1e-4, 1e-5)
    close(dbias, g, 1e-4, 1e-5)
    close(dgamma, (g * (n * scale + bias)).sum(0), 1e-4)
    close(dbeta, g.sum(0), 1e-4, 1e-5)


def test_the_pages_adjustment_with_random_numbers():
    layer = BN(
        adjustment=lambda shape: (
            gl.random_uniform(shape[-1:], 0.93, 1.07),
            gl.random_uniform(shape[-1:], -0.1, 0.1),
        )
    )
    y = asnumpy(layer(X, training=True))
    n = plain(X)
    for channel in range(3):  # one scale and one bias for each feature, shared by the examples
        scale, bias = np.polyfit(n[:, channel], y[:, channel], 1)
        assert 0.93 <= scale <= 1.07 and -0.1 <= bias <= 0.1
        close(y[:, channel], n[:, channel] * scale + bias, rtol=1e-4, atol=1e-5)


def finite_difference(function, x, weight, step=1e-6):
    """Return the derivative of ``sum(function(x) * weight)`` along a random direction, and that direction."""
    direction = np.random.default_rng(0).normal(size=x.shape)
    return np.sum((function(x + step * direction) - function(x - step * direction)) * weight) / (2 * step), direction


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("what", ["x", "scale", "bias", "gamma"])
def test_gradients_flow_through_the_adjustment(what, renorm):
    values = {
        "x": RNG.normal(size=(6, 3)),
        "scale": RNG.uniform(0.9, 1.1, 3),
        "bias": RNG.uniform(-0.1, 0.1, 3),
        "gamma": RNG.uniform(0.5, 1.5, 3),
    }
    weight = RNG.normal(size=(6, 3))

    # r and d carry no gradient: they stay what they are at the point of the derivative
    s = np.sqrt(values["x"].var(0) + 1e-3)
    r, d = (s, values["x"].mean(0)) if renorm else (1.0, 0.0)

    def truth(**changed):
        v = {**values, **changed}
        return ((plain(v["x"]) * r + d) * v["scale"] + v["bias"]) * v["gamma"] + 0.5

    scale, bias, x = values["scale"].copy(), values["bias"].copy(), values["x"].copy()
    with gl.GradientTape() as tape:
        a, b = tape.watch(scale), tape.watch(bias)
        tape.watch(x)
        layer = BN(renorm=renorm, dtype="float64", adjustment=lambda shape: (a, b), beta_initializer=half)
        layer.build((6, 3))
        layer.gamma.assign(values["gamma"])
        y = layer(x, training=True)
    close(y, truth(), rtol=1e-12)
    source = {"x": x, "scale": scale, "bias": bias, "gamma": layer.gamma}[what]
    gradient = tape.gradient(y, source, output_gradients=weight)
    slope, direction = finite_difference(lambda v: truth(**{what: v}), values[what], weight)
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def half(shape, dtype=None):
    return np.full(shape, 0.5, dtype)


# --- masks ------------------------------------------------------------------------------------------------------------


@BOTH
def test_masked_rows_do_not_count_and_are_still_normalised(family):
    mask = np.array([True, True, False, True, False, True])
    layer = family.BatchNormalization(momentum=0.0)
    kept = X[mask].astype("float64")
    expected = (X - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-3)
    close(layer(X, training=True, mask=mask), expected)
    close(layer.moving_mean, kept.mean(0))
    close(layer.moving_variance, kept.var(0))


def test_weights_that_are_no_booleans_are_frequencies():
    layer = BN(momentum=0.0)
    layer(np.array([[1.0], [3.0]], "float32"), training=True, mask=np.array([1.0, 3.0]))
    close(layer.moving_mean, [2.5])
    close(layer.moving_variance, [0.75])


def test_a_mask_without_any_entry_gives_zero_moments():
    layer = BN(momentum=0.0)
    y = layer(X, training=True, mask=np.zeros(6, bool))
    close(y, X / np.sqrt(1e-3), rtol=1e-4)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(3))


@pytest.mark.parametrize("where", ["cpu", "emulated"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_mask_goes_with_a_residual_and_an_activation_forward_and_backward(activation, where):
    mask = np.array([1.0, 1.0, 0.0, 2.0, 0.0, 1.0])
    weight = RNG.normal(size=(6, 3)).astype("float32")
    found = []
    for fused in (True, False):
        with gl.device(where):
            layer = BN(activation=activation if fused else None)
            x, residual = gl.asarray(X.copy()), gl.asarray(weight * 2)
            with gl.GradientTape() as tape:
                tape.watch([x, residual])
                y = layer(x, training=True, mask=mask, residual=residual if fused else None)
                if not fused:
                    y = y + residual
                    y = gl.ops.relu(y) if activation else y
            gradients = tape.gradient(y, [x, residual, layer.gamma, layer.beta], output_gradients=gl.asarray(weight))
            found.append([asnumpy(v) for v in (y.value, *gradients)])
    for mine, composed in zip(*found, strict=True):
        np.testing.assert_allclose(mine, composed, rtol=1e-5, atol=1e-5)
    assert activation is None or found[0][0].min() == 0.0


@pytest.mark.parametrize("where", ["cpu", "emulated"])
def test_padding_that_is_no_number_and_that_nothing_uses_reaches_no_gradient(where):
    mask = np.array([True, True, False, True, False, True])
    weight = np.where(mask[:, None], RNG.normal(size=(6, 3)), 0.0).astype("float32")
    found = []
    for padding in (7.0, np.nan):
        with gl.device(where), np.errstate(all="ignore"):
            layer, x = BN(), gl.asarray(np.where(mask[:, None], X, np.float32(padding)))
            with gl.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
            gradients = tape.gradient(y, [x, layer.gamma, layer.beta], output_gradients=gl.asarray(weight))
            found.append([asnumpy(v) for v in gradients])
    for with_number, with_nan in zip(*found, strict=True):
        np.testing.assert_array_equal(with_nan, with_number)


def test_a_carried_mask_is_passed_on_and_has_no_effect_in_inference():
    from gpulayers.layers.masks import mask_of

    x = X.copy()
    x[2] = 0.0
    masked = gl.keras.layers.Masking(0.0)(x.reshape(6, 1, 3))
    layer = gl.keras.layers.BatchNormalization(momentum=0.0)
    y = layer(masked, training=True)
    close(layer.moving_mean, np.delete(x, 2, 0).astype("float64").mean(0))
    np.testing.assert_array_equal(asnumpy(mask_of(y))[:, 0], [True, True, False, True, True, True])
    fresh = BN(epsilon=0.0)
    close(fresh(masked, training=False), x.reshape(6, 1, 3))


def test_a_mask_on_the_fused_path_is_ignored_with_a_warning():
    layer = BN(axis=1)
    with pytest.warns(UserWarning, match="mask is ignored"):
        y = layer(X4, training=True, mask=np.zeros((4, 3, 2)))
    close(y, plain(X4, (0, 2, 3)))


# --- configuration, functional form -----------------------------------------------------------------------------------


@BOTH
def test_config_round_trip(family):
    layer = family.BatchNormalization(
        axis=[1, 2],
        momentum=0.9,
        epsilon=1e-4,
        center=False,
        gamma_initializer=gl.constant_initializer(2.0) if family is gl.layers else "ones",
        gamma_regularizer="l2",
        gamma_constraint="non_neg",
        renorm=True,
        renorm_clipping={"rmax": 3.0},
        renorm_momentum=0.8,
        virtual_batch_size=2,
        name="again",
    )
    config = layer.get_config()
    assert "fused" not in config and "adjustment" not in config
    assert config["renorm"] is True and config["renorm_clipping"] == {"rmax": 3.0} and config["renorm_momentum"] == 0.8
    for key in ("gamma_initializer", "gamma_regularizer", "gamma_constraint"):
        assert {"class_name", "config"} <= set(config[key])
    twin = family.BatchNormalization.from_config(config)
    assert twin.get_config() == config and twin.name == "again" and not twin.built
    layer.get_config()["renorm_clipping"]["rmax"] = 1.0  # the caller's own dictionary
    assert layer.get_config() == config
    x = RNG.normal(size=(4, 3, 2)).astype("float32")
    close(twin(x, training=True), asnumpy(layer(x, training=True)))


def test_plain_config_has_no_renorm_and_an_adjustment_is_left_out_with_a_warning():
    config = BN(fused=False).get_config()
    assert not {"renorm", "renorm_clipping", "renorm_momentum", "virtual_batch_size", "fused"} & set(config)
    assert not hasattr(BN(), "renorm_momentum") and hasattr(BN(renorm=True), "renorm_momentum")
    with pytest.warns(UserWarning, match="adjustment"):
        config = BN(adjustment=lambda s: (1, 0)).get_config()
    assert "adjustment" not in config


@DEPRECATED
def test_the_functional_form_makes_shares_and_refuses():
    function = gl.layers.batch_normalization
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, (None, 3))
        function(x, name="norm")
        names = [v.name for v in gl.global_variables()]
        assert names == [f"norm/{n}:0" for n in ("gamma", "beta", "moving_mean", "moving_variance")]
        with pytest.raises(ValueError, match="already exists"):
            function(x, name="norm")
        function(x, name="norm", reuse=True)
        assert len(gl.global_variables()) == 4
        with gl.variable_scope("auto", reuse=gl.AUTO_REUSE):
            function(x, name="norm")
            function(x, name="norm")
        assert len(gl.global_variables()) == 8
        with pytest.raises(ValueError, match="does not exist"):
            function(x, name="other", reuse=True)


@DEPRECATED
def test_the_functional_form_without_a_name():
    function = gl.layers.batch_normalization
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, (None, 3))
        function(x)
        function(x)
        prefixes = list(dict.fromkeys(v.name.partition("/")[0] for v in gl.global_variables()))
        assert prefixes == ["batch_normalization", "batch_normalization_1"]
        function(x, reuse=True)
        assert len(gl.global_variables()) == 8


def test_the_functional_form_is_deprecated():
    with pytest.warns(DeprecationWarning, match="BatchNormalization") as caught:
        close(gl.layers.batch_normalization(X, training=True), plain(X))
    assert caught[0].filename == __file__


def test_default_initializers_of_the_legacy_layer_are_those_of_its_generation():
    for layer in (BN(), BN(center=False)):
        assert isinstance(layer.gamma_initializer, gl.ones_initializer)
        assert isinstance(layer.moving_variance_initializer, gl.ones_initializer)
        assert isinstance(layer.beta_initializer, gl.zeros_initializer)
        assert isinstance(layer.moving_mean_initializer, gl.zeros_initializer)
        copy = BN.from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()
        assert isinstance(copy.gamma_initializer, gl.ones_initializer)
    layer = BN(renorm=True, dtype="float64")
    layer.build((None, 3))
    assert {v.dtype for v in layer.variables} == {np.dtype("float64")}


@DEPRECATED
def test_positional_order_of_class_and_function():
    layer = BN(1, 0.9, 1e-4, False, True, "zeros", "ones", "zeros", "ones", None, "l2", None, None, True, None, 0.8)
    assert (layer.axis, layer.momentum, layer.epsilon, layer.center, layer.renorm, layer.renorm_momentum) == (
        1,
        0.9,
        1e-4,
        False,
        True,
        0.8,
    )
    y = gl.layers.batch_normalization(
        X, -1, 0.9, 0.0, True, True, "zeros", "ones", "zeros", "ones", None, None, None, None, True, True, "positional"
    )
    close(y, plain(X, epsilon=0.0))


# --- partitioners -----------------------------------------------------------------------------------------------------


def test_gamma_and_beta_may_be_cut_and_the_statistics_are_not():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float32, (None, 3))
        with gl.variable_scope("s", partitioner=gl.fixed_size_partitioner(2)):
            layer = BN(renorm=True)
            y = layer(x, training=True)
        cut = [isinstance(getattr(layer, n), gl.PartitionedVariable) for n in ("gamma", "beta")]
        whole = [isinstance(getattr(layer, n), gl.Variable) for n in ("moving_mean", "moving_variance", "renorm_mean")]
        assert all(cut) and all(whole)
        assert [v.shape for v in layer.trainable_variables] == [(2,), (1,), (2,), (1,)]
        slopes = gl.gradients(y, layer.trainable_variables)
        session.run(gl.global_variables_initializer())
        found, *parts = session.run([y, *slopes], {x: X})
        close(found, renorm_truth(X.astype("float64"), 0.0, 1.0), rtol=1e-4)
        close(np.concatenate(parts[2:]), np.full(3, 6.0))


@BOTH
@pytest.mark.parametrize("keywords", [{}, {"virtual_batch_size": 3}, {"axis": 0}])
def test_gradients_of_gradients(family, keywords):
    x = RNG.normal(size=(6, 3))
    layer = family.BatchNormalization(dtype="float64", **keywords)
    layer.build((6, 3))

    def slopes(value):
        with gl.GradientTape() as tape:
            y = gl.reduce_sum(layer(tape.watch(value), training=True) ** 3)
        return tape.gradient(y, value)

    with gl.GradientTape() as outer:
        t = outer.watch(x)
        with gl.GradientTape() as inner:
            inner.watch(t)
            y = gl.reduce_sum(layer(t, training=True) ** 3)
        slope = inner.gradient(y, t)
        penalty = gl.reduce_sum(slope * slope)
    direction = RNG.normal(size=x.shape)
    step = 1e-5
    expected = (np.sum(slopes(x + step * direction) ** 2) - np.sum(slopes(x - step * direction) ** 2)) / (2 * step)
    assert np.sum(outer.gradient(penalty, x) * direction) == pytest.approx(expected, rel=1e-5)


EXTENDED = {
    "plain": {},
    "renorm": {"renorm": True},
    "sub_batches": {"virtual_batch_size": 3},
    "adjustment": {"adjustment": lambda shape: (2, 1)},
}


# --- extensions -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keywords", list(EXTENDED.values()), ids=EXTENDED)
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_residual_and_activation_are_the_composition_with_its_gradients(family, training, keywords, activation):
    functions = {None: lambda v: v, "relu": gl.ops.relu, "tanh": gl.ops.tanh}
    x, residual, weight = (RNG.normal(size=(6, 3)) for _ in range(3))
    results = []
    for fused in (True, False):
        layer = family.BatchNormalization(dtype="float64", activation=activation if fused else None, **keywords)
        layer.build((6, 3))
        layer.gamma.assign(np.reshape([2.0, -1.0, 0.5], layer.gamma.shape))
        layer.beta.assign(np.reshape([0.1, 0.2, -0.3], layer.beta.shape))
        x_, residual_ = x.copy(), residual.copy()
        with gl.GradientTape() as tape:
            tape.watch([x_, residual_])
            if fused:
                y = layer(x_, training=training, residual=residual_)
            else:
                y = functions[activation](layer(x_, training=training) + tape.watch(residual_))
        gradients = tape.gradient(y, [x_, residual_, layer.gamma, layer.beta], output_gradients=weight)
        results.append([asnumpy(y), *gradients, *layer.get_weights()])
    for mine, composed in zip(*results, strict=True):
        np.testing.assert_allclose(mine, composed, rtol=1e-9, atol=1e-11)


@BOTH
def test_skipping_updates_of_channels_that_are_not_finite(family):
    x = X.copy()
    x[2, 1] = np.nan
    layer = family.BatchNormalization(momentum=0.0, skip_nonfinite_updates=True)
    with np.errstate(all="ignore"):
        layer(x, training=True)
    expected = X.astype("float64").mean(0)
    expected[1] = 0.0
    close(layer.moving_mean, expected)
    assert np.isfinite(layer.moving_variance.numpy()).all() and layer.moving_variance.numpy()[1] == 1.0
    assert int(layer.skipped_updates) == 1
    layer(X, training=True)
    assert int(layer.skipped_updates) == 1
    plain_layer = family.BatchNormalization(momentum=0.0)
    with np.errstate(all="ignore"):
        plain_layer(x, training=True)
    assert np.isnan(plain_layer.moving_mean.numpy()[1])


@pytest.mark.parametrize("where", ["cpu", "emulated"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("renorm", [False, True])
def test_a_skipped_channel_keeps_every_statistic_to_the_bit(renorm, mode, where):
    x = X.copy()
    x[:2, 1] = [2e38, -2e38]  # the sum is finite, the variance is not
    x[2:, 1] = 0.0
    with gl.device(where), np.errstate(all="ignore"):
        layer = BN(momentum=0.5, renorm=renorm, skip_nonfinite_updates=True, dtype="float32")
        if mode == "eager":
            layer.build((6, 3))
            before = layer.get_weights()
            layer(x, training=True)
        else:
            with gl.Graph().as_default(), gl.Session() as session:
                layer(gl.ops.identity(x), training=True)
                session.run(gl.global_variables_initializer())
                before = session.run(layer.variables)
                session.run(layer.updates)
        *after, skipped = [v.numpy() for v in layer.variables]
    assert skipped == 1
    for mine, expected in zip(after, before, strict=False):
        assert mine[1] == expected[1] and np.isfinite(mine).all()
    assert after[2][0] != before[2][0]


def test_extensions_survive_the_config():
    layer = BN(activation="relu", skip_nonfinite_updates=True)
    twin = BN.from_config(layer.get_config())
    assert twin.get_config() == layer.get_config() and twin.skip_nonfinite_updates


# --- corners ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("keywords", [{}, {"renorm": True}, {"fused": False}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 2, 3)])
def test_an_empty_batch_gives_an_empty_output_and_leaves_the_statistics(family, keywords, training, shape):
    if family is gl.keras.layers:
        keywords = {k: v for k, v in keywords.items() if k != "fused"}
    layer = family.BatchNormalization(**keywords)
    layer.build((None, *shape[1:]))
    before = layer.get_weights()
    for _ in range(2):
        y = layer(np.ones(shape, "float32"), training=training)
        assert y.shape == shape and y.dtype == np.float32
    for mine, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)


@BOTH
@pytest.mark.parametrize(("axis", "shape"), [(-1, (None, 0)), (1, (None, 0, 5)), ([1, 2], (None, 0, 3))])
@pytest.mark.parametrize("training", [False, True, "tensor"])
def test_gradients_without_channels_in_a_graph(family, axis, shape, training):
    with gl.Graph().as_default(), gl.Session() as session:
        x, flag = gl.placeholder(gl.float32, shape), gl.placeholder(gl.bool, ())
        layer = family.BatchNormalization(axis=axis)
        y = layer(x, training=flag if training == "tensor" else training)
        wanted = [y, *gl.gradients(y, [x, layer.gamma])]
        session.run(gl.global_variables_initializer())
        for value in (False, True):
            found = session.run(wanted, {x: np.zeros([4, *shape[1:]], "float32"), flag: value})
            assert [f.shape for f in found] == [(4, *shape[1:])] * 2 + [tuple(layer.gamma.shape)]


@BOTH
def test_one_value_per_channel_gives_beta_and_warns_once(family):
    layer = family.BatchNormalization(beta_initializer=gl.constant_initializer(0.5), name="lonely")
    x = np.array([[3.0, -2.0]], "float32")
    with pytest.warns(UserWarning, match="lonely.*one value per channel.*last batch of one row"):
        y = layer(x, training=True)
    np.testing.assert_array_equal(y, [[0.5, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, training=True)


@pytest.mark.parametrize("training", [True, "tensor"])
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("size", [None, 1])
def test_one_value_per_channel_warns_once_in_a_graph_of_unknown_sizes_too(training, rows, size):
    with gl.Graph().as_default(), gl.Session() as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, flag = gl.placeholder(gl.float32, (rows, 3)), gl.placeholder(gl.bool, ())
        y = BN(virtual_batch_size=size)(x, training=flag if training == "tensor" else True)
        session.run(gl.global_variables_initializer())
        if training == "tensor":
            session.run(y, {x: X[:1], flag: False})
            assert not caught
        elif rows is None and size is None:
            session.run(y, {x: X})
            assert not caught
        for _ in range(2):
            session.run(y, {x: X[:1], flag: True})
    assert ["one value per channel" in str(w.message) for w in caught] == [True]


def test_a_constant_far_from_zero_has_no_variance():
    x = np.full((8, 2), 1e4, "float32")
    layer = BN(momentum=0.0)
    np.testing.assert_array_equal(layer(x, training=True), np.zeros((8, 2)))
    np.testing.assert_array_equal(layer.moving_variance.numpy(), [0.0, 0.0])


def test_sub_batches_are_interleaved():
    layer = BN(virtual_batch_size=2, momentum=0.0)
    y = layer(X, training=True)
    expected = np.empty_like(X, dtype="float64")
    for j in range(3):
        expected[j::3] = plain(X[j::3])
    close(y, expected, rtol=1e-4)
    groups = [X[j::3].astype("float64") for j in range(3)]
    close(layer.moving_mean.numpy().ravel(), np.mean([g.mean(0) for g in groups], 0))
    close(layer.moving_variance.numpy().ravel(), np.mean([g.var(0) for g in groups], 0), rtol=1e-4)


# --- the same layer on the emulated kernels ---------------------------------------------------------------------------

OPTIONS = {
    "plain": ({}, X),
    "axis_1": ({"axis": 1}, X4),
    "axes": ({"axis": [1, 3]}, X4),
    "renorm": ({"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}}, X),
    "sub_batches": ({"virtual_batch_size": 3}, X),
    "adjustment": ({"adjustment": lambda s: (gl.asarray(np.float32(1.05)), gl.asarray(np.float32(0.1)))}, X),
    "relu": ({"activation": "relu"}, X),
    "no_scale": ({"scale": False, "center": False}, X),
    "float16": ({"dtype": "float16"}, X.astype("float16")),
    "skip": ({"skip_nonfinite_updates": True}, X),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_emulated_device_agrees_with_numpy(name, training):
    keywords, data = OPTIONS[name]
    results = []
    for where in ("cpu", "emulated"):
        with gl.device(where):
            layer = BN(momentum=0.9, **keywords)
            layer.build(data.shape)
            x = gl.asarray(data.copy())
            with gl.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
                total = gl.reduce_sum(gl.ops.cast(y, "float32") * gl.ops.cast(y, "float32") * 0.5)
            found = tape.gradient(total, [x, *layer.trainable_variables])
            kinds = {type(v) for v in (y.value, *found, *(v.value for v in layer.variables))}
            assert kinds == {StrictArray if where == "emulated" else np.ndarray}
            results.append([asnumpy(v) for v in (y, *found)] + layer.get_weights())
    tolerance = 4e-3 if name == "float16" else 2e-5
    for numpy_value, device_value in zip(*results, strict=True):
        np.testing.assert_allclose(
            device_value.astype("float64"), numpy_value.astype("float64"), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("where", ["cpu", "emulated"])
def test_host_arrays_from_an_adjustment_go_where_the_layer_is(where, mode):
    scale, bias = np.array([1.5, 1.0, 0.5]), np.array([0.0, 1.0, 2.0], "float32")  # NumPy draws in float64
    with gl.device(where):
        layer = BN(adjustment=lambda shape: (scale, bias))
        if mode == "eager":
            y = layer(X, training=True)
        else:
            with gl.Graph().as_default(), gl.Session() as session:
                x = gl.placeholder(gl.float32, (None, 3))
                y = layer(x, training=True)
                session.run(gl.global_variables_initializer())
                y = session.run(y, {x: X})
        assert y.dtype == np.float32
        close(y, plain(X) * scale + bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["cpu", "emulated"])
def test_a_residual_of_another_dtype_is_cast_and_its_gradient_has_its_own(where, training):
    with gl.device(where):
        layer, residual = BN(epsilon=0.0, dtype="float32"), gl.asarray(X.astype("float64"))
        layer.build((6, 3))
        with gl.GradientTape() as tape:
            tape.watch(residual)
            y = layer(X, training=training, residual=residual)
        assert y.dtype == np.float32
        close(y.value, (plain(X, epsilon=0.0) if training else X) + X, rtol=1e-5)
        gradient = tape.gradient(y, residual)
        assert gradient.dtype == np.float64
        np.testing.assert_array_equal(asnumpy(gradient), np.ones((6, 3)))


@pytest.mark.parametrize("where", ["cpu", "emulated"])
@pytest.mark.parametrize("shape", [(5,), (6, 3), (6, 2)])
def test_a_mask_that_does_not_fit_says_what_would(where, shape):
    with gl.device(where), pytest.raises(ValueError, match="mask.*do not fit.*without its last axis"):
        BN()(X, training=True, mask=gl.asarray(np.ones(shape)))


def test_a_mask_and_a_residual_on_the_emulated_device():
    mask = np.array([True, True, False, True, False, True])
    results = []
    for where in ("cpu", "emulated"):
        with gl.device(where):
            layer = BN()
            results.append(asnumpy(layer(X, training=True, mask=gl.asarray(mask), residual=gl.asarray(X * 2))))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
