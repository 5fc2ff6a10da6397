"""Layer: recorded calls (nodes), what is asked of inputs, and masks; both families."""

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers.masks import mask_of, set_mask

InputSpec = gl.keras.layers.InputSpec
X = np.ones((2, 3), "float32")
FAMILIES = pytest.mark.parametrize("base", [gl.layers.Layer, gl.keras.layers.Layer], ids=["legacy", "modern"])


@pytest.fixture
def graph():
    with gl.Graph().as_default() as graph:
        yield graph


def plus_one(base, **keywords):
    class PlusOne(base):
        def call(self, inputs, more=None):
            return gl.nest.map_structure(lambda x: x + 1.0, inputs)

    return PlusOne(**keywords)


def placeholder(*shape):
    return gl.placeholder(gl.float32, shape)


# --- nodes ------------------------------------------------------------------------------------------------------------


@FAMILIES
def test_never_called(graph, base):
    layer = base(name="lay")
    for attribute, text in (
        ("input", r"Layer lay is not connected, no input to return\."),
        ("output", r"Layer lay has no inbound nodes\."),
        ("input_shape", 'The layer "lay" has never been called and thus has no defined input shape'),
        ("output_shape", r"The layer has never been called and thus has no defined output shape\."),
    ):
        with pytest.raises(AttributeError, match=text):
            getattr(layer, attribute)
    for method, what in (
        ("get_input_at", "input"),
        ("get_output_at", "output"),
        ("get_input_shape_at", "input shape"),
        ("get_output_shape_at", "output shape"),
    ):
        with pytest.raises(RuntimeError, match=rf"The layer has never been called and thus has no defined {what}\."):
            getattr(layer, method)(0)


@FAMILIES
def test_one_call(graph, base):
    x = placeholder(None, 4)
    layer = plus_one(base)
    y = layer(x)
    assert layer.input is x and layer.output is y
    assert layer.input_shape == (None, 4) == layer.output_shape
    assert type(layer.input_shape) is tuple
    assert layer.get_input_at(0) is x and layer.get_output_at(0) is y
    assert layer.get_input_shape_at(0) == layer.get_output_shape_at(0) == (None, 4)
    assert layer.input_mask is None and layer.output_mask is None
    assert layer.get_input_mask_at(0) is None and layer.get_output_mask_at(0) is None


@FAMILIES
def test_calls_of_equal_shape(graph, base):
    x, z = placeholder(None, 4), placeholder(None, 4)
    layer = plus_one(base, name="lay")
    outputs = [layer(x), layer(z)]
    for attribute in ("input", "output"):
        with pytest.raises(AttributeError, match=f"multiple inbound nodes.*get_{attribute}_at"):
            getattr(layer, attribute)
    assert layer.input_shape == layer.output_shape == (None, 4)
    assert layer.get_input_at(1) is z and layer.get_output_at(0) is outputs[0]
    assert layer.get_output_at(-1) is outputs[1] and layer.get_input_at(-2) is x
    with pytest.raises(IndexError):
        layer.get_input_at(-3)
    with pytest.raises(ValueError, match=r"Asked to get input at node 2, but the layer has only 2 inbound nodes\."):
        layer.get_input_at(2)
    with pytest.raises(ValueError, match="Asked to get output shape at node 5"):
        layer.get_output_shape_at(5)


@FAMILIES
def test_calls_of_different_shape(graph, base):
    layer = plus_one(base, name="lay")
    layer(placeholder(None, 4))
    layer(placeholder(2, 5))
    for what in ("input", "output"):
        with pytest.raises(
            AttributeError, match=rf'"lay" has multiple inbound nodes, with different {what} shapes.*ill-defined'
        ) as caught:
            getattr(layer, f"{what}_shape")
        assert f"Use `get_{what}_shape_at(node_index)` instead." in str(caught.value)
    assert layer.get_input_shape_at(1) == (2, 5)


@FAMILIES
def test_structures_of_inputs(graph, base):
    a, b = placeholder(None, 4), placeholder(2)
    layer = plus_one(base)
    out = layer([a, b])
    assert all(x is y for x, y in zip(layer.input, [a, b], strict=True))
    assert all(x is y for x, y in zip(layer.output, out, strict=True))
    assert layer.input_shape == [(None, 4), (2,)] == layer.output_shape


@FAMILIES
def test_an_input_of_unknown_rank(graph, base):
    layer = base()
    layer(gl.placeholder(gl.float32))
    assert layer.input_shape is None


def test_modern_layers_record_calls_on_input_tensors():
    x = gl.keras.Input((4,))
    layer = gl.keras.layers.Dense(3)
    y = layer(x)
    assert layer.input is x and layer.output is y
    assert layer.input_shape == (None, 4) and layer.output_shape == (None, 3)


def test_modern_layers_do_not_record_eager_calls():
    layer = gl.keras.layers.Dense(3)
    layer(X)
    with pytest.raises(AttributeError, match="not connected"):
        _ = layer.input


# --- InputSpec --------------------------------------------------------------------------------------------------------


def test_spec_fields_config_and_repr():
    spec = InputSpec(shape=(None, 3), dtype="float32", axes={1: 3})
    assert (spec.ndim, spec.shape, spec.dtype, spec.axes) == (2, (None, 3), "float32", {1: 3})
    assert repr(spec) == "InputSpec(dtype=float32, shape=(None, 3), ndim=2, axes={1: 3})"
    config = InputSpec(min_ndim=2, max_ndim=4).get_config()
    assert config == {"dtype": None, "shape": None, "ndim": None, "max_ndim": 4, "min_ndim": 2, "axes": {}}
    assert InputSpec.from_config(spec.get_config()).get_config() == spec.get_config()
    assert InputSpec(shape=(2, 3), ndim=5).ndim == 2
    assert InputSpec(axes={"1": 2, np.int64(0): None}).axes == {1: 2, 0: None}


@pytest.mark.parametrize("axes", [{"a": 1}, {None: 1}, 3])
def test_axes_must_be_a_dictionary_with_integer_keys(axes):
    with pytest.raises(TypeError, match="must be a dict with integer keys"):
        InputSpec(axes=axes)


@pytest.mark.parametrize("limit", [{"ndim": 2}, {"max_ndim": 2}, {"shape": (None, 3)}])
def test_an_axis_beyond_the_rank(limit):
    with pytest.raises(ValueError, match="Axis 3 is greater than the maximum allowed value: 1"):
        InputSpec(axes={3: 1}, **limit)


@FAMILIES
def test_setting_the_input_spec(base):
    layer = base()
    for value in (None, InputSpec(ndim=2), [InputSpec(ndim=2), None], {"a": InputSpec(ndim=1)}):
        layer.input_spec = value
        assert layer.input_spec is value
    for wrong in (2, "spec", [InputSpec(ndim=2), 3]):
        with pytest.raises(TypeError, match="Layer input_spec must be an instance of InputSpec. Got: "):
            layer.input_spec = wrong


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


PREFIX = "Input 0 of layer lay is incompatible with the layer: "


@FAMILIES
@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize(
    ("spec", "inputs", "error", "text"),
    [
        (InputSpec(ndim=4), ones(2), ValueError, PREFIX + "expected ndim=4, found ndim=1. Full shape received:[2]"),
        (InputSpec(max_ndim=1), ones(2, 3), ValueError, PREFIX + "expected max_ndim=1, found ndim=2"),
        (
            InputSpec(min_ndim=3),
            ones(2, 3),
            ValueError,
            PREFIX + "expected min_ndim=3, found ndim=2. Full shape received:[2, 3]",
        ),
        (InputSpec(dtype="int32"), ones(2, 3), ValueError, PREFIX + "expected dtype=int32, found dtype=float32"),
        (
            InputSpec(axes={-1: 5}),
            ones(2, 3),
            ValueError,
            PREFIX + "expected axis -1 of input shape to have value 5, but received input with shape (2, 3)",
        ),
        (
            InputSpec(shape=(None, 28)),
            ones(2, 3),
            ValueError,
            PREFIX + "expected shape=(None, 28), found shape=(2, 3)",
        ),
        ([InputSpec(ndim=2)] * 2, [ones(2, 3)], ValueError, 'Layer "lay" expects 2 input(s), but it received 1 input'),
        (
            [InputSpec(ndim=2), InputSpec(ndim=1)],
            [ones(2, 3), ones(2, 2)],
            ValueError,
            "Input 1 of layer lay is incompatible with the layer: expected ndim=1, found ndim=2",
        ),
        (InputSpec(ndim=2), "text", TypeError, "Inputs to a layer should be tensors"),
        (
            {"a": InputSpec(ndim=2, name="a"), "c": InputSpec(ndim=2, name="c")},
            {"a": ones(2, 3), "b": ones(2, 3)},
            ValueError,
            'Missing data for input "c"',
        ),
        (InputSpec(axes={2: 5}), ones(2, 3), IndexError, ""),
    ],
    ids=lambda v: None if not isinstance(v, str) else "",
)
def test_the_table_of_mismatches(symbolic, base, spec, inputs, error, text):
    layer = base(name="lay", **({"autocast": False} if base is gl.keras.layers.Layer else {}))
    layer.input_spec = spec
    with gl.Graph().as_default() if symbolic else gl.device("cpu"):
        if symbolic:
            inputs = gl.nest.map_structure(lambda x: x if isinstance(x, str) else gl.ops.identity(x), inputs)
        with pytest.raises(error) as caught:
            layer(inputs)
    assert text in str(caught.value)
    assert not layer.built


@FAMILIES
@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (None, ones(2, 3)),
        (InputSpec(), ones(2, 3)),
        (InputSpec(shape=(None, 3)), ones(2, 3)),
        (InputSpec(axes={0: None, 1: 3}), ones(2, 3)),
        (InputSpec(axes={"-1": 3}), ones(2, 3)),
        ([None, InputSpec(ndim=1)], [ones(2, 3), ones(2)]),
        (InputSpec(shape=(None, 28), allow_last_axis_squeeze=True), ones(2, 28, 1)),
        (InputSpec(shape=(None, 28), allow_last_axis_squeeze=True), ones(2, 28, 2)),
        (InputSpec(shape=(None, 28, 1), allow_last_axis_squeeze=True), ones(2, 28)),
        ({"a": InputSpec(ndim=2, name="a"), "b": InputSpec(ndim=1, name="b")}, {"b": ones(2), "a": ones(2, 3)}),
    ],
)
def test_inputs_that_fit(base, spec, inputs):
    layer = base()
    layer.input_spec = spec
    layer(inputs)
    assert layer.built


def test_unknown_sizes_and_ranks_pass(graph):
    layer = gl.layers.Layer()
    layer.input_spec = InputSpec(shape=(4, 3), axes={0: 4})
    layer(placeholder(None, None))
    layer.input_spec = [InputSpec(ndim=2), InputSpec(ndim=7)]
    layer([gl.placeholder(gl.float32), placeholder(2)])  # unknown rank ends the check, for what follows too


def test_the_first_mismatch_in_the_order_of_the_table_is_reported():
    layer = gl.layers.Layer()
    layer.input_spec = InputSpec(ndim=1, dtype="int32", axes={0: 7})
    with pytest.raises(ValueError, match="expected ndim=1"):
        layer(ones(2, 3))
    with pytest.raises(ValueError, match="expected dtype=int32"):
        layer(ones(2))
    with pytest.raises(ValueError, match="expected axis 0"):
        layer(ones(2, dtype="int32"))


# --- masks ------------------------------------------------------------------------------------------------------------

MASK = np.array([True, False])


@FAMILIES
def test_compute_mask(base):
    layer = base(name="lay")
    assert layer.compute_mask(X, None) is None and layer.compute_mask([X], [None]) is None
    for mask in (MASK, [None, MASK]):
        with pytest.raises(TypeError, match="Layer lay: does not support masking|Layer lay does not support masking"):
            layer.compute_mask(X, mask)
    layer.supports_masking = True
    assert layer.compute_mask(X, MASK) is MASK


class Masking(gl.keras.layers.Layer):
    """Gives its output a mask: rows that are not all zero."""

    def compute_mask(self, inputs, mask=None):
        return gl.ops.any(inputs != 0.0, axis=-1)

    def call(self, inputs):
        return inputs * 1.0


def seeing(base, supports=False):
    class Seeing(base):
        seen = "never"

        def call(self, inputs, mask=None):
            self.seen = mask
            return gl.nest.map_structure(lambda x: x * 2.0, inputs)

    layer = Seeing()
    layer.supports_masking = supports
    return layer


DATA = np.array([[1.0, 2.0], [0.0, 0.0]], "float32")


@FAMILIES
def test_the_mask_of_the_input_is_passed_and_an_explicit_one_wins(base):
    x = Masking()(DATA)
    layer = seeing(base, supports=True)
    y = layer(x)
    np.testing.assert_array_equal(layer.seen, MASK)
    np.testing.assert_array_equal(mask_of(y), MASK)
    other = ~MASK
    y = layer(x, mask=other)
    assert layer.seen is other
    np.testing.assert_array_equal(mask_of(y), other)
    layer(DATA)
    assert layer.seen is None


@FAMILIES
def test_a_mask_given_by_position(base):
    layer = seeing(base, supports=True)
    layer(Masking()(DATA), MASK)
    assert layer.seen is MASK


@FAMILIES
def test_masks_in_the_structure_of_the_inputs(base):
    x = Masking()(DATA)
    layer = seeing(base, supports=True)
    layer([x, DATA])
    np.testing.assert_array_equal(layer.seen[0], MASK)
    assert layer.seen[1] is None
    layer({"a": DATA, "b": DATA})
    assert layer.seen is None


@FAMILIES
def test_a_layer_that_does_not_support_masking_gives_none(base):
    layer = seeing(base)
    y = layer(Masking()(DATA))
    np.testing.assert_array_equal(layer.seen, MASK)
    assert mask_of(y) is None


@FAMILIES
def test_a_layer_that_returns_its_input_keeps_what_that_had(base):
    x = Masking()(DATA)
    y = base()(x)
    np.testing.assert_array_equal(mask_of(y), MASK)


def test_masks_in_a_graph_and_on_input_tensors(graph):
    layer = seeing(gl.layers.Layer, supports=True)
    x = Masking()(placeholder(None, 2))
    y = layer(x)
    assert layer.seen is mask_of(x) and layer.output_mask is mask_of(y) and layer.input_mask is mask_of(x)
    with gl.Session() as session:
        np.testing.assert_array_equal(session.run(mask_of(y), {x.op.inputs[0]: DATA}), MASK)


def test_masks_under_a_tape():
    with gl.GradientTape() as tape:
        x = tape.watch(DATA.copy())
        layer = seeing(gl.keras.layers.Layer, supports=True)
        y = layer(Masking()(x))
        np.testing.assert_array_equal(gl.asnumpy(mask_of(y)), MASK)


def test_a_mask_goes_with_its_array():
    x = DATA.copy()
    set_mask(x, MASK)
    assert mask_of(x) is MASK
    set_mask(x, None)
    assert mask_of(x) is None
    for _ in range(20):  # an array that takes the place of a dead one has no mask
        set_mask(np.ones(3), MASK)
        assert mask_of(np.ones(3)) is None


@FAMILIES
@pytest.mark.parametrize("inputs", [X, 2.5, [X, 3]], ids=["array", "number", "list"])
def test_arrays_and_numbers_become_tensors_in_a_graph(graph, base, inputs):
    outputs = base()(inputs)
    with gl.Session() as session:
        gl.nest.map_structure(np.testing.assert_array_equal, session.run(outputs), inputs)


def test_losses_of_an_array_in_a_graph_depend_on_the_input_of_the_call(graph):
    class Lossy(gl.layers.Layer):
        def call(self, inputs):
            self.add_loss(gl.reduce_sum(inputs), inputs=inputs)
            return inputs

    layer = Lossy()
    y = layer(X)
    assert layer.get_losses_for(y) == layer.losses and layer.get_losses_for(None) == []
    with gl.Session() as session:
        assert session.run(layer.losses) == [6.0]
