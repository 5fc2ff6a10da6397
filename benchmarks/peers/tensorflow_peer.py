"""TensorFlow on a CPU, every row as one ``tf.function``: fused batch normalisation (NHWC), or the formulas in its ops.

A backward row times ``tape.gradient`` of a persistent tape, compiled too where TensorFlow allows it: the forward pass
is outside; a step has both in one function. Sequences are ``tf.keras.layers.LSTM`` and ``GRU``, cells the cells of
these layers. Optimizers are the update operations that ``tf.compat.v1.train`` calls, one for each parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.shapes import Case, axis_of
from benchmarks.truth import EPSILON, LIMITS

__all__ = ["prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import tensorflow  # noqa: F401  (the question is whether it is there)

    return "measured on a CPU only" if on_gpu else ""


def version() -> str:
    import tensorflow

    return f"TensorFlow {tensorflow.__version__}"


def to_numpy(value: Any) -> np.ndarray:
    found = value.numpy()
    return found.astype(np.float32) if found.dtype.itemsize == 2 else found


def _fused(case: Case, d: dict[str, Any]) -> Any:
    """Return the function of the layer's fused path."""
    import tensorflow as tf

    if case.mode == "inference":
        given = {"mean": d["moving_mean"], "variance": d["moving_variance"], "is_training": False}
    else:
        given = {}

    def norm(x: Any, gamma: Any, beta: Any, residual: Any) -> dict[str, Any]:
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON, **given)
        if residual is not None:
            y = tf.nn.relu(y + residual)
        if case.mode == "inference":
            return {"y": y}
        # the layer's moving statistics; the variance is the unbiased one, which no row compares
        return {"y": y, "mean": mean, "moved": _moved(d, mean, variance)}

    return norm


def _moved(d: dict[str, Any], mean: Any, variance: Any) -> list[Any]:
    pairs = ((d["moving_mean"], mean), (d["moving_variance"], variance))
    return [state - (state - value) * 0.01 for state, value in pairs]


def _formulas(case: Case, d: dict[str, Any]) -> Any:
    """Return the function of the layer's other path, with renorm and sub-batches."""
    import tensorflow as tf

    axis, grouped = axis_of(case), case.groups > 1
    shape = case.shape if not grouped else (case.shape[0] // case.groups, case.groups, *case.shape[1:])
    kept = axis if not grouped else (1, *(a + 1 for a in axis))
    reduced = [a for a in range(len(shape)) if a not in kept]
    along = [n if a in kept and not (grouped and a == 1) else 1 for a, n in enumerate(shape)]

    def norm(x: Any, gamma: Any, beta: Any, residual: Any) -> dict[str, Any]:
        x = tf.reshape(x, shape)
        scale, offset = tf.reshape(gamma, along), tf.reshape(beta, along)
        if case.mode == "inference":
            mean, variance = (tf.reshape(d[f"moving_{name}"], along) for name in ("mean", "variance"))
        else:
            mean, variance = tf.nn.moments(x, reduced, keepdims=True)
        if case.op == "batch_norm_renorm":
            old, stddev = tf.reshape(d["renorm_stddev"], along), tf.sqrt(variance + EPSILON)
            r = tf.clip_by_value(stddev / old, LIMITS["rmin"], LIMITS["rmax"])
            shift = (mean - tf.reshape(d["renorm_mean"], along)) / old
            shift = tf.stop_gradient(tf.clip_by_value(shift, -LIMITS["dmax"], LIMITS["dmax"]))
            offset, scale = offset + shift * scale, scale * tf.stop_gradient(r)
        y = tf.reshape(tf.nn.batch_normalization(x, mean, variance, offset, scale, EPSILON), case.shape)
        if residual is not None:
            y = tf.nn.relu(y + residual)
        if case.mode == "inference":
            return {"y": y}
        batch = [tf.reduce_mean(v, 1, keepdims=True) if grouped else v for v in (mean, variance)]
        mean, variance = (tf.reshape(value, [-1]) for value in batch)
        return {"y": y, "mean": mean, "variance": variance, "moved": _moved(d, mean, variance)}

    return norm


def _norm(case: Case, d: dict[str, Any]) -> Any:
    import tensorflow as tf

    fused = case.layout == "NHWC" and case.op in ("batch_norm", "batch_norm_relu_residual")
    norm = (_fused if fused else _formulas)(case, d)
    call = tf.function(norm)
    inputs = [d["x"], d["gamma"], d["beta"], d.get("residual")]
    given = [value for value in inputs if value is not None]
    names = ("dx", "dgamma", "dbeta", "dresidual")

    @tf.function
    def step(*inputs: Any) -> dict[str, Any]:
        given = [value for value in inputs if value is not None]
        with tf.GradientTape() as tape:
            tape.watch(given)
            first = norm(*inputs)
        return {**first, **dict(zip(names, tape.gradient(first["y"], given, d["dy"]), strict=False))}

    if case.mode == "step":
        return lambda: step(*inputs)
    if case.mode != "backward":
        return lambda: call(*inputs)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(given)
        y = call(*inputs)["y"]
    return lambda: dict(zip(names, tape.gradient(y, given, d["dy"]), strict=False))


def _recurrent(case: Case, data: dict[str, Any], d: dict[str, Any]) -> Any:
    import tensorflow as tf

    kind, form = case.op.split("_")
    lstm, units = kind == "lstm", case.shape[-1]
    states = [d["h"], d["c"]] if lstm else [d["h"]]
    weights = [data["kernel"], data["recurrent_kernel"], data["bias"]]
    layers = tf.keras.layers
    if form == "cell":
        layer = (layers.LSTMCell if lstm else layers.GRUCell)(units)
        run = lambda x: (lambda output, last: (output, *last))(*layer(x, states))
        layer.build((None, case.shape[-2]))
    else:
        keywords = {"return_sequences": True, "return_state": True, "time_major": True}
        layer = (layers.LSTM if lstm else layers.GRU)(units, **keywords)
        run = lambda x: layer(x, initial_state=states)
        layer.build((None, None, case.shape[-2]))
    layer.set_weights(weights)

    @tf.function
    def call(x: Any) -> dict[str, Any]:
        output, *last = run(x)
        return {"output": output + x, **dict(zip(("h", "c"), last, strict=False))}

    if case.mode == "forward":
        return lambda: call(d["x"])
    inputs = [d["x"], *layer.trainable_variables[:2]]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(d["x"])
        output = call(d["x"])["output"]
    return lambda: dict(
        zip(("dx", "dkernel", "drecurrent_kernel"), tape.gradient(output, inputs, d["dy"]), strict=True)
    )


def _digits(d: dict[str, Any]) -> Any:
    import tensorflow as tf

    names = ("kernel_1", "gamma", "beta", "kernel_2", "bias_2")
    p = {name: tf.Variable(d[name]) for name in names}
    slots = {name: tf.Variable(tf.zeros_like(d[name])) for name in names}

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            u = d["x"] @ p["kernel_1"]
            mean, variance = tf.nn.moments(u, [0])
            h = tf.nn.relu(tf.nn.batch_normalization(u, mean, variance, p["beta"], p["gamma"], EPSILON))
            logits = h @ p["kernel_2"] + p["bias_2"]
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(d["labels"], logits))
        gradients = tape.gradient(loss, p)
        for name in names:
            tf.raw_ops.ResourceApplyMomentum(
                var=p[name].handle, accum=slots[name].handle, lr=0.1, grad=gradients[name], momentum=0.9
            )

    def run() -> dict[str, Any]:
        step()
        return p

    return run


def _optimizer(case: Case, data: dict[str, Any]) -> Any:
    import tensorflow as tf

    from benchmarks.data import split_parameters

    variables = [tf.Variable(piece) for piece in split_parameters(data["parameters"])]
    gradients = [tf.constant(piece) for piece in split_parameters(data["gradients"])]
    count = 2 if case.op == "adam" else 1
    slots = [[tf.Variable(tf.zeros_like(v)).handle for _ in range(count)] for v in variables]
    powers = [tf.Variable(0.9), tf.Variable(0.999)]

    @tf.function
    def step() -> None:
        for variable, gradient, slot in zip(variables, gradients, slots, strict=True):
            if case.op == "momentum":
                tf.raw_ops.ResourceApplyMomentum(
                    var=variable.handle, accum=slot[0], lr=0.01, grad=gradient, momentum=0.9
                )
            else:
                tf.raw_ops.ResourceApplyAdam(
                    var=variable.handle, m=slot[0], v=slot[1], beta1_power=powers[0], beta2_power=powers[1], lr=0.01,
                    beta1=0.9, beta2=0.999, epsilon=1e-7, grad=gradient,
                )  # fmt: skip
        for power, beta in zip(powers, (0.9, 0.999), strict=True):
            power.assign(power * beta)

    def run() -> dict[str, Any]:
        step()
        return {"parameters": variables}

    return run


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    import tensorflow as tf

    if case.dtype != "float32":
        return "float32 only"
    if case.op in ("momentum", "adam"):
        return _optimizer(case, data)
    d = {name: tf.constant(value) for name, value in data.items()}
    if case.op.startswith("batch_norm"):
        return _norm(case, d)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, data, d)
    if case.op == "digits":
        return _digits(d)
    if case.op == "residual_add":
        call = tf.function(lambda x, residual: x + residual)
        return lambda: {"y": call(d["x"], d["residual"])}
    if case.op == "dense":
        call = tf.function(lambda x, kernel, bias: tf.nn.bias_add(x @ kernel, bias))
        return lambda: {"y": call(d["x"], d["kernel"], d["bias"])}
    call = tf.function(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"))
    return lambda: {"y": call(d["x"], d["kernel"])}
