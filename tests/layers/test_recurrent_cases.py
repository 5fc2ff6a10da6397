"""Cells, wrappers, RNN layers and dynamic_rnn against every recurrent case recorded from TensorFlow."""

import warnings

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import nest, ops
from gpulayers.device import asarray, asnumpy, device
from gpulayers.keras import layers
from gpulayers.nn import rnn_cell
from gpulayers.trace import GradientTape, Graph, Session, gradients, placeholder
from gpulayers.variables import global_variables_initializer
from tests.reference.cases import Case, cases, residual_function

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS, LAYERS, DYNAMIC = (cases(kind) for kind in ("rnn_cell_step", "rnn_layer", "dynamic_rnn"))
# Written out, because a case's config holds the constructor's arguments among others.
MODERN = ("activation", "recurrent_activation", "use_bias", "reset_after", "implementation")
LEGACY = ("forget_bias", "state_is_tuple", "use_peepholes", "cell_clip", "num_proj", "proj_clip")


def close(actual, expected, case, what):
    actual = np.asarray(asnumpy(actual), np.float64)
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(
        actual, np.asarray(expected, np.float64), rtol=0, atol=max(case.tolerance, 1e-6) * scale,
        err_msg=f"{case.name}: {what}",
    )  # fmt: skip


def residual_of(config):
    return residual_function(config.get("residual_fn"), lambda values, axis: ops.concatenate(values, axis))


def modern_cell(config):
    arguments = {key: config[key] for key in MODERN if key in config}
    cell = getattr(layers, config["cell"])(config["units"], **arguments)
    wrappers = config.get("wrappers", 1 if config.get("residual_wrapped") else 0)
    for level in range(wrappers):
        cell = gl.nn.RNNCellResidualWrapper(cell, residual_of(config) if level == 0 or wrappers == 1 else None)
    return cell


def innermost(cell):
    while hasattr(cell, "cell"):
        cell = cell.cell
    return cell


def set_weights(cell, case, prefix):
    cell = innermost(cell)
    for name, value in case.with_prefix(prefix).items():
        variable = getattr(cell, name)
        variable.store(variable.accept(value))


def weighted(y, w):
    return ops.sum(y * asarray(w))


def check_gradients(found, case, names):
    for name, gradient in zip(names, found, strict=True):
        close(gradient, case.arrays[f"grad.{name}"], case, f"gradient of {name}")


# --- one step ---------------------------------------------------------------------------------------------------------


def step_sources(case, x, states, cell):
    base = innermost(cell)
    named = {"x": x} | {f"state{i}": s for i, s in enumerate(states)}
    named |= {name: getattr(base, name) for name in case.with_prefix("weight.")}
    return {name: source for name, source in named.items() if f"grad.{name}" in case.arrays}


def run_step_eagerly(case):
    cell = modern_cell(case.config)
    x, states = asarray(case.arrays["x"]), [asarray(s) for s in case.numbered("state")]
    cell(x, states)
    set_weights(cell, case, "weight.")
    with GradientTape() as tape:
        tape.watch([x, *states])
        y, new_states = cell(x, states)
        total = weighted(y, case.arrays["w"]) if "w" in case.arrays else None
    close(y, case.arrays["y"], case, "y")
    for i, state in enumerate(nest.flatten(new_states)):
        close(state, case.arrays[f"new_state{i}"], case, f"state {i}")
    if total is not None:
        sources = step_sources(case, x, states, cell)
        assert sources
        check_gradients(tape.gradient(total, list(sources.values())), case, sources)


def run_step_in_graph(case):
    with Graph().as_default(), Session() as session:
        cell = modern_cell(case.config)
        x = placeholder("float32", (None, case.arrays["x"].shape[1]))
        states = [placeholder("float32", s.shape) for s in case.numbered("state")]
        y, new_states = cell(x, states)
        fetches = {"y": y} | {f"new_state{i}": s for i, s in enumerate(nest.flatten(new_states))}
        if "w" in case.arrays:
            sources = step_sources(case, x, states, cell)
            found = gradients(weighted(y, case.arrays["w"]), list(sources.values()))
            fetches |= {f"grad.{name}": g for name, g in zip(sources, found, strict=True)}
        session.run(global_variables_initializer())
        set_weights(cell, case, "weight.")
        feeds = {x: case.arrays["x"]} | dict(zip(states, case.numbered("state"), strict=True))
        for name, value in session.run(fetches, feeds).items():
            close(value, case.arrays[name], case, name)


# --- the RNN layer ----------------------------------------------------------------------------------------------------


def cell_configs(config):
    if "cells" not in config:
        return [config]
    own = config.get("cell_configs", [{}] * len(config["cells"]))
    shared = {key: config[key] for key in ("units", "residual_wrapped", "residual_fn") if key in config}
    return [{"cell": name, **shared, **extra} for name, extra in zip(config["cells"], own, strict=True)]


def make_rnn(config, **extra):
    cells = [modern_cell(one) for one in cell_configs(config)]
    arguments = {**config["layer_args"], **extra}
    return layers.RNN(cells if len(cells) > 1 else cells[0], return_state=True, **arguments), cells


def initial_states(case, layer, values):
    return nest.pack_sequence_as(layer.cell.state_size, list(values)) if values else None


def set_layer_weights(cells, case):
    for i, cell in enumerate(cells):
        set_weights(cell, case, f"weight{i}.")


def layer_sources(case, x, states, cells):
    named = {"x0": x} | {f"initial_state{i}": s for i, s in enumerate(states)}
    for i, cell in enumerate(cells):
        named |= {f"weight{i}.{n}": getattr(innermost(cell), n) for n in case.with_prefix(f"weight{i}.")}
    return {name: source for name, source in named.items() if f"grad.{name}" in case.arrays}


def run_layer_eagerly(case):
    layer, cells = make_rnn(case.config)
    inputs = [asarray(x) for x in case.numbered("x")]
    layer(inputs[0])
    layer.reset_states() if layer.stateful else None
    set_layer_weights(cells, case)
    mask = asarray(case.arrays["mask"]) if "mask" in case.arrays else None
    states = [asarray(s) for s in case.numbered("initial_state")]
    for call, x in enumerate(inputs):
        with GradientTape() as tape:
            tape.watch([x, *states])
            y, *final = layer(x, mask=mask, initial_state=initial_states(case, layer, states))
            total = weighted(y, case.arrays["w0"]) if "w0" in case.arrays and not call else None
        close(y, case.arrays[f"y{call}"], case, f"y{call}")
        for i, state in enumerate(nest.flatten(final)):
            close(state, case.arrays[f"state{call}.{i}"], case, f"state {i} of call {call}")
        if total is not None:
            sources = layer_sources(case, x, states, cells)
            assert sources
            check_gradients(tape.gradient(total, list(sources.values())), case, sources)


def run_layer_in_graph(case, known_time):
    with Graph().as_default(), Session() as session:
        layer, cells = make_rnn(case.config)
        shape = list(case.arrays["x0"].shape)
        if not (known_time or layer.unroll):
            shape[0 if layer.time_major else 1] = None
        x = placeholder("float32", shape)
        mask = placeholder("bool", shape[:2]) if "mask" in case.arrays else None
        states = [placeholder("float32", s.shape) for s in case.numbered("initial_state")]
        y, *final = layer(x, mask=mask, initial_state=initial_states(case, layer, states))
        slopes = {}
        if "w0" in case.arrays:
            sources = layer_sources(case, x, states, cells)
            found = gradients(weighted(y, case.arrays["w0"]), list(sources.values()))
            slopes = {f"grad.{name}": g for name, g in zip(sources, found, strict=True)}
        session.run(global_variables_initializer())
        set_layer_weights(cells, case)
        for call, value in enumerate(case.numbered("x")):
            fetches = {f"y{call}": y} | {f"state{call}.{i}": s for i, s in enumerate(nest.flatten(final))}
            fetches |= slopes if not call else {}
            feeds = {x: value} | dict(zip(states, case.numbered("initial_state"), strict=True))
            feeds |= {mask: case.arrays["mask"]} if mask is not None else {}
            results, _ = session.run([fetches, layer.updates], feeds)
            for name, result in results.items():
                close(result, case.arrays[name], case, name)


# --- dynamic_rnn ------------------------------------------------------------------------------------------------------


def legacy_cell(name, config, wrapper, residual_fn):
    arguments = {"num_units": config["num_units"]} | {key: config[key] for key in LEGACY if key in config}
    cell = getattr(rnn_cell, name.removeprefix("legacy "))(**arguments)
    if wrapper is None:
        return cell
    kind = rnn_cell.ResidualWrapper if wrapper == "ResidualWrapper" else gl.nn.RNNCellResidualWrapper
    return kind(cell, residual_fn=residual_fn)


def dynamic_cell(config):
    wrapper = config.get("wrapper", "ResidualWrapper") if config.get("residual_wrapped") else None
    function = residual_of(config)
    if not config.get("multi"):
        return legacy_cell(config["cell"], config, wrapper, function)
    own = config.get("cell_configs", [{}] * len(config["cells"]))
    units = {"num_units": config["num_units"] if "num_proj" not in config else config["num_proj"]}
    return rnn_cell.MultiRNNCell(
        [legacy_cell(n, {**units, **extra}, wrapper, function) for n, extra in zip(config["cells"], own, strict=True)]
    )


def variables_of(cell):
    """All variables of a legacy cell, found through wrappers and stacks, by name."""
    found = list(cell.weights) if not hasattr(cell, "cell") or cell.weights else []
    for below in [*getattr(cell, "cells", []), *([cell.cell] if hasattr(cell, "cell") else [])]:
        found += variables_of(below)
    return list({id(v): v for v in found}.values())


def run_dynamic(case, cell, x, states, lengths):
    given = nest.pack_sequence_as(cell.state_size, states) if states else None
    return gl.nn.dynamic_rnn(
        cell, x, sequence_length=lengths, initial_state=given, dtype="float32", time_major=case.config["time_major"]
    )


def set_named(variables, case):
    values = case.with_prefix("weight.")
    assert {v.name.split(":")[0] for v in variables} == set(values)
    for variable in variables:
        variable.store(variable.accept(values[variable.name.split(":")[0]]))


def dynamic_sources(case, x, states, variables):
    named = {"x": x} | {f"initial_state{i}": s for i, s in enumerate(states)}
    named |= {v.name.split(":")[0]: v for v in variables}
    return {name: source for name, source in named.items() if f"grad.{name}" in case.arrays}


def run_dynamic_eagerly(case):
    cell = dynamic_cell(case.config)
    lengths = case.config["sequence_length"]
    lengths = None if lengths is None else np.asarray(lengths)
    x, states = asarray(case.arrays["x"]), [asarray(s) for s in case.numbered("initial_state")]
    run_dynamic(case, cell, x, states, lengths)
    variables = variables_of(cell)
    set_named(variables, case)
    with GradientTape() as tape:
        tape.watch([x, *states])
        y, final = run_dynamic(case, cell, x, states, lengths)
        total = weighted(y, case.arrays["w"])
    close(y, case.arrays["y"], case, "y")
    for i, state in enumerate(nest.flatten(final)):
        close(state, case.arrays[f"final_state{i}"], case, f"state {i}")
    sources = dynamic_sources(case, x, states, variables)
    assert sources
    check_gradients(tape.gradient(total, list(sources.values())), case, sources)


def run_dynamic_in_graph(case, known_time):
    with Graph().as_default(), Session() as session:
        cell = dynamic_cell(case.config)
        shape = list(case.arrays["x"].shape)
        if not known_time:
            shape[0 if case.config["time_major"] else 1] = None
        x = placeholder("float32", shape)
        states = [placeholder("float32", s.shape) for s in case.numbered("initial_state")]
        given = case.config["sequence_length"]
        lengths = None if given is None else placeholder("int32", (None,))
        y, final = run_dynamic(case, cell, x, states, lengths)
        variables = gl.global_variables()
        sources = dynamic_sources(case, x, states, variables)
        found = gradients(weighted(y, case.arrays["w"]), list(sources.values()))
        fetches = {"y": y} | {f"final_state{i}": s for i, s in enumerate(nest.flatten(final))}
        fetches |= {f"grad.{name}": g for name, g in zip(sources, found, strict=True)}
        session.run(global_variables_initializer())
        set_named(variables, case)
        feeds = {x: case.arrays["x"]} | dict(zip(states, case.numbered("initial_state"), strict=True))
        feeds |= {} if lengths is None else {lengths: given}
        for name, value in session.run(fetches, feeds).items():
            close(value, case.arrays[name], case, name)


# --- the tests --------------------------------------------------------------------------------------------------------

EAGER = {"rnn_cell_step": run_step_eagerly, "rnn_layer": run_layer_eagerly, "dynamic_rnn": run_dynamic_eagerly}
ALL = [*STEPS, *LAYERS, *DYNAMIC]


def test_no_case_is_missing():
    from_the_reference = [case for case in ALL if not any(part in case.name for part in ("_pair_",))]
    assert len(from_the_reference) >= 31


@pytest.mark.parametrize("case", ALL, ids=str)
def test_eager(case: Case):
    EAGER[case.kind](case)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_in_graph(case: Case):
    run_step_in_graph(case)


@pytest.mark.parametrize("known_time", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_in_graph(case: Case, known_time):
    run_layer_in_graph(case, known_time)


@pytest.mark.parametrize("known_time", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("case", DYNAMIC, ids=str)
def test_dynamic_in_graph(case: Case, known_time):
    run_dynamic_in_graph(case, known_time)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_emulated(case: Case):
    from tests.kernels import strict_array  # noqa: F401  # registers the device

    with device("emulated"):
        EAGER[case.kind](case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gpu(case: Case):
    with warnings.catch_warnings(), device("gpu"):
        EAGER[case.kind](case)
