"""Gradients of the gradients of batch normalisation against differences of the first ones, in float64."""

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.ops.batch_norm.operations import batch_norm_inference, batch_norm_training
from gpulayers.trace import GradientTape

RNG = np.random.default_rng(11)

CASES = {
    "plain": {"shape": (5, 3), "axis": (1,), "given": ("gamma", "beta")},
    "no scale": {"shape": (6, 2, 3), "axis": (2,), "given": ("beta",)},
    "channels first": {"shape": (3, 2, 2, 2), "axis": (1,), "given": ("gamma", "beta")},
    "two axes": {"shape": (5, 2, 3, 2), "axis": (1, 3), "given": ("gamma", "beta")},
    "sub-batches": {"shape": (6, 2, 2), "axis": (2,), "given": ("gamma", "beta"), "virtual_batch_size": 3},
    "relu": {"shape": (9, 3), "axis": (1,), "given": ("gamma", "beta"), "activation": "relu"},
    "relu, sub-batches": {
        "shape": (6, 2, 2),
        "axis": (2,),
        "given": ("gamma",),
        "activation": "relu",
        "virtual_batch_size": 3,
    },
    "relu and residual": {"shape": (7, 3), "axis": (1,), "given": ("gamma", "beta", "residual"), "activation": "relu"},
    "renorm": {
        "shape": (5, 3),
        "axis": (1,),
        "given": ("gamma", "beta", "renorm_mean", "renorm_stddev", "rmax", "dmax"),
    },
}


def operands(case):
    channels = int(np.prod([case["shape"][a] for a in case["axis"]]))
    made = {"x": RNG.normal(size=case["shape"]) * 2 + 1}
    for name in case["given"]:
        size = case["shape"] if name == "residual" else channels
        # The clips are so small that r and d are at them in every channel: constants for the differences too.
        made[name] = 0.01 if name in ("rmax", "dmax") else RNG.uniform(0.5, 1.5, size=size)
        if name == "residual":
            made[name] -= 2.5  # so that the ReLU stops about half of the values
    return made


def first_gradients(case, inference, values, cotangent, dmask):
    """Return (dx, dgamma or dx again, dbeta), each summed with fixed random weights: one number per first gradient."""
    names = [n for n in ("x", "gamma", "beta", "residual") if n in values]
    with GradientTape() as tape:
        tensors = {n: (tape.watch(v) if n in names else v) for n, v in values.items()}
        attributes = {
            "given": case["given"],
            "axis": case["axis"],
            "epsilon": 1e-3,
            "activation": case.get("activation"),
        }
        if inference:
            channels = values["beta"].size
            statistics = [np.linspace(0.5, 1, channels), np.linspace(1, 2, channels)]
            y = batch_norm_inference(tensors["x"], *statistics, *[tensors[n] for n in case["given"]], **attributes)
        else:
            y, *_ = batch_norm_training(
                tensors["x"],
                *[tensors[n] for n in case["given"]],
                virtual_batch_size=case.get("virtual_batch_size"),
                **attributes,
            )
    gradients = tape.gradient(y, [values[n] for n in names], output_gradients=cotangent)
    return sum(ops.sum(g * dmask[n]) for n, g in zip(names, gradients, strict=True))


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("name", CASES)
def test_second_order(name, inference):
    case = CASES[name]
    if inference and (name in ("sub-batches", "relu, sub-batches", "renorm")):
        case = {**case, "given": ("gamma", "beta"), "virtual_batch_size": None}
    values = operands(case)
    cotangent = RNG.normal(size=case["shape"])
    weights = {n: RNG.normal(size=np.shape(v)) for n, v in values.items() if n in ("x", "gamma", "beta", "residual")}
    with GradientTape() as outer:
        g = outer.watch(cotangent)
        watched = [values[n] for n in weights]
        outer.watch(watched)
        total = first_gradients(case, inference, values, g, weights)
    found = outer.gradient(total, [cotangent, *watched], unconnected_gradients="zero")
    for source, gradient in zip([cotangent, *watched], found, strict=True):
        direction = RNG.normal(size=source.shape)
        step = 1e-5
        keep = source.copy()
        results = []
        for sign in (1, -1):
            source[...] = keep + sign * step * direction
            results.append(float(first_gradients(case, inference, values, cotangent, weights)))
        source[...] = keep
        expected = (results[0] - results[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=2e-6, atol=2e-6)
