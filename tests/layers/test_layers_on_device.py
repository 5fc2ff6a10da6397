"""Every layer on a device: the strict double of CuPy's arrays, and a GPU where there is one (``-m gpu``)."""

from __future__ import annotations

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.device import array_module
from tests.kernels import strict_array  # registers the emulated device
from tests.layers.test_conformance import TABLE, Entry, every_layer

assert strict_array.StrictArray is not None


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request):
    return request.param


def on_host(entry: Entry) -> tuple:
    """Return weights, output, projection and gradients on the CPU."""
    layer, x = entry.make(), entry.inputs()
    with gl.device("cpu"):
        layer(x)
        weights = layer.get_weights()
        y = layer(x, **entry.call)
        projection = np.random.default_rng(0).normal(size=y.shape).astype("float32")
        layer.set_weights(weights)
        gradients = slopes(layer, entry, gl.nest.flatten(x), projection)
    return weights, y, projection, gradients


def slopes(layer, entry, arrays, projection):
    with gl.GradientTape() as tape:
        for a in arrays:
            tape.watch(a)
        y = layer(arrays[0] if len(arrays) == 1 else arrays, **entry.call)
        total = gl.reduce_sum(y * projection)
    return tape.gradient(total, [*arrays, *layer.trainable_weights], unconnected_gradients="zero")


def test_the_table_is_not_empty():
    assert len(TABLE) > 40


@every_layer
def test_same_results_as_on_the_host(entry, where):
    weights, expected, projection, wanted = on_host(entry)
    with gl.device(where):
        layer = entry.make()
        module = array_module(gl.asarray(np.ones(1)))
        assert module is not np
        y = layer(entry.inputs())  # a host array is copied
        assert array_module(y) is module and all(array_module(w.value) is module for w in layer.weights)
        layer.set_weights(weights)
        y = layer(entry.inputs(), **entry.call)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(gl.asnumpy(y), expected, rtol=1e-4, atol=1e-5)

        layer.set_weights(weights)
        arrays = [gl.asarray(a) for a in gl.nest.flatten(entry.inputs())]
        for gradient, truth in zip(slopes(layer, entry, arrays, gl.asarray(projection)), wanted, strict=True):
            assert array_module(gradient) is module
            np.testing.assert_allclose(gl.asnumpy(gradient), truth, rtol=1e-3, atol=1e-4)


def test_a_device_array_is_refused_by_a_layer_of_the_cpu(where):
    with gl.device(where):
        x = gl.asarray(np.ones((2, 3), "float32"))
    with gl.device("cpu"):
        layer = gl.keras.layers.Dense(2)
        with pytest.raises(TypeError, match="gl.asnumpy"):
            layer(x)
