"""Shapes that hypothesis makes up: values against NumPy, and the shape rule against the shape that comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpulayers import ops
from gpulayers.trace import Graph, placeholder
from tests.ops.network_cases import naive_convolution, naive_pool

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
SOLID = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4)


def filled(shape: tuple[int, ...]) -> np.ndarray:
    return np.sin(np.arange(int(np.prod(shape)), dtype=float) * 1.7 + 0.3).reshape(shape)


def agree(call: Any, truth: Any, *arrays: np.ndarray) -> None:
    result = call(*arrays)
    np.testing.assert_allclose(result, truth, rtol=1e-12, atol=1e-12)
    assert result.shape == np.shape(truth)
    with Graph().as_default():
        static = call(*(placeholder(a.dtype, a.shape) for a in arrays))
        assert tuple(static.shape) == result.shape
        partly = call(*(placeholder(a.dtype, (*([None] * min(a.ndim, 1)), *a.shape[1:])) for a in arrays))
    sizes = partly.shape
    assert sizes.rank is None or all(a in (None, b) for a, b in zip(sizes, result.shape, strict=True))


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4))
def test_broadcasting(shapes: Any) -> None:
    a, b = (filled(s) for s in shapes.input_shapes)
    agree(ops.subtract, a - b, a, b)


@given(st.data())
def test_reductions(data: st.DataObject) -> None:
    shape = data.draw(SOLID)
    axis = data.draw(st.none() | hnp.valid_tuple_axes(len(shape), min_size=1))
    keepdims = data.draw(st.booleans())
    x = filled(shape)
    for name in ("sum", "max", "var"):
        function, truth = getattr(ops, name), getattr(np, name)(x, axis=axis, keepdims=keepdims)
        agree(lambda t, f=function: f(t, axis, keepdims=keepdims), truth, x)


@given(st.data())
def test_basic_indexing(data: st.DataObject) -> None:
    shape = data.draw(SOLID)
    key = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    x = filled(shape)
    agree(lambda t: ops.getitem(t, key), x[key], x)


@given(st.data())
def test_array_indexing(data: st.DataObject) -> None:
    shape = data.draw(SOLID)
    key = data.draw(hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=3)))
    x = filled(shape)
    agree(lambda t: ops.getitem(t, key), x[key], x)


@given(st.data())
def test_transpose_and_reshape(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    order = data.draw(st.permutations(range(len(shape))))
    x = filled(shape)
    agree(lambda t: ops.transpose(t, order), x.transpose(order), x)
    wanted = tuple(shape[i] for i in order)
    agree(lambda t: ops.reshape(t, wanted), x.reshape(wanted), x)


@given(hnp.mutually_broadcastable_shapes(signature="(i?,k),(k,j?)->(i?,j?)", min_side=0, max_side=3, max_dims=2))
def test_matmul(shapes: Any) -> None:
    a, b = (filled(s) for s in shapes.input_shapes)
    agree(ops.matmul, np.matmul(a, b), a, b)


@given(st.data())
def test_concatenate_and_split(data: st.DataObject) -> None:
    shape = data.draw(SOLID)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    x = filled(shape)
    pieces = ops.split(x, cuts, axis)
    for piece, truth in zip(pieces, np.split(x, cuts, axis), strict=True):
        np.testing.assert_array_equal(piece, truth)
    agree(lambda *parts: ops.concatenate(parts, axis), x, *pieces)


@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["valid", "same"]),
    last=st.booleans(),
)
def test_windows(sizes: Any, window: Any, strides: Any, dilation: Any, padding: str, last: bool) -> None:
    x = filled((2, *sizes, 3) if last else (2, 3, *sizes))
    kernel = filled((*window, 3, 2))
    data_format = "channels_last" if last else "channels_first"
    agree(
        lambda t: ops.convolution(t, kernel, strides, padding, data_format, dilation),
        naive_convolution(x, kernel, strides, padding, dilation, last),
        x,
    )
    for pool, function in ((ops.max_pool, np.max), (ops.avg_pool, np.mean)):
        truth = naive_pool(x, window, strides, padding, last, function)
        agree(lambda t, f=pool: f(t, window, strides, padding, data_format), truth, x)
