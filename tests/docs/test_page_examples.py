"""The code examples of the three TensorFlow pages, as they stand there, after ``import gpulayers as tf``."""

from __future__ import annotations

import numpy as np
import pytest

import gpulayers as tf

pytestmark = pytest.mark.filterwarnings("ignore:batch_normalization is a legacy function:DeprecationWarning")

# --- tf.nn.RNNCellResidualWrapper (and the Layer methods that its page explains) --------------------------


def test_losses_of_a_layer():
    class MyLayer(tf.keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(tf.abs(tf.reduce_mean(inputs)))
            return inputs

    l = MyLayer()  # noqa: E741
    l(np.ones((10, 1)))
    assert len(l.losses) == 1
    assert l.losses[0].shape == () and l.losses[0].dtype == tf.float32 and float(l.losses[0]) == 1.0
    l(3 * np.ones((10, 1)))
    assert [float(loss) for loss in l.losses] == [3.0]


def test_losses_of_a_model_on_a_symbolic_tensor():
    inputs = tf.keras.Input(shape=(10,))
    x = tf.keras.layers.Dense(10)(inputs)
    outputs = tf.keras.layers.Dense(1)(x)
    model = tf.keras.Model(inputs, outputs)
    # Activity regularization.
    assert len(model.losses) == 0
    model.add_loss(tf.abs(tf.reduce_mean(x)))
    assert len(model.losses) == 1
    assert isinstance(model.losses[0], tf.Tensor) and tuple(model.losses[0].shape) == ()

    data = np.random.default_rng(0).normal(size=(4, 10)).astype("float32")
    model(data)
    hidden = model.layers[1]
    assert len(model.losses) == 1
    np.testing.assert_allclose(model.losses[0], abs(hidden(data).mean()), rtol=1e-5)


def test_losses_of_a_model_on_a_weight():
    inputs = tf.keras.Input(shape=(10,))
    d = tf.keras.layers.Dense(10, kernel_initializer="ones")
    x = d(inputs)
    outputs = tf.keras.layers.Dense(1)(x)
    model = tf.keras.Model(inputs, outputs)
    # Weight regularization.
    model.add_loss(lambda: tf.reduce_mean(d.kernel))
    assert [float(loss) for loss in model.losses] == [1.0]
    d.kernel.assign(2 * np.ones((10, 10)))
    assert [float(loss) for loss in model.losses] == [2.0]


def test_metrics_of_a_layer():
    input = tf.keras.layers.Input(shape=(3,))
    d = tf.keras.layers.Dense(2)
    output = d(input)
    d.add_metric(tf.reduce_max(output), name="max")
    d.add_metric(tf.reduce_min(output), name="min")
    assert [m.name for m in d.metrics] == ["max", "min"]
    assert all(isinstance(m, tf.keras.metrics.Mean) for m in d.metrics)
    assert [m.name for m in tf.keras.Model(input, output).metrics] == ["max", "min"]


def test_metrics_inside_call():
    class MyMetricLayer(tf.keras.layers.Layer):
        def __init__(self):
            super(MyMetricLayer, self).__init__(name="my_metric_layer")  # noqa: UP008
            self.mean = tf.keras.metrics.Mean(name="metric_1")

        def call(self, inputs):
            self.add_metric(self.mean(inputs))
            self.add_metric(tf.reduce_sum(inputs), name="metric_2")
            return inputs

    layer = MyMetricLayer()
    layer(np.array([[1.0, 2.0]]))
    layer(np.array([[3.0, 6.0]]))
    found = {m.name: float(m.result()) for m in layer.metrics}
    assert found == {"metric_1": 3.0, "metric_2": 6.0}


def test_input_spec():
    class MyLayer(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__(name="conv2d")
            self.input_spec = tf.keras.layers.InputSpec(ndim=4)

    with pytest.raises(ValueError) as caught:
        MyLayer()(np.ones((2,)))
    assert str(caught.value) == (
        "Input 0 of layer conv2d is incompatible with the layer: expected ndim=4, found ndim=1. Full shape received:[2]"
    )


def test_get_and_set_weights():
    layer_a = tf.keras.layers.Dense(1, kernel_initializer=tf.constant_initializer(1.0))
    layer_a(tf.convert_to_tensor([[1.0, 2.0, 3.0]]))
    assert [w.tolist() for w in layer_a.get_weights()] == [[[1.0], [1.0], [1.0]], [0.0]]
    layer_b = tf.keras.layers.Dense(1, kernel_initializer=tf.constant_initializer(2.0))
    layer_b(tf.convert_to_tensor([[10.0, 20.0, 30.0]]))
    assert [w.tolist() for w in layer_b.get_weights()] == [[[2.0], [2.0], [2.0]], [0.0]]
    layer_b.set_weights(layer_a.get_weights())
    assert [w.tolist() for w in layer_b.get_weights()] == [[[1.0], [1.0], [1.0]], [0.0]]


def test_residual_function():
    # "Defaults to calling nest.map_structure on (lambda i, o: i + o), inputs and outputs."
    wrappers = pytest.importorskip("gpulayers.nn.wrappers")
    assert tf.nn.RNNCellResidualWrapper is wrappers.RNNCellResidualWrapper
    cell = tf.keras.layers.SimpleRNNCell(3) if hasattr(tf.keras.layers, "SimpleRNNCell") else _simple_cell()
    wrapped = tf.nn.RNNCellResidualWrapper(cell)
    inputs, state = np.ones((2, 3), "float32"), np.zeros((2, 3), "float32")
    output, _ = wrapped(inputs, state)
    plain, _ = cell(inputs, state)
    np.testing.assert_allclose(output, tf.nest.map_structure(lambda i, o: i + o, inputs, plain), rtol=1e-6)
    given = tf.nn.RNNCellResidualWrapper(cell, residual_fn=lambda i, o: i - o)
    np.testing.assert_allclose(given(inputs, state)[0], inputs - plain, rtol=1e-6)


def _simple_cell():
    from gpulayers.nn.cells_modern import SimpleRNNCell

    return SimpleRNNCell(3)


# --- tf.layers.BatchNormalization -------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [tf.random_uniform, tf.random.uniform], ids=["random_uniform", "random.uniform"])
def test_adjustment(uniform):
    adjustment = lambda shape: (
        uniform(shape[-1:], 0.93, 1.07),
        uniform(shape[-1:], -0.1, 0.1))  # fmt: skip
    seen = []

    def kept(shape):
        seen.append(adjustment(shape))
        return seen[-1]

    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    layer = tf.layers.BatchNormalization(adjustment=kept, epsilon=0.0)
    y = layer(x, training=True)
    # One scale and one bias for each feature, shared by all examples, applied before gamma and beta.
    [(scale, bias)] = seen
    assert scale.shape == bias.shape == (4,)
    normal = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(y, normal * scale + bias, rtol=1e-4, atol=1e-5)


def test_axis_after_a_channels_first_convolution():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype("float32")
    h = tf.layers.Conv2D(4, 3, data_format="channels_first")(x)
    layer = tf.layers.BatchNormalization(axis=1)
    y = layer(h, training=True)
    assert layer.moving_mean.shape == (4,)
    np.testing.assert_allclose(y.mean((0, 2, 3)), np.zeros(4), atol=1e-5)


def test_updates_run_with_the_training_step():
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, (None, 2))
        x_norm = tf.layers.batch_normalization(x, training=True)
        loss = tf.reduce_sum(x_norm * x_norm * x)

        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        train_op = tf.train.GradientDescentOptimizer(0.1).minimize(loss)
        train_op = tf.group([train_op, update_ops])

        [mean] = [v for v in tf.global_variables() if v.name.endswith("moving_mean:0")]
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            session.run(train_op, {x: [[1.0, 2.0], [3.0, 4.0]]})
            np.testing.assert_allclose(session.run(mean), [0.02, 0.03], rtol=1e-5)


# --- tf.layers.Layer -------------------------------------------------------------------------------


def test_losses_of_one_layer_used_twice():
    with tf.Graph().as_default():
        a, b = tf.placeholder(tf.float32, (2, 3)), tf.placeholder(tf.float32, (2, 3))
        layer = tf.layers.Dense(4, activity_regularizer=tf.regularizers.l2(0.1), kernel_regularizer="l2")
        layer(a), layer(b)
        of_a, of_b, always = layer.get_losses_for(a), layer.get_losses_for(b), layer.get_losses_for(None)
        assert len(of_a) == len(of_b) == len(always) == 1
        assert of_a[0] is not of_b[0]
        assert set(map(id, layer.losses)) == set(map(id, [*of_a, *of_b, *always]))


@pytest.mark.parametrize(
    ("partitioner", "parts"), [(tf.fixed_size_partitioner(3), 3), (tf.variable_axis_size_partitioner(16), 4)]
)
def test_partitioned_variables(partitioner, parts):
    class MyLayer(tf.layers.Layer):
        def build(self, input_shape):
            self.w = self.add_variable("w", [7, 2], tf.float32, partitioner=partitioner)

        def call(self, inputs):
            return tf.matmul(inputs, self.w)

    with tf.Graph().as_default():
        layer = MyLayer(name="mine")
        y = layer(tf.placeholder(tf.float32, (None, 7)))
        assert isinstance(layer.w, tf.PartitionedVariable) and len(list(layer.w)) == parts
        assert [v.name for v in layer.variables] == [f"mine/w/part_{i}:0" for i in range(parts)]
        assert tuple(y.shape) == (None, 2)


def test_a_program_of_2018():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, 8, 8, 1)).astype("float32")
    targets = (images.mean((1, 2, 3)) > 0).astype("int64")
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        x = tf.placeholder(tf.float32, [None, 8, 8, 1], name="x")
        y = tf.placeholder(tf.int64, [None])
        training = tf.placeholder(tf.bool, [])
        with tf.variable_scope("net", initializer=tf.glorot_uniform_initializer()):
            h = tf.layers.conv2d(x, 4, 3, padding="same", activation=tf.nn.relu, name="conv1")
            h = tf.layers.max_pooling2d(h, 2, 2)
            h = tf.layers.batch_normalization(h, training=training)
            h = tf.layers.dropout(tf.layers.flatten(h), rate=0.1, training=training)
            logits = tf.layers.dense(h, 2, name="logits")
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
            train_op = tf.train.AdamOptimizer(0.01).minimize(loss)
        names = [v.name for v in tf.trainable_variables()]
        assert names[:2] == ["net/conv1/kernel:0", "net/conv1/bias:0"] and "net/logits/kernel:0" in names
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            feed = {x: images, y: targets, training: False}
            before = session.run(loss, feed)
            for _ in range(30):
                session.run(train_op, {x: images, y: targets, training: True})
            assert session.run(loss, feed) < before


def test_the_v1_face_has_the_same_objects():
    v1 = tf.compat.v1
    assert v1.layers is tf.layers and v1.placeholder is tf.placeholder and v1.float32 == tf.float32
    assert v1.train.AdamOptimizer is tf.train.AdamOptimizer and v1.Session is tf.Session
    v1.disable_eager_execution()
    try:
        assert not tf.executing_eagerly()
        assert v1.layers.dense(v1.placeholder(v1.float32, (2, 3)), 4).shape == (2, 4)
    finally:
        v1.enable_eager_execution()
        v1.reset_default_graph()
    assert tf.executing_eagerly()
