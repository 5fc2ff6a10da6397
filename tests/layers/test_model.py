"""Input, Model, Sequential: joining, calling, losses and metrics, saving, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers.masks import mask_of

K = gl.keras.layers


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("float32")


# --- Input --------------------------------------------------------------------------------


def test_input_shapes_dtypes_and_names():
    gl.keras.backend.clear_session()
    first, second = gl.keras.Input((4,)), gl.keras.Input(shape=(2, 3), batch_size=5, dtype="int32")
    assert tuple(first.shape) == (None, 4) and first.dtype == gl.float32
    assert tuple(second.shape) == (5, 2, 3) and second.dtype == gl.int32
    assert [first.name.split(":")[0], second.name.split(":")[0]] == ["input_1", "input_2"]
    assert tuple(gl.keras.Input(batch_shape=(None, None, 3)).shape) == (None, None, 3)
    assert gl.keras.Input((1,), name="mine").name.startswith("mine")
    with pytest.raises(ValueError, match="shape"):
        gl.keras.Input()


def test_calls_on_an_input_make_nodes():
    x, layer = gl.keras.Input((4,)), K.Dense(2)
    with pytest.raises(AttributeError):
        _ = layer.input
    y = layer(x)
    assert layer.input is x and layer.output is y
    assert layer.input_shape == (None, 4) and layer.output_shape == (None, 2)
    layer(gl.keras.Input((4,)))
    assert layer.input_shape == (None, 4) and layer.get_output_at(0) is y and layer.get_input_at(-1) is not x
    with pytest.raises(AttributeError, match="multiple inbound nodes"):
        _ = layer.output
    with pytest.raises(ValueError, match="node 2"):
        layer.get_input_at(2)


# --- joining ------------------------------------------------------------------------------


def test_several_inputs_and_outputs():
    a, b = gl.keras.Input((3,), name="a"), gl.keras.Input((2,), name="b")
    joined = K.Concatenate()([a, b])
    hidden = K.Dense(4, "tanh", name="hidden")(joined)
    model = gl.keras.Model([a, b], {"sum": gl.reduce_sum(hidden, 1), "hidden": hidden})
    x, y = data(5, 3), data(5, 2)
    result = model([x, y])
    layer = model.get_layer("hidden")
    truth = np.tanh(np.concatenate([x, y], 1) @ layer.kernel.numpy() + layer.bias.numpy())
    np.testing.assert_allclose(result["hidden"], truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["sum"], truth.sum(1), rtol=1e-5, atol=1e-5)
    by_name = model({"b": y, "a": x})
    np.testing.assert_array_equal(by_name["sum"], result["sum"])
    assert [l.name for l in model.layers][:2] == ["a", "b"] and model.layers[-1] is layer  # noqa: E741
    assert len(model.weights) == 2 and model.count_params() == 5 * 4 + 4
    with pytest.raises(ValueError, match="expects 2 input"):
        model([x])
    with pytest.raises(ValueError, match="missing"):
        model({"a": x})


def test_nested_structures_of_inputs():
    a, b, c = (gl.keras.Input((2,)) for _ in range(3))
    model = gl.keras.Model({"first": a, "rest": [b, c]}, [K.Add()([a, b]), K.Multiply()([b, c])])
    x, y, z = data(3, 2), data(3, 2) + 1, data(3, 2) + 2
    added, multiplied = model({"first": x, "rest": [y, z]})
    np.testing.assert_allclose(added, x + y, rtol=1e-6)
    np.testing.assert_allclose(multiplied, y * z, rtol=1e-6)


def test_a_shared_layer_appears_once():
    a, b, shared = gl.keras.Input((3,)), gl.keras.Input((3,)), K.Dense(2)
    model = gl.keras.Model([a, b], K.Subtract()([shared(a), shared(b)]))
    x, y = data(4, 3), data(4, 3) * 2
    np.testing.assert_allclose(model([x, y]), (x - y) @ shared.kernel.numpy(), rtol=1e-5, atol=1e-6)
    assert sum(layer is shared for layer in model.layers) == 1 and len(model.weights) == 2
    with gl.GradientTape() as tape:
        loss = gl.reduce_sum(model([x, y]))
    np.testing.assert_allclose(
        tape.gradient(loss, shared.kernel), np.repeat((x - y).sum(0)[:, None], 2, 1), rtol=1e-4, atol=1e-5
    )


def test_a_model_inside_a_model():
    inner_input = gl.keras.Input((3,))
    inner = gl.keras.Model(inner_input, K.Dense(2, activity_regularizer="l2")(inner_input), name="inner")
    x = gl.keras.Input((3,))
    outer = gl.keras.Model(x, K.Activation("relu")(inner(x)))
    values = data(4, 3)
    np.testing.assert_allclose(outer(values), np.maximum(inner(values), 0), rtol=1e-6)
    assert [id(w) for w in outer.weights] == [id(w) for w in inner.weights]
    assert inner in outer.layers
    assert len(outer.losses) == len(inner.losses) == 1, "the losses of the last call only"


def test_a_model_of_part_of_another():
    x = gl.keras.Input((3,))
    hidden = K.Dense(4)(x)
    whole = gl.keras.Model(x, K.Dense(1)(hidden))
    part = gl.keras.Model(hidden, whole.outputs[0])
    values = data(2, 3)
    np.testing.assert_allclose(part(whole.layers[1](values)), whole(values), rtol=1e-6)


def test_plain_operations_between_layers():
    x = gl.keras.Input((3,))
    layer = K.Dense(3)
    model = gl.keras.Model(x, gl.reduce_mean(layer(x) * 2.0 + x, axis=1))
    values = data(4, 3)
    np.testing.assert_allclose(model(values), (layer(values) * 2 + values).mean(1), rtol=1e-5, atol=1e-6)


def test_a_disconnected_graph_is_refused():
    a, b = gl.keras.Input((3,), name="needed"), gl.keras.Input((3,))
    with pytest.raises(ValueError, match="disconnected.*needed"):
        gl.keras.Model(b, K.Dense(2)(a))
    with pytest.raises(TypeError, match="symbolic"):
        gl.keras.Model(np.ones((2, 3)), b)
    with pytest.raises(ValueError, match="both"):
        gl.keras.Model(a)


def test_a_legacy_layer_is_refused():
    class Holder(gl.keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gl.layers.Dense(2)

    with pytest.raises(TypeError, match="legacy tf.layers"):
        _ = Holder().weights
    with pytest.raises(TypeError, match="legacy tf.layers"):
        gl.keras.Sequential([gl.layers.Dense(2)])
    x = gl.keras.Input((3,))
    with pytest.raises(TypeError, match="legacy tf.layers"):
        gl.keras.Model(x, gl.layers.Dense(2)(x))


def test_a_wrong_input_is_refused():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(2)(x), name="checked")
    with pytest.raises(ValueError, match="incompatible"):
        model(data(2, 4))
    with pytest.raises(ValueError, match="incompatible"):
        model(data(2, 3, 1))


# --- calling ------------------------------------------------------------------------------


def test_inputs_are_cast_and_training_reaches_the_layers():
    x = gl.keras.Input((200,))
    model = gl.keras.Model(x, K.Dropout(0.5, seed=1)(x))
    ones = np.ones((1, 200))
    assert model(ones).dtype == np.float32
    np.testing.assert_array_equal(model(ones), ones)
    assert set(np.unique(model(ones, training=True))) == {0.0, 2.0}
    np.testing.assert_array_equal(model(ones, training=False), ones)
    gl.keras.backend.set_learning_phase(1)
    try:
        assert set(np.unique(model(ones))) == {0.0, 2.0}
    finally:
        gl.keras.backend.set_learning_phase(None)


def test_training_given_at_the_symbolic_call_stays():
    x = gl.keras.Input((200,))
    model = gl.keras.Model(x, K.Dropout(0.5, seed=1)(x, training=True))
    assert set(np.unique(model(np.ones((1, 200))))) == {0.0, 2.0}


def test_masks_travel_through_a_model():
    x = gl.keras.Input((4, 3))
    model = gl.keras.Model(x, K.GlobalAveragePooling1D()(K.Dense(2)(K.Masking()(x))))
    values = data(2, 4, 3)
    values[0, 2:] = 0
    dense = model.layers[2]
    truth = np.stack([dense(values)[0, :2].mean(0), dense(values)[1].mean(0)])
    np.testing.assert_allclose(model(values), truth, rtol=1e-5, atol=1e-6)
    inner = gl.keras.Model(x, K.Masking()(x))
    np.testing.assert_array_equal(mask_of(inner(values)), (values != 0).any(-1))


def test_predict_in_slices():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(2)(x))
    values = data(10, 3)
    np.testing.assert_allclose(model.predict(values, batch_size=3), model(values), rtol=1e-6)
    assert model.predict(values[:0]).shape == (0, 2)


def test_a_model_in_a_function():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(2, "tanh")(x))
    values = data(4, 3)
    np.testing.assert_allclose(gl.function(lambda v: model(v))(values), model(values), rtol=1e-6)


# --- losses and metrics -------------------------------------------------------------------


def test_losses_of_layers_and_of_the_model():
    x = gl.keras.Input((3,))
    dense = K.Dense(2, kernel_regularizer=gl.regularizers.L2(0.5), activity_regularizer=gl.regularizers.L1(0.1))
    y = dense(x)
    model = gl.keras.Model(x, y)
    model.add_loss(gl.reduce_sum(gl.abs(y)))
    values = data(4, 3)
    for scale in (1.0, 2.0):  # the losses of one call replace those of the call before
        output = model(values * np.float32(scale))
        kernel = dense.kernel.numpy()
        expected = sorted([0.5 * (kernel**2).sum(), 0.1 * np.abs(output).sum() / 4, np.abs(output).sum()])
        np.testing.assert_allclose(sorted(float(loss) for loss in model.losses), expected, rtol=1e-4)
    with gl.GradientTape() as tape:
        model(values)
        total = gl.add_n(model.losses)
    output = model(values)
    slope = np.sign(output) * (1 + 0.1 / 4)
    np.testing.assert_allclose(tape.gradient(total, dense.kernel), values.T @ slope + dense.kernel.numpy(), rtol=1e-4)


def test_metrics_of_the_model():
    x = gl.keras.Input((2,))
    y = K.Activation("linear")(x)
    model = gl.keras.Model(x, y)
    model.add_metric(gl.reduce_max(y), name="largest")
    model(np.array([[1.0, 2.0]]))
    model(np.array([[3.0, 6.0]]))
    assert [m.name for m in model.metrics] == ["largest"]
    assert float(model.metrics[0].result()) == 4.0
    with pytest.raises(ValueError, match="name"):
        model.add_metric(gl.reduce_max(y))


def test_a_subclassed_model():
    class Two(gl.keras.Model):
        def __init__(self) -> None:
            super().__init__(name="two")
            self.blocks = [K.Dense(4), K.Dense(4)]
            self.head = {"out": K.Dense(1)}

        def call(self, inputs: Any) -> Any:
            for block in self.blocks:
                inputs = block(inputs)
            self.add_loss(gl.reduce_mean(inputs))
            return self.head["out"](inputs)

    model = Two()
    model(data(2, 3))
    assert len(model.layers) == 3 and len(model.weights) == 6 and len(model.losses) == 1
    assert model.weights[0].name.startswith("two/")
    model.trainable = False
    assert model.trainable_weights == [] and not model.blocks[0].trainable and len(model.non_trainable_weights) == 6
    with pytest.raises(ValueError, match="how to compute"):
        gl.keras.Model(name="empty")(data(2, 3))


# --- Sequential ---------------------------------------------------------------------------


def test_sequential_with_and_without_an_input():
    values = data(4, 3)
    open_stack = gl.keras.Sequential([K.Dense(5, "relu"), K.Dense(2)])
    assert open_stack.weights == [] and not open_stack.built
    assert open_stack(values).shape == (4, 2) and len(open_stack.weights) == 4
    for first in ([gl.keras.Input((3,)), K.Dense(5)], [K.Dense(5, input_shape=(3,))], [K.Dense(5, input_dim=3)]):
        stack = gl.keras.Sequential([*first, K.Dense(2)])
        assert stack.built and stack.count_params() == 3 * 5 + 5 + 5 * 2 + 2
        assert len(stack.layers) == 2
        np.testing.assert_allclose(stack(values), stack.layers[1](stack.layers[0](values)), rtol=1e-6)


def test_sequential_build_by_hand_add_and_pop():
    stack = gl.keras.Sequential(name="stack")
    with pytest.raises(ValueError, match="no layers"):
        stack.build((None, 3))
    stack.add(K.Dense(5))
    stack.build((None, 3))
    assert stack.built and stack.layers[0].built and stack.count_params() == 20
    stack.add(K.Dense(2))
    assert stack(data(4, 3)).shape == (4, 2)
    top = stack.pop()
    assert top.units == 2 and stack(data(4, 3)).shape == (4, 5)
    with pytest.raises(TypeError, match="only layers"):
        stack.add(lambda x: x)


def test_sequential_with_an_input_pops_too():
    stack = gl.keras.Sequential([gl.keras.Input((3,)), K.Dense(5), K.Dense(2)])
    stack.pop()
    assert stack(data(4, 3)).shape == (4, 5)


# --- showing, copying, saving -------------------------------------------------------------


def test_summary_counts_parameters():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(2, name="head")(K.BatchNormalization()(x)), name="shown")
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "shown" in text and "head (Dense)" in text and "(None, 2)" in text
    assert "20" in lines[-1] and "14" in lines[-1] and "6" in lines[-1]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_save_and_load(tmp_path, suffix):
    def make() -> Any:
        x = gl.keras.Input((3,))
        shared = K.Dense(3)
        return gl.keras.Model(x, K.Dense(2)(K.BatchNormalization()(shared(shared(x)))))

    first, second = make(), make()
    values = data(4, 3)
    assert not np.allclose(first(values), second(values))
    first.save_weights(tmp_path / f"weights{suffix}")
    second_names, first_names = list(second.named_weights()), list(first.named_weights())
    assert len(set(first_names)) == len(first.weights)
    for mine, theirs in zip(second_names, first_names, strict=True):
        assert mine.rpartition("/")[2] == theirs.rpartition("/")[2]
    first.set_weights([w + 1 for w in first.get_weights()])
    changed = first(values)
    first.load_weights(tmp_path / f"weights{suffix}")
    assert not np.allclose(first(values), changed)


class Pair(K.Layer):
    """Two layers of one kind and size."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.first, self.second = K.Dense(3), K.Dense(3)

    def call(self, inputs):
        return self.second(self.first(inputs))


def test_weights_keep_their_order_and_names_whatever_is_trainable():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(3)(K.BatchNormalization()(Pair()(K.Dense(3)(x)))))
    before, names = [id(w) for w in model.weights], {name: id(w) for name, w in model.named_weights().items()}
    shapes = [w.shape for w in model.weights]
    assert shapes == [(3, 3), (3,)] * 3 + [(3,)] * 4 + [(3, 3), (3,)]
    for layer in (model.layers[1], model.layers[3], model):
        layer.trainable = False
        assert [id(w) for w in model.weights] == before
    model.trainable = True
    model.layers[2].first.trainable = False
    assert {name: id(w) for name, w in model.named_weights().items()} == names


def test_input_and_output_of_a_model_are_what_it_was_made_of():
    x = gl.keras.Input((3,))
    hidden = K.Dense(2)(x)
    y = K.Dense(1)(hidden)
    model, both = gl.keras.Model([x], [y]), gl.keras.Model({"x": x}, [hidden, y])
    gl.keras.Model(x, model(x))
    assert model.input is x and model.output is y
    assert (model.input_shape, model.output_shape) == ((None, 3), (None, 1))
    assert (both.input_shape, both.output_shape) == ({"x": (None, 3)}, [(None, 2), (None, 1)])
    assert model(data(4, 3)).shape == (4, 1) and [part.shape for part in both({"x": data(4, 3)})] == [(4, 2), (4, 1)]
    with pytest.raises(AttributeError):
        _ = gl.keras.Model().input_shape


def test_loading_is_strict_and_changes_nothing_on_error(tmp_path):
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(2, name="head")(x))
    model.save_weights(tmp_path / "weights.npz")
    other = gl.keras.Model(x, K.Dense(4, name="head")(x))
    before = other.get_weights()
    with pytest.raises(ValueError, match="head/kernel"):
        other.load_weights(tmp_path / "weights.npz")
    for a, b in zip(before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_copies_are_independent():
    model = gl.keras.Sequential([K.Dense(4), K.Dense(2)])
    values = data(3, 3)
    expected = model(values)
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(other(values), expected)
    other.set_weights([w + 1 for w in other.get_weights()])
    np.testing.assert_array_equal(model(values), expected)


def test_training_a_model_lowers_its_loss():
    x = gl.keras.Input((3,))
    model = gl.keras.Model(x, K.Dense(1)(K.Dense(8, "tanh")(x)))
    optimizer = gl.keras.optimizers.Adam(0.05)
    values = data(64, 3)
    target = np.sin(values[:, :1])

    @gl.function
    def loss_of(v: Any, t: Any) -> Any:
        return gl.reduce_mean(gl.square(model(v) - t))

    losses = []
    for _ in range(60):
        with gl.GradientTape() as tape:
            loss = loss_of(values, target)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
