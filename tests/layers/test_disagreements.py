"""Where TensorFlow's pages and TensorFlow 2.15.1 differ: what this library does, one test for each, by its number."""

import numpy as np
import pytest

import gpulayers as gl

X = np.array([[3.0, 4.0], [5.0, 8.0]], "float32")


@pytest.fixture
def graph():
    with gl.Graph().as_default() as graph:
        yield graph


def placeholder(*shape):
    return gl.placeholder(gl.float32, shape)


class Lossy(gl.layers.Layer):
    """Adds the mean of its inputs as a loss."""

    def call(self, inputs):
        self.add_loss(gl.reduce_mean(inputs), inputs=inputs)
        return inputs * 1.0


def test_diff_1_eager_add_loss_works_in_both_families():
    layer = Lossy()
    layer(X)
    assert [float(v) for v in layer.losses] == [5.0]

    class Modern(gl.keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(gl.ops.absolute(gl.reduce_mean(inputs)))
            return inputs

    modern = Modern()
    modern(np.ones((10, 1), "float32"))
    modern(np.full((10, 1), 3.0, "float32"))
    assert [(float(v), v.dtype.name) for v in modern.losses] == [(3.0, "float32")]


@pytest.mark.parametrize("method", ["get_losses_for", "get_updates_for"])
def test_diff_2_losses_and_updates_for_an_input_are_refused_in_eager_mode(method):
    layer = Lossy()
    layer(X)
    for inputs in (None, X):
        with pytest.raises(RuntimeError, match=method):
            getattr(layer, method)(inputs)


@pytest.mark.parametrize("name", ["input", "output", "input_shape", "output_shape"])
def test_diff_3_recorded_calls_are_refused_in_eager_mode(name):
    layer = Lossy()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=name):
            getattr(layer, name)
        layer(X)
    for method in ("get_input_at", "get_output_at", "get_input_shape_at", "get_output_shape_at"):
        with pytest.raises(RuntimeError):
            getattr(layer, method)(0)


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers])
def test_diff_4_input_and_output_of_several_calls_raise(graph, family):
    layer = family.Dense(2)
    layer(placeholder(None, 2))
    layer(placeholder(None, 2))
    for name in ("input", "output"):
        with pytest.raises(AttributeError, match="multiple inbound nodes"):
            getattr(layer, name)
    assert layer.input_shape == (None, 2)


def test_diff_5_inputs_decide_whether_an_update_is_conditional(graph):
    x = placeholder(None, 2)

    class Both(gl.layers.Layer):
        def build(self, input_shape):
            self.v = self.add_variable("v", (), trainable=False)

        def call(self, inputs):
            self.add_update(self.v.assign_add(gl.reduce_sum(inputs)), inputs=inputs)
            self.add_update(self.v.assign_add(gl.reduce_sum(inputs)))
            return inputs * 1.0

    layer = Both()
    layer(x)
    conditional, unconditional = layer.updates
    assert [id(u) for u in layer.get_updates_for(x)] == [id(conditional)]
    assert [id(u) for u in layer.get_updates_for(None)] == [id(unconditional)]


def test_diff_6_reading_losses_in_a_graph_makes_no_new_tensors(graph):
    layer = gl.layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l2")
    layer(placeholder(None, 2))
    count = len(graph.get_operations())
    first, second = layer.losses, layer.losses
    assert [id(v) for v in first] == [id(v) for v in second] and len(first) == 2
    assert len(graph.get_operations()) == count


@pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer])
@pytest.mark.parametrize("symbolic", [True, False])
def test_diff_7_call_returning_none_is_a_value_error_that_names_the_layer(base, symbolic):
    class Silent(base):
        def call(self, inputs):
            pass

    with gl.Graph().as_default() if symbolic else gl.device("cpu"):
        with pytest.raises(ValueError, match="quiet_one.*None"):
            Silent(name="quiet_one")(placeholder(2) if symbolic else X)


def test_diff_8_an_eager_partitioned_variable_with_a_regularizer_is_refused():
    layer = gl.layers.Layer()
    partitioner = gl.fixed_size_partitioner(2)
    with pytest.raises(RuntimeError, match="partition"):
        layer.add_variable("v", (4,), regularizer="l2", partitioner=partitioner)
    with gl.Graph().as_default():
        assert len(gl.layers.Layer().add_variable("v", (4,), regularizer="l2", partitioner=partitioner)) == 2


def test_diff_9_every_call_in_a_graph_makes_a_node(graph):
    x = placeholder(None, 2)
    layer = gl.layers.Dense(3)
    y = layer(x)
    assert layer.input is x and layer.output is y and layer.get_input_at(0) is x


LAYERS = {
    "base": lambda f: f.Layer(),
    "dense": lambda f: f.Dense(3),
    "batch_normalization": lambda f: f.BatchNormalization(),
    "dropout": lambda f: f.Dropout(0.5),
    "flatten": lambda f: f.Flatten(),
    "conv1d": lambda f: f.Conv1D(2, 2),
    "conv2d": lambda f: f.Conv2D(2, 2),
    "max_pooling": lambda f: f.MaxPooling2D(2, 2),
    "average_pooling": lambda f: f.AveragePooling1D(2, 2),
}


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])
@pytest.mark.parametrize("name", LAYERS)
def test_diff_10_compute_output_shape_checks_its_argument(family, name):
    layer = LAYERS[name](family)
    for junk in ("junk", 3.5, object(), {"a": "b"}):
        with pytest.raises(TypeError):
            layer.compute_output_shape(junk)


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])
def test_diff_10_batch_normalization_returns_a_shape_and_refuses_what_does_not_fit(family):
    layer = family.BatchNormalization()
    found = layer.compute_output_shape((None, 4))
    assert isinstance(found, gl.TensorShape) and found == (None, 4)
    for unknown in (None, ()):
        with pytest.raises(ValueError, match="rank"):
            layer.compute_output_shape(gl.TensorShape(unknown))
    with pytest.raises(ValueError, match="axis"):
        family.BatchNormalization(axis=2).compute_output_shape((None, 4))
    layer.build((None, 4))
    for fitting in ((None, 4), (None, None), (3, 4)):
        assert layer.compute_output_shape(fitting).as_list() == list(fitting)
    for other in ((None, 4, 4), (None, 5), gl.TensorShape(None), (4,)):
        with pytest.raises(ValueError):
            layer.compute_output_shape(other)
    for several in ([(None, 4)], {"a": (None, 4)}):
        with pytest.raises(TypeError):
            layer.compute_output_shape(several)


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])
def test_diff_11_the_text_of_an_input_that_does_not_fit(family):
    conv2d = family.Layer(name="conv2d")
    conv2d.input_spec = gl.keras.layers.InputSpec(ndim=4)
    with pytest.raises(ValueError) as caught:
        conv2d(np.ones(2, "float32"))
    expected = (
        "Input 0 of layer conv2d is incompatible with the layer: expected ndim=4, found ndim=1. Full shape received:[2]"
    )
    assert str(caught.value) == expected


def test_diff_12_the_class_of_the_residual_wrapper_and_its_layer_name():
    from gpulayers.nn.cells_modern import GRUCell
    from gpulayers.nn.wrappers import RNNCellResidualWrapper

    assert RNNCellResidualWrapper.__name__ in ("RNNCellResidualWrapper", "ResidualWrapper")
    with gl.Graph().as_default():
        names = [RNNCellResidualWrapper(GRUCell(2)).name for _ in range(2)]
    assert names == ["residual_wrapper", "residual_wrapper_1"]


def test_diff_13_batch_normalization_takes_a_mask():
    y = gl.layers.BatchNormalization(epsilon=0.0)(X, training=True, mask=np.array([True, True]))
    np.testing.assert_allclose(y, [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-5)


def test_diff_14_sub_batches_must_divide_the_batch_in_training_only():
    layer = gl.layers.BatchNormalization(virtual_batch_size=2)
    batch = np.ones((3, 2), "float32")
    assert layer(batch, training=False).shape == (3, 2)
    with pytest.raises(ValueError, match="virtual_batch_size|divide"):
        layer(batch, training=True)


@pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_diff_15_eager_updates_are_ignored(family, recorded, trainable):
    runs = []

    class Updating(family.Layer):
        def call(self, inputs):
            self.add_update([lambda: runs.append(1), None, inputs])
            self.add_update(lambda: runs.append(2), inputs=inputs)
            return inputs * 2.0

    layer = Updating(trainable=trainable)
    call = gl.function(layer) if recorded else layer
    np.testing.assert_array_equal(call(X), 2 * X)
    layer.add_update(lambda: runs.append(3))
    assert runs == [] and layer.updates == []


def test_diff_16_fused_where_it_is_impossible_falls_back_in_the_legacy_layer_and_raises_in_the_modern_one():
    legacy = gl.layers.BatchNormalization(fused=True)
    legacy(X, training=True)
    assert legacy.fused is False
    with pytest.raises(ValueError, match="fused"):
        gl.keras.layers.BatchNormalization(fused=True)(X, training=True)


def test_diff_17_the_functional_form_works_in_eager_mode():
    with pytest.warns(DeprecationWarning):
        y = gl.layers.batch_normalization(X, epsilon=0.0, training=True)
    np.testing.assert_allclose(y, [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-5)


def test_diff_18_graph_is_the_graph_of_use_and_refused_in_eager_mode():
    layer = Lossy()
    layer(X)
    with pytest.raises(RuntimeError, match="eager"):
        _ = layer.graph
    with gl.Graph().as_default() as graph:
        other = Lossy()
        other(placeholder(2))
        assert other.graph is graph
