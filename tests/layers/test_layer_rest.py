"""Layer: dtypes and policies, copies, configurations, metrics, dynamic layers, submodules, output shapes."""

import copy

import numpy as np
import pytest

import gpulayers as gl

X = np.ones((2, 3), "float32")
FAMILIES = pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer], ids=["legacy", "modern"])
BOTH = pytest.mark.parametrize("family", [gl.layers, gl.keras.layers], ids=["legacy", "modern"])


class Probe:
    """Mixed in: remembers the dtypes that `call` saw, of inputs and variables."""

    def build(self, input_shape):
        self.w = self.add_weight("w", (3,), initializer="ones")
        self.plain = self.add_weight("plain", (3,), initializer="ones", experimental_autocast=False)
        self.whole = self.add_weight("whole", (), "int32", trainable=False)

    def call(self, inputs, other=None):
        first = inputs[0] if isinstance(inputs, list) else inputs
        self.seen = [v.dtype for v in (first, self.w, self.w * 1, self.plain * 1, self.whole)]
        self.other = None if other is None else other.dtype
        return first * self.w if first.dtype.kind == "f" else first


class LegacyProbe(Probe, gl.layers.Layer):
    """Legacy."""


class ModernProbe(Probe, gl.keras.layers.Layer):
    """Modern."""


# --- dtype and policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_legacy_layer_takes_the_dtype_of_its_first_input(dtype):
    layer = LegacyProbe()
    y = layer(X.astype(dtype))
    assert layer.dtype == layer.compute_dtype == dtype and layer.dtype_policy.name == dtype
    assert layer.w.dtype == dtype and y.dtype == dtype
    assert layer(X.astype("float64")).dtype == np.float64  # later inputs are not cast


def test_an_integer_first_input_makes_a_legacy_layer_integer():
    layer = gl.layers.Layer()
    layer(np.ones(2, "int32"))
    assert layer.dtype == "int32"


def test_a_legacy_layer_of_given_dtype_does_not_cast_its_inputs():
    layer = LegacyProbe(dtype="float16")
    layer(X)
    assert layer.w.dtype == np.float16 and layer.seen[0] == np.float32


def test_a_legacy_layer_with_autocast_casts():
    layer = LegacyProbe(dtype="float16", autocast=True)
    assert layer(X).dtype == np.float16 and layer.seen[0] == np.float16


def test_a_modern_layer_casts_the_first_argument_only():
    layer = ModernProbe()
    other = X.astype("float64")
    assert layer(X.astype("float64"), other=other).dtype == np.float32
    assert layer.seen[0] == np.float32 and layer.other == np.float64
    assert ModernProbe()(np.ones((2, 3), "int32")).dtype == np.int32
    assert ModernProbe(autocast=False)(X.astype("float64")).dtype == np.float64
    layer([X.astype("float64"), other])
    assert layer.seen[0] == np.float32


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_policies(policy, symbolic):
    if "b" in policy:
        pytest.importorskip("ml_dtypes")
    short = policy.removeprefix("mixed_")
    layer = ModernProbe(dtype=policy)
    assert (layer.dtype, layer.variable_dtype, layer.compute_dtype) == ("float32", "float32", short)
    if symbolic:
        y = layer(gl.keras.Input((3,)))
    else:
        y = layer(X)
    assert [str(d) for d in layer.seen] == [short, short, short, "float32", "int32"]
    assert str(y.dtype) == short
    assert layer.w.value.dtype == np.float32 and layer.w.dtype == np.float32


def test_gradients_of_mixed_variables_are_in_their_own_dtype():
    layer = ModernProbe(dtype="mixed_float16")
    layer.build((2, 3))
    with gl.GradientTape() as tape:
        y = layer(X)
    assert y.dtype == np.float16
    gradient = tape.gradient(y, layer.w)
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, [2.0, 2.0, 2.0])


def test_an_inner_layer_has_its_own_policy():
    class Outer(gl.keras.layers.Layer):
        def __init__(self):
            super().__init__(dtype="mixed_float16")
            self.inner = ModernProbe(dtype="float32")

        def call(self, inputs):
            return self.inner(inputs)

    layer = Outer()
    assert layer(X).dtype == np.float32 and layer.inner.seen[1] == np.float32


def test_the_global_policy_is_taken_by_modern_layers_only():
    gl.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        assert gl.keras.layers.Layer().compute_dtype == "float16"
        assert gl.layers.Layer().dtype is None
    finally:
        gl.keras.mixed_precision.set_global_policy("float32")


# --- copies -----------------------------------------------------------------------------------------------------------


@BOTH
def test_deepcopy_of_a_built_layer(family):
    layer = family.BatchNormalization(name="original", momentum=0.5, gamma_regularizer="l2")
    layer(X, training=True)
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and twin is not layer and twin.name == "original"
    assert twin.variables[0] is twin.gamma and twin.gamma is not layer.gamma
    assert [v.name for v in twin.variables] == [v.name for v in layer.variables]
    for mine, theirs in zip(twin.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    twin.gamma.assign([5.0, 5.0, 5.0])
    twin(X * 3, training=True)
    np.testing.assert_array_equal(layer.gamma.numpy(), np.ones(3))
    np.testing.assert_allclose(layer.moving_mean.numpy(), np.full(3, 0.5))
    np.testing.assert_allclose(twin.moving_mean.numpy(), np.full(3, 1.75))
    layer.gamma.assign([2.0, 0.0, 0.0])  # each layer's regularizer looks at its own variable
    assert [float(v) for v in twin.losses] == [pytest.approx(0.75)]
    assert [float(v) for v in layer.losses] == [pytest.approx(0.04)]
    if family is gl.layers:
        assert twin.scope_name == layer.scope_name


@FAMILIES
def test_deepcopy_runs_no_constructor_registers_first_and_shares_tensors(base):
    constructed = []

    class Own(base):
        def __init__(self, needed):
            super().__init__()
            constructed.append(1)
            self.itself, self.settings = self, {"deep": [needed]}

    layer = Own(3)
    with gl.GradientTape() as tape:
        layer.tensor = tape.watch(X.copy())
        layer.tensors = [layer.tensor, layer.tensor * 2.0]
        memo = {}
        twin = copy.deepcopy(layer, memo)
    assert constructed == [1] and memo[id(layer)] is twin and twin.itself is twin
    assert twin.tensor is layer.tensor and twin.tensors is layer.tensors
    assert twin.settings == layer.settings and twin.settings is not layer.settings


@BOTH
def test_deepcopy_in_a_graph(family):
    with gl.Graph().as_default():
        layer = family.Dense(2, name="d")
        twin = copy.deepcopy(layer)
        assert twin.name == "d" and not twin.built
        layer(gl.placeholder(gl.float32, (None, 3)))
        with pytest.raises(NotImplementedError):
            copy.deepcopy(layer)
        twin(gl.placeholder(gl.float32, (None, 3)))
        assert twin.kernel is not layer.kernel


# --- configuration ----------------------------------------------------------------------------------------------------


@FAMILIES
def test_base_config(base):
    layer = base(name="a", trainable=False)
    assert layer.get_config() == {
        "name": "a",
        "trainable": False,
        "dtype": None if base is gl.layers.Layer else "float32",
    }
    layer = base(name="b", dtype="float64", input_shape=(3,), dynamic=True)
    expected = {"name": "b", "trainable": True, "dtype": "float64", "batch_input_shape": (None, 3), "dynamic": True}
    assert layer.get_config() == expected
    again = base.from_config(expected)
    assert again.get_config() == expected and not again.built


@FAMILIES
def test_a_subclass_with_arguments_must_say_its_config(base):
    class Own(base):
        def __init__(self, units, **keywords):
            super().__init__(**keywords)
            self.units = units

    with pytest.raises(NotImplementedError, match="Layers with arguments in `__init__` must override `get_config`"):
        Own(3).get_config()

    class Said(Own):
        def get_config(self):
            return {**base.get_config(self), "units": self.units}

    assert Said.from_config(Said(3, name="s").get_config()).units == 3


@FAMILIES
def test_the_activity_regularizer_is_in_a_config_that_nobody_overrides(base):
    config = base(activity_regularizer=gl.regularizers.L2(0.25)).get_config()
    assert config["activity_regularizer"]["config"] == {"l2": 0.25}
    twin = base.from_config(config)
    assert twin.get_config() == config
    np.testing.assert_allclose(twin.activity_regularizer(np.ones(4, "float32")), 1.0)


# --- metrics ----------------------------------------------------------------------------------------------------------


class Measuring(gl.keras.layers.Layer):
    """Follows the mean of its inputs."""

    def call(self, inputs):
        self.add_metric(gl.reduce_mean(inputs), name="level")
        return inputs * 1.0


def test_a_metric_accumulates_over_eager_calls():
    layer = Measuring()
    layer(X * 2)
    layer(X * 4)
    assert [m.name for m in layer.metrics] == ["level"]
    assert float(layer.metrics[0].result()) == 3.0


def test_metrics_of_children_come_after_the_own():
    class Outer(gl.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Measuring()

        def call(self, inputs):
            self.add_metric(gl.reduce_max(inputs), name="top", aggregation="mean")
            return self.inner(inputs)

    layer = Outer()
    layer(X)
    assert [m.name for m in layer.metrics] == ["top", "level"]


@FAMILIES
def test_metric_errors(base):
    layer = base()
    with pytest.raises(ValueError, match="Please provide a name for your metric"):
        layer.add_metric(gl.asarray(1.0))
    with pytest.raises(ValueError, match="Expected a symbolic Tensor for the metric value"):
        layer.add_metric(gl.asarray(1.0), name="m")
    with pytest.raises(ValueError, match="aggregation"):
        layer.add_metric(gl.asarray(1.0), name="m", aggregation="sum")


def test_metrics_on_input_tensors_are_two_means():
    x = gl.keras.Input((3,))
    layer = gl.keras.layers.Dense(2, kernel_initializer="ones", name="dense_of_metrics")
    y = layer(x)
    layer.add_metric(gl.reduce_max(y), name="max")
    layer.add_metric(gl.reduce_min(y), name="min")
    assert [m.name for m in layer.metrics] == ["max", "min"]
    model = gl.keras.Model(x, y)
    assert [m.name for m in model.metrics] == ["max", "min"]


# --- dynamic, submodules, name scope ----------------------------------------------------------------------------------


def test_a_dynamic_layer_on_a_symbolic_input_needs_its_own_output_shape():
    class Dynamic(gl.keras.layers.Layer):
        def call(self, inputs):
            return inputs * 1.0

    layer = Dynamic(dynamic=True)
    assert layer.dynamic
    np.testing.assert_array_equal(layer(X), X)
    with pytest.raises(NotImplementedError, match="compute_output_shape"):
        Dynamic(dynamic=True)(gl.keras.Input((3,)))

    class Shaped(Dynamic):
        def compute_output_shape(self, input_shape):
            return input_shape

    assert Shaped(dynamic=True)(gl.keras.Input((3,))).shape == (None, 3)


@FAMILIES
def test_submodules_at_any_depth(base):
    class Named(base):
        pass

    leaf, middle, top = Named(name="leaf"), Named(name="middle"), Named(name="top")
    middle.inner = [leaf]
    top.inner = {"a": middle, "itself": top}
    assert {m.name for m in top.submodules} == {"middle", "leaf"}
    assert leaf.submodules == ()


@FAMILIES
def test_name_scope_is_a_method(base):
    assert base(name="abc").name_scope() == "abc/"


# --- output shapes ----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("shape", [(None, 3), [None, 3], gl.TensorShape((None, 3))])
def test_output_shape_of_a_layer_that_does_not_say_it(base, shape):
    class Doubled(base):
        def build(self, input_shape):
            self.w = self.add_weight("w", (input_shape[-1], 7))

        def call(self, inputs):
            return gl.matmul(inputs, self.w)

    layer = Doubled()
    found = layer.compute_output_shape(shape)
    assert isinstance(found, gl.TensorShape) and found == (None, 7)
    assert base().compute_output_shape(shape) == (None, 3)


@BOTH
def test_dense_rules(family):
    dense = family.Dense(3)
    assert dense.compute_output_shape((None, 4)) == (None, 3)
    assert dense.compute_output_shape((2, 5, 4)) == (2, 5, 3)
    with pytest.raises(ValueError):
        dense.compute_output_shape((4, None))
    with pytest.raises(TypeError):
        dense.compute_output_shape("abc")
    with pytest.raises(ValueError, match="expected min_ndim=2, found ndim=1"):
        family.Dense(3)(np.ones(4, "float32"))
    if family is gl.layers:  # the dtype of the first input is the layer's
        with pytest.raises(TypeError):
            family.Dense(3)(np.ones((2, 4), "int32"))
    assert family.Dense(3)(np.ones((2, 5, 4), "float32")).shape == (2, 5, 3)
    with gl.Graph().as_default(), pytest.raises(ValueError, match="last dimension"):
        family.Dense(3)(gl.placeholder(gl.float32, (None, None)))
