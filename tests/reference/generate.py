"""Record further cases from TensorFlow 2.15.1 into data/more.json and data/more.npz.

    python3.11 -m venv reference-venv
    reference-venv/bin/pip install -r tests/reference/requirements.txt
    reference-venv/bin/python tests/reference/generate.py

Runs on a CPU in about two minutes and writes the same arrays again on the same machine. Combinations that the reference
refuses are left out by the `possible_*` functions, and so are the ones where it contradicts the pages:

* a tensor `training` with `virtual_batch_size` (the whole batch becomes one group);
* renormalisation of float64 (a TypeError inside the reference);
* a mask with `virtual_batch_size` (the mask is not split with the batch);
* renormalisation with `trainable=False` in eager mode (its two renorm statistics move although nothing is trained).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
v1.experimental.output_all_intermediates(True)
v1.logging.set_verbosity(v1.logging.ERROR)
warnings.filterwarnings("ignore")

DATA = Path(__file__).parent / "data"
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 3e-5, "float64": 1e-6}

KINDS = {
    "batch_normalization": "as in examples.json; mask and adjustment_returns in config; in graph mode the update ops "
    "run with the step, in eager mode they happen by themselves",
    "rnn_cell_step": "as in examples.json",
    "rnn_layer": "RNN layer with return_state=True; call i maps x<i> (and initial_state<j>, mask) to y<i>, "
    "state<i>.<j>; weight<cell>.<var>; grad.<array> is the gradient of sum(y0*w0) for that array",
    "dynamic_rnn": "as in examples.json, also grad.initial_state<j>; wrapper names the wrapper's class",
    "dense": "legacy Dense layer: x, kernel, bias, y; grad.* of sum(y*w)",
    "conv2d": "Conv2D layer, NHWC",
    "pooling": "pooling layer, channels last; grad.x of sum(y*w)",
    "optimizer": "variable start, gradients gradient<i>; after<i> is the variable after step i",
    "loss": "per_example and mean over target and prediction; grad.prediction is the gradient of mean",
    "initializer_fans": "expect: shape -> [fan_in, fan_out]",
    "initializer_spread": "expect: standard deviation and largest magnitude of a large sample, the mean is 0",
    "snake_case": "expect: class name -> first automatic name of a modern layer",
    "layer_scopes": "legacy Dense(3) layers made and called one after the other in one graph; ctor, inside (an "
    "enclosing variable scope), call_scope; expect per layer: name, scope_name, variables, output, or the error",
}


# -- pairwise choice ---------------------------------------------------------------------------------------------------


def pairs_of(row: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Return the pairs of (factor, value) that a combination covers."""
    return {(a, repr(row[a]), b, repr(row[b])) for a, b in itertools.combinations(sorted(row), 2)}


def pairwise(
    factors: dict[str, list[Any]], possible: Callable[[dict[str, Any]], bool], more: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Return combinations that cover every pair of values that can occur together, and `more` drawn at random."""
    draw = random.Random(seed)

    def valid() -> dict[str, Any]:
        while True:
            row = {name: draw.choice(values) for name, values in factors.items()}
            if possible(row):
                return row

    pool = [valid() for _ in range(60000)]
    wanted = set().union(*map(pairs_of, pool))
    chosen: list[dict[str, Any]] = []
    while wanted:
        best = max(draw.sample(pool, 400), key=lambda row: len(pairs_of(row) & wanted))
        if not pairs_of(best) & wanted:
            target = next(iter(sorted(wanted)))
            best = next(row for row in pool if target in pairs_of(row))
        chosen.append(best)
        wanted -= pairs_of(best)
    return chosen + [valid() for _ in range(more)]


# -- writing -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Collects cases and writes them once, at the end."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def add(
        self, name: str, kind: str, mode: str, config: dict[str, Any], arrays: dict[str, Any], **extra: Any
    ) -> None:
        """Add one case; bfloat16 is stored as float32."""
        if any(case["name"] == name for case in self.cases):
            raise ValueError(f"two cases are called {name}")
        listed, stored_as = {}, {}
        for key, array in arrays.items():
            array = np.asarray(array)
            if array.dtype.name == "bfloat16":
                array = array.astype(np.float32)
                stored_as[key] = "bfloat16 values stored as float32"
            self.arrays[f"{name}/{key}"] = array
            listed[key] = {"key": f"{name}/{key}", "shape": list(array.shape), "dtype": array.dtype.name}
        case = {"name": name, "kind": kind, "mode": mode, "config": config, "arrays": listed, **extra}
        if stored_as:
            case["stored_as"] = stored_as
        self.cases.append(case)

    def write(self) -> None:
        """Write more.json, one case per line, and more.npz."""
        head = {
            "reference": f"TensorFlow {tf.__version__} / Keras 2.15, CPU",
            "array_file": "more.npz",
            "key_rule": 'npz key = case name + "/" + array name',
            "kinds": KINDS,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        cases = ",\n".join("    " + json.dumps(case) for case in self.cases)
        text = "{\n" + "\n".join(lines) + '\n  "cases": [\n' + cases + "\n  ]\n}\n"
        (DATA / "more.json").write_text(text, encoding="utf-8")
        np.savez_compressed(DATA / "more.npz", **self.arrays)
        print(f"{len(self.cases)} cases, {len(self.arrays)} arrays")


def absolute(arrays: dict[str, Any]) -> float:
    """Return the absolute tolerance for float32 arrays: 1e-5 of the largest number, at least 3e-5."""
    largest = max(float(np.abs(np.asarray(a, np.float64)).max()) for a in arrays.values())
    return float(f"{max(3e-5, 1e-5 * largest):.2g}")


def numbers(rng: np.random.Generator, shape: Any, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return normal numbers of three decimals, short in print and in the file."""
    return np.round(offset + scale * rng.normal(size=shape), 3).astype(np.float32)


# -- batch normalisation -----------------------------------------------------------------------------------------------

CLIPS = {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}
CLIP_SETS = [set(keys) for size in range(4) for keys in itertools.combinations(sorted(CLIPS), size)]

BN_FACTORS: dict[str, list[Any]] = {
    "dtype": ["float32", "float16", "bfloat16", "float64"],
    "rank": [2, 3, 4, 5],
    "axis": ["last", "one", "middle", "several", "zero"],
    "fused": [None, False],
    "training": ["bool", "tensor"],
    "renorm": [None, *(",".join(sorted(keys)) for keys in CLIP_SETS)],
    "virtual": [False, True],
    "adjustment": [False, True],
    "mask": [False, True],
    "center": [True, False],
    "scale": [True, False],
    "trainable": [True, False],
    "momentum": [0.99, 0.6],
    "epsilon": [1e-3, 1e-5],
    "mode": ["graph", "eager"],
    "steps": ["T", "TTI", "TT", "TI"],
}


def possible_bn(row: dict[str, Any]) -> bool:
    """Say whether the reference runs this combination as the pages promise."""
    if row["axis"] in ("one", "several") and row["rank"] < 3 or row["axis"] == "middle" and row["rank"] < 4:
        return False
    if row["virtual"] and (row["adjustment"] or row["mask"] or row["training"] == "tensor" or row["axis"] == "zero"):
        return False
    if row["renorm"] is not None and row["mode"] == "eager" and not row["trainable"]:
        return False
    return not (row["renorm"] is not None and row["dtype"] == "float64")


def bn_shape_and_axis(row: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
    rank = row["rank"]
    shape = {2: (6, 3), 3: (6, 3, 4), 4: (6, 3, 2, 4), 5: (6, 3, 2, 2, 3)}[rank]
    return shape, {"last": -1, "one": 1, "middle": rank - 2, "several": [-1, 1], "zero": 0}[row["axis"]]


def bn_case(name: str, row: dict[str, Any], rng: np.random.Generator, recorder: Recorder) -> None:
    """Record one combination: steps of training and inference, then the gradient of the last step."""
    shape, axis = bn_shape_and_axis(row)
    axes = [a % len(shape) for a in (axis if isinstance(axis, list) else [axis])]
    along = [n if i in axes else 1 for i, n in enumerate(shape)]
    ctor: dict[str, Any] = {"axis": axis, "momentum": row["momentum"], "epsilon": row["epsilon"]}
    ctor |= {key: row[key] for key in ("center", "scale", "trainable") if not row[key]}
    if row["fused"] is not None:
        ctor["fused"] = row["fused"]
    if row["renorm"] is not None:
        clips = {key: CLIPS[key] for key in row["renorm"].split(",") if key}
        ctor |= {"renorm": True, "renorm_momentum": 0.9} | ({"renorm_clipping": clips} if clips else {})
    if row["virtual"]:
        ctor["virtual_batch_size"] = 3
    config: dict[str, Any] = {"ctor": dict(ctor)}
    adjustment = None
    if row["adjustment"]:
        pair = {"scale": 1 + numbers(rng, along, 0.1), "bias": numbers(rng, along, 0.2)}
        config["adjustment_returns"] = {key: np.round(value, 3).tolist() for key, value in pair.items()}
        adjustment = config["adjustment_returns"]
    mask = None
    if row["mask"]:
        mask = rng.random(shape[:-1]) < 0.7
        mask[: len(shape) - 1] = True
        config["mask"] = mask.tolist()
    offset, spread = numbers(rng, along, 2.0), 0.5 + rng.random(along)
    xs = [(offset + spread * numbers(rng, shape)).round(3).astype(np.float32) for _ in row["steps"]]
    xs = [tf.cast(x, row["dtype"]).numpy() for x in xs]
    w = tf.cast(numbers(rng, shape), row["dtype"]).numpy()
    training = [letter == "T" for letter in row["steps"]]
    run = bn_graph if row["mode"] == "graph" else bn_eager
    arrays, facts = run(ctor, adjustment, mask, xs, w, training, row, rng)
    config["steps"] = [{"x": f"x{i}", "y": f"y{i}", "training": t} for i, t in enumerate(training)]
    config |= {"input_dtype": row["dtype"], "updates_run": True, "training_passed_as": row["training"], **facts}
    for key, array in arrays.items():
        if not np.isfinite(np.asarray(array, np.float64)).all():
            raise ValueError(f"{name}: {key} is not finite")
    notes = "mask ignored on the fused path" if mask is not None and facts["fused_path_selected"] else ""
    recorder.add(
        name, "batch_normalization", row["mode"], config, arrays, tolerance=TOLERANCE[row["dtype"]], notes=notes
    )


def bn_layer(ctor: dict[str, Any], adjustment: Any, dtype: str) -> Any:
    parameter = "float64" if dtype == "float64" else "float32"

    def adjust(_shape: Any) -> tuple[Any, Any]:
        return tf.constant(adjustment["scale"], parameter), tf.constant(adjustment["bias"], parameter)

    return v1.layers.BatchNormalization(name="bn", dtype=dtype, adjustment=adjust if adjustment else None, **ctor)


def bn_initial(layer: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return initial values by variable name, positive where they are variances or deviations."""
    values = {}
    for variable in layer.variables:
        name = variable.name.split("/")[-1].split(":")[0]
        value = numbers(rng, variable.shape, 0.3)
        if name != "beta" and not name.endswith("mean"):
            value = (1.0 + np.abs(value)).round(3)
        values[name] = value.astype(variable.dtype.as_numpy_dtype)
    return values


def bn_targets(layer: Any) -> dict[str, Any]:
    """Return the parameters a gradient is recorded for: those that train."""
    return {
        name: getattr(layer, name) for name in ("gamma", "beta") if getattr(layer, name) is not None and layer.trainable
    }


def bn_facts(layer: Any) -> dict[str, Any]:
    return {"fused_path_selected": bool(layer.fused), "built_axis": list(layer.axis)}


def bn_graph(ctor, adjustment, mask, xs, w, training, row, rng):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(row["dtype"], xs[0].shape)
        layer = bn_layer(ctor, adjustment, row["dtype"])
        flag = v1.placeholder(tf.bool, ())
        outputs, updates = {}, {}
        for value in sorted(set(training), reverse=True):
            if row["training"] == "tensor" and outputs:
                outputs[value], updates[value] = outputs[True], updates[True]
                continue
            before = len(layer.updates)
            given = flag if row["training"] == "tensor" else value
            outputs[value] = layer(x, training=given, mask=None if mask is None else tf.constant(mask))
            updates[value] = layer.updates[before:]
        initial = bn_initial(layer, rng)
        session.run(v1.global_variables_initializer())
        for variable in layer.variables:
            variable.load(initial[variable.name.split("/")[-1].split(":")[0]], session)
        arrays = {f"init.{name}": value for name, value in initial.items()}
        y = outputs[training[-1]]
        targets = bn_targets(layer)
        gradients = dict(zip(["x", *targets], tf.gradients(y * w, [x, *targets.values()]), strict=True))
        for i, (value, train) in enumerate(zip(xs, training, strict=True)):
            feed = {x: value, flag: train}
            if i == len(xs) - 1:
                recorded = session.run(gradients, feed)
                arrays |= {"w": w} | {f"grad.{name}": value for name, value in recorded.items()}
            result, _ = session.run([outputs[train], updates[train]], feed)
            arrays |= {f"x{i}": value, f"y{i}": result}
            for variable in layer.variables:
                arrays[f"after{i}.{variable.name.split('/')[-1].split(':')[0]}"] = session.run(variable)
        return arrays, bn_facts(layer)


def bn_eager(ctor, adjustment, mask, xs, w, training, row, rng):
    layer = bn_layer(ctor, adjustment, row["dtype"])
    layer.build(xs[0].shape)
    initial = bn_initial(layer, rng)
    for variable in layer.variables:
        variable.assign(initial[variable.name.split("/")[-1].split(":")[0]])
    arrays = {f"init.{name}": value for name, value in initial.items()}
    for i, (value, train) in enumerate(zip(xs, training, strict=True)):
        x = tf.constant(value)
        given = tf.constant(train) if row["training"] == "tensor" else train
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=given, mask=None if mask is None else tf.constant(mask))
            total = tf.reduce_sum(y * w)
        if i == len(xs) - 1:
            targets = bn_targets(layer)
            recorded = dict(zip(["x", *targets], tape.gradient(total, [x, *targets.values()]), strict=True))
            arrays |= {"w": w} | {f"grad.{name}": tf.convert_to_tensor(g).numpy() for name, g in recorded.items()}
        arrays |= {f"x{i}": value, f"y{i}": y.numpy()}
        for variable in layer.variables:
            arrays[f"after{i}.{variable.name.split('/')[-1].split(':')[0]}"] = variable.numpy()
    return arrays, bn_facts(layer)


def record_batch_normalization(recorder: Recorder) -> None:
    """Record every pair of options, and more combinations drawn at random."""
    for number, row in enumerate(pairwise(BN_FACTORS, possible_bn, more=40, seed=11)):
        name = f"bn_pair_{number:03d}"
        try:
            bn_case(name, row, np.random.default_rng(1000 + number), recorder)
        except Exception as error:
            raise RuntimeError(f"{name}: {row}") from error


# -- recurrent ---------------------------------------------------------------------------------------------------------

RESIDUALS: dict[str, Callable[[Any, Any], Any]] = {
    "0.5*inputs - outputs": lambda inputs, outputs: 0.5 * inputs - outputs,
    "inputs * outputs": lambda inputs, outputs: inputs * outputs,
    "concat([inputs, 2*outputs], -1)": lambda inputs, outputs: tf.concat([inputs, 2 * outputs], -1),
}


def modern_cell(config: dict[str, Any]) -> Any:
    """Return the modern cell of a config, wrapped as often as it says."""
    own = ("reset_after", "activation", "recurrent_activation", "use_bias", "implementation")
    cell = getattr(tf.keras.layers, config["cell"])(config["units"], **{k: config[k] for k in own if k in config})
    for _ in range(config.get("wrappers", int(config.get("residual_wrapped", False)))):
        cell = tf.nn.RNNCellResidualWrapper(cell, residual_fn=RESIDUALS.get(config.get("residual_fn", "")))
    return cell


def inner(cell: Any) -> Any:
    while hasattr(cell, "cell"):
        cell = cell.cell
    return cell


def short_name(variable: Any) -> str:
    return variable.name.split("/")[-1].split(":")[0]


def fill(variables: Any, rng: np.random.Generator) -> None:
    for variable in variables:
        variable.assign(numbers(rng, variable.shape, 0.5))


CELLS: list[dict[str, Any]] = [
    {"cell": "SimpleRNNCell"},
    {"cell": "SimpleRNNCell", "activation": "relu", "use_bias": False},
    {"cell": "GRUCell"},
    {"cell": "GRUCell", "reset_after": False},
    {"cell": "GRUCell", "recurrent_activation": "hard_sigmoid"},
    {"cell": "GRUCell", "use_bias": False},
    {"cell": "LSTMCell"},
    {"cell": "LSTMCell", "use_bias": False, "activation": "softsign"},
    {"cell": "LSTMCell", "recurrent_activation": "hard_sigmoid"},
]


def record_cell_steps(recorder: Recorder) -> None:
    """Record one step of every cell, bare, wrapped, wrapped twice and with each residual function."""
    shapes = [{}, {"wrappers": 1}, {"wrappers": 2}, *({"wrappers": 1, "residual_fn": text} for text in RESIDUALS)]
    for number, (cell_config, wrapping) in enumerate(itertools.product(CELLS, shapes)):
        rng = np.random.default_rng(3000 + number)
        wide = wrapping.get("residual_fn", "").startswith("concat")
        config = {**cell_config, "units": 5 if wide else 4, **wrapping}
        cell = modern_cell(config)
        x = tf.constant(numbers(rng, (3, 4)))
        cell.build((3, 4))
        weights = inner(cell).weights
        fill(weights, rng)
        count = 2 if config["cell"] == "LSTMCell" else 1
        states = [tf.constant(numbers(rng, (3, config["units"]))) for _ in range(count)]
        with tf.GradientTape() as tape:
            tape.watch([x, states])
            y, new_states = cell(x, states)
            w = tf.constant(numbers(rng, y.shape))
            total = tf.reduce_sum(y * w)
        arrays = {"x": x, "y": y, "w": w}
        sources = {"x": x} | {f"state{i}": state for i, state in enumerate(states)}
        sources |= {short_name(v): v for v in weights}
        arrays |= {f"state{i}": state for i, state in enumerate(states)}
        arrays |= {f"new_state{i}": state for i, state in enumerate(tf.nest.flatten(new_states))}
        arrays |= {f"weight.{short_name(v)}": v.numpy() for v in weights}
        arrays |= gradients_of(tape, total, sources)
        recorder.add(
            f"cell_pair_{number:03d}", "rnn_cell_step", "eager", config, arrays, tolerance=TOLERANCE["float32"]
        )


def gradients_of(tape: Any, total: Any, sources: dict[str, Any]) -> dict[str, Any]:
    """Return grad.<name> for every source that the total depends on."""
    found = tape.gradient(total, sources)
    return {f"grad.{name}": tf.convert_to_tensor(value) for name, value in found.items() if value is not None}


RNN_FACTORS: dict[str, list[Any]] = {
    "cell": list(range(len(CELLS))),
    "second": [None, 0, 2, 6],
    "residual": [None, "default", "0.5*inputs - outputs", "inputs * outputs"],
    "mask": [None, "ragged", "holes", "empty_row"],
    "go_backwards": [False, True],
    "return_sequences": [True, False],
    "time_major": [False, True],
    "zero_output_for_mask": [False, True],
    "unroll": [False, True],
    "initial_state": [False, True],
}

MASKS = {
    "ragged": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 1], [1, 1, 0, 0, 1], [1, 0, 1, 0, 1]],
    "empty_row": [[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
}


def possible_rnn(row: dict[str, Any]) -> bool:
    if row["zero_output_for_mask"] and row["unroll"] and not row["return_sequences"]:
        return False  # the reference crashes: zeros of the whole sequence against one step
    return not (row["zero_output_for_mask"] and row["mask"] is None)


def record_rnn_layers(recorder: Recorder) -> None:
    """Record the RNN layer over every pair of its options, residual and bare, one cell and two."""
    for number, row in enumerate(pairwise(RNN_FACTORS, possible_rnn, more=12, seed=5)):
        rng = np.random.default_rng(4000 + number)
        flags = ("go_backwards", "return_sequences", "time_major", "zero_output_for_mask", "unroll")
        layer_args = {flag: True for flag in flags if row[flag]}
        shared: dict[str, Any] = {"units": 4}
        if row["residual"]:
            shared["residual_wrapped"] = True
        if row["residual"] in RESIDUALS:
            shared["residual_fn"] = row["residual"]
        cell_configs = [{**CELLS[row["cell"]], **shared}]
        if row["second"] is not None:
            cell_configs.append({**CELLS[row["second"]], **shared})
        config: dict[str, Any] = {"layer": "RNN", "layer_args": layer_args, **shared}
        if len(cell_configs) == 1:
            config |= cell_configs[0]
        else:
            config["cells"] = [c["cell"] for c in cell_configs]
            config["cell_configs"] = [{k: v for k, v in c.items() if k not in shared} for c in cell_configs]
        rnn_case(f"rnn_pair_{number:03d}", config, cell_configs, row, rng, recorder)


def rnn_case(name, config, cell_configs, row, rng, recorder):
    cells = [modern_cell(c) for c in cell_configs]
    layer = tf.keras.layers.RNN(cells if len(cells) > 1 else cells[0], return_state=True, **config["layer_args"])
    shape = (5, 3, 4) if row["time_major"] else (3, 5, 4)
    x = tf.constant(numbers(rng, shape))
    layer.build(shape)
    for cell in cells:
        fill(inner(cell).weights, rng)
    states = None
    if row["initial_state"]:
        count = sum(2 if c["cell"] == "LSTMCell" else 1 for c in cell_configs)
        states = [tf.constant(numbers(rng, (3, 4))) for _ in range(count)]
    mask = None
    if row["mask"]:
        mask = np.array(MASKS[row["mask"]], bool)
        mask = mask.T.copy() if row["time_major"] else mask
    given = states
    if states is not None and len(cells) > 1:
        given, rest = [], list(states)
        for c in cell_configs:
            given.append([rest.pop(0) for _ in range(2 if c["cell"] == "LSTMCell" else 1)])
            given[-1] = given[-1] if len(given[-1]) > 1 else given[-1][0]
    with tf.GradientTape() as tape:
        tape.watch([x, states or []])
        y, *final = layer(x, initial_state=given, mask=None if mask is None else tf.constant(mask))
        w = tf.constant(numbers(rng, y.shape))
        total = tf.reduce_sum(y * w)
    arrays = {"x0": x, "y0": y, "w0": w}
    arrays |= {f"state0.{i}": state for i, state in enumerate(tf.nest.flatten(final))}
    sources = {"x0": x} | {f"initial_state{i}": state for i, state in enumerate(states or [])}
    arrays |= {f"initial_state{i}": state for i, state in enumerate(states or [])}
    if mask is not None:
        arrays["mask"] = mask
    for i, cell in enumerate(cells):
        sources |= {f"weight{i}.{short_name(v)}": v for v in inner(cell).weights}
        arrays |= {f"weight{i}.{short_name(v)}": v.numpy() for v in inner(cell).weights}
    arrays |= gradients_of(tape, total, sources)
    recorder.add(name, "rnn_layer", "eager", config, arrays, tolerance=absolute(arrays))


LEGACY_CELLS: list[dict[str, Any]] = [
    {"cell": "BasicRNNCell"},
    {"cell": "legacy GRUCell"},
    {"cell": "BasicLSTMCell"},
    {"cell": "BasicLSTMCell", "forget_bias": 0.3},
    {"cell": "BasicLSTMCell", "state_is_tuple": False},
    {"cell": "legacy LSTMCell"},
    {"cell": "legacy LSTMCell", "use_peepholes": True},
    {"cell": "legacy LSTMCell", "use_peepholes": True, "cell_clip": 0.5},
    {"cell": "legacy LSTMCell", "num_units": 5, "num_proj": 4},
    {"cell": "legacy LSTMCell", "num_units": 5, "num_proj": 4, "proj_clip": 0.25, "use_peepholes": True},
]

DYNAMIC_FACTORS: dict[str, list[Any]] = {
    "cell": list(range(len(LEGACY_CELLS))),
    "multi": [False, True],
    "wrapper": [None, "ResidualWrapper", "RNNCellResidualWrapper"],
    "residual_fn": [None, "0.5*inputs - outputs", "inputs * outputs"],
    "sequence_length": [None, (2, 5, 3), (0, 4, 1), (5, 5, 5)],
    "time_major": [False, True],
    "initial_state": [False, True],
}


def possible_dynamic(row: dict[str, Any]) -> bool:
    if row["wrapper"] is None and row["residual_fn"] is not None:
        return False
    concatenated = LEGACY_CELLS[row["cell"]].get("state_is_tuple") is False
    return not (row["multi"] and (concatenated or row["wrapper"] == "RNNCellResidualWrapper"))


def legacy_cell(config: dict[str, Any], wrapper: str | None, residual_fn: str | None) -> Any:
    arguments = {"num_units": 4} | {key: value for key, value in config.items() if key != "cell"}
    cell = getattr(v1.nn.rnn_cell, config["cell"].removeprefix("legacy "))(**arguments)
    if wrapper is None:
        return cell
    kind = v1.nn.rnn_cell.ResidualWrapper if wrapper == "ResidualWrapper" else tf.nn.RNNCellResidualWrapper
    return kind(cell, residual_fn=RESIDUALS.get(residual_fn or ""))


def record_dynamic_rnn(recorder: Recorder) -> None:
    """Record dynamic_rnn over every pair of legacy cell, wrapper, lengths and layout."""
    for number, row in enumerate(pairwise(DYNAMIC_FACTORS, possible_dynamic, more=8, seed=6)):
        rng = np.random.default_rng(5000 + number)
        cell_config = LEGACY_CELLS[row["cell"]]
        config: dict[str, Any] = {"time_major": row["time_major"], "num_units": 4, **cell_config}
        config["sequence_length"] = list(row["sequence_length"]) if row["sequence_length"] else None
        if row["wrapper"]:
            config |= {"residual_wrapped": True, "wrapper": row["wrapper"]}
        if row["residual_fn"]:
            config["residual_fn"] = row["residual_fn"]
        if row["multi"]:
            config |= {"multi": True, "cells": [cell_config["cell"], "legacy GRUCell"]}
            config["cell_configs"] = [{k: v for k, v in cell_config.items() if k != "cell"}, {}]
        dynamic_case(f"dyn_pair_{number:03d}", config, cell_config, row, rng, recorder)


def dynamic_case(name, config, cell_config, row, rng, recorder):
    with tf.Graph().as_default(), v1.Session() as session:
        x_value = numbers(rng, (5, 3, 4) if row["time_major"] else (3, 5, 4))
        x = v1.placeholder(tf.float32, x_value.shape)
        cell = legacy_cell(cell_config, row["wrapper"], row["residual_fn"])
        if row["multi"]:
            second = legacy_cell({"cell": "legacy GRUCell"}, row["wrapper"], row["residual_fn"])
            cell = v1.nn.rnn_cell.MultiRNNCell([cell, second])
        given, flat, feed = None, [], {x: x_value}
        if row["initial_state"]:
            sizes = tf.nest.flatten(cell.state_size)
            flat = [v1.placeholder(tf.float32, (3, size)) for size in sizes]
            feed |= {state: numbers(rng, (3, size), 0.5) for state, size in zip(flat, sizes, strict=True)}
            given = tf.nest.pack_sequence_as(cell.state_size, flat)
        y, final = v1.nn.dynamic_rnn(
            cell, x, sequence_length=config["sequence_length"], initial_state=given, dtype=tf.float32,
            time_major=row["time_major"],
        )  # fmt: skip
        variables = v1.global_variables()
        session.run(v1.global_variables_initializer())
        for variable in variables:
            variable.load(numbers(rng, variable.shape, 0.5), session)
        w = numbers(rng, x_value.shape)
        sources = {"x": x} | {f"initial_state{i}": state for i, state in enumerate(flat)}
        sources |= {v.name.split(":")[0]: v for v in variables}
        recorded = dict(zip(sources, tf.gradients(tf.reduce_sum(y * w), list(sources.values())), strict=True))
        fetches = {"y": y} | {f"final_state{i}": s for i, s in enumerate(tf.nest.flatten(final))}
        fetches |= {f"weight.{v.name.split(':')[0]}": v for v in variables}
        fetches |= {f"grad.{key}": value for key, value in recorded.items() if value is not None}
        arrays = {"x": x_value, "w": w} | {f"initial_state{i}": feed[s] for i, s in enumerate(flat)}
        arrays |= session.run(fetches, feed)
    recorder.add(name, "dynamic_rnn", "graph", config, arrays, tolerance=absolute(arrays))


# -- dense, convolution, pooling ---------------------------------------------------------------------------------------


def layer_case(
    name: str, kind: str, layer: Any, config: dict[str, Any], x: Any, rng: np.random.Generator, recorder: Any
) -> None:
    """Record one eager call of a layer with gradients for input and weights."""
    x = tf.constant(x)
    layer.build(x.shape)
    fill(layer.weights, rng)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        w = tf.constant(numbers(rng, y.shape))
        total = tf.reduce_sum(y * w)
    weights = {short_name(v): v for v in layer.weights}
    arrays = {"x": x, "y": y, "w": w} | {name: v.numpy() for name, v in weights.items()}
    arrays |= gradients_of(tape, total, {"x": x, **weights})
    config = {"layer": type(layer).__name__, **config}
    recorder.add(name, kind, "eager", config, arrays, tolerance=absolute(arrays))


def record_layers(recorder: Recorder) -> None:
    """Record Dense, Conv2D and pooling with the options that the page examples leave out."""
    rng = np.random.default_rng(6000)
    dense: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"units": 3}, (4, 5)),
        ({"units": 2, "use_bias": False}, (4, 5)),
        ({"units": 3, "activation": "relu"}, (2, 3, 4)),
        ({"units": 3, "activation": "softmax"}, (2, 2, 2, 3)),
        ({"units": 1, "activation": "softplus"}, (1, 1)),
        ({"units": 4, "activation": "elu"}, (3, 2)),
    ]
    for number, (config, shape) in enumerate(dense):
        layer_case(f"dense_{number}", "dense", v1.layers.Dense(**config), config, numbers(rng, shape), rng, recorder)
    convolutions: list[dict[str, Any]] = [
        {"kernel_size": [2, 3], "padding": "same"},
        {"kernel_size": [4, 2], "padding": "same", "strides": [3, 2]},
        {"kernel_size": 3, "padding": "valid", "strides": [2, 1], "use_bias": False},
        {"kernel_size": 2, "padding": "valid", "dilation_rate": 2},
        {"kernel_size": 3, "padding": "same", "dilation_rate": [1, 2], "activation": "tanh"},
        {"kernel_size": 1, "padding": "same", "strides": 2},
    ]
    for number, config in enumerate(convolutions):
        config = {"filters": 3, **config}
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        layer = tf.keras.layers.Conv2D(**arguments)
        layer_case(f"conv2d_{number}", "conv2d", layer, config, numbers(rng, (2, 7, 6, 2)), rng, recorder)
    for number, (kind, size, strides, padding) in enumerate(
        itertools.product(["MaxPooling2D", "AveragePooling2D"], [2, [3, 2]], [None, 1], ["valid", "same"])
    ):
        config = {"pool_size": size, "strides": strides, "padding": padding}
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        x = numbers(rng, (2, 5, 7, 2))
        layer = getattr(tf.keras.layers, kind)(**arguments)
        layer_case(f"pool_{number:02d}", "pooling", layer, config, x, rng, recorder)


# -- optimizers, losses, initializers ----------------------------------------------------------------------------------

OPTIMIZERS: list[tuple[str, str, dict[str, Any]]] = [
    ("train.GradientDescentOptimizer", "sgd_v1", {"learning_rate": 0.1}),
    ("train.MomentumOptimizer", "momentum_v1", {"learning_rate": 0.1, "momentum": 0.9}),
    ("train.MomentumOptimizer", "nesterov_v1", {"learning_rate": 0.1, "momentum": 0.9, "use_nesterov": True}),
    ("train.AdamOptimizer", "adam_v1", {"learning_rate": 0.01}),
    ("train.AdamOptimizer", "adam_v1_eps", {"learning_rate": 0.05, "beta1": 0.8, "beta2": 0.9, "epsilon": 0.01}),
    ("optimizers.SGD", "sgd", {"learning_rate": 0.1}),
    ("optimizers.SGD", "sgd_momentum", {"learning_rate": 0.1, "momentum": 0.9}),
    ("optimizers.SGD", "sgd_nesterov", {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    ("optimizers.Adam", "adam", {"learning_rate": 0.01}),
    ("optimizers.Adam", "adam_eps", {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.01}),
    ("optimizers.AdamW", "adamw", {"learning_rate": 0.01, "weight_decay": 0.1}),
    ("optimizers.AdamW", "adamw_default", {}),
]


def record_optimizers(recorder: Recorder) -> None:
    """Record four steps of each optimizer on one variable."""
    for number, (path, name, arguments) in enumerate(OPTIMIZERS):
        rng = np.random.default_rng(7000 + number)
        start, gradients = numbers(rng, (3, 2)), [numbers(rng, (3, 2)) for _ in range(4)]
        arrays: dict[str, Any] = {"start": start} | {f"gradient{i}": g for i, g in enumerate(gradients)}
        legacy = path.startswith("train.")
        kind = getattr(v1.train if legacy else tf.keras.optimizers, path.split(".")[1])
        if legacy:
            with tf.Graph().as_default(), v1.Session() as session:
                variable = v1.get_variable("v", initializer=start)
                gradient = v1.placeholder(tf.float32, (3, 2))
                step = kind(**arguments).apply_gradients([(gradient, variable)])
                session.run(v1.global_variables_initializer())
                for i, value in enumerate(gradients):
                    session.run(step, {gradient: value})
                    arrays[f"after{i}"] = session.run(variable)
        else:
            variable, optimizer = tf.Variable(start), kind(**arguments)
            for i, value in enumerate(gradients):
                optimizer.apply_gradients([(tf.constant(value), variable)])
                arrays[f"after{i}"] = variable.numpy()
        config = {"optimizer": path, "arguments": arguments}
        recorder.add(f"optimizer_{name}", "optimizer", "graph" if legacy else "eager", config, arrays, tolerance=3e-6)


def record_losses(recorder: Recorder) -> None:
    """Record the losses per example, their mean, and the gradient of the mean."""
    rng = np.random.default_rng(8000)
    losses = tf.keras.losses
    cases: list[tuple[str, Any, Any, np.ndarray]] = [
        ("mean_squared_error", losses.mean_squared_error, numbers(rng, (4, 3)), numbers(rng, (4, 3))),
        ("mean_squared_error", losses.mean_squared_error, numbers(rng, (2, 3, 4)), numbers(rng, (2, 3, 4))),
        ("binary_crossentropy", losses.binary_crossentropy, rng.integers(0, 2, (5, 1)), numbers(rng, (5, 1), 3)),
        ("binary_crossentropy", losses.binary_crossentropy, rng.random((4, 3)).round(3), numbers(rng, (4, 3), 30)),
        ("sparse_categorical_crossentropy", None, rng.integers(0, 4, 6), numbers(rng, (6, 4), 2)),
        ("sparse_categorical_crossentropy", None, rng.integers(0, 4, (2, 3)), numbers(rng, (2, 3, 4), 40)),
    ]
    for number, (name, function, target, prediction) in enumerate(cases):
        function = function or losses.sparse_categorical_crossentropy
        logits = {} if name == "mean_squared_error" else {"from_logits": True}
        target = np.asarray(target, np.int64 if name.startswith("sparse") else np.float32)
        x = tf.constant(prediction)
        with tf.GradientTape() as tape:
            tape.watch(x)
            per_example = function(target, x, **logits)
            mean = tf.reduce_mean(per_example)
        arrays = {"target": target, "prediction": prediction, "per_example": per_example, "mean": mean}
        arrays["grad.prediction"] = tape.gradient(mean, x)
        recorder.add(f"loss_{number}", "loss", "eager", {"loss": name, **logits}, arrays, tolerance=2e-5)


def record_initializers(recorder: Recorder) -> None:
    """Record how shapes become fans, and the spread of every initializer on a wide and a tall shape."""
    from keras.src.initializers.initializers import _compute_fans

    shapes = [(), (5,), (4, 6), (6, 4), (3, 4, 8), (3, 3, 4, 8), (1, 1, 16, 2), (2, 3, 4, 5, 6)]
    fans = [{"shape": list(shape), "fans": [int(n) for n in _compute_fans(shape)]} for shape in shapes]
    recorder.add("initializer_fans", "initializer_fans", "eager", {}, {}, expect=fans)
    names = [a + b for a in ("glorot_", "he_", "lecun_") for b in ("uniform", "normal")]
    names += ["random_uniform", "random_normal", "truncated_normal"]
    found = []
    for name, shape in itertools.product(names, [(100, 900), (900, 100), (3, 3, 40, 200)]):
        sample = tf.keras.initializers.get(name)
        sample = type(sample)(seed=17)(shape).numpy().astype(np.float64)
        found.append(
            {
                "initializer": name,
                "shape": list(shape),
                "std": float(f"{sample.std():.4g}"),
                "largest": float(f"{np.abs(sample).max():.4g}"),
            }
        )
    recorder.add("initializer_spread", "initializer_spread", "eager", {"relative_tolerance": 0.02}, {}, expect=found)


# -- names and scopes --------------------------------------------------------------------------------------------------

CLASS_NAMES = (
    "Dense Conv2D BatchNormalization MyLayer2D HTTPServer2 ABCLayer LSTMCell RNNCellResidualWrapper X1Y2Zz _Private "
    "__Twice A AB aB lower Under_Score Two__Under CamelCASE Layer1D2 GRU XMLHttpRequest MaxPooling2D ReLU PReLU6 A1"
).split()


def legacy(inside: str = "", call_scope: str = "", **ctor: Any) -> dict[str, Any]:
    """Return one step: a legacy Dense layer made with `ctor` and called, inside a variable scope or with scope=."""
    step = {"inside": inside, "call_scope": call_scope, "ctor": ctor}
    return {key: value for key, value in step.items() if value}


SCOPES: list[list[dict[str, Any]]] = [
    [legacy(), legacy(), legacy(name="foo"), legacy(name="foo"), legacy("outer", name="foo"), legacy("outer")],
    [legacy("a"), legacy("b"), legacy(), legacy("a/b"), legacy("a")],
    [legacy(name="foo"), legacy(name="foo", _scope="foo", _reuse=True), legacy(name="foo", _reuse=True)],
    [legacy(name="nm", _scope="zip2"), legacy(call_scope="callscope", name="foo"), legacy(name="x/y")],
    [legacy("p", "q"), legacy("p", _scope="s"), legacy("p", name="dense")],
    [legacy(_scope="none", _reuse=True), legacy(name="foo"), legacy(_scope="foo")],
]


def record_names(recorder: Recorder) -> None:
    """Record automatic names, and scope and variable names of legacy layers in one graph each."""
    names = {}
    for class_name in CLASS_NAMES:
        with tf.Graph().as_default():
            names[class_name] = type(class_name, (tf.keras.layers.Layer,), {})().name
    recorder.add("snake_case", "snake_case", "graph", {}, {}, expect=names)
    for number, steps in enumerate(SCOPES):
        expect = []
        with tf.Graph().as_default():
            x = v1.placeholder(tf.float32, (None, 2))
            for step in steps:
                try:
                    with scope_of(step.get("inside")):
                        layer = v1.layers.Dense(3, **step.get("ctor", {}))
                        call = {"scope": step["call_scope"]} if "call_scope" in step else {}
                        y = layer(x, **call)
                except ValueError:
                    expect.append({"error": "ValueError"})
                    continue
                expect.append(
                    {
                        "name": layer.name,
                        "scope_name": layer.scope_name,
                        "variables": [v.name for v in layer.variables],
                        "output": y.name,
                    }
                )
        recorder.add(f"layer_scopes_{number}", "layer_scopes", "graph", {"steps": steps}, {}, expect=expect)


def scope_of(name: str | None) -> Any:
    return v1.variable_scope(name) if name else contextlib.nullcontext()


def main() -> None:
    """Record everything and write it."""
    recorder = Recorder()
    for record in RECORDINGS:
        record(recorder)
    recorder.write()


RECORDINGS: list[Callable[[Recorder], None]] = [
    record_batch_normalization,
    record_cell_steps,
    record_rnn_layers,
    record_dynamic_rnn,
    record_layers,
    record_optimizers,
    record_losses,
    record_initializers,
    record_names,
]

if __name__ == "__main__":
    main()
