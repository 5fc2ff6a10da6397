"""Dense, convolution, pooling, partitioners and scopes against what TensorFlow 2.15.1 gave."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers.naming import snake_case
from tests.reference.cases import case, cases

K, L = gl.keras.layers, gl.layers
FAMILIES = {"modern": K, "legacy": L}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return constructor arguments: regularizers from ``{"L2": 0.5}`` or ``{"L1L2": {"l1": ...}}``."""
    found = {}
    for key, value in config.items():
        if key in ("layer", "losses_order"):
            continue
        if key.endswith("regularizer"):
            [(name, arguments)] = value.items()
            cls = getattr(gl.regularizers, name)
            value = cls(**arguments) if isinstance(arguments, dict) else cls(arguments)
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", [*cases("dense"), *cases("conv2d"), *cases("pooling")], ids=str)
def test_outputs_and_gradients(case, family):
    settings = settings_of(case.config)
    if case.kind == "pooling":  # positional: the legacy family has no default for strides
        arguments = [settings.pop("pool_size"), settings.pop("strides") or case.config["pool_size"]]
    else:
        arguments = []
    layer = getattr(FAMILIES[family], case.config["layer"])(*arguments, **settings)
    x = case.arrays["x"].copy()
    layer.build(x.shape)
    layer.set_weights([case.arrays[name] for name in ("kernel", "bias") if name in case.arrays])
    with gl.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        total = gl.reduce_sum(y * case.arrays["w"])
    gradients = tape.gradient(total, [x, *layer.weights])
    tolerance = {"rtol": 0, "atol": case.tolerance}
    np.testing.assert_allclose(y.value, case.arrays["y"], **tolerance)
    for name, gradient in zip(("x", "kernel", "bias"), gradients, strict=False):
        if f"grad.{name}" in case.arrays:
            np.testing.assert_allclose(gradient, case.arrays[f"grad.{name}"], **tolerance)


@pytest.mark.parametrize("name", ["conv_valid", "conv_same_s2", "pool_01", "pool_09", "conv2d_1"])
def test_channels_first_is_the_same_transposed(name):
    found = case(name)
    settings = settings_of(found.config)
    layer = getattr(K, found.config["layer"])(**settings, data_format="channels_first")
    x = np.moveaxis(found.arrays["x"], -1, 1)
    layer.build(x.shape)
    layer.set_weights([found.arrays[n] for n in ("kernel", "bias") if n in found.arrays])
    np.testing.assert_allclose(np.moveaxis(layer(x), 1, -1), found.arrays["y"], rtol=0, atol=found.tolerance)


def test_dense_losses_in_a_graph():
    found = case("dense_losses")
    with gl.Graph().as_default():
        layer = L.Dense(**settings_of(found.config), name="d")
        x = gl.placeholder(gl.float32, found.arrays["x"].shape)
        y = layer(x)
        assert [v.name for v in layer.variables] == found.expect["names"]
        assert y.name == found.expect["tensor_name"]
        assert layer.count_params() == found.expect["count_params"]
        assert len(layer.get_losses_for(x)) == found.expect["losses_for_input"]
        assert len(layer.get_losses_for(None)) == found.expect["losses_for_none"]
        assert len(gl.get_collection(gl.GraphKeys.REGULARIZATION_LOSSES)) == 3
        gradients = gl.gradients(gl.reduce_sum(y * found.arrays["w"]), [x, *layer.variables])
        with gl.Session() as session:
            session.run([v.assign(found.arrays[n]) for v, n in zip(layer.variables, ("kernel", "bias"), strict=True)])
            values = session.run([y, layer.losses, gradients], {x: found.arrays["x"]})
    np.testing.assert_allclose(values[0], found.arrays["y"], rtol=0, atol=found.tolerance)
    np.testing.assert_allclose(values[1], found.arrays["losses"], rtol=0, atol=found.tolerance)
    for name, gradient in zip(("x", "kernel", "bias"), values[2], strict=True):
        np.testing.assert_allclose(gradient, found.arrays[f"grad.{name}"], rtol=0, atol=found.tolerance)


PARTITIONERS = {
    "fixed3": gl.fixed_size_partitioner(3),
    "fixed3_axis1": gl.fixed_size_partitioner(3, axis=1),
    "fixed5_of_3": gl.fixed_size_partitioner(5),
    "fixed1": gl.fixed_size_partitioner(1),
    "axis_size64": gl.variable_axis_size_partitioner(64),
    "axis_size64_max2": gl.variable_axis_size_partitioner(64, max_shards=2),
    "axis_size64_axis1": gl.variable_axis_size_partitioner(64, axis=1),
    "axis_size8": gl.variable_axis_size_partitioner(8),
    "axis_size8000": gl.variable_axis_size_partitioner(8000),
}


@pytest.mark.parametrize("expected", case("partitioners").expect, ids=lambda e: e["name"])
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_partitioners(expected, mode):
    partitioner = PARTITIONERS[expected["name"]]
    shape = expected["shape"]
    assert partitioner(shape=gl.TensorShape(shape), dtype=gl.float32) == expected["partition_list"]

    class Holder(L.Layer):
        def build(self, input_shape: Any) -> None:
            self.w = self.add_variable("w", shape, partitioner=partitioner)

    with gl.Graph().as_default() if mode == "graph" else contextlib.nullcontext():
        layer = Holder()
        layer(gl.zeros((1,)))
        assert isinstance(layer.w, gl.PartitionedVariable)
        assert [list(v.shape) for v in layer.variables] == expected["part_shapes"]
        for variable, suffix in zip(layer.variables, expected["part_suffixes"], strict=True):
            assert variable.name.endswith(suffix)
        assert layer.count_params() == np.prod(shape)
        whole = layer.w.as_tensor()
        assert tuple(whole.shape) == tuple(shape)


def test_snake_case():
    for name, expected in case("snake_case").expect.items():
        assert snake_case(name) == expected


@pytest.mark.parametrize("case", cases("layer_scopes"), ids=str)
def test_names_and_scopes(case):
    with gl.Graph().as_default():
        x = gl.placeholder(gl.float32, (2, 3))
        for step, expected in zip(case.config["steps"], case.expect, strict=True):
            scope = gl.variable_scope(step["inside"]) if "inside" in step else contextlib.nullcontext()
            with contextlib.ExitStack() as stack:
                if "error" in expected:
                    stack.enter_context(pytest.raises(ValueError))
                stack.enter_context(scope)
                layer = L.Dense(1, **step.get("ctor", {}))
                y = layer(x, **({"scope": step["call_scope"]} if "call_scope" in step else {}))
                found = {
                    "name": layer.name,
                    "scope_name": layer.scope_name,
                    "variables": [v.name for v in layer.variables],
                    "output": y.name,
                }
            if "error" not in expected:
                assert found == expected
