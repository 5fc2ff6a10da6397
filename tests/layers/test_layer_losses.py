"""Layer: losses, updates, and which of them depend on which input."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.trace import Node

X = np.full((4, 2), 3.0, "float32")
FAMILIES = pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer], ids=["legacy", "modern"])


@pytest.fixture
def session():
    with gl.Graph().as_default(), gl.Session() as session:
        yield session


def same(found, expected):
    return [id(v) for v in found] == [id(v) for v in expected]


def collection(key):
    return gl.get_collection(getattr(gl.GraphKeys, key))


def adding(base, *losses, **keywords):
    """Return a layer whose `call` adds ``loss(inputs)`` for each of `losses`."""

    class Adding(base):
        def call(self, inputs):
            for loss in losses:
                value = loss(inputs)
                self.add_loss(value, inputs=None if callable(value) else inputs)
            return inputs * 1.0

    return Adding(**keywords)


# --- the order of losses ----------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("symbolic", [True, False])
def test_activity_then_kernel_then_bias(base, symbolic):
    dense = (gl.layers if base is gl.layers.Layer else gl.keras.layers).Dense
    with gl.Graph().as_default() if symbolic else gl.device("cpu"):
        layer = dense(
            2,
            kernel_initializer="ones",
            bias_initializer="ones",
            kernel_regularizer=lambda k: gl.reduce_sum(k) * 1.0,
            bias_regularizer=lambda b: gl.reduce_sum(b) * 10.0,
            activity_regularizer=lambda y: gl.reduce_sum(y) * 100.0,
        )
        layer(gl.ops.identity(X) if symbolic else X)
        losses = layer.losses
        if symbolic:
            with gl.Session() as session:
                session.run(gl.global_variables_initializer())
                losses = session.run(losses)
    np.testing.assert_allclose(np.asarray(losses), [100 * 8 * 7 / 4, 4.0, 20.0])


@FAMILIES
def test_tensor_losses_come_before_callables(base):
    layer = adding(base, lambda x: lambda: gl.asarray(9.0), lambda x: gl.reduce_sum(x), lambda x: 5.0)
    layer(X)
    assert [float(loss) for loss in layer.losses] == [24.0, 5.0, 9.0]


@FAMILIES
def test_nested_lists_none_numbers_and_callables(base):
    layer = base()
    layer.build(())
    layer.add_loss([lambda: 2, [None, lambda: None], lambda: gl.asarray(1.5)])
    assert [(float(loss), loss.dtype.name) for loss in layer.losses] == [(2.0, "float32"), (1.5, "float32")]


def test_numbers_become_float32_tensors(session):
    layer = gl.layers.Layer()
    layer.add_loss([1, 2.5, lambda: 3])
    assert all(loss.dtype == np.float32 for loss in layer.losses)
    assert session.run(layer.losses) == [1.0, 2.5, 3.0]


def test_arrays_become_tensors_in_a_graph(session):
    layer = gl.layers.Layer()
    layer.add_loss([np.float32(1.5), lambda: np.float64(2.5)])
    assert session.run(layer.losses) == [1.5, 2.5] == session.run(collection("REGULARIZATION_LOSSES"))


@FAMILIES
def test_a_text_is_no_loss(base):
    layer = base()
    layer.build(())
    with pytest.raises(TypeError, match="not a loss"):
        layer.add_loss("l2")
    layer.add_loss(lambda: "l2")
    with pytest.raises(TypeError, match="not a loss"):
        _ = layer.losses


@FAMILIES
def test_losses_do_not_depend_on_trainable(base):
    layer = adding(base, lambda x: gl.reduce_sum(x), lambda x: lambda: gl.asarray(1.0), trainable=False)
    layer(X)
    assert len(layer.losses) == 2


def test_legacy_graph_losses_add_up_over_calls(session):
    class Regularized(gl.layers.Layer):
        def build(self, input_shape):
            self.w = self.add_variable("w", (2,), regularizer="l2")

        def call(self, inputs):
            self.add_loss([gl.reduce_sum(inputs), gl.reduce_mean(inputs)], inputs=inputs)
            self.add_loss(lambda: gl.reduce_sum(self.w))
            return inputs * self.w

    x = gl.placeholder(gl.float32, (None, 2))
    layer = Regularized()
    layer(x)
    assert len(layer.losses) == 4
    layer(x)
    assert len(layer.losses) == 7
    assert len(collection("REGULARIZATION_LOSSES")) == 7


def test_every_legacy_loss_enters_the_collection(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = gl.layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l2")
    layer(x)
    extra = gl.reduce_sum(x)
    layer.add_loss(extra)
    layer.add_loss(extra * 2.0, inputs=True)
    assert len(collection("REGULARIZATION_LOSSES")) == 4 == len(layer.losses)
    assert {id(v) for v in collection("REGULARIZATION_LOSSES")} == {id(v) for v in layer.losses}


def test_a_callable_is_evaluated_once_when_it_is_added_to_a_legacy_layer_in_a_graph(session):
    calls = []
    layer = gl.layers.Layer()
    layer.add_loss(lambda: calls.append(1) or gl.ops.identity(2.0))
    _ = layer.losses, layer.losses
    assert calls == [1]


# --- activity regularisation ------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("symbolic", [True, False])
def test_activity_loss_is_divided_by_the_batch(base, symbolic):
    layer = base(activity_regularizer=gl.regularizers.l2(0.1))
    if symbolic:
        with gl.Graph().as_default(), gl.Session() as session:
            x = gl.placeholder(gl.float32, (None, 2))
            layer(x)
            [found] = session.run(layer.losses, {x: X})
    else:
        layer(X)
        [found] = layer.losses
    assert float(found) == pytest.approx(1.8)


@FAMILIES
def test_activity_loss_of_each_output_and_of_a_scalar(base):
    class Two(base):
        def call(self, inputs):
            return [inputs, inputs[:2] * 2.0]

    layer = Two(activity_regularizer=lambda y: gl.reduce_sum(y))
    layer(X)
    assert [float(loss) for loss in layer.losses] == [24 / 4, 24 / 2]

    class Scalar(base):
        def call(self, inputs):
            return gl.reduce_sum(inputs)

    with pytest.raises(ValueError, match="batch axis"):
        Scalar(activity_regularizer="l2")(X)
    with pytest.raises(ValueError, match="returned None"):
        base(activity_regularizer=lambda y: None)(X)


# --- eager, modern ----------------------------------------------------------------------------------------------------


def test_tensor_losses_last_until_the_next_outermost_call_and_callables_add_up():
    layer = adding(gl.keras.layers.Layer, lambda x: gl.reduce_mean(x), lambda x: lambda: gl.asarray(2.0))
    layer(X)
    assert [float(v) for v in layer.losses] == [3.0, 2.0]
    layer(X + 1)
    assert [float(v) for v in layer.losses] == [4.0, 2.0, 2.0]


def test_losses_of_inner_layers_are_cleared_by_the_outermost_call():
    inner = adding(gl.keras.layers.Layer, lambda x: gl.reduce_mean(x))

    class Outer(gl.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def call(self, inputs):
            return self.inner(self.inner(inputs) * 2.0)

    layer = Outer()
    for _ in range(2):
        layer(X)
        assert [float(v) for v in layer.losses] == [3.0, 6.0]


def test_a_tensor_loss_outside_call_asks_for_a_lambda():
    layer = gl.keras.layers.Dense(1)
    with pytest.raises(ValueError, match="lambda"):
        layer.add_loss(gl.asarray(1.0))
    layer.add_loss(lambda: gl.asarray(1.0))
    assert len(layer.losses) == 1


@FAMILIES
def test_gradients_reach_variables_through_callables_and_activity_losses(base):
    dense = (gl.layers if base is gl.layers.Layer else gl.keras.layers).Dense
    layer = dense(1, use_bias=False, kernel_initializer="ones", activity_regularizer=lambda y: gl.reduce_sum(y))
    layer.build((None, 2))
    layer.add_loss(lambda: gl.reduce_sum(layer.kernel * layer.kernel))
    with gl.GradientTape() as tape:
        layer(X)
        total = sum(layer.losses)
    np.testing.assert_allclose(tape.gradient(total, layer.kernel), [[3.0 + 2.0]] * 2)


@FAMILIES
def test_losses_inside_a_function_are_of_that_call_and_of_no_other_recording(base):
    dense = (gl.layers if base is gl.layers.Layer else gl.keras.layers).Dense
    layer = dense(
        1,
        use_bias=False,
        kernel_initializer="ones",
        kernel_regularizer=lambda k: gl.reduce_sum(k),
        activity_regularizer=lambda y: gl.reduce_sum(y),
    )

    @gl.function
    def total(x):
        layer(x)
        return sum(layer.losses)

    for x in (X, X[:2], X, X[:3] * 2):  # recorded anew for each shape
        assert float(total(x)) == pytest.approx(float(x.sum(1).mean()) + 2.0)
    layer(X)
    assert [float(v) for v in layer.losses] == [6.0, 2.0]


@FAMILIES
def test_a_function_leaves_no_nodes_and_updates_with_the_layer(base):
    family = gl.layers if base is gl.layers.Layer else gl.keras.layers
    layer = family.BatchNormalization(momentum=0.0)
    step = gl.function(lambda x: layer(x, training=True))
    step(np.array([[1.0], [3.0]], "float32"))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), [2.0])
    assert layer.updates == []
    with pytest.raises((AttributeError, RuntimeError)):
        _ = layer.input


@FAMILIES
def test_computing_an_output_shape_leaves_no_losses_behind(base):
    class Probe(base):
        def build(self, input_shape):
            self.w = self.add_weight("w", (), initializer="ones", regularizer=lambda w: w * 3.0)

        def call(self, inputs):
            self.add_loss(gl.reduce_sum(inputs))
            return inputs * self.w

    layer = Probe(activity_regularizer="l2")
    assert layer.compute_output_shape((4, 2)) == (4, 2)
    assert [float(v) for v in layer.losses] == [3.0]


# --- updates ----------------------------------------------------------------------------------------------------------


class Updating(gl.layers.Layer):
    """Counts its calls: one update that depends on the inputs, one that does not, one given as a function."""

    def build(self, input_shape):
        self.total = self.add_variable("total", (), initializer="zeros", trainable=False)
        self.count = self.add_variable("count", (), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.add_update(self.total.assign_add(gl.reduce_sum(inputs)), inputs=inputs)
        self.add_update([lambda: self.count.assign_add(1.0), None])
        return inputs * 1.0


def test_updates_in_order_and_in_the_collection_without_duplicates(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = Updating()
    layer(x)
    first = layer.updates
    assert len(first) == 2 and same(collection("UPDATE_OPS"), first)
    layer(x)
    assert len(layer.updates) == 4 and same(layer.updates[:2], first)
    assert same(collection("UPDATE_OPS"), layer.updates)
    session.run(gl.global_variables_initializer())
    session.run(layer.updates[:2], {x: X})
    assert session.run([layer.total, layer.count]) == [24.0, 1.0]


def test_updates_are_not_run_by_the_output(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = Updating()
    y = layer(x)
    session.run(gl.global_variables_initializer())
    session.run(y, {x: X})
    assert session.run(layer.count) == 0.0


def test_a_layer_that_is_not_trainable_has_no_updates_unless_it_is_stateful(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = Updating(trainable=False)
    layer(x)
    assert layer.updates == [] and collection("UPDATE_OPS") == []
    assert layer.get_updates_for(x) == [] == layer.get_updates_for(None)
    layer.trainable = True
    assert len(layer.updates) == 2
    layer.trainable, layer.stateful = False, True
    assert len(layer.updates) == 2


def test_eager_updates_happen_at_once_and_nothing_is_kept():
    layer = Updating()
    layer(X)
    assert float(layer.total) == 24.0 and layer.updates == []
    assert float(layer.count) == 0.0  # given as a function, which is ignored as the page says


# --- reachability -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_calls(session):
    source = gl.placeholder(gl.float32, (None, 2), name="source")
    x, other = source * 2.0, gl.placeholder(gl.float32, (None, 2), name="other")
    layer = adding(gl.layers.Layer, lambda i: gl.reduce_sum(i * 2.0), lambda i: gl.reduce_mean(i))
    layer.add_loss(gl.ops.identity(1.0))
    y = layer(x)
    layer(other)
    return layer, source, x, other, y


def test_unconditional_losses(two_calls):
    layer, *_ = two_calls
    assert same(layer.get_losses_for(None), layer.losses[:1])


def test_losses_of_one_call_by_its_input_or_what_that_came_from(two_calls):
    layer, source, x, other, y = two_calls
    assert same(layer.get_losses_for(x), layer.losses[1:3])
    assert same(layer.get_losses_for([x]), layer.losses[1:3])
    assert same(layer.get_losses_for(source), layer.losses[1:3])
    assert same(layer.get_losses_for(other), layer.losses[3:])


def test_a_list_is_a_union_and_unrelated_tensors_give_nothing(two_calls):
    layer, _, x, other, y = two_calls
    assert same(layer.get_losses_for([x, other]), layer.losses[1:])
    assert layer.get_losses_for(y) == [] == layer.get_losses_for(x + 1.0)
    assert layer.get_losses_for(gl.placeholder(gl.float32, (2,))) == []


def test_a_variable_as_input(session):
    x = gl.placeholder(gl.float32, (None, 2))

    class Weighed(gl.layers.Layer):
        def build(self, input_shape):
            self.w, self.v = self.add_variable("w", ()), self.add_variable("v", ())

        def call(self, inputs):
            self.add_loss(gl.reduce_sum(inputs * self.w), inputs=inputs)
            self.add_loss(gl.reduce_sum(inputs * self.v), inputs=inputs)
            return inputs * 1.0

    layer = Weighed()
    layer(x)
    assert same(layer.get_losses_for(layer.w), layer.losses[:1])
    assert same(layer.get_losses_for(x), layer.losses)


def test_activity_losses_are_conditional_and_weight_losses_are_not(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = gl.layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l2")
    layer(x)
    activity, kernel = layer.losses
    assert same(layer.get_losses_for(x), [activity]) and same(layer.get_losses_for(None), [kernel])


def test_updates_by_input(session):
    x, other = gl.placeholder(gl.float32, (None, 2)), gl.placeholder(gl.float32, (None, 2))
    layer = Updating()
    layer(x)
    layer(other)
    updates = layer.updates
    assert same(layer.get_updates_for(x), updates[:1]) and same(layer.get_updates_for(other), updates[2:3])
    assert same(layer.get_updates_for(None), [updates[1], updates[3]])


def test_batch_normalization_updates_are_conditional_on_its_input(session):
    x = gl.placeholder(gl.float32, (None, 2))
    layer = gl.layers.BatchNormalization()
    layer(x, training=True)
    assert len(layer.updates) == 2 and same(layer.get_updates_for(x), layer.updates)
    assert layer.get_updates_for(None) == []
    layer(x, training=False)
    assert len(layer.updates) == 2
    assert all(isinstance(u, Node) or hasattr(u, "graph") for u in layer.updates)
