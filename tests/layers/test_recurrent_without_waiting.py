"""Fused sequences never wait for the device: lengths and masks that are there already are not read back."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.ops.recurrent.operations import length_mask
from tests.kernels.emulation.build import compiler
from tests.kernels.strict_array import StrictArray, xp

X = np.random.default_rng(0).uniform(-1, 1, (3, 5, 4)).astype("float32")
READS = ("get", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request):
    if request.param == "emulated" and compiler() is None:
        pytest.skip("needs g++")
    return request.param


@contextlib.contextmanager
def no_waiting(where):
    """Make every read of device data an error."""
    if where == "gpu":
        import cupyx

        with cupyx.allow_synchronize(False):
            yield
        return

    def refuse(self, *unused):
        raise AssertionError("the device's data was read")

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(StrictArray, name, refuse)
        yield


def forward_and_backward(make, where):
    """Run once to build, then twice as fast as it goes; return outputs and gradients of both."""
    results = []
    for context in (contextlib.nullcontext(), no_waiting(where)):
        with context:
            with gl.GradientTape() as tape:
                y, variables = make()
                total = gl.reduce_sum(y * y)
            results.append([y.value, *tape.gradient(total, variables)])
    return [[gl.asnumpy(a) for a in arrays] for arrays in results]


def test_reads_are_noticed(where):
    with gl.device(where), pytest.raises((AssertionError, RuntimeError)), no_waiting(where):
        bool(gl.asarray(np.ones(1)).sum() > 0)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "SimpleRNNCell"])
def test_dynamic_rnn_with_lengths_on_the_device(kind, where):
    with gl.device(where):
        cell = gl.nn.RNNCellResidualWrapper(getattr(gl.keras.layers, kind)(4))
        x, lengths = gl.asarray(X), gl.asarray(np.array([2, 0, 5]))

        def make():
            y, _ = gl.nn.dynamic_rnn(cell, x, sequence_length=lengths, dtype="float32")
            return y, cell.trainable_weights

        first, again = forward_and_backward(make, where)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not first[0][1].any() and not first[0][0, 2:].any()


def test_rnn_layer_with_a_mask_on_the_device(where):
    with gl.device(where):
        layer = gl.keras.layers.RNN(gl.nn.RNNCellResidualWrapper(gl.keras.layers.GRUCell(4)), return_sequences=True)
        x, mask = gl.asarray(X), gl.asarray(np.arange(5) < np.array([[2], [0], [5]]))
        first, again = forward_and_backward(lambda: (layer(x, mask=mask), layer.trainable_weights), where)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lengths_on_the_device_are_clamped():
    """Looking for bad ones would wait; host lengths are checked."""
    x = np.zeros((3, 4, 2), "float32")
    mask = length_mask(xp.asarray(np.array([7, 2, 0, -1])), xp.asarray(x))
    np.testing.assert_array_equal(mask.get().sum(axis=0), [3, 2, 0, 0])
    with pytest.raises(ValueError, match="beyond the time axis"):
        length_mask(np.array([7, 2, 0, 1]), x)
    with pytest.raises(ValueError, match="one length for each row"):
        length_mask(xp.asarray(np.array([1, 2, 0])), xp.asarray(x))
