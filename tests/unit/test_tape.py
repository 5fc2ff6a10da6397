"""GradientTape: what it records, what it refuses to lose, and the gradients it gives."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.errors import GradientError, StateError
from gpulayers.nn.cells_modern import GRUCell
from gpulayers.nn.wrappers import RNNCellResidualWrapper
from gpulayers.trace import RecordedTensor, active_tapes

X = np.array([0.5, -1.25, 2.0])


class Affine(gl.layers.Layer):
    """``x * w + extra``; `extra` may come in any argument and any structure."""

    def build(self, input_shape):
        self.w = self.add_variable("w", (3,), dtype="float64", initializer="ones")

    def call(self, inputs, *extra, more=None):
        y = inputs["x"] if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, list | tuple) else inputs
        y = y * self.w
        for value in gl.nest.flatten([extra, more]):
            if value is not None:
                y = y + value * value
        return y


# --- the basics -------------------------------------------------------------------------------------------------------


def test_gradient_of_a_watched_array():
    x = X.copy()
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        y = (t**3).sum()
    gradient = tape.gradient(y, x)
    assert type(gradient) is np.ndarray
    np.testing.assert_allclose(gradient, 3 * X**2)


def test_the_watched_tensor_itself_is_a_source_too():
    with gl.GradientTape() as tape:
        t = tape.watch(X.copy())
        y = t * t
    np.testing.assert_allclose(tape.gradient(y, t), 2 * X)


def test_without_a_watch_nothing_is_recorded():
    x = X.copy()
    with gl.GradientTape() as tape:
        y = gl.ops.tanh(x)
    assert type(y) is np.ndarray
    with pytest.raises(GradientError, match="not recorded"):
        tape.gradient(y, x)


@pytest.mark.parametrize("container", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))])
def test_watch_takes_structures_and_returns_them_with_tensors(container):
    a, b = X.copy(), X.copy() + 1
    given = container([a, b])
    with gl.GradientTape() as tape:
        tensors = tape.watch(given)
        first, second = gl.nest.flatten(tensors)
        y = first * second
    assert type(tensors) is type(given)
    found = tape.gradient(y, given)
    assert type(found) is type(given)
    for gradient, expected in zip(gl.nest.flatten(found), (X + 1, X), strict=True):
        np.testing.assert_allclose(gradient, expected)


def test_watch_refuses_integers_and_things_that_are_not_arrays():
    with gl.GradientTape() as tape:
        with pytest.raises(TypeError, match="floating"):
            tape.watch(np.arange(3))
        with pytest.raises(TypeError, match="str"):
            tape.watch("x")


def test_trainable_variables_are_watched_by_themselves_and_others_are_not():
    v, fixed = gl.Variable(X, name="v"), gl.Variable(X, trainable=False, name="fixed")
    with gl.GradientTape() as tape:
        y = v * fixed
    assert tape.watched_variables() == (v,)
    slope, none = tape.gradient(y, [v, fixed])
    np.testing.assert_allclose(slope, X)
    assert none is None


def test_watched_variables_come_in_the_order_of_first_use():
    a, b = gl.Variable(1.0), gl.Variable(2.0)
    with gl.GradientTape() as tape:
        _ = b * a * b
    assert tape.watched_variables() == (b, a)


def test_a_variable_that_is_not_trainable_can_be_watched():
    v = gl.Variable(X, trainable=False)
    with gl.GradientTape() as tape:
        assert tape.watch(v) is v
        y = v * v
    np.testing.assert_allclose(tape.gradient(y, v), 2 * X)


def test_watch_accessed_variables_off():
    a, b = gl.Variable(X), gl.Variable(X)
    with gl.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(a)
        y = a * b
    assert tape.watched_variables() == (a,)
    slope, none = tape.gradient(y, [a, b])
    np.testing.assert_allclose(slope, X)
    assert none is None


def test_sources_keep_their_structure():
    v, w = gl.Variable(2.0), gl.Variable(3.0)
    with gl.GradientTape() as tape:
        y = v * w
    found = tape.gradient(y, {"a": [v], "b": (w,)})
    assert float(found["a"][0]) == 3.0 and float(found["b"][0]) == 2.0


def test_several_targets_add_up():
    x = X.copy()
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        y = [t * t, {"z": t * 3.0}]
    np.testing.assert_allclose(tape.gradient(y, x), 2 * X + 3)


def test_the_target_itself_as_source():
    x = X.copy()
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        y = t * t
    slope, own = tape.gradient(y, [x, y])
    np.testing.assert_allclose(own, np.ones(3))
    np.testing.assert_allclose(slope, 2 * X)


# --- persistence, pausing, forgetting ---------------------------------------------------------------------------------


def test_a_second_gradient_needs_a_persistent_tape():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = v * v
    tape.gradient(y, v)
    with pytest.raises(RuntimeError, match="persistent=True"):
        tape.gradient(y, v)


def test_a_persistent_tape_gives_several_gradients():
    v = gl.Variable(X)
    with gl.GradientTape(persistent=True) as tape:
        y = v * v
        z = y * v
    np.testing.assert_allclose(tape.gradient(z, v), 3 * X**2)
    np.testing.assert_allclose(tape.gradient(y, v), 2 * X)
    np.testing.assert_allclose(tape.gradient(z, y), X)


def test_stop_recording_of_one_tape():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        with tape.stop_recording():
            constant = v * v
            assert active_tapes() == []
        y = v * constant
    assert type(constant) is np.ndarray
    np.testing.assert_allclose(tape.gradient(y, v), X**2)


def test_stop_recording_of_all_tapes():
    v = gl.Variable(X)
    with gl.GradientTape(), gl.GradientTape(), gl.stop_recording():
        assert type(v * v) is np.ndarray


def test_reset_forgets():
    x = X.copy()
    with gl.GradientTape(persistent=True) as tape:
        t = tape.watch(x)
        y = t * t
        tape.reset()
        u = tape.watch(x)
        z = u * 5.0
        with pytest.raises(GradientError):
            tape.gradient(y, x)
    np.testing.assert_allclose(tape.gradient(z, x), np.full(3, 5.0))


def test_a_tape_is_not_entered_twice():
    with gl.GradientTape() as tape, pytest.raises(StateError, match="recording already"), tape:
        pass
    assert active_tapes() == []


def test_nothing_is_recorded_after_the_block():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = v * v
    z = y * 2.0
    with pytest.raises(GradientError):
        tape.gradient(z, v)


# --- cotangents, unconnected sources ----------------------------------------------------------------------------------


def test_gradients_of_scalars_are_arrays_too():
    v, x = gl.Variable(3.0), np.array(2.0)
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        y = v * v * v + v * gl.ops.cast(t * t, "float32")
    for gradient in tape.gradient(y, [v, x]):
        assert type(gradient) is np.ndarray and gradient.shape == ()


def test_output_gradients_weigh_the_target():
    v = gl.Variable(X)
    weights = np.array([1.0, 10.0, 100.0])
    with gl.GradientTape() as tape:
        y = v * v
    np.testing.assert_allclose(tape.gradient(y, v, output_gradients=weights), 2 * X * weights)


def test_output_gradients_in_a_structure_with_none():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = [v * v, v * 3.0]
    np.testing.assert_allclose(tape.gradient(y, v, output_gradients=[None, np.full(3, 2.0)]), 2 * X + 6)


def test_output_gradients_of_another_shape_are_refused():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = v * v
    with pytest.raises(GradientError, match=r"\(3,\).*\(2,\)"):
        tape.gradient(y, v, output_gradients=np.ones(2))


def test_unconnected_sources():
    v, other = gl.Variable(X), gl.Variable(np.ones((2, 2)))
    x = X.copy()
    with gl.GradientTape(persistent=True) as tape:
        _ = other * 2.0
        tape.watch(x)
        y = v * 1.0
    assert tape.gradient(y, other) is None
    found = tape.gradient(y, [other, x], unconnected_gradients=gl.UnconnectedGradients.ZERO)
    np.testing.assert_array_equal(found[0], np.zeros((2, 2)))
    np.testing.assert_array_equal(found[1], np.zeros(3))


def test_gradients_through_integers_are_none():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        _ = v * 1.0
        y = gl.ops.cast(gl.ops.cast(v, "int32"), "float64") * 1.0
    with pytest.raises(GradientError):
        tape.gradient(y, v)


# --- second order -----------------------------------------------------------------------------------------------------


def test_nested_tapes_give_second_derivatives():
    x = X.copy()
    with gl.GradientTape() as outer:
        outer.watch(x)
        with gl.GradientTape() as inner:
            t = inner.watch(x)
            y = gl.ops.exp(t) * t
        slope = inner.gradient(y, x)
    assert isinstance(slope, RecordedTensor)
    np.testing.assert_allclose(outer.gradient(slope, x), np.exp(X) * (X + 2), rtol=1e-12)


def test_three_levels():
    v = gl.Variable(2.0, dtype="float64")
    with gl.GradientTape() as a, gl.GradientTape() as b:
        with gl.GradientTape() as c:
            y = v**4
        first = c.gradient(y, v)
        second = b.gradient(first, v)
    np.testing.assert_allclose(a.gradient(second, v), 24 * 2.0)


def test_second_order_through_a_variable_and_an_input():
    v, x = gl.Variable(X), X.copy() + 3
    with gl.GradientTape() as outer:
        with gl.GradientTape() as inner:
            t = inner.watch(x)
            y = gl.ops.tanh(t * v).sum()
        slope = inner.gradient(y, x)
        penalty = (slope * slope).sum()
    found = outer.gradient(penalty, v)

    def value(w):
        return float(np.sum(((1 - np.tanh(x * w) ** 2) * w) ** 2))

    step = 1e-6
    for i in range(3):
        shift = np.eye(3)[i] * step
        assert found[i] == pytest.approx((value(X + shift) - value(X - shift)) / (2 * step), rel=1e-5, abs=1e-8)


def test_an_inner_tape_that_does_not_watch_stays_out():
    x = X.copy()
    with gl.GradientTape() as outer:
        t = outer.watch(x)
        with gl.GradientTape() as inner:
            y = t * t
    with pytest.raises(GradientError):
        inner.gradient(y, x)
    np.testing.assert_allclose(outer.gradient(y, x), 2 * X)


# --- guards: nothing is lost in silence -------------------------------------------------------------------------------


def test_arithmetic_on_a_watched_plain_array_is_explained():
    x = X.copy()
    layer = Affine()
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = layer(x * 2.0)  # plain NumPy arithmetic: the tape cannot see it
    with pytest.raises(GradientError, match="reached no recorded operation.*tape.watch"):
        tape.gradient(y, x)


def test_a_source_that_was_never_watched_is_explained():
    layer, x = Affine(), X.copy()
    with gl.GradientTape() as tape:
        y = layer(x)
    with pytest.raises(GradientError, match="never watched.*tape.watch"):
        tape.gradient(y, x)


def test_the_array_itself_given_to_a_layer_is_recorded():
    layer, x = Affine(), X.copy()
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    np.testing.assert_allclose(tape.gradient(y, x), np.ones(3))


@pytest.mark.parametrize("convert", [np.asarray, np.array, lambda t: np.asarray(t, "float32")])
def test_numpy_conversion_of_a_recording_tensor_says_what_to_write(convert):
    with gl.GradientTape() as tape:
        t = tape.watch(X.copy())
        with pytest.raises(TypeError, match=r"gl\.ops.*t\.value"):
            convert(t)


def test_cupy_conversion_of_a_recording_tensor_says_what_to_write():
    with gl.GradientTape() as tape:
        t = tape.watch(X.copy())
        with pytest.raises(AttributeError, match=r"gl\.ops.*t\.value"):
            _ = t.__cuda_array_interface__
        assert not hasattr(t, "__cuda_array_interface__")
        with pytest.raises(TypeError, match=r"gl\.ops\.tanh.*t\.value"):
            t.__cupy_override_elementwise_kernel__(None, t)


def test_cupy_itself_refuses_a_recording_tensor():
    cupy = pytest.importorskip("cupy")
    with gl.GradientTape() as tape:
        t = tape.watch(X.copy())
        with pytest.raises(TypeError, match=r"gl\.ops\.tanh.*t\.value"):
            cupy.tanh(t)


def test_value_and_numpy_give_the_plain_contents():
    x = X.copy()
    with gl.GradientTape() as tape:
        t = tape.watch(x)
        assert t.value is x
        assert type(t.numpy()) is np.ndarray
    np.testing.assert_array_equal(t.numpy(), X)


def test_a_function_of_numpys_inside_a_layer_is_recorded():
    class Tanh(gl.keras.layers.Layer):
        def call(self, inputs):
            return np.tanh(inputs) + np.mean(inputs, axis=0)

    x = X.copy().astype("float32")
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = Tanh()(x)
    np.testing.assert_allclose(tape.gradient(y, x), 1 - np.tanh(X) ** 2 + 1, rtol=1e-5)


def test_a_residual_function_of_numpys_is_recorded():
    units, x = 3, np.array([[0.1, -0.4, 0.3]], "float32")
    cell = RNNCellResidualWrapper(GRUCell(units), residual_fn=lambda i, o: np.tanh(i) + o)
    state = [np.zeros((1, units), "float32")]
    cell(x, state)  # builds it
    cell.cell.set_weights([np.zeros_like(w) for w in cell.cell.get_weights()])  # the raw output is then 0
    with gl.GradientTape() as tape:
        tape.watch(x)
        y, _ = cell(x, state)
    np.testing.assert_allclose(tape.gradient(y, x), 1 - np.tanh(x) ** 2, rtol=1e-5)


def test_a_numpy_function_without_a_rule_is_an_error_not_a_silent_array():
    with gl.GradientTape() as tape:
        t = tape.watch(X.copy())
        with pytest.raises(TypeError, match=r"np\.nextafter.*gl\.ops"):
            np.nextafter(t, 1.0)
        with pytest.raises(TypeError, match=r"np\.unwrap.*gl\.ops"):
            np.unwrap(t)
        with pytest.raises(TypeError, match="out"):
            np.tanh(t, out=np.empty(3))
        with pytest.raises(TypeError, match=r"add\.reduce"):
            np.add.reduce(t)


@pytest.mark.parametrize("change", ["assign", "assign_add", "assign_sub", "writable"])
def test_a_variable_changed_before_gradient_is_noticed(change):
    v = gl.Variable(X, name="kernel")
    with gl.GradientTape() as tape:
        y = v * v
    if change == "writable":
        v.writable()[...] = 0.0  # as optimizers update in place
    else:
        getattr(v, change)(np.ones(3))
    with pytest.raises(GradientError, match=r"'kernel:0' was changed"):
        tape.gradient(y, v)


def test_a_changed_variable_whose_value_no_rule_needs_does_not_matter():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = (v + 1.0).sum()
    v.assign(np.zeros(3))
    np.testing.assert_array_equal(tape.gradient(y, v), np.ones(3))


def test_a_variable_assigned_inside_the_tape_has_the_gradient_of_each_of_its_values():
    v = gl.Variable(2.0, dtype="float64")
    with gl.GradientTape() as tape:
        a = v + 0.0
        v.assign(5.0)
        b = v + 0.0
        y = a * b
    assert float(y) == 10.0
    assert float(tape.gradient(y, v)) == 7.0  # d(ab) by each reading, summed


# --- nested structures as layer arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x, e: ((x, e), {}),
        lambda x, e: ((x, [e]), {}),
        lambda x, e: ((x, {"deep": (e,)}), {}),
        lambda x, e: (([x], e), {}),
        lambda x, e: (({"x": x},), {"more": e}),
        lambda x, e: (((x,),), {"more": {"a": [e]}}),
    ],
)
def test_watched_arrays_are_recorded_in_any_argument_of_a_layer(arrange):
    x, extra = X.copy(), X.copy() + 2
    layer = Affine()
    arguments, keywords = arrange(x, extra)
    with gl.GradientTape() as tape:
        tape.watch([x, extra])
        y = layer(*arguments, **keywords)
    slope_x, slope_extra = tape.gradient(y, [x, extra])
    np.testing.assert_allclose(slope_x, np.ones(3))
    np.testing.assert_allclose(slope_extra, 2 * extra)


# --- how a tensor behaves ---------------------------------------------------------------------------------------------


@pytest.fixture
def t():
    with gl.GradientTape() as tape:
        yield tape.watch(X.copy())


def test_tensors_hash_by_identity_and_compare_by_element(t):
    other = t + 0.0
    assert len({t, other, t}) == 2
    assert {t: 1}[t] == 1
    np.testing.assert_array_equal((t == other), [True, True, True])
    np.testing.assert_array_equal((t != 0.5), [False, True, True])
    np.testing.assert_array_equal((t < 1.0), X < 1)


def test_zero_plus_a_tensor_so_that_sum_works(t):
    np.testing.assert_array_equal((0 + t).value, X)
    np.testing.assert_array_equal(sum([t, t]).value, 2 * X)


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, t: a + t,
        lambda a, t: a - t,
        lambda a, t: a * t,
        lambda a, t: a / t,
        lambda a, t: a**2 @ t,
        lambda a, t: np.maximum(a, t),
        lambda a, t: np.concatenate([a, t]),
        lambda a, t: np.where(a > 0, t, a),
        lambda a, t: np.float64(2.0) * t,
    ],
)
def test_a_numpy_array_on_the_left_gives_a_tensor(t, compute):
    a = np.array([2.0, -1.0, 4.0])
    result = compute(a, t)
    assert isinstance(result, RecordedTensor)
    np.testing.assert_allclose(result.value, compute(a, X))


def test_indexing_iterating_length_and_methods(t):
    np.testing.assert_array_equal(t[1:].value, X[1:])
    np.testing.assert_array_equal([float(e) for e in t], X)
    assert len(t) == 3 and t.ndim == 1 and t.size == 3 and t.shape == (3,) and t.dtype == np.float64
    assert float(t.sum()) == X.sum() and float(t.mean()) == X.mean()
    np.testing.assert_array_equal(t.reshape(3, 1).T.value, X[None])
    assert t.astype("float32").dtype == np.float32


def test_numpys_questions_about_shape(t):
    assert np.shape(t) == (3,) and np.ndim(t) == 1 and int(np.size(t)) == 3
    np.testing.assert_array_equal(gl.asnumpy(np.zeros_like(t)), np.zeros(3))


def test_a_tensor_is_not_changed_in_place(t):
    with pytest.raises(TypeError, match=r"in place.*gl\.where"):
        t[0] = 1.0
    before = t
    t += 1.0
    assert t is not before
    np.testing.assert_array_equal(before.value, X)


def test_a_scalar_tensor_is_a_number():
    with gl.GradientTape() as tape:
        s = tape.watch(np.array(2.0))
        assert float(s) == 2.0 and int(s) == 2 and bool(s) and s.item() == 2.0
        with pytest.raises(TypeError, match="length"):
            len(s)
        with pytest.raises(TypeError, match="iterate"):
            iter(s)


# --- variables under a tape -------------------------------------------------------------------------------------------


def test_a_variable_does_not_become_an_array_under_a_tape():
    v = gl.Variable(X, name="v")
    np.testing.assert_array_equal(np.asarray(v), X)
    with gl.GradientTape(), pytest.raises(StateError, match=r"v:0.*lose the recording.*variable\.value"):
        np.asarray(v)


def test_a_partitioned_variable_as_source_is_explained():
    v = gl.get_variable("cut_source", (4,), initializer="ones", partitioner=gl.fixed_size_partitioner(2))
    with gl.GradientTape(persistent=True) as tape:
        y = v * v
    with pytest.raises(GradientError, match=r"list\(variable\)"):
        tape.gradient(y, v)
    np.testing.assert_array_equal(np.concatenate(tape.gradient(y, list(v))), np.full(4, 2.0))


def test_a_variable_in_numpys_functions_is_recorded_under_a_tape():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = np.array([1.0, 2.0, 3.0]) * np.tanh(v)
    np.testing.assert_allclose(tape.gradient(y, v), np.array([1.0, 2.0, 3.0]) * (1 - np.tanh(X) ** 2))


def test_a_value_read_outside_the_tape_is_a_constant():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = v.value * v
    np.testing.assert_allclose(tape.gradient(y, v), X)


# --- custom gradients -------------------------------------------------------------------------------------------------


@gl.custom_gradient
def clipped(x):
    return gl.ops.identity(x), lambda g: gl.ops.clip(g, -1.0, 1.0)


@gl.custom_gradient
def two_results(x, y):
    return (x * y, x + y), lambda ga, gb: (ga * 100.0, gb * 1000.0)


def test_custom_gradient_eagerly_gives_arrays():
    assert type(clipped(X)) is np.ndarray
    np.testing.assert_array_equal(clipped(X), X)
    product, total = two_results(X, X)
    np.testing.assert_array_equal(product, X * X)
    np.testing.assert_array_equal(total, X + X)


def test_custom_gradient_under_a_tape():
    x = X.copy()
    with gl.GradientTape() as tape:
        y = clipped(tape.watch(x)) * np.array([5.0, -7.0, 0.5])
    np.testing.assert_array_equal(tape.gradient(y, x), [1.0, -1.0, 0.5])


def test_custom_gradient_of_an_array_known_by_identity_and_of_a_variable():
    x, v = X.copy(), gl.Variable(X)
    with gl.GradientTape() as tape:
        tape.watch(x)
        a, b = two_results(x, v)
        y = a + b
    slope_x, slope_v = tape.gradient(y, [x, v])
    np.testing.assert_array_equal(slope_x, np.full(3, 100.0))
    np.testing.assert_array_equal(slope_v, np.full(3, 1000.0))


def test_custom_gradient_when_only_one_result_is_used():
    x, v = X.copy(), gl.Variable(X)
    with gl.GradientTape() as tape:
        _, b = two_results(tape.watch(x), v)
    slope_x, slope_v = tape.gradient(b, [x, v])
    np.testing.assert_array_equal(slope_x, np.zeros(3))
    np.testing.assert_array_equal(slope_v, np.full(3, 1000.0))


def test_custom_gradient_in_a_graph():
    with gl.Graph().as_default(), gl.Session() as session:
        x = gl.placeholder(gl.float64, (3,))
        y = clipped(x) * np.array([5.0, -7.0, 0.5])
        [slope] = gl.gradients(y, x)
        value, gradient = session.run([y, slope], {x: X})
    np.testing.assert_array_equal(value, X * np.array([5.0, -7.0, 0.5]))
    np.testing.assert_array_equal(gradient, [1.0, -1.0, 0.5])


def test_custom_gradient_inside_a_function():
    @gl.function
    def doubled(x):
        return clipped(x) * 2.0

    x = X.copy()
    with gl.GradientTape() as tape:
        y = doubled(tape.watch(x))
    np.testing.assert_array_equal(tape.gradient(y, x), np.ones(3))


def test_stop_gradient():
    v = gl.Variable(X)
    with gl.GradientTape() as tape:
        y = gl.stop_gradient(v * v) * v
    np.testing.assert_allclose(tape.gradient(y, v), X**2)
