"""Products into given memory: the arguments that reach cuBLAS, and its column-major result, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from gpulayers import _cupy
from gpulayers.errors import ShapeError
from gpulayers.ops.device_products import matmul, product_into
from tests.kernels.fake_cublas import HANDLE, fake_cublas
from tests.kernels.strict_array import xp

DTYPES = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
SIZES = [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1), (17, 33, 9)]


@pytest.fixture(params=["cublas", "matmul"])
def product(request, monkeypatch):
    if request.param == "cublas":
        functions, found = fake_cublas()
        monkeypatch.setattr(xp, "cublas", found, raising=False)
        yield product_into(xp)
        assert functions.calls and functions.pointer_mode == 1, "the pointer mode is put back"
        return
    yield product_into(xp)


def draw(shape, dtype, seed):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def laid(host, layout, dtype):
    """Put a host matrix on the device: by rows, by columns, or as columns of a wider buffer either way."""
    rows, columns = host.shape
    buffer = xp.asarray(np.full({"rows": (rows, columns), "columns": (columns, rows), "part": (rows, columns + 3),
                                 "part by columns": (columns, rows + 2)}[layout], 7, dtype))  # fmt: skip
    view = {"rows": buffer, "columns": buffer.T, "part": buffer[:, 1 : columns + 1],
            "part by columns": buffer[:, 1 : rows + 1].T}[layout]  # fmt: skip
    view[...] = xp.asarray(host)
    return buffer, view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("layouts", [("rows", "rows", "rows"), ("columns", "rows", "part"),
                                     ("part", "columns", "rows"), ("part by columns", "part", "part")])  # fmt: skip
def test_products_and_sums(product, dtype, add, layouts):
    dtype = np.dtype(dtype)
    for m, k, n in SIZES:
        hosts = draw((m, k), dtype, 1), draw((k, n), dtype, 2), draw((m, n), dtype, 3)
        (_, a), (_, b), (around, out) = (laid(h, way, dtype) for h, way in zip(hosts, layouts, strict=True))
        product(a, b, out, add)
        left, right, start = (h.astype(np.float64) for h in hosts)
        want = left @ right + (start if add else 0)
        np.testing.assert_allclose(out.get().astype(np.float64), want, atol=DTYPES[dtype.name] * max(1, k / 4))
        if layouts[2] == "part":  # what lies between the rows is not touched
            assert (around.get()[:, 0] == 7).all() and (around.get()[:, n + 1 :] == 7).all()


def test_what_cublas_is_told(monkeypatch):
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    gates, ones = xp.asarray(np.zeros((2, 12), np.float16)), xp.asarray(np.ones((3, 8), np.float16))
    product_into(xp)(xp.asarray(np.ones((2, 3), np.float16)), ones, gates[:, :8], True)
    (call,) = functions.calls
    assert call["transposed"] == (0, 0) and call["sizes"] == (8, 2, 3) and call["leading"] == (8, 3, 12)
    assert call["types"] == (2, 2, 2) and call["compute"] == 68 and call["beta"] == 1.0
    assert (gates.get()[:, :8] == 3).all() and not gates.get()[:, 8:].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wide_result_of_narrow_operands(dtype, monkeypatch):
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    a, b = draw((300, 4), np.dtype(dtype), 1), draw((300, 5), np.dtype(dtype), 2)
    out = xp.empty((4, 5), np.float32)
    product_into(xp)(xp.asarray(a).T, xp.asarray(b), out, False)
    want = a.astype(np.float64).T @ b.astype(np.float64)
    np.testing.assert_allclose(out.get(), want, atol=1e-4)
    assert functions.calls[0]["transposed"] == (0, 1) and functions.calls[0]["types"][2] == 0


@pytest.mark.parametrize(("operands", "result"), [("float16", "float16"), ("bfloat16", "bfloat16"),
                                                  ("float16", "float32"), ("float32", "float32"),
                                                  ("float64", "float64")])  # fmt: skip
def test_parts_of_a_narrow_result_are_not_added_in_its_type(operands, result, monkeypatch):
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    out = xp.empty((2, 2), np.dtype(result))
    product_into(xp)(xp.ones((2, 3), np.dtype(operands)), xp.ones((3, 2), np.dtype(operands)), out, False)
    assert functions.calls[0]["math"] == (3 | 16 if out.dtype.itemsize == 2 else 3)
    assert functions.math_modes[HANDLE] == 3, "the math mode is put back"


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 2), (2, 3, 0), (2, 0, 3)])
@pytest.mark.parametrize("add", [False, True])
def test_empty_operands_never_reach_cublas(m, k, n, add, monkeypatch):
    functions, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    out = xp.asarray(np.full((m, n), 5.0))
    product_into(xp)(xp.empty((m, k)), xp.empty((k, n)), out, add)
    assert (out.get() == (5 if add else 0)).all() and not functions.calls


def test_matrices_that_cublas_cannot_read_are_refused(monkeypatch):
    _, found = fake_cublas()
    monkeypatch.setattr(xp, "cublas", found, raising=False)
    a, b = xp.asarray(np.ones((4, 6))), xp.asarray(np.ones((3, 2)))
    with pytest.raises(ShapeError, match="lie apart or overlap"):
        product_into(xp)(a[:, ::2], b, xp.empty((4, 2)), False)
    with pytest.raises(ShapeError, match="lie apart or overlap"):
        product_into(xp)(a[::-1], xp.asarray(np.ones((6, 2))), xp.empty((4, 2)), False)
    with pytest.raises(ShapeError, match="columns of `out`"):
        product_into(xp)(a, xp.asarray(np.ones((6, 2))), xp.empty((2, 4)).T, False)


def test_the_handle_is_asked_for_at_each_product(monkeypatch):
    """Another current device has another handle."""
    asked = []
    functions, _ = fake_cublas()
    monkeypatch.setattr(xp, "cublas", _cupy.Cublas(functions, lambda: asked.append(1) or HANDLE), raising=False)
    product = product_into(xp)
    for _ in range(2):
        product(xp.ones((2, 2)), xp.ones((2, 2)), xp.empty((2, 2)), False)
    assert len(asked) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3), (3, 4)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (3,)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (3,)),
     ((5, 2, 3), (5, 3, 4)), ((2, 3), (5, 3, 4)), ((3,), (5, 3, 4)), ((0, 2, 3), (3, 4)), ((5, 2, 0), (0, 4))],
)  # fmt: skip
def test_matmul_of_any_shapes(dtype, library, left, right, monkeypatch):
    functions, found = fake_cublas()
    if library:
        monkeypatch.setattr(xp, "cublas", found, raising=False)
    a, b = draw(left, np.dtype(dtype), 1), draw(right, np.dtype(dtype), 2)
    product = matmul(xp, xp.asarray(a), xp.asarray(b))
    want = np.matmul(a.astype(np.float64), b.astype(np.float64))
    assert product.shape == want.shape and product.dtype == a.dtype
    np.testing.assert_allclose(product.get().astype(np.float64), want, atol=DTYPES[dtype])
    assert bool(functions.calls) == (library and len(right) < 3 and want.size > 0 and left[-1] > 0)


def test_the_installed_cupy_has_this_signature():
    """The names and the order of arguments that are relied on, where CuPy and a cuBLAS are installed."""
    pytest.importorskip("cupy")
    found = _cupy._cublas()
    assert found is not None, "CuPy's wheels come with cuBLAS, or CUDA has it"
    functions = found.functions
    order = (functions.gemmEx.__doc__ or "").split("(", 1)[1].split(")")[0].split(", ")
    assert [argument.split()[-1] for argument in order] == [
        "handle", "transa", "transb", "m", "n", "k", "alpha", "A", "Atype", "lda", "B", "Btype", "ldb", "beta", "C",
        "Ctype", "ldc", "computeType", "algo",
    ]  # fmt: skip
    assert (functions.CUBLAS_OP_N, functions.CUBLAS_OP_T, functions.CUBLAS_GEMM_DEFAULT) == (0, 1, -1)
    assert (functions.CUBLAS_COMPUTE_32F, functions.CUBLAS_COMPUTE_64F) == (68, 70)
    assert functions.CUBLAS_POINTER_MODE_HOST == 0 and callable(functions.getPointerMode)
    assert callable(functions.getMathMode) and callable(functions.setMathMode)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_on_a_gpu(dtype, add, monkeypatch):
    """The same comparison through the real library, on a stream that is not the default one."""
    cupy = pytest.importorskip("cupy")
    assert _cupy.cublas(cupy) is not None
    monkeypatch.setitem(globals(), "xp", cupy)
    with cupy.cuda.Stream(non_blocking=True):
        for layouts in (("rows", "rows", "rows"), ("columns", "rows", "part"), ("part by columns", "columns", "part")):
            test_products_and_sums(product_into(cupy), dtype, add, layouts)
