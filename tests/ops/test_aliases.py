"""TensorFlow's names: same values as the operations, TensorFlow's argument names and order."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.ops.aliases import NN, TOP

X = np.arange(6.0).reshape(2, 3) - 2.5
IMAGE = np.random.default_rng(0).standard_normal((1, 4, 4, 2))
KERNEL = np.random.default_rng(1).standard_normal((3, 3, 2, 3))
LABELS = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])

CALLS: dict[str, tuple[Any, Any]] = {
    "reduce_mean": (lambda f: f(X, 1, True), np.mean(X, 1, keepdims=True)),
    "reduce_sum": (lambda f: f(input_tensor=X, axis=[0], keepdims=False), X.sum(0)),
    "reduce_max": (lambda f: f(X), X.max()),
    "reduce_min": (lambda f: f(X, -1), X.min(-1)),
    "reduce_prod": (lambda f: f(X, 0), X.prod(0)),
    "reduce_all": (lambda f: f(X > 0, 0), (X > 0).all(0)),
    "reduce_any": (lambda f: f(X > 0, 1), (X > 0).any(1)),
    "reduce_logsumexp": (lambda f: f(X, 1), np.log(np.exp(X).sum(1))),
    "reduce_std": (lambda f: f(X, 0), X.std(0)),
    "reduce_variance": (lambda f: f(X, 0), X.var(0)),
    "matmul": (lambda f: f(X, X, transpose_b=True), X @ X.T),
    "concat": (lambda f: f([X, X], 1), np.concatenate([X, X], 1)),
    "stack": (lambda f: f([X, X], axis=1), np.stack([X, X], 1)),
    "unstack": (lambda f: f(X, axis=1)[2], X[:, 2]),
    "split": (lambda f: f(X, [1, 2], 1)[1], X[:, 1:]),
    "expand_dims": (lambda f: f(X, axis=0), X[None]),
    "squeeze": (lambda f: f(X[None], [0]), X),
    "reshape": (lambda f: f(X, [3, 2]), X.reshape(3, 2)),
    "transpose": (lambda f: f(X, perm=[1, 0]), X.T),
    "cast": (lambda f: f(X, "int32"), X.astype("int32")),
    "shape": (lambda f: f(X), np.array([2, 3], np.int32)),
    "size": (lambda f: f(X), 6),
    "rank": (lambda f: f(X), 2),
    "fill": (lambda f: f([2, 2], 3.0), np.full((2, 2), 3.0, np.float32)),
    "range": (lambda f: f(1, 7, delta=2), [1, 3, 5]),
    "clip_by_value": (lambda f: f(X, -1.0, 1.0), np.clip(X, -1, 1)),
    "where": (lambda f: f(X > 0, X, 0.0), np.where(X > 0, X, 0)),
    "gather": (lambda f: f(X, [1, 1], axis=1), X[:, [1, 1]]),
    "tile": (lambda f: f(X, [2, 1]), np.tile(X, (2, 1))),
    "repeat": (lambda f: f(X, 2, axis=0), np.repeat(X, 2, 0)),
    "pad": (lambda f: f(X, [[1, 0], [0, 1]], "CONSTANT", 9), np.pad(X, [(1, 0), (0, 1)], constant_values=9)),
    "boolean_mask": (lambda f: f(X, [True, False]), X[:1]),
    "reverse": (lambda f: f(X, [1]), X[:, ::-1]),
    "roll": (lambda f: f(X, shift=1, axis=0), X[::-1]),
    "broadcast_to": (lambda f: f(X, [2, 2, 3]), np.stack([X, X])),
    "one_hot": (lambda f: f([1, 0], depth=2), [[0, 1], [1, 0]]),
    "eye": (lambda f: f(2, 3), np.eye(2, 3)),
    "cumsum": (lambda f: f(X), np.cumsum(X, 0)),
    "tensordot": (lambda f: f(X, X, [[1], [1]]), X @ X.T),
    "add_n": (lambda f: f([X, X, X]), 3 * X),
    "argmax": (lambda f: f(X), [1, 1, 1]),
    "argmin": (lambda f: f(X, 1), [0, 0]),
    "constant": (lambda f: f(X, shape=[3, 2]), X.reshape(3, 2)),
    "convert_to_tensor": (lambda f: f([1, 2], "float64"), [1.0, 2.0]),
    "einsum": (lambda f: f("ij->j", X), X.sum(0)),
    "ones": (lambda f: f([2], "int32"), [1, 1]),
    "zeros": (lambda f: f((2,)), [0, 0]),
    "floordiv": (lambda f: f(X, 2.0), X // 2),
    "floormod": (lambda f: f(X, 2.0), X % 2),
    "truediv": (lambda f: f(X, 2.0), X / 2),
    "round": (lambda f: f(X), np.rint(X)),
    "is_nan": (lambda f: f(X), np.isnan(X)),
    "is_inf": (lambda f: f(X), np.isinf(X)),
    "is_finite": (lambda f: f(X), np.isfinite(X)),
    "random_normal": (lambda f: f([2, 3], 1.0, 2.0, "float64", 4), ops.random_normal((2, 3), 1.0, 2.0, "float64", 4)),
    "random_uniform": (lambda f: f([3], 0.93, 1.07, seed=4), ops.random_uniform((3,), 0.93, 1.07, seed=4)),
    "truncated_normal": (lambda f: f([3], stddev=0.1, seed=4), ops.truncated_normal((3,), 0.0, 0.1, seed=4)),
    "nn.avg_pool2d": (lambda f: f(IMAGE, 2, 2, "VALID"), ops.avg_pool(IMAGE, 2)),
    "nn.max_pool2d": (lambda f: f(IMAGE, [1, 2, 2, 1], [1, 1, 1, 1], "SAME"), ops.max_pool(IMAGE, 2, 1, "same")),
    "nn.conv2d": (lambda f: f(IMAGE, KERNEL, [1, 2, 2, 1], "SAME"), ops.convolution(IMAGE, KERNEL, 2, "same")),
    "nn.softmax": (lambda f: f(X, axis=0), ops.softmax(X, 0)),
    "nn.log_softmax": (lambda f: f(X), ops.log_softmax(X)),
    "nn.bias_add": (lambda f: f(X, np.ones(3)), X + 1),
    "nn.dropout": (lambda f: f(X, rate=0.5, seed=3), ops.dropout(X, 0.5, seed=3)),
    "nn.gelu": (lambda f: f(X, True), ops.gelu(X, approximate=True)),
    "nn.l2_normalize": (lambda f: f(X, 1), X / np.linalg.norm(X, axis=1, keepdims=True)),
    "nn.leaky_relu": (lambda f: f(X, alpha=0.3), np.where(X > 0, X, 0.3 * X)),
    "nn.moments": (lambda f: f(X, axes=[0])[1], X.var(0)),
    "nn.softmax_cross_entropy_with_logits": (
        lambda f: f(labels=LABELS.T, logits=X.T, axis=0),
        -(LABELS * ops.log_softmax(X)).sum(1),
    ),
    "nn.sparse_softmax_cross_entropy_with_logits": (
        lambda f: f(labels=[2, 0], logits=X),
        -ops.log_softmax(X)[[0, 1], [2, 0]],
    ),
    "nn.sigmoid_cross_entropy_with_logits": (
        lambda f: f(labels=LABELS, logits=X),
        ops.sigmoid_cross_entropy_with_logits(LABELS, X),
    ),
}
ALL = {**TOP, **{f"nn.{name}": function for name, function in NN.items()}}
PLAIN = [name for name in ALL if name not in CALLS]


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    call, truth = CALLS[name]
    np.testing.assert_allclose(call(ALL[name]), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_same_name_and_operands_as_the_operation(name: str) -> None:
    function, operation = ALL[name], getattr(ops, name.removeprefix("nn."))
    operands = [p for p in inspect.signature(function).parameters if p != "name"]
    assert operands in (["x"], ["x", "y"])
    boolean = name.startswith("logical")
    arrays = [X > 0, X > 1] if boolean else [np.abs(X) + 0.5, np.abs(X)]
    arguments = arrays[: len(operands)]
    np.testing.assert_array_equal(function(*arguments, name="n"), operation(*arguments))
    np.testing.assert_array_equal(function(**dict(zip(operands, arguments, strict=True))), operation(*arguments))
