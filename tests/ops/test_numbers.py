"""Accuracy, extremes, 16-bit data and determinism of the operations."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.special

from gpulayers import ops
from gpulayers.trace import GradientTape, Graph, placeholder

HALVES = [np.float16, ml_dtypes.bfloat16]
EPSILON = {np.dtype(np.float16): 2.0**-11, np.dtype(ml_dtypes.bfloat16): 2.0**-8}


def test_erf_is_accurate() -> None:
    x = np.concatenate([np.linspace(-7, 7, 100_001), np.logspace(-300, 0, 1000)])
    truth = scipy.special.erf(x)
    assert np.abs(ops.erf(x) - truth).max() < 1e-15
    near = truth != 0
    assert np.abs(ops.erf(x)[near] / truth[near] - 1).max() < 1e-15
    np.testing.assert_array_equal(ops.erf(np.array([np.inf, -np.inf, np.nan, 0.0])), [1, -1, np.nan, 0])


def test_activations_at_the_extremes() -> None:
    x = np.array([-1e4, -745.0, -50.0, 0.0, 50.0, 1e4])
    np.testing.assert_allclose(ops.sigmoid(x), scipy.special.expit(x), rtol=1e-15, atol=1e-320)
    np.testing.assert_allclose(ops.softplus(x), np.logaddexp(x, 0), rtol=1e-15)
    np.testing.assert_allclose(ops.elu(x), np.where(x > 0, x, np.expm1(np.minimum(x, 0))), rtol=1e-15)
    np.testing.assert_array_equal(ops.softmax(np.array([-1e4, 1e4])), [0, 1])
    np.testing.assert_array_equal(ops.log_softmax(np.array([-1e4, 1e4])), [-2e4, 0])
    np.testing.assert_array_equal(
        ops.sigmoid_cross_entropy_with_logits(np.array([1.0, 0.0]), np.array([-1e4, -1e4])), [1e4, 0]
    )


def test_logsumexp_at_the_extremes() -> None:
    x = np.array([[1e4, 1e4], [-np.inf, -np.inf], [-1e4, -np.inf], [np.inf, 0.0]])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(ops.logsumexp(x, 1), scipy.special.logsumexp(x, 1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "prod", "logsumexp"])
def test_half_reductions_accumulate_in_float32(name: str, dtype: Any) -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, (4, 4096)).astype(dtype)
    x = x if name != "prod" else np.ones_like(x)
    result = getattr(ops, name)(x, 1)
    truth = (
        scipy.special.logsumexp(x.astype(float), 1) if name == "logsumexp" else getattr(np, name)(x.astype(float), 1)
    )
    assert result.dtype == dtype
    np.testing.assert_allclose(result.astype(float), truth, rtol=EPSILON[np.dtype(dtype)] * 1.01)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_products_accumulate_in_float32(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.5, 1.5, shape).astype(dtype) for shape in ((3, 2048), (2048, 2)))
    truth = a.astype(float) @ b.astype(float)
    for result in (ops.matmul(a, b), ops.einsum("ij,jk->ik", a, b), ops.tensordot(a, b, 1)):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(float), truth, rtol=EPSILON[np.dtype(dtype)] * 1.01)
    x, k = rng.uniform(0.5, 1.5, (1, 6, 64)).astype(dtype), rng.uniform(0.5, 1.5, (5, 64, 2)).astype(dtype)
    result = ops.convolution(x, k)
    assert result.dtype == dtype
    truth = ops.convolution(x.astype(float), k.astype(float))
    np.testing.assert_allclose(result.astype(float), truth, rtol=EPSILON[np.dtype(dtype)] * 1.01)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["sigmoid", "softplus", "elu", "softmax", "log_softmax", "gelu", "silu", "erf", "softsign"]
)
def test_half_activations(name: str, dtype: Any) -> None:
    x = np.linspace(-4, 4, 33).astype(dtype)
    function = getattr(ops, name)
    result = function(x)
    assert result.dtype == dtype
    composed = name in ("gelu", "silu")  # several roundings
    np.testing.assert_allclose(
        result.astype(float),
        function(x.astype(float)),
        rtol=EPSILON[np.dtype(dtype)] * (6 if composed else 1.01),
        atol=4e-3 if composed else 0,
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_gradients_keep_the_dtype(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((2, 6, 3)).astype(dtype), rng.standard_normal((3, 3, 4)).astype(dtype)
    with GradientTape() as tape:
        a, b = tape.watch(x), tape.watch(k)
        y = ops.relu(ops.convolution(a, b, padding="same"))
        y = (
            ops.sum(ops.max_pool(y, 2) + ops.avg_pool(y, 2))
            + ops.sum(ops.var(y, 0))
            + ops.mean(ops.take(a, [0, 0, 5], 1))
        )
    for gradient in tape.gradient(y, (x, k)):
        assert gradient.dtype == dtype
        assert np.isfinite(gradient.astype(float)).all()


def test_repeated_indices_add_up_the_same_way_every_time() -> None:
    rng = np.random.default_rng(0)
    x, indices = rng.standard_normal((5, 3)).astype(np.float32), rng.integers(0, 5, 4000)
    u = rng.standard_normal((4000, 3)).astype(np.float32)

    def gradient() -> Any:
        with GradientTape() as tape:
            t = tape.watch(x)
            y = ops.sum(t[indices] * u)
        return tape.gradient(y, x)

    first = gradient()
    truth = np.zeros((5, 3))
    np.add.at(truth, indices, u.astype(float))
    np.testing.assert_allclose(first, truth, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(first, gradient())


def test_ties_share_the_gradient_of_reductions() -> None:
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    with GradientTape(persistent=True) as tape:
        t = tape.watch(x)
        largest, smallest = ops.max(t, 1), ops.min(t)
    np.testing.assert_allclose(tape.gradient(largest, x), [[0, 0.5, 0.5], [1 / 3] * 3])
    np.testing.assert_array_equal(tape.gradient(smallest, x), [[1, 0, 0], [0, 0, 0]])


def test_ties_in_a_pool_go_to_the_first() -> None:
    x = np.ones((1, 4, 1))
    with GradientTape() as tape:
        y = ops.max_pool(tape.watch(x), 3, 1, "same")
    np.testing.assert_array_equal(tape.gradient(y, x)[0, :, 0], [2, 1, 1, 0])


def test_convolution_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((3, 7, 6, 2)), rng.standard_normal((3, 2, 2, 4))

    def everything() -> list[Any]:
        with GradientTape() as tape:
            y = ops.convolution(tape.watch(x), tape.watch(k), 2, "same")
            z = ops.sum(y * y)
        return [y.value, *tape.gradient(z, (x, k))]

    whole = everything()
    module = sys.modules["gpulayers.ops.convolution"]
    for block in (1, 60, 200):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
        monkeypatch.setattr(module, "GRADIENT_ELEMENTS", block)
        for part, truth in zip(everything(), whole, strict=True):
            np.testing.assert_allclose(part, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("strides", [1, 2])
def test_pointwise_convolution_is_a_product(groups: int, strides: int) -> None:
    """A window of one place needs no matrix of its own; with groups, its rows are not side by side in memory."""
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((2, 5, 4, 6)), rng.standard_normal((1, 1, 6 // groups, 9))
    with GradientTape() as tape:
        y = ops.convolution(tape.watch(x), tape.watch(k), strides, "same", groups=groups)
        z = ops.sum(y * y)
    whole = np.zeros((6, 9))
    for i in range(groups):
        c, f = slice(i * 6 // groups, (i + 1) * 6 // groups), slice(i * 9 // groups, (i + 1) * 9 // groups)
        whole[c, f] = k[0, 0, :, f]
    seen = x[:, ::strides, ::strides]
    np.testing.assert_allclose(y.value, seen @ whole, atol=1e-13)
    dx, dk = tape.gradient(z, (x, k))
    wanted = np.zeros_like(x)
    wanted[:, ::strides, ::strides] = 2 * (seen @ whole) @ whole.T
    np.testing.assert_allclose(dx, wanted, atol=1e-12)
    full = np.einsum("nhwc,nhwf->cf", seen, 2 * (seen @ whole))
    for i in range(groups):
        c, f = slice(i * 6 // groups, (i + 1) * 6 // groups), slice(i * 9 // groups, (i + 1) * 9 // groups)
        np.testing.assert_allclose(dk[0, 0, :, f], full[c, f], atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (0, 7, 7, 2), (2, 7, 7, 0)])
def test_convolution_without_places_images_or_channels(shape: tuple[int, ...]) -> None:
    x, k = np.ones(shape), np.ones((5, 5, shape[-1], 3))
    with GradientTape() as tape:
        y = ops.convolution(tape.watch(x), tape.watch(k))
        z = ops.sum(y * y)
    assert y.shape == (shape[0], max(shape[1] - 4, 0), max(shape[2] - 4, 0), 3) and not np.any(y.value)
    dx, dk = tape.gradient(z, (x, k))
    assert dx.shape == shape and dk.shape == k.shape and not np.any(dx) and not np.any(dk)


def test_results_of_convolutions_stay_as_they_are() -> None:
    """They may lie in memory that is used again, but never while somebody holds them."""
    rng = np.random.default_rng(0)
    images, k = [rng.standard_normal((4, 32, 32, 8)) for _ in range(3)], rng.standard_normal((3, 3, 8, 16))
    held = [np.asarray(ops.convolution(x, k, padding="same")) for x in images]
    copies = [y.copy() for y in held]
    for x in images:  # what these leave is free at once
        ops.convolution(-x, k, padding="same")
    assert all(np.array_equal(y, copy) for y, copy in zip(held, copies, strict=True))
    assert held[0].ctypes.data % 64 == 0


@pytest.mark.parametrize(("padding", "strides", "dilation"), [("valid", 2, 1), ("same", 1, 2), ("valid", 1, 1)])
def test_convolution_against_torch(padding: str, strides: int, dilation: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; loops in NumPy are compared everywhere")
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((2, 4, 9, 8)), rng.standard_normal((3, 3, 2, 6))
    a = torch.tensor(x, requires_grad=True)
    b = torch.tensor(k.transpose(3, 2, 0, 1).copy(), requires_grad=True)
    truth = torch.nn.functional.conv2d(a, b, stride=strides, padding=padding, dilation=dilation, groups=2)
    (truth**2).sum().backward()
    with GradientTape() as tape:
        y = ops.convolution(tape.watch(x), tape.watch(k), strides, padding, "channels_first", dilation, 2)
        z = ops.sum(y * y)
    dx, dk = tape.gradient(z, (x, k))
    np.testing.assert_allclose(y.value, truth.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(dx, a.grad.numpy(), atol=1e-11)
    np.testing.assert_allclose(dk, b.grad.numpy().transpose(2, 3, 1, 0), atol=1e-11)


def test_numbers_do_not_promote_bfloat16() -> None:
    x = np.ones(3, ml_dtypes.bfloat16)
    assert ops.multiply(x, 0.5).dtype == x.dtype
    assert ops.add(2, x).dtype == x.dtype
    assert ops.add(x, np.ones(3, np.float32)).dtype == np.float32
    with Graph().as_default():
        t = placeholder(ml_dtypes.bfloat16, (3,))
        assert ops.multiply(t, 0.5).dtype == x.dtype
        assert (t + 1).dtype == x.dtype


PROMOTIONS = ["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("left", PROMOTIONS)
@pytest.mark.parametrize("right", [*PROMOTIONS, "number"])
@pytest.mark.parametrize("name", ["add", "multiply", "divide", "maximum", "power", "less"])
def test_promotion_is_numpys(name: str, left: str, right: str) -> None:
    x = np.ones(2, left)
    y: Any = 2.5 if right == "number" else np.ones(2, right)
    try:
        truth = getattr(np, name)(x, y)
    except TypeError as error:
        with pytest.raises(TypeError, match=name):
            getattr(ops, name)(x, y)
        assert error
        return
    assert getattr(ops, name)(x, y).dtype == truth.dtype
