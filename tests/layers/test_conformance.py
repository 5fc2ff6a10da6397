"""One table of layers, and what every one of them must do: build, call, record, copy, configure, differentiate."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers.masks import mask_of, set_mask

K, L = gl.keras.layers, gl.layers


class Entry(NamedTuple):
    """A layer: how to make it, what it eats, and what is expected of it."""

    name: str
    make: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    variables: int = 0
    wrong: tuple[int, ...] | None = None  # a shape of a rank it refuses
    masked: bool = False  # it hands a mask of the first two axes on
    call: dict[str, Any] = {}  # noqa: RUF012

    @property
    def legacy(self) -> bool:
        return self.name.startswith("legacy")

    def inputs(self, dtype: str = "float32") -> Any:
        rng = np.random.default_rng(7)
        # Distinct values, so that maxima have no ties and finite differences see no kink.
        arrays = [
            (rng.permutation(int(np.prod(s))) / np.prod(s) * 2 - 0.95).reshape(s).astype(dtype) for s in self.shapes
        ]
        return arrays[0] if len(arrays) == 1 else arrays

    def shape(self, batch: Any = "same") -> Any:
        """Return the input shape, or a list of them, with this batch size."""
        shapes = [gl.TensorShape(s if batch == "same" else (batch, *s[1:])) for s in self.shapes]
        return shapes[0] if len(shapes) == 1 else shapes


def cells(settings: dict[str, Any]) -> list[Any]:
    """Return two cells of the layer's dtype: a cell has a policy of its own."""
    given = {"dtype": settings["dtype"]} if "dtype" in settings else {}
    return [K.GRUCell(3, **given), K.LSTMCell(2, **given)]


def entries() -> list[Entry]:
    image, steps, rows = ((2, 6, 5, 3),), ((2, 7, 3),), ((4, 3),)
    pair = ((2, 3, 4), (2, 3, 4))
    table = [
        Entry("dense", lambda **k: K.Dense(5, "tanh", **k), rows, 2, (3,)),
        Entry("dense_rank_3", lambda **k: K.Dense(5, **k), ((2, 4, 3),), 2, (3,), masked=True),
        Entry("dense_no_bias", lambda **k: K.Dense(5, use_bias=False, **k), rows, 1, (3,)),
        Entry("activation", lambda **k: K.Activation("sigmoid", **k), ((2, 3, 4),), masked=True),
        Entry("relu", lambda **k: K.ReLU(0.5, 0.1, 0.2, **k), ((2, 3, 4),), masked=True),
        Entry("leaky_relu", lambda **k: K.LeakyReLU(0.2, **k), ((2, 3, 4),), masked=True),
        Entry("elu", lambda **k: K.ELU(0.7, **k), ((2, 3, 4),), masked=True),
        Entry("softmax", lambda **k: K.Softmax(1, **k), ((2, 3, 4),), masked=True),
        Entry("dropout", lambda **k: K.Dropout(0.4, seed=3, **k), ((2, 3, 4),), masked=True),
        Entry("flatten", lambda **k: K.Flatten(**k), image, 0, ()),
        Entry("flatten_first", lambda **k: K.Flatten("channels_first", **k), image, 0, ()),
        Entry("reshape", lambda **k: K.Reshape((3, -1), **k), image),
        Entry("permute", lambda **k: K.Permute((3, 1, 2), **k), image, 0, (2, 3)),
        Entry("conv1d", lambda **k: K.Conv1D(4, 3, padding="causal", dilation_rate=2, **k), steps, 2, (2, 3)),
        Entry("conv1d_first", lambda **k: K.Conv1D(4, 2, 2, data_format="channels_first", **k), steps, 2, (2, 3)),
        Entry("conv2d", lambda **k: K.Conv2D(4, 3, 2, "same", activation="tanh", **k), image, 2, (2, 3, 4)),
        Entry("conv2d_groups", lambda **k: K.Conv2D(6, (2, 3), groups=3, **k), image, 2, (2, 3, 4)),
        Entry("conv2d_first", lambda **k: K.Conv2D(4, (3, 2), data_format="channels_first", **k), image, 2, (2, 3)),
        Entry("conv2d_rank_5", lambda **k: K.Conv2D(4, 2, **k), ((2, 2, 4, 4, 3),), 2, (2, 3, 4)),
        Entry("max_pooling1d", lambda **k: K.MaxPooling1D(3, 2, "same", **k), steps, 0, (2, 3)),
        Entry("max_pooling2d", lambda **k: K.MaxPooling2D((2, 3), **k), image, 0, (2, 3, 4)),
        Entry("average_pooling1d", lambda **k: K.AveragePooling1D(3, 2, "same", **k), steps, 0, (2, 3)),
        Entry(
            "average_pooling2d", lambda **k: K.AveragePooling2D(2, 1, "same", "channels_first", **k), image, 0, (2, 3)
        ),
        Entry("global_average1d", lambda **k: K.GlobalAveragePooling1D(**k), steps, 0, (2, 3)),
        Entry("global_average2d", lambda **k: K.GlobalAveragePooling2D(keepdims=True, **k), image, 0, (2, 3)),
        Entry("global_max1d", lambda **k: K.GlobalMaxPooling1D("channels_first", **k), steps, 0, (2, 3)),
        Entry("global_max2d", lambda **k: K.GlobalMaxPooling2D(**k), image, 0, (2, 3)),
        Entry("masking", lambda **k: K.Masking(0.25, **k), ((2, 3, 4),)),
        Entry("add", lambda **k: K.Add(**k), pair, masked=True),
        Entry("add_broadcast", lambda **k: K.Add(**k), ((2, 3, 4), (2, 4))),
        Entry("subtract", lambda **k: K.Subtract(**k), pair, masked=True),
        Entry("multiply", lambda **k: K.Multiply(**k), (*pair, (2, 1, 4))),
        Entry("average", lambda **k: K.Average(**k), pair, masked=True),
        Entry("maximum", lambda **k: K.Maximum(**k), ((2, 3, 4), (2, 3, 1))),
        Entry("minimum", lambda **k: K.Minimum(**k), ((2, 3, 4), (2, 3, 1))),
        Entry("concatenate", lambda **k: K.Concatenate(1, **k), ((2, 3, 4), (2, 1, 4))),
        Entry("batch_normalization", lambda **k: K.BatchNormalization(**k), ((6, 2, 3),), 4, masked=True),
        Entry(
            "batch_normalization_training",
            lambda **k: K.BatchNormalization(**k),
            ((6, 2, 3),),
            4,
            call={"training": True},
        ),
        Entry("simple_rnn", lambda **k: K.SimpleRNN(4, **k), steps, 3, (2, 3)),
        Entry("gru_sequences", lambda **k: K.GRU(4, return_sequences=True, **k), steps, 3, (2, 3), masked=True),
        Entry("lstm_backwards", lambda **k: K.LSTM(4, go_backwards=True, **k), steps, 3, (2, 3)),
        Entry("rnn_of_cells", lambda **k: K.RNN(cells(k), **k), steps, 6, (2, 3)),
        Entry("legacy_dense", lambda **k: L.Dense(5, "tanh", **k), rows, 2, (3,)),
        Entry("legacy_dense_rank_3", lambda **k: L.Dense(5, **k), ((2, 4, 3),), 2, (3,), masked=True),
        Entry("legacy_dropout", lambda **k: L.Dropout(0.4, seed=3, **k), ((2, 3, 4),), masked=True),
        Entry("legacy_flatten", lambda **k: L.Flatten(**k), image, 0, ()),
        Entry("legacy_conv1d", lambda **k: L.Conv1D(4, 3, padding="same", **k), steps, 2, (2, 3)),
        Entry("legacy_conv2d", lambda **k: L.Conv2D(4, 3, 2, "same", **k), image, 2, (2, 3, 4)),
        Entry(
            "legacy_conv2d_first", lambda **k: L.Conv2D(4, 3, data_format="channels_first", **k), image, 2, (2, 3, 4)
        ),
        Entry("legacy_max_pooling1d", lambda **k: L.MaxPooling1D(3, 2, **k), steps, 0, (2, 3)),
        Entry("legacy_max_pooling2d", lambda **k: L.MaxPooling2D(2, 1, **k), image, 0, (2, 3, 4)),
        Entry("legacy_average_pooling1d", lambda **k: L.AveragePooling1D(3, 2, **k), steps, 0, (2, 3)),
        Entry("legacy_average_pooling2d", lambda **k: L.AveragePooling2D(2, 1, **k), image, 0, (2, 3, 4)),
        Entry("legacy_batch_normalization", lambda **k: L.BatchNormalization(**k), ((6, 2, 3),), 4, masked=True),
        Entry(
            "legacy_batch_normalization_training",
            lambda **k: L.BatchNormalization(**k),
            ((6, 2, 3),),
            4,
            call={"training": True},
        ),
    ]
    return table


TABLE = entries()
every_layer = pytest.mark.parametrize("entry", TABLE, ids=lambda e: e.name)
modern_layers = pytest.mark.parametrize("entry", [e for e in TABLE if not e.legacy], ids=lambda e: e.name)


def value_of(output: Any) -> np.ndarray:
    return np.asarray(output.value if hasattr(output, "value") else output)


def test_the_table_names_every_layer_of_the_faces():
    classes = {type(entry.make()) for entry in TABLE}
    bases = {K.Layer, K.InputLayer, L.Layer}
    for face in (K, L):
        found = {v for v in vars(face).values() if isinstance(v, type) and issubclass(v, (K.Layer, L.Layer))}
        cells = {v for v in found if hasattr(v, "state_size") and not hasattr(v, "states")}  # they take states as well
        assert found - bases - cells <= classes


@every_layer
def test_build_and_eager_call(entry):
    layer, x = entry.make(), entry.inputs()
    assert not layer.built and layer.weights == [] and layer.losses == [] and layer.updates == []
    y = layer(x, **entry.call)
    assert type(y) is np.ndarray and y.dtype == np.float32 and layer.built
    assert len(layer.weights) == entry.variables
    assert layer.count_params() == sum(w.numpy().size for w in layer.weights)
    assert all(str(w.dtype) == "float32" for w in layer.weights)


@every_layer
def test_build_by_hand_and_then_call(entry):
    layer = entry.make()
    layer.build(entry.shape(None))
    before = [id(w) for w in layer.weights]
    layer.built = True
    layer(entry.inputs(), **entry.call)
    assert [id(w) for w in layer.weights] == before and len(before) == entry.variables


@every_layer
def test_dtype_follows_the_family(entry):
    layer = entry.make()
    y = layer(entry.inputs("float64"), **entry.call)
    expected = "float64" if entry.legacy else "float32"
    assert y.dtype == expected and layer.dtype == expected
    assert all(str(w.dtype) == expected for w in layer.weights)


@every_layer
def test_compute_output_shape_is_the_real_one(entry):
    layer = entry.make()
    computed = layer.compute_output_shape(entry.shape())
    unknown_batch = layer.compute_output_shape(entry.shape(None))
    assert not layer.built, "asking for a shape builds nothing"
    y = entry.make()(entry.inputs(), **entry.call)
    assert isinstance(computed, gl.TensorShape)
    plain = [tuple(s) for s in entry.shapes]
    assert layer.compute_output_shape(plain[0] if len(plain) == 1 else plain) == computed
    assert tuple(computed) == y.shape
    assert tuple(unknown_batch) == (None, *y.shape[1:])


@every_layer
@pytest.mark.parametrize("wrong", ["junk", 3.5, object()], ids=["string", "float", "object"])
def test_compute_output_shape_refuses_what_is_no_shape(entry, wrong):
    with pytest.raises((TypeError, ValueError)) as caught:
        entry.make().compute_output_shape(wrong)
    assert isinstance(caught.value, TypeError) or len(entry.shapes) > 1


@pytest.mark.parametrize("entry", [e for e in TABLE if e.wrong is not None], ids=lambda e: e.name)
def test_a_wrong_rank_is_refused_and_builds_nothing(entry):
    layer = entry.make()
    with pytest.raises(ValueError, match=layer.name):
        layer(np.ones(entry.wrong, "float32"))
    assert not layer.built and layer.weights == []
    with pytest.raises(ValueError, match=layer.name):
        layer.compute_output_shape(entry.wrong)


@every_layer
def test_config_round_trip(entry):
    layer, x = entry.make(name="named", trainable=False), entry.inputs()
    expected = layer(x)
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert not again.built and again.name == "named" and again.trainable is False
    again.build(entry.shape(None))
    again.set_weights(layer.get_weights())
    np.testing.assert_allclose(again(x), expected, rtol=1e-5, atol=1e-6)
    fresh = entry.make().get_config()
    copied = type(layer).from_config(fresh).get_config()
    assert json.dumps(copied) == json.dumps(fresh)


@modern_layers
def test_symbolic_call_and_model(entry):
    layer = entry.make()
    tensors = gl.nest.map_structure(lambda a: gl.keras.Input(a.shape[1:]), entry.inputs())
    y = layer(tensors, **entry.call)
    assert tuple(y.shape) == tuple(layer.compute_output_shape(entry.shape(None)))
    model = gl.keras.Model(tensors, y)
    np.testing.assert_allclose(model(entry.inputs()), layer(entry.inputs(), **entry.call), rtol=1e-6, atol=1e-6)
    assert [id(w) for w in model.weights] == [id(w) for w in layer.weights]
    assert layer.output is y and gl.nest.flatten(layer.input)[0] is gl.nest.flatten(tensors)[0]


@every_layer
def test_graph_and_session(entry):
    eager, x = entry.make(), entry.inputs()
    eager(x)
    rng = np.random.default_rng(0)
    weights = [rng.uniform(0.5, 1.5, w.shape).astype("float32") for w in eager.weights]
    eager.set_weights(weights)
    expected = eager(x, **entry.call)
    with gl.Graph().as_default():
        layer = entry.make()
        placeholders = gl.nest.map_structure(lambda a: gl.placeholder(a.dtype, (None, *a.shape[1:])), x)
        y = layer(placeholders, **entry.call)
        assert tuple(y.shape) == (None, *expected.shape[1:])
        assign = [w.assign(v) for w, v in zip(layer.weights, weights, strict=True)]
        with gl.Session() as session:
            session.run(gl.global_variables_initializer())
            session.run(assign)
            feeds = dict(zip(gl.nest.flatten(placeholders), gl.nest.flatten(x), strict=True))
            np.testing.assert_allclose(session.run(y, feeds), expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_inside_a_function(entry):
    layer, x = entry.make(), entry.inputs()
    layer(x)
    weights = layer.get_weights()
    expected = layer(x, **entry.call)
    layer.set_weights(weights)
    traced = gl.function(lambda v: layer(v, **entry.call))
    np.testing.assert_allclose(traced(x), expected, rtol=1e-6, atol=1e-6)


@every_layer
def test_gradients_against_finite_differences(entry):
    layer = entry.make(dtype="float64")
    x = entry.inputs("float64")
    layer(x, **entry.call)
    rng = np.random.default_rng(1)
    for w in layer.trainable_weights:
        w.assign(rng.uniform(0.5, 1.5, w.shape))
    arrays = gl.nest.flatten(x)
    projection = rng.normal(size=layer(x, **entry.call).shape)
    with gl.GradientTape() as tape:
        watched = [tape.watch(a) for a in arrays]
        y = layer(watched[0] if len(watched) == 1 else watched, **entry.call)
        loss = gl.reduce_sum(y * projection)
    sources = [*arrays, *layer.trainable_weights]
    gradients = tape.gradient(loss, sources, unconnected_gradients="zero")

    def total(values: list[np.ndarray]) -> float:
        inputs, weights = values[: len(arrays)], values[len(arrays) :]
        for w, value in zip(layer.trainable_weights, weights, strict=True):
            w.assign(value)
        return float((value_of(layer(inputs[0] if len(inputs) == 1 else inputs, **entry.call)) * projection).sum())

    start = [a if isinstance(a, np.ndarray) else a.numpy() for a in sources]
    directions = [rng.normal(size=a.shape) for a in start]
    step = 1e-6
    rise = total([a + step * d for a, d in zip(start, directions, strict=True)])
    fall = total([a - step * d for a, d in zip(start, directions, strict=True)])
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert slope == pytest.approx((rise - fall) / (2 * step), rel=1e-5, abs=1e-6)
    assert all(type(g) is np.ndarray and g.shape == a.shape for g, a in zip(gradients, start, strict=True))


@every_layer
def test_deepcopy_is_independent(entry):
    layer, x = entry.make(), entry.inputs()
    expected = layer(x)
    other = copy.deepcopy(layer)
    assert other.name == layer.name and [w.name for w in other.weights] == [w.name for w in layer.weights]
    np.testing.assert_allclose(other(x), expected, rtol=1e-5, atol=1e-6)
    expected = layer(x)
    for w in other.weights:
        w.assign(w.numpy() + 1)
    np.testing.assert_array_equal(layer(x), expected)


@every_layer
def test_masks(entry):
    layer, x = entry.make(), entry.inputs()
    arrays = gl.nest.flatten(x)
    if arrays[0].ndim < 3:
        pytest.skip("no step axis")
    mask = np.random.default_rng(2).random(arrays[0].shape[:2]) < 0.5
    for a in arrays:
        set_mask(a, mask)
    y = layer(x)
    found = mask_of(y)
    if entry.masked:
        np.testing.assert_array_equal(found, mask)
    elif entry.name == "masking":
        np.testing.assert_array_equal(found, (arrays[0] != 0.25).any(-1))
    elif not entry.name.startswith(("add", "multiply", "maximum", "minimum", "concatenate", "batch", "legacy_batch")):
        assert found is None


@modern_layers
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_16_bit_policy(entry, policy):
    wide, layer, x = entry.make(), entry.make(dtype=policy), entry.inputs()
    wide(x)
    layer(x)
    layer.set_weights(wide.get_weights())
    expected = wide(x, **entry.call)
    y = layer(x, **entry.call)
    assert y.dtype == gl.as_dtype(policy.removeprefix("mixed_"))
    assert all(str(w.static_dtype) == "float32" for w in layer.weights)
    tolerance = 4e-3 if policy == "mixed_float16" else 4e-2
    if entry.name not in ("dropout", "relu"):  # relu jumps at its threshold: rounding the input may cross it
        np.testing.assert_allclose(y.astype("float32"), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_are_accumulated_in_float32(dtype):
    # A float16 accumulator of ones stops at 2048, a bfloat16 one at 256.
    ones = np.ones((1, 64, 64, 1), "float32").astype(gl.as_dtype(dtype))
    make = {"kernel_initializer": "ones", "dtype": dtype}
    assert float(K.Dense(1, **make)(ones.reshape(1, 4096))[0, 0]) == 4096
    assert float(K.Conv2D(1, 64, **make)(ones).ravel()[0]) == 4096
    assert float(K.Conv1D(1, 4096, **make)(ones.reshape(1, 4096, 1)).ravel()[0]) == 4096
    assert float(K.AveragePooling2D(64, dtype=dtype)(ones).ravel()[0]) == 1
    assert float(K.GlobalAveragePooling2D(dtype=dtype)(ones).ravel()[0]) == 1
    assert float(L.Dense(1, kernel_initializer=gl.ones_initializer())(ones.reshape(1, 4096))[0, 0]) == 4096


@every_layer
def test_an_empty_batch(entry):
    x = gl.nest.map_structure(lambda a: a[:0], entry.inputs())
    assert entry.make()(x).shape == (0, *entry.make().compute_output_shape(entry.shape(None))[1:])
