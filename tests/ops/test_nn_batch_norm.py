"""Batch normalisation without a layer."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

import gpulayers as gl

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("with_scale", [True, False])
def test_the_formula_and_its_gradients(with_scale):
    shapes = {"x": (4, 3), "mean": (3,), "variance": (3,), "offset": (3,), "scale": (3,)}
    values = {name: RNG.uniform(0.5, 2.0, size=shape) for name, shape in shapes.items()}
    if not with_scale:
        values["scale"] = None
    names = [n for n, v in values.items() if v is not None]
    weights = RNG.normal(size=(4, 3))

    def total(flat):
        parts, rest = {}, flat
        for name in names:
            size = int(np.prod(shapes[name]))
            parts[name], rest = rest[:size].reshape(shapes[name]), rest[size:]
        scale = parts.get("scale", 1.0)
        y = (parts["x"] - parts["mean"]) / np.sqrt(parts["variance"] + 0.1) * scale + parts["offset"]
        return float(np.sum(y * weights))

    with gl.GradientTape() as tape:
        tensors = {n: None if v is None else tape.watch(v) for n, v in values.items()}
        y = gl.nn.batch_normalization(
            tensors["x"], tensors["mean"], tensors["variance"], tensors["offset"], tensors["scale"], 0.1
        )
        result = gl.ops.sum(y * weights)
    flat = np.concatenate([values[n].ravel() for n in names])
    assert float(result) == pytest.approx(total(flat), rel=1e-12)
    found = np.concatenate([g.ravel() for g in tape.gradient(result, [values[n] for n in names])])
    np.testing.assert_allclose(found, approx_fprime(flat, total, 1e-7), rtol=1e-4, atol=1e-5)


def test_the_functions_on_plain_arrays_are_a_training_step():
    x, dy = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 3))
    gamma, beta = RNG.normal(size=3), RNG.normal(size=3)
    step = gl.nn.batch_norm.forward(x, gamma, beta, axis=(1,))
    gradients = gl.nn.batch_norm.backward(dy, x, gamma, step.saved, axis=(1,))
    layer = gl.layers.BatchNormalization()
    layer(x)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    expected = tape.gradient(y, [x, layer.gamma, layer.beta], output_gradients=dy)
    np.testing.assert_allclose(step.y, y.value, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip((gradients.dx, gradients.dgamma, gradients.dbeta), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    mean, variance = gl.nn.batch_norm.statistics(x, axis=(1,))
    np.testing.assert_allclose([mean, variance], [x.mean(0), x.var(0)], rtol=1e-12)
    y = gl.nn.batch_norm.inference(x, gamma, beta, mean, variance, axis=(1,))
    np.testing.assert_allclose(y, step.y, rtol=1e-12, atol=1e-12)


CHANNELS, WRONG = np.ones(3), np.ones(2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda bn, x: bn.forward(x, None, None, axis=(1,), groups=0), "sub-batches do not fit"),
        (lambda bn, x: bn.forward(x, None, None, axis=(1,), groups=3), "sub-batches do not fit"),
        (lambda bn, x: bn.forward(x, None, None, axis=(1,), weights=np.ones((5, 1))), "weights do not fit"),
        (
            lambda bn, x: bn.forward(x, None, None, axis=(1,), moving=bn.MovingStatistics(CHANNELS, WRONG, 0.1)),
            "wrong number of values",
        ),
        (
            lambda bn, x: bn.forward(x, None, None, axis=(1,), renorm=bn.Renorm(WRONG, CHANNELS)),
            "wrong number of values",
        ),
        (lambda bn, x: bn.backward(x, x, None, np.ones((3, 1, 2)), axis=(1,)), "`saved` does not belong"),
        (lambda bn, x: bn.backward(x, x, None, np.ones((3, 2, 3)), axis=(1,)), "`saved` does not belong"),
        (lambda bn, x: bn.backward(x, x, None, np.ones((4, 1, 3)), axis=(1,)), "`saved` does not belong"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_computed(call, text):
    with pytest.raises(ValueError, match=text):
        call(gl.nn.batch_norm, np.ones((8, 3)))
