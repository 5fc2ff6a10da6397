"""RNNCellResidualWrapper and the legacy ResidualWrapper: every property and method of the page."""

import copy
import functools
import json

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import nest, ops
from gpulayers.keras import layers
from gpulayers.keras.utils import register_serializable, to_json
from gpulayers.nn import RNNCellDeviceWrapper, RNNCellResidualWrapper, rnn_cell
from gpulayers.trace import GradientTape, Graph, Session, gradients, placeholder
from gpulayers.variables import global_variables_initializer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3)).astype(np.float32)
H = RNG.standard_normal((2, 3)).astype(np.float32)


@register_serializable("Tests")
def twice_the_inputs(inputs, outputs):
    return 2 * inputs + outputs


class NestedCell(layers.Layer):
    """Echoes its inputs: a cell with nested inputs and outputs."""

    state_size, output_size = 1, 3

    def __init__(self, change=lambda outputs: outputs, **kwargs):
        super().__init__(**kwargs)
        self.change = change

    def call(self, inputs, state, training=None):
        return self.change(inputs), state


def wrapped(cell=None, **keywords):
    return RNNCellResidualWrapper(layers.SimpleRNNCell(3) if cell is None else cell, **keywords)


# --- call -------------------------------------------------------------------------------------------------------------


def test_output_is_inputs_plus_raw_output_and_the_state_is_untouched():
    wrapper = wrapped()
    y, state = wrapper(X, [H])
    raw, new_state = wrapper.cell.call(X, [H])
    np.testing.assert_allclose(y, X + raw, rtol=1e-6)
    np.testing.assert_array_equal(state[0], new_state[0])
    np.testing.assert_array_equal(state[0], raw)


@pytest.mark.parametrize("state, kind", [([H], list), ((H,), list), (H, np.ndarray)])
def test_state_comes_back_as_it_was_given(state, kind):
    assert isinstance(wrapped()(X, state)[1], kind)


def test_lstm_state_is_always_a_list():
    assert isinstance(wrapped(layers.LSTMCell(3))(X, (H, H))[1], list)


def test_residual_fn_gets_inputs_first_and_may_be_positional():
    wrapper = RNNCellResidualWrapper(layers.SimpleRNNCell(3), lambda i, o: ("seen", i, o))
    (word, inputs, raw), _ = wrapper(X, [H])
    assert word == "seen"
    np.testing.assert_array_equal(inputs, X)
    np.testing.assert_array_equal(raw, wrapper.cell.call(X, [H])[0])


@pytest.mark.parametrize("result", [{"a": X}, (X, X), [X]])
def test_a_custom_residual_fn_may_return_anything(result):
    y, _ = wrapped(residual_fn=lambda i, o: result)(X, [H])
    assert type(y) is type(result)


def test_a_residual_fn_may_widen_the_output_and_output_size_stays():
    wrapper = wrapped(layers.SimpleRNNCell(5), residual_fn=lambda i, o: ops.concatenate([i, o], -1))
    assert wrapper(X, [np.zeros((2, 5), np.float32)])[0].shape == (2, 8)
    assert wrapper.output_size == 5


@pytest.mark.parametrize("structure", [{"a": X, "b": [X, 2 * X]}, (X, X), [X]])
def test_nested_inputs_are_added_leaf_by_leaf(structure):
    y, _ = wrapped(NestedCell())(structure, [H])
    nest.assert_same_structure(y, structure)
    for ours, leaf in zip(nest.flatten(y), nest.flatten(structure), strict=True):
        np.testing.assert_array_equal(ours, 2 * leaf)


def test_gradient_of_nested_addition():
    wrapper = wrapped(NestedCell(lambda values: [3 * v for v in values]))
    with GradientTape() as tape:
        tape.watch([X, H])
        y, _ = wrapper([X, H], [H])
        total = ops.sum(y[0]) + ops.sum(y[1] * 2)
    for slope, expected in zip(tape.gradient(total, [X, H]), (4, 8), strict=True):
        np.testing.assert_allclose(slope, np.full((2, 3), expected))


@pytest.mark.parametrize(
    "inputs, change, error",
    [
        ([X], lambda v: tuple(v), TypeError),
        ([X], lambda v: v[0], ValueError),
        (X, lambda v: [v], ValueError),
        ([X, X], lambda v: v[:1], ValueError),
        ({"a": X}, lambda v: {"b": v["a"]}, ValueError),
        (X, lambda v: v[:, :2], ValueError),
        (X, lambda v: v[:, :1], ValueError),
        (X, lambda v: v[0], ValueError),
    ],
    ids=["list-tuple", "nested-single", "single-nested", "lengths", "keys", "width", "broadcastable", "rank"],
)
def test_mismatch(inputs, change, error):
    with pytest.raises(error):
        wrapped(NestedCell(change))(inputs, [H])


def test_depth_mismatch_says_shapes_and_suggests_a_projection():
    for cell in (layers.LSTMCell(4), layers.LSTMCell(4, implementation=1), layers.GRUCell(4)):
        states = [np.zeros((2, 4), np.float32)] * len(nest.flatten(cell.state_size))
        with pytest.raises(
            ValueError, match=r"Shapes .*2, 3.* and .*2, 4.* are incompatible.*residual_fn that projects"
        ):
            wrapped(cell)(X, states)


def test_training_reaches_cells_that_take_it_and_is_dropped_for_others():
    class Plain(NestedCell):
        def call(self, inputs, state):
            return inputs, state

    class Asking(NestedCell):
        def call(self, inputs, state, training=None):
            return inputs * (10 if training else 1), state

    assert np.allclose(wrapped(Plain())(X, [H], training=True)[0], 2 * X)
    assert np.allclose(wrapped(Asking())(X, [H], training=True)[0], 11 * X)
    assert np.allclose(wrapped(Asking())(X, [H])[0], 2 * X)


def test_bad_calls():
    with pytest.raises(TypeError):
        RNNCellResidualWrapper()
    with pytest.raises(AttributeError, match="'int' object has no attribute 'call'"):
        RNNCellResidualWrapper(3)
    with pytest.raises(TypeError):
        wrapped(nonsense=1)
    with pytest.raises(TypeError):
        wrapped()(X)
    with pytest.raises(TypeError):
        wrapped()(X, [H], scope="s")
    with pytest.raises(TypeError):
        wrapped(residual_fn=3)(X, [H])
    with pytest.raises(ValueError, match="number of states"):
        wrapped()(X, [H, H])
    with pytest.raises(ValueError, match="state 0"):
        wrapped()(X, [np.zeros((2, 4), np.float32)])
    with pytest.raises(AttributeError):
        wrapped().call(X, [H])


def test_float64_inputs_are_cast_and_list_states_converted():
    y, state = wrapped()(X.astype(np.float64), [H.tolist()])
    assert y.dtype == np.float32 and state[0].dtype == np.float32


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("cell", [layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell])
def test_mixed_policies(name, cell):
    wrapper = wrapped(cell(3, dtype=name), dtype=name)
    states = wrapper.get_initial_state(batch_size=2, dtype=wrapper.compute_dtype)
    y, _ = wrapper(X, states)
    assert y.dtype.name == name.removeprefix("mixed_")
    assert wrapper.cell.kernel.static_dtype == np.float32
    reference = wrapped(cell(3))
    reference.build((2, 3))
    reference.set_weights(wrapper.get_weights())
    expected, _ = reference(X, reference.get_initial_state(batch_size=2, dtype="float32"))
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.03)
    with GradientTape() as tape:
        total = ops.sum(ops.cast(wrapper(X, states)[0], "float32"))
    assert all(g.dtype == np.float32 for g in tape.gradient(total, wrapper.trainable_weights))


# --- properties -------------------------------------------------------------------------------------------------------


def test_sizes_are_the_cells():
    wrapper = wrapped(layers.LSTMCell(3))
    assert (wrapper.state_size, wrapper.output_size) == ([3, 3], 3)


def test_names_count_up():
    with Graph().as_default():
        assert [wrapped().name for _ in range(3)] == ["residual_wrapper", "residual_wrapper_1", "residual_wrapper_2"]
        assert wrapped(name="mine").name == "mine"


def test_weights_are_the_cells_named_after_the_wrapper():
    wrapper = wrapped(layers.LSTMCell(3), name="w")
    assert wrapper.weights == [] and not wrapper.built
    wrapper(X, [H, H])
    assert [v.name for v in wrapper.weights] == ["w/kernel:0", "w/recurrent_kernel:0", "w/bias:0"]
    assert all(a is b for a, b in zip(wrapper.weights, wrapper.cell.weights, strict=True))
    assert wrapper.trainable_weights == wrapper.weights and wrapper.non_trainable_weights == []
    assert wrapper.count_params() == 3 * 12 + 3 * 12 + 12


def test_dtype_and_policy_are_the_wrappers_own():
    wrapper = wrapped(layers.SimpleRNNCell(3, dtype="float64"))
    assert (wrapper.compute_dtype, wrapper.variable_dtype, wrapper.dtype) == ("float32",) * 3
    assert repr(wrapper.dtype_policy) == '<Policy "float32">'


def test_plain_attributes():
    wrapper = wrapped(dynamic=True)
    assert wrapper.dynamic and wrapper.input_spec is None and wrapper.metrics == [] and not wrapper.supports_masking
    assert wrapper.activity_regularizer is None
    wrapper.input_spec = layers.InputSpec(ndim=3)
    with pytest.raises(ValueError):
        wrapper(X, [H])
    with pytest.raises(TypeError):
        wrapper.compute_mask(X, X > 0)
    with pytest.raises(AttributeError):
        _ = wrapper.input
    with pytest.raises(AttributeError):
        _ = wrapper.output


def test_activity_regularizer_covers_output_and_state():
    wrapper = wrapped(activity_regularizer=lambda t: ops.sum(t))
    y, state = wrapper(X, [H])
    np.testing.assert_allclose([float(v) for v in wrapper.losses], [y.sum() / 2, state[0].sum() / 2], rtol=1e-5)


def test_losses_are_the_wrappers_then_the_cells_weight_regularizers():
    cell = layers.SimpleRNNCell(3, kernel_regularizer="l2", activity_regularizer=lambda t: ops.sum(t))
    wrapper = wrapped(cell, activity_regularizer=lambda t: ops.sum(t) * 0 + 7)
    wrapper(X, [H])
    found = [float(v) for v in wrapper.losses]
    assert found[:2] == [3.5, 3.5] and len(found) == 3  # not the cell's activity: its __call__ is bypassed
    np.testing.assert_allclose(found[2], 0.01 * np.sum(cell.kernel.numpy() ** 2), rtol=1e-5)


def test_trainable_propagates_down_but_not_at_construction():
    wrapper = wrapped()
    wrapper(X, [H])
    wrapper.trainable = False
    assert not wrapper.cell.trainable and wrapper.trainable_weights == [] and len(wrapper.non_trainable_weights) == 3
    wrapper.trainable = True
    assert wrapper.cell.trainable and len(wrapper.trainable_weights) == 3
    frozen = wrapped(trainable=False)
    frozen(X, [H])
    assert frozen.cell.trainable and frozen.trainable_weights == []


def test_metrics_and_add_metric():
    class Measuring(NestedCell):
        def call(self, inputs, state, training=None):
            self.add_metric(ops.mean(inputs), name="level")
            return inputs, state

    wrapper = wrapped(Measuring())
    wrapper(np.full((2, 3), 2.0, np.float32), [H])
    wrapper(np.full((2, 3), 4.0, np.float32), [H])
    assert [m.name for m in wrapper.metrics] == ["level"]
    assert float(wrapper.metrics[0].result()) == 3.0


def test_states_to_start_from():
    wrapper = wrapped(layers.LSTMCell(3))
    for states in (wrapper.get_initial_state(inputs=X), wrapper.get_initial_state(batch_size=2, dtype="float32")):
        assert [s.shape for s in states] == [(2, 3)] * 2 and all(s.dtype == np.float32 and not s.any() for s in states)
    with pytest.raises(ValueError, match="batch_size and dtype cannot be None"):
        wrapper.get_initial_state(batch_size=2)
    with pytest.raises(AttributeError):
        wrapper.zero_state(2, "float32")
    assert wrapped(rnn_cell.BasicRNNCell(3)).zero_state(2, "float32").shape == (2, 3)


def test_output_shape_checks_its_argument_and_builds_nothing():
    wrapper = wrapped(layers.GRUCell(3))
    assert wrapper.compute_output_shape((None, 3)) == (None, 3) and not wrapper.built
    assert wrapper.compute_output_shape(gl.TensorShape((2, 3))) == (2, 3)
    joined = wrapped(layers.GRUCell(5), residual_fn=lambda i, o: ops.concatenate([i, o], -1))
    assert joined.compute_output_shape((2, 3)) == (2, 8)
    assert layers.LSTMCell(4).compute_output_shape((2, 3)) == (2, 4)
    assert rnn_cell.LSTMCell(4, num_proj=2).compute_output_shape((2, 3)) == (2, 2)
    with pytest.raises(TypeError):
        wrapper.compute_output_shape("junk")
    for shape in ((2, 4), (2, None), (3,)):
        with pytest.raises(ValueError):
            wrapper.compute_output_shape(shape)


# --- build ------------------------------------------------------------------------------------------------------------


def test_build_builds_the_cell():
    wrapper = wrapped()
    with pytest.raises(ValueError):
        wrapper.count_params()
    wrapper.build((2, 3))
    assert wrapper.built and wrapper.cell.built and wrapper.cell.kernel.shape == (3, 3)


def test_a_built_cell_keeps_its_variables():
    cell = layers.SimpleRNNCell(3)
    cell(X, [H])
    kernel = cell.kernel
    first, second = wrapped(cell), wrapped(cell)
    first(X, [H])
    second.build((2, 3))
    assert cell.kernel is kernel and first.weights[0] is kernel and second.weights[0] is kernel


def test_wrapper_of_wrapper_adds_the_inputs_twice():
    inner = wrapped()
    outer = wrapped(inner, name="outer")
    y, _ = outer(X, [H])
    np.testing.assert_allclose(y, 2 * X + inner.cell.call(X, [H])[0], rtol=1e-5)
    assert outer.weights[0].name == "outer/kernel:0"


def test_deepcopy_has_variables_of_its_own():
    wrapper = wrapped()
    y, _ = wrapper(X, [H])
    twin = copy.deepcopy(wrapper)
    twin.weights[0].assign(np.zeros((3, 3)))
    np.testing.assert_array_equal(wrapper(X, [H])[0], y)
    assert twin.name == wrapper.name and twin.cell is not wrapper.cell


def test_a_subclassed_cell_is_asked_itself():
    class Doubling(layers.LSTMCell):
        def call(self, inputs, states, training=None):
            output, states = super().call(inputs, states, training=training)
            return 2 * output, states

    cell = Doubling(3)
    y, (h, _) = wrapped(cell)(X, [H, H])
    np.testing.assert_allclose(y, X + 2 * h, rtol=1e-5)
    sequences = layers.RNN(wrapped(cell), return_sequences=True)(X[:, None])
    np.testing.assert_allclose(sequences[:, 0], X + 2 * cell.call(X, [0 * H, 0 * H])[0] / 2, rtol=1e-4)


def test_in_a_graph():
    with Graph().as_default(), Session() as session:
        wrapper = wrapped(layers.GRUCell(3))
        x, h = placeholder("float32", (None, 3)), placeholder("float32", (None, 3))
        y, state = wrapper(x, h)
        slope = gradients(y, [x])[0]
        assert wrapper.input is x
        session.run(global_variables_initializer())
        got = session.run([y, state, slope], {x: X, h: H})
        weights = session.run(wrapper.weights)
    eager = wrapped(layers.GRUCell(3))
    eager.build((2, 3))
    eager.set_weights(weights)
    with GradientTape() as tape:
        tape.watch(X)
        expected, new = eager(X, H)
    for ours, theirs in zip(got, [expected.value, new.value, tape.gradient(expected, X)], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_without_a_function():
    config = wrapped(layers.LSTMCell(3), name="w").get_config()
    assert set(config) == {"name", "trainable", "dtype", "cell"}
    assert config["cell"]["class_name"] == "LSTMCell" and config["cell"]["config"]["units"] == 3
    before = copy.deepcopy(config)
    twin = RNNCellResidualWrapper.from_config(config)
    assert config == before and twin.name == "w" and twin.cell.units == 3 and not twin.built
    again = RNNCellResidualWrapper.from_config(json.loads(to_json(config)))
    assert again.cell.name == twin.cell.name


def test_a_registered_function_travels_by_name():
    config = json.loads(to_json(wrapped(residual_fn=twice_the_inputs).get_config()))
    assert config["residual_fn"] == "Tests>twice_the_inputs" and config["residual_fn_type"] == "function"
    twin = RNNCellResidualWrapper.from_config(config)
    assert twin._residual_fn is twice_the_inputs
    named = {**config, "residual_fn": "local"}
    twin = RNNCellResidualWrapper.from_config(named, custom_objects={"local": twice_the_inputs})
    assert twin._residual_fn is twice_the_inputs
    with pytest.raises(ValueError, match="is not known"):
        RNNCellResidualWrapper.from_config({**config, "residual_fn": "os.system"})


@pytest.mark.parametrize("function", [lambda i, o: 2 * i + o, functools.partial(twice_the_inputs)])
def test_any_other_function_serves_in_the_process_and_is_refused_in_json(function):
    wrapper = wrapped(residual_fn=function)
    config = wrapper.get_config()
    assert config["residual_fn"] is function
    twin = RNNCellResidualWrapper.from_config(config)
    twin.build((2, 3))
    wrapper.build((2, 3))
    twin.set_weights(wrapper.get_weights())
    np.testing.assert_array_equal(twin(X, [H])[0], wrapper(X, [H])[0])
    with pytest.raises(ValueError, match="register_serializable"):
        to_json(config)


def test_code_in_a_config_is_never_run():
    config = {**wrapped().get_config(), "residual_fn": (b"\xe3\x00", None, None), "residual_fn_type": "lambda"}
    with pytest.raises(TypeError, match="never executed"):
        RNNCellResidualWrapper.from_config(config)
    with pytest.raises(ValueError, match="not callable"):
        wrapped(residual_fn=3).get_config()
    with pytest.raises(ValueError, match="is not known"):
        RNNCellResidualWrapper.from_config({**wrapped().get_config(), "cell": {"class_name": "Evil", "config": {}}})


def test_a_legacy_cell_comes_back_as_a_legacy_cell():
    config = json.loads(to_json(wrapped(rnn_cell.GRUCell(3)).get_config()))
    assert type(RNNCellResidualWrapper.from_config(config).cell) is rnn_cell.GRUCell
    assert type(RNNCellResidualWrapper.from_config(wrapped(wrapped()).get_config()).cell) is RNNCellResidualWrapper


# --- the legacy wrapper -----------------------------------------------------------------------------------------------


def test_legacy_wrapper_adds_and_owns_nothing():
    with Graph().as_default(), Session() as session:
        cell = rnn_cell.BasicRNNCell(3)
        wrapper = rnn_cell.ResidualWrapper(cell)
        y, state = wrapper(X, H)
        assert [v.name for v in cell.weights] == ["basic_rnn_cell/kernel:0", "basic_rnn_cell/bias:0"]
        assert wrapper.weights == [] and not wrapper.built
        session.run(global_variables_initializer())
        ours, raw = session.run([y, state])
    np.testing.assert_allclose(ours, X + raw, rtol=1e-6)


def test_legacy_wrapper_delegates():
    cell = rnn_cell.LSTMCell(3)
    wrapper = rnn_cell.ResidualWrapper(cell, residual_fn=lambda i, o: i * o)
    assert wrapper.state_size == cell.state_size and wrapper.output_size == 3 and wrapper.wrapped_cell is cell
    assert isinstance(wrapper.zero_state(2, "float32"), rnn_cell.LSTMStateTuple)
    assert isinstance(wrapper.get_initial_state(inputs=X), rnn_cell.LSTMStateTuple)
    y, state = wrapper(X, wrapper.zero_state(2, "float32"))
    np.testing.assert_allclose(y, X * state.h, rtol=1e-6)


def test_legacy_wrapper_passes_the_scope():
    cell = rnn_cell.BasicRNNCell(3)
    with Graph().as_default():
        rnn_cell.ResidualWrapper(cell)(X, H, scope="here")
        assert cell.weights[0].name == "here/kernel:0"


def test_legacy_wrapper_refuses():
    with pytest.raises(TypeError, match="output_size.*state_size.*zero_state"):
        rnn_cell.ResidualWrapper(object())
    with pytest.raises(TypeError):
        rnn_cell.ResidualWrapper(rnn_cell.BasicRNNCell(3))(X, H, training=True)
    wrapper = rnn_cell.ResidualWrapper(rnn_cell.BasicRNNCell(3))
    with pytest.raises(ValueError, match="live cell"):
        rnn_cell.ResidualWrapper.from_config(wrapper.get_config())
    alive = rnn_cell.BasicRNNCell(3)
    assert rnn_cell.ResidualWrapper.from_config({**wrapper.get_config(), "cell": alive}).cell is alive
    with pytest.raises(ValueError, match="incompatible"):
        rnn_cell.ResidualWrapper(rnn_cell.BasicRNNCell(4))(X, np.zeros((2, 4), np.float32))


def test_legacy_wrapper_needs_floats():
    with pytest.raises(ValueError, match="only supports floating point inputs"):
        rnn_cell.ResidualWrapper(rnn_cell.BasicRNNCell(3))(X.astype(np.int32), H)


def test_gradients_of_the_wrapper_match_finite_differences():
    for cell in (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell):
        wrapper = wrapped(cell(3, dtype="float64"), dtype="float64")
        x, states = X.astype(float), [H.astype(float)] * len(nest.flatten(cell(3).state_size))
        wrapper(x, states)
        w = RNG.standard_normal((2, 3))
        with GradientTape() as tape:
            tape.watch(x)
            total = ops.sum(wrapper(x, states)[0] * w)
        kernel = wrapper.cell.kernel
        slopes = tape.gradient(total, [x, kernel])
        for slope, place in zip(slopes, [x, kernel], strict=True):
            base = np.array(place if place is x else place.numpy())
            along = RNG.standard_normal(base.shape)
            values = []
            for step in (1e-5, -1e-5):
                if place is not x:
                    kernel.assign(base + step * along)
                values.append(float(np.sum(wrapper(base + step * along if place is x else x, states)[0] * w)))
            if place is not x:
                kernel.assign(base)
            np.testing.assert_allclose(np.sum(slope * along), (values[0] - values[1]) / 2e-5, rtol=1e-7)


def test_second_gradients_of_fused_and_composed_cells_agree():
    x, found = X.astype(float), []
    cells = [layers.LSTMCell(3, dtype="float64", implementation=implementation) for implementation in (1, 2)]
    for cell in cells:
        wrapper = wrapped(cell, dtype="float64")
        wrapper(x, [H.astype(float)] * 2)
        cell.set_weights(cells[0].get_weights())
        with GradientTape() as outer:
            outer.watch(x)
            with GradientTape() as inner:
                inner.watch(x)
                y, _ = wrapper(x, [H.astype(float)] * 2)
            slope = inner.gradient(y, x)
        found.append(outer.gradient(slope, x))
    np.testing.assert_allclose(*found, atol=1e-13)
    assert np.abs(found[0]).max() > 1e-3


# --- a depth that does not fit ----------------------------------------------------------------------------------------


def _all_in(cell):
    inner = getattr(cell, "cells", None) or ([cell.cell] if hasattr(cell, "cell") else [])
    return [cell, *(found for one in inner for found in _all_in(one))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: RNNCellResidualWrapper(layers.GRUCell(4)),
        lambda: RNNCellResidualWrapper(rnn_cell.GRUCell(4)),
        lambda: RNNCellResidualWrapper(layers.GRUCell(4, activation="relu")),
        lambda: rnn_cell.ResidualWrapper(rnn_cell.GRUCell(4)),
        lambda: rnn_cell.DropoutWrapper(rnn_cell.ResidualWrapper(layers.GRUCell(4))),
        lambda: RNNCellDeviceWrapper(RNNCellResidualWrapper(layers.GRUCell(4)), "cpu"),
    ],
    ids=["modern", "around legacy", "composed", "legacy", "in a legacy wrapper", "in a wrapper"],
)
def test_a_depth_that_cannot_be_added_builds_nothing(make):
    narrow, wide, state = X.astype("float32"), np.ones((2, 4), "float32"), np.zeros((2, 4), "float32")
    wrapper = make()
    with pytest.raises(ValueError, match="incompatible"):
        wrapper(narrow, state)
    assert not any(cell.built for cell in _all_in(wrapper))
    assert wrapper(wide, state)[0].shape == (2, 4)
    layer = layers.RNN(make())
    with pytest.raises(ValueError, match="incompatible"):
        layer(np.stack([narrow] * 2, 1))
    assert not layer.built and layer(np.stack([wide] * 2, 1)).shape == (2, 4)
    with Graph().as_default():
        with pytest.raises(ValueError, match="incompatible"):
            gl.nn.dynamic_rnn(make(), placeholder("float32", (2, None, 3)), dtype="float32")
        assert not gl.global_variables()


@pytest.mark.parametrize("kind", [layers.StackedRNNCells, rnn_cell.MultiRNNCell])
def test_a_depth_that_cannot_be_added_builds_no_cell_below(kind):
    stack = kind([layers.GRUCell(5), RNNCellResidualWrapper(layers.GRUCell(4))])
    with pytest.raises(ValueError, match="incompatible"):
        layers.RNN(stack)(np.ones((2, 4, 3), "float32"))
    assert not any(cell.built for cell in _all_in(stack))


def test_cells_that_do_not_say_their_output_are_added_as_before():
    class Silent(layers.Layer):
        state_size = 3

        def call(self, inputs, states):
            return inputs, states

    wrapper = RNNCellResidualWrapper(Silent())
    np.testing.assert_allclose(wrapper(X, [H])[0], 2 * X, rtol=1e-6)

    class Projecting(RNNCellResidualWrapper):
        def call(self, inputs, state, training=None, **kwargs):
            output, new_state = self.cell.call(inputs, state)
            return inputs[:, :2] + output, new_state

    assert Projecting(layers.GRUCell(2))(X, np.zeros((2, 2), "float32"))[0].shape == (2, 2)
