"""TensorFlow on a CPU: the fused batch normalisation of inference and training, NHWC."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.shapes import Case
from benchmarks.truth import EPSILON

__all__ = ["prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import tensorflow  # noqa: F401  (the question is whether it is there)

    return "measured on a CPU only" if on_gpu else ""


def version() -> str:
    import tensorflow

    return f"TensorFlow {tensorflow.__version__}"


def to_numpy(value: Any) -> np.ndarray:
    return value.numpy()


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    import tensorflow as tf

    if case.op != "batch_norm" or case.layout != "NHWC" or case.dtype != "float32":
        return "its fused batch normalisation on the CPU is NHWC, float32"
    d = {name: tf.constant(value) for name, value in data.items()}
    norm = tf.compat.v1.nn.fused_batch_norm
    if case.mode == "inference":
        given = {"mean": d["moving_mean"], "variance": d["moving_variance"], "is_training": False}
        call = tf.function(lambda x: norm(x, d["gamma"], d["beta"], epsilon=EPSILON, **given)[0])
        return lambda: {"y": call(d["x"])}
    if case.mode == "forward":
        call = tf.function(lambda x: norm(x, d["gamma"], d["beta"], epsilon=EPSILON)[0])
        return lambda: {"y": call(d["x"])}
    with tf.GradientTape(persistent=True) as tape:
        inputs = [d["x"], d["gamma"], d["beta"]]
        tape.watch(inputs)
        y = norm(*inputs, epsilon=EPSILON)[0]
    return lambda: dict(zip(("dx", "dgamma", "dbeta"), tape.gradient(y, inputs, d["dy"]), strict=True))
