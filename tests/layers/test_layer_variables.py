"""Layer: its variables, the lists it keeps of them, and how they are made; both families, eager and graph."""

import numpy as np
import pytest

import gpulayers as gl

X = np.ones((2, 3), "float32")
FAMILIES = pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer], ids=["legacy", "modern"])


@pytest.fixture(params=["eager", "graph"])
def in_mode(request):
    if request.param == "eager":
        yield
        return
    with gl.Graph().as_default():
        yield


def four(base, **keywords):
    """Return a layer with variables a (fixed), b, c (trainable), d (fixed), made in this order."""

    class Four(base):
        def build(self, input_shape):
            self.a = self.add_weight("a", (2, 3), trainable=False)
            self.b = self.add_weight("b", (2, 3))
            self.c = self.add_weight("c", (4,))
            self.d = self.add_weight("d", (), trainable=False)
            self.built = True

    layer = Four(**keywords)
    layer.build((None, 3))
    return layer


def short(variables):
    return "".join(v.name.rpartition("/")[2][0] for v in variables)


# --- lists ------------------------------------------------------------------------------------------------------------


@FAMILIES
def test_lists_and_their_aliases(in_mode, base):
    layer = four(base)
    assert short(layer.trainable_weights) == short(layer.trainable_variables) == "bc"
    assert short(layer.non_trainable_weights) == short(layer.non_trainable_variables) == "ad"
    assert short(layer.weights) == short(layer.variables) == "bcad"


@FAMILIES
def test_toggling_trainable_moves_and_restores(in_mode, base):
    layer = four(base)
    layer.trainable = False
    assert not layer.trainable and layer.trainable_weights == []
    assert short(layer.non_trainable_weights) == short(layer.weights) == "bcad"
    assert layer.b.trainable
    layer.trainable = True
    assert short(layer.trainable_weights) == "bc" and short(layer.non_trainable_weights) == "ad"


def test_the_collection_does_not_follow_the_toggle():
    with gl.Graph().as_default():
        layer = four(gl.layers.Layer)
        layer.trainable = False
        assert gl.trainable_variables() == [layer.b, layer.c]


def test_a_legacy_layer_that_is_not_trainable_from_the_start(in_mode):
    layer = four(gl.layers.Layer, trainable=False)
    assert short(layer.non_trainable_weights) == "abcd" and not any(v.trainable for v in layer.weights)
    assert gl.trainable_variables() == []
    layer.trainable = True
    assert layer.trainable_weights == [] and short(layer.weights) == "abcd"


def test_a_legacy_layer_that_is_not_trainable_shares_variables_as_not_trainable():
    with gl.Graph().as_default():
        maker = four(gl.layers.Layer, name="shared")
        user = four(gl.layers.Layer, name="shared", _reuse=True, trainable=False)
        user.trainable = True
        assert user.trainable_weights == [] and short(user.non_trainable_weights) == "abcd"
        assert user.weights[1] is maker.b and short(maker.trainable_weights) == "bc"


def test_a_modern_layer_that_is_not_trainable_from_the_start_can_become_so(in_mode):
    layer = four(gl.keras.layers.Layer, trainable=False)
    assert layer.trainable_weights == [] and short(layer.non_trainable_weights) == "bcad"
    layer.trainable = True
    assert short(layer.trainable_weights) == "bc" and short(layer.non_trainable_weights) == "ad"


def test_a_custom_getter_that_overrides_trainable_moves_the_variable():
    def getter(getter, name, *arguments, **keywords):
        return getter(name, *arguments, **{**keywords, "trainable": name.endswith("c")})

    with gl.Graph().as_default(), gl.variable_scope("s", custom_getter=getter):
        layer = four(gl.layers.Layer)
        assert short(layer.trainable_weights) == "c" and short(layer.non_trainable_weights) == "abd"


def test_legacy_layers_do_not_track_sub_layers_but_list_them_as_submodules():
    outer, inner = gl.layers.Layer(), four(gl.layers.Layer)
    outer.inner = inner
    assert outer.weights == [] and outer.submodules == (inner,)


def test_modern_layers_track_sub_layers_in_the_order_of_assignment():
    outer = four(gl.keras.layers.Layer)
    outer.second, outer.first = gl.keras.layers.Dense(1, name="x"), [gl.keras.layers.Dense(1, name="y")]
    for layer in (outer.second, *outer.first):
        layer.build((None, 2))
    own, second, first = outer._weight_book, outer.second.weights, outer.first[0].weights
    assert [id(v) for v in outer.weights] == [id(v) for v in [*own.trainable, *second, *first, *own.non_trainable]]
    outer.second.trainable = False
    assert [id(v) for v in outer.non_trainable_weights] == [id(v) for v in [*own.non_trainable, *second]]
    outer.trainable = False
    assert not outer.first[0].trainable and outer.trainable_weights == []
    outer.trainable = True
    assert outer.second.trainable and len(outer.trainable_weights) == 6


def test_variables_as_attributes_of_a_modern_layer_are_tracked():
    layer = gl.keras.layers.Layer()
    layer.v, layer.w = gl.Variable(1.0), [gl.Variable(2.0, trainable=False)]
    assert [id(v) for v in layer.weights] == [id(layer.v), id(layer.w[0])]
    assert len(layer.trainable_weights) == 1


@FAMILIES
def test_a_variable_is_listed_once(base):
    class Twice(base):
        def build(self, input_shape):
            self.a = self.b = self.add_weight("a", ())

    layer = Twice()
    layer(X)
    assert len(layer.weights) == 1


@FAMILIES
def test_count_params(in_mode, base):
    layer = four(base)
    assert layer.count_params() == 6 + 6 + 4 + 1
    unbuilt = base(name="odd_one")
    with pytest.raises(ValueError, match="^You tried to call `count_params` on odd_one, but the layer isn't built"):
        unbuilt.count_params()


@FAMILIES
def test_get_and_set_weights(base):
    assert base().get_weights() == []
    layer = four(base)
    values = [np.full(v.shape, i + 1.0) for i, v in enumerate(layer.weights)]
    layer.set_weights(values)
    found = layer.get_weights()
    for value, expected in zip(found, values, strict=True):
        assert type(value) is np.ndarray and value.dtype == np.float32
        np.testing.assert_array_equal(value, expected)
    assert float(layer.a.numpy()[0, 0]) == 3.0  # weights order: b, c, a, d
    with pytest.raises(ValueError, match="length 2.*expecting 4"):
        layer.set_weights(values[:2])
    wrong = [np.zeros((3, 3)), *[0 * v for v in values[1:]]]
    with pytest.raises(ValueError, match=r"Layer weight shape \(2, 3\) not compatible.*weight shape \(3, 3\)"):
        layer.set_weights(wrong)
    for value, expected in zip(layer.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, expected)


# --- add_variable, add_weight -----------------------------------------------------------------------------------------


@FAMILIES
def test_positional_order_of_add_variable(in_mode, base):
    layer = base()
    v = layer.add_variable("v", (2,), "float64", "ones", None, False, gl.constraints.NonNeg(), None)
    assert v.dtype == np.float64 and not v.trainable and isinstance(v.constraint, gl.constraints.NonNeg)


@FAMILIES
@pytest.mark.parametrize(("shape", "expected"), [(None, ()), (4, (4,)), ((2, 3), (2, 3)), ([2], (2,)), ((), ())])
def test_kinds_of_shape(base, shape, expected):
    assert tuple(base().add_weight("v", shape).shape) == expected


@FAMILIES
def test_a_shape_that_is_not_fully_known(base):
    with pytest.raises(ValueError, match="fully defined"):
        base().add_weight("v", (None, 2))


def test_legacy_name_and_shape_are_required():
    with pytest.raises(TypeError):
        gl.layers.Layer().add_variable("v")
    with pytest.raises(TypeError):
        gl.layers.Layer().add_variable(shape=(2,))
    with pytest.raises(TypeError):
        gl.layers.Layer().add_weight("v")
    with pytest.raises(TypeError):
        gl.layers.Layer().add_weight(shape=(2,))


def test_a_name_that_is_not_legal_in_a_graph():
    with gl.Graph().as_default(), pytest.raises(ValueError, match="not a valid scope name"):
        gl.layers.Layer().add_variable("a b", (2,))


@FAMILIES
def test_other_keywords_are_a_type_error_with_these_arguments(base):
    with pytest.raises(TypeError) as caught:
        base().add_weight("v", (), colour="red")
    assert caught.value.args == ("Unknown keyword argument:", "colour")
    base().add_weight("w", (), use_resource=True, aggregation=None, synchronization=None, experimental_autocast=False)


def test_dtype_of_a_variable():
    layer = gl.layers.Layer()
    assert layer.add_variable("v", (), "float64").dtype == np.float64
    assert layer.dtype == "float64"
    assert layer.add_variable("w", ()).dtype == np.float64
    assert gl.layers.Layer().add_variable("v", ()).dtype == np.float32
    assert gl.layers.Layer(dtype="float16").add_variable("v", ()).dtype == np.float16
    modern = gl.keras.layers.Layer()
    assert modern.add_weight("v", (), "float64").dtype == np.float64 and modern.dtype == "float32"


@FAMILIES
@pytest.mark.parametrize(
    "initializer",
    ["ones", {"class_name": "Ones", "config": {}}, gl.ones_initializer(), lambda shape, dtype: np.ones(shape, dtype)],
)
def test_kinds_of_initializer(base, initializer):
    v = base().add_weight("v", (2,), initializer=initializer)
    np.testing.assert_array_equal(v.numpy(), [1.0, 1.0])


@FAMILIES
def test_an_array_is_no_initializer(in_mode, base):
    for value in (np.ones(2), gl.ops.identity(np.ones(2))):
        with pytest.raises(ValueError, match="Could not interpret initializer identifier"):
            base().add_weight("v", (2,), initializer=value)


@FAMILIES
def test_a_callable_that_takes_no_shape_is_a_type_error(in_mode, base):
    with pytest.raises(TypeError):
        base().add_weight("v", (2,), initializer=lambda: np.ones(2))


@FAMILIES
def test_the_default_initializer(base):
    layer = base()
    kernel = layer.add_weight("k", (300, 200)).numpy()
    limit = np.sqrt(6 / 500)
    assert np.abs(kernel).max() <= limit and kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.02)
    for dtype in ("int32", "bool", "int8"):
        assert not layer.add_weight(f"v_{dtype}", (2,), dtype).numpy().any()
    with pytest.raises(ValueError, match="complex64"):
        layer.add_weight("c", (2,), "complex64")


def test_the_scopes_initializer_comes_before_the_default():
    with gl.variable_scope("with_default_initializer", initializer=gl.constant_initializer(7.0)):
        v = gl.layers.Layer().add_variable("v", (2,))
        w = gl.layers.Layer().add_variable("w", (2,), initializer="ones")
    np.testing.assert_array_equal(v.numpy(), [7.0, 7.0])
    np.testing.assert_array_equal(w.numpy(), [1.0, 1.0])


@FAMILIES
def test_a_regularizer_adds_one_unconditional_loss(in_mode, base):
    layer = base()
    v = layer.add_weight("v", (3,), initializer="ones", regularizer=gl.regularizers.l2(0.5))
    assert len(layer.losses) == 1
    if gl.executing_eagerly():
        assert float(layer.losses[0]) == pytest.approx(1.5)
        v.assign([2.0, 0.0, 0.0])
        assert float(layer.losses[0]) == pytest.approx(2.0)
        with gl.GradientTape() as tape:
            loss = layer.losses[0]
        np.testing.assert_allclose(tape.gradient(loss, v), [2.0, 0.0, 0.0])
    else:
        assert len(layer.get_losses_for(None)) == 1 and layer.get_losses_for(gl.ops.identity(1.0)) == []
        with gl.Session() as session:
            session.run(gl.global_variables_initializer())
            assert session.run(layer.losses[0]) == pytest.approx(1.5)


def test_a_shared_variable_is_not_regularized_again():
    def layer(**keywords):
        made = gl.layers.Layer(name="shared", **keywords)
        made.add_variable("w", (2,), regularizer="l2")
        return made

    with gl.Graph().as_default():
        first, second = layer(), layer(_reuse=True)
        assert first.weights == second.weights
        assert (len(first.losses), len(second.losses)) == (1, 0)
        assert len(gl.get_collection(gl.GraphKeys.REGULARIZATION_LOSSES)) == 1


def test_a_partitioned_variable_is_regularized_part_by_part():
    with gl.Graph().as_default():
        layer = gl.layers.Layer()
        v = layer.add_variable("v", (5, 2), regularizer="l2", partitioner=gl.fixed_size_partitioner(3))
        assert isinstance(v, gl.PartitionedVariable)
        assert len(layer.losses) == len(layer.weights) == 3 == len(gl.trainable_variables())
        layer.built = True
        assert layer.count_params() == 10


def test_a_scope_regularizer_enters_the_collection_and_not_the_layer():
    with gl.Graph().as_default(), gl.variable_scope("s", regularizer=gl.regularizers.l2(0.1)):
        layer = gl.layers.Dense(2)
        layer(gl.placeholder(gl.float32, (None, 3)))
        assert layer.losses == []
        assert len(gl.get_collection(gl.GraphKeys.REGULARIZATION_LOSSES)) == 2


def test_a_scope_partitioner_applies_to_a_layers_variables_and_gradients_flow():
    x = np.arange(6.0).reshape(2, 3)
    with gl.Graph().as_default(), gl.Session() as session:
        with gl.variable_scope("s", partitioner=gl.fixed_size_partitioner(2)):
            layer = gl.layers.Dense(2, use_bias=False, kernel_initializer="ones")
            y = layer(gl.asarray(x))
        assert [v.name for v in layer.weights] == ["s/dense/kernel/part_0:0", "s/dense/kernel/part_1:0"]
        slopes = gl.gradients(y, layer.weights)
        session.run(gl.global_variables_initializer())
        np.testing.assert_allclose(session.run(y), x.sum(1, keepdims=True).repeat(2, 1))
        np.testing.assert_allclose(np.concatenate(session.run(slopes)), x.sum(0)[:, None].repeat(2, 1))


def test_a_partitioner_in_a_modern_layer():
    v = gl.keras.layers.Layer().add_weight("v", (5, 2), partitioner=gl.fixed_size_partitioner(2))
    assert isinstance(v, gl.PartitionedVariable) and [p.shape for p in v] == [(3, 2), (2, 2)]


def test_a_layers_partitioner_error():
    with pytest.raises(ValueError, match="partitioner"):
        gl.layers.Layer().add_variable("v", (4, 4), partitioner=lambda **_: [2, 2])


@FAMILIES
def test_a_constraint_is_applied_by_the_optimizer_only(base):
    layer = base()
    v = layer.add_weight("v", (1,), initializer=gl.constant_initializer(-1.0), constraint="non_neg")
    assert float(v.numpy()[0]) == -1.0
    with gl.GradientTape() as tape:
        y = v * 1.0
    gl.optimizers.SGD(0.1).apply_gradients([(tape.gradient(y, v), v)])
    assert float(v.numpy()[0]) == 0.0


@pytest.mark.parametrize("value", ["ON_READ", "on_read"])
@FAMILIES
def test_synchronization_on_read(base, value):
    v = base().add_weight("v", (), synchronization=value)
    assert not v.trainable
    with pytest.raises(ValueError, match="ON_READ"):
        base().add_weight("v", (), synchronization=value, trainable=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((2, 4), None, r"Trying to share variable s/w, but specified shape \(2, 4\) and found shape \(2, 3\)"),
        ((2, 3), "float64", "Trying to share variable s/w, but specified dtype float64"),
    ],
)
def test_a_shared_variable_of_another_kind_is_refused(shape, dtype, text):
    with gl.Graph().as_default():
        gl.layers.Layer(name="s").add_variable("w", (2, 3))
        with pytest.raises(ValueError, match=text):
            gl.layers.Layer(name="s", _reuse=True).add_variable("w", shape, dtype)


def test_the_scope_may_forbid_training():
    def frozen(getter, name, *arguments, **keywords):
        return getter(name, *arguments, **{**keywords, "trainable": False})

    with gl.Graph().as_default(), gl.variable_scope("s", custom_getter=frozen):
        layer = gl.layers.Dense(2)
        layer(gl.placeholder(gl.float32, (None, 3)))
        assert layer.trainable_weights == [] and gl.trainable_variables() == []
