"""Bad input: the type promised, and a text that says what is wrong, where, and what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.errors import DTypeError, ShapeError
from gpulayers.ops.operation import OPERATIONS, Operation
from gpulayers.trace import Graph, placeholder

X = np.ones((2, 3))

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "broadcast": (lambda x: ops.add(x, np.ones(4)), ValueError, r"\(2, ?3\)|\[2, 3\]"),
    "matmul": (lambda x: ops.matmul(x, np.ones((2, 2))), ValueError, "matmul: "),
    "matmul-scalar": (lambda x: ops.matmul(x, np.ones(())), ValueError, "matmul: "),
    "sum-axis": (lambda x: ops.sum(x, 2), ValueError, "sum: "),
    "sum-twice": (lambda x: ops.sum(x, (0, -2)), ValueError, "sum: "),
    "reshape": (lambda x: ops.reshape(x, (4, 2)), ValueError, "reshape: "),
    "reshape-two": (lambda x: ops.reshape(x, (-1, -1)), ValueError, "reshape: "),
    "transpose": (lambda x: ops.transpose(x, (0, 0)), ValueError, "transpose: "),
    "transpose-short": (lambda x: ops.transpose(x, (0,)), ValueError, "transpose: "),
    "squeeze": (lambda x: ops.squeeze(x, 0), ValueError, "squeeze: "),
    "expand_dims": (lambda x: ops.expand_dims(x, 5), ValueError, "expand_dims: "),
    "moveaxis": (lambda x: ops.moveaxis(x, (0, 1), 0), ValueError, "moveaxis: "),
    "concatenate": (lambda x: ops.concatenate([x, np.ones((3, 3))], 1), ValueError, "concatenate: "),
    "concatenate-rank": (lambda x: ops.concatenate([x, np.ones(3)]), ValueError, "concatenate: "),
    "concatenate-none": (lambda x: ops.concatenate([]), ValueError, "concatenate: "),
    "split": (lambda x: ops.split(x, 2, 1), ValueError, "split: "),
    "split_sizes": (lambda x: ops.split_sizes(x, [1, 3], 1), ValueError, "split: "),
    "broadcast_to": (lambda x: ops.broadcast_to(x, (3, 3)), ValueError, "broadcast_to: "),
    "pad": (lambda x: ops.pad(x, ((1, 1), (1, 1), (1, 1))), ValueError, "pad: "),
    "pad-mode": (lambda x: ops.pad(x, 1, "wrap"), ValueError, "'constant'"),
    "tile": (lambda x: ops.tile(x, (1.5,)), DTypeError, "tile: "),
    "repeat": (lambda x: ops.repeat(x, [1, 2], 0), DTypeError, "repeat: "),
    "index-many": (lambda x: ops.getitem(x, (0, 0, 0)), (IndexError, ValueError), "getitem: "),
    "index-large": (lambda x: ops.getitem(x, 2), IndexError, "getitem: "),
    "index-float": (lambda x: ops.getitem(x, 1.5), IndexError, "getitem: "),
    "index-array": (lambda x: ops.getitem(x, np.array([0.5])), IndexError, "getitem: "),
    "mask": (lambda x: ops.boolean_mask(x, np.array([1, 0])), DTypeError, "boolean_mask: "),
    "einsum": (lambda x: ops.einsum("ij,jk->ik", x), ValueError, "einsum: "),
    "einsum-rank": (lambda x: ops.einsum("ijk->i", x), ValueError, "einsum: "),
    "einsum-size": (lambda x: ops.einsum("ij,jk->ik", x, np.ones((4, 2))), ValueError, "einsum: "),
    "einsum-type": (lambda x: ops.einsum(x, "ij"), TypeError, "einsum: "),
    "softmax": (lambda x: ops.softmax(x, 2), ValueError, "softmax: "),
    "one_hot": (lambda x: ops.one_hot(np.array([0]), 3, axis=4), ValueError, "one_hot: "),
    "convolution-rank": (lambda x: ops.convolution(x, np.ones((3, 3, 1))), ValueError, "convolution: "),
    "convolution-channels": (
        lambda x: ops.convolution(ops.expand_dims(x, 0), np.ones((1, 4, 2))),
        ValueError,
        "convolution: channels",
    ),
    "convolution-kernel": (lambda x: ops.convolution(x, x), ValueError, "convolution: "),
    "convolution-padding": (
        lambda x: ops.convolution(ops.expand_dims(x, 0), np.ones((1, 3, 2)), padding="full"),
        ValueError,
        "'valid' or 'same'",
    ),
    "convolution-format": (
        lambda x: ops.convolution(ops.expand_dims(x, 0), np.ones((1, 3, 2)), data_format="last"),
        ValueError,
        "data_format",
    ),
    "convolution-strides": (
        lambda x: ops.convolution(ops.expand_dims(x, 0), np.ones((1, 3, 2)), (1, 1)),
        ValueError,
        "strides",
    ),
    "pool-rank": (lambda x: ops.max_pool(x, 2), ValueError, "max_pool: "),
    "pool-size": (lambda x: ops.avg_pool(ops.expand_dims(x, 0), 0), ValueError, "pool_size"),
    "cross-entropy": (lambda x: ops.softmax_cross_entropy_with_logits(np.ones(3), x), ValueError, "labels"),
    "sparse-dtype": (lambda x: ops.sparse_softmax_cross_entropy_with_logits(np.ones(2), x), DTypeError, "integers"),
    "sparse-rank": (
        lambda x: ops.sparse_softmax_cross_entropy_with_logits(np.ones((2, 2), int), x),
        ValueError,
        "labels",
    ),
    "dtype": (lambda x: ops.cast(x, "float31"), DTypeError, "dtype: "),
    "arange": (lambda x: ops.arange(0, 3, 0), ValueError, "step"),
    "unstack": (lambda x: ops.unstack(x, 3), ValueError, "unstack: "),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", BAD)
def test_error(name: str, symbolic: bool) -> None:
    call, error, text = BAD[name]
    if not symbolic:
        with pytest.raises(error, match=text):
            call(X)
        return
    with Graph().as_default(), pytest.raises(error, match=text):
        call(placeholder("float64", (2, 3)))


def test_largest_of_nothing() -> None:
    with pytest.raises(ShapeError, match=r"max: .*float64\[0, 3\]"):
        ops.max(np.ones((0, 3)), 0)


@pytest.mark.parametrize(("identifier", "error"), [("reluu", ValueError), (3, TypeError)])
def test_unknown_activation(identifier: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="activation: "):
        ops.activations.get(identifier)


def test_an_operation_is_defined_once() -> None:
    count = len(OPERATIONS)
    with pytest.raises(ValueError, match="defined twice"):
        Operation("add", lambda xp, x: x, spec=lambda x: x)
    assert len(OPERATIONS) == count
