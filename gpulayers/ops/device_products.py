"""Matrix products of device arrays into memory that is there already, added to what it holds: cuBLAS's ``gemmEx``.

The array modules' ``matmul`` can do neither: it overwrites its ``out``, and copies operands whose rows have gaps. Here
a matrix is any 2-D array whose elements are neighbours along one axis, so columns of a wider buffer need no copy.

Same bits on every run while the handle, with its workspace, serves one stream at a time: that is cuBLAS's condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers import _cupy
from gpulayers.errors import ShapeError, message

__all__ = ["Product", "matmul", "product_into"]

Product = Callable[[Any, Any, Any, bool], None]

# cudaDataType of CUDA's library_types.h, which older CuPy does not name in full.
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
# alpha and beta are read from host memory, in the type of the arithmetic; they live as long as the module.
_ZERO, _ONE = ({d: np.full(1, value, d) for d in ("float32", "float64")} for value in (0.0, 1.0))


def product_into(xp: Any) -> Product:
    """Return the function ``(a, b, out, add)`` that computes ``out = a @ b``, or ``out += a @ b`` if `add`.

    `a` (m, k), `b` (k, n), `out` (m, n): arrays of module `xp`, `out` with neighbouring elements along its last axis.
    16-bit products are summed in float32 and rounded once, with `add` after the addition; their `out` may be float32.
    cuBLAS may cut a long sum into parts: it is told to add those in float32 too, not in the dtype of `out`.
    Where `xp` has no cuBLAS its ``matmul`` makes the product first, rounded to the dtype of `out`.
    """
    cublas = _cupy.cublas(xp)
    if cublas is None:
        return lambda a, b, out, add: _add_by_matmul(xp, a, b, out, add)
    return lambda a, b, out, add: _by_gemm(cublas, a, b, out, add)


def matmul(xp: Any, a: Any, b: Any, out: Any = None) -> Any:
    """Return ``xp.matmul(a, b, out)``; by ``gemmEx`` where `b` is a matrix or a vector of the same floating dtype.

    CuPy's is refused in a step that becomes a CUDA graph, and has no bfloat16 for batches of matrices: where `b` is
    one, bfloat16 is multiplied as float32 and rounded once.
    """
    if not (a.ndim and b.ndim in (1, 2) and a.dtype == b.dtype and a.dtype.name in _TYPES and _cupy.cublas(xp)):
        return _by_matmul(xp, a, b, out)
    if a.shape[-1] != b.shape[0]:
        return xp.matmul(a, b)  # its error
    right = b if b.ndim == 2 else b.reshape(-1, 1)
    left = a if a.ndim == 2 else a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    product = xp.empty((left.shape[0], right.shape[1]), dtype=a.dtype) if out is None else out
    product_into(xp)(_lined(xp, left), _lined(xp, right), product, False)
    return product.reshape(a.shape[:-1] + b.shape[1:]) if out is None else out


def _by_matmul(xp: Any, a: Any, b: Any, out: Any) -> Any:
    """Return ``xp.matmul(a, b, out)``, batches of bfloat16 by way of float32."""
    if max(a.ndim, b.ndim) < 3 or a.dtype.kind != "V" or b.dtype != a.dtype:
        return xp.matmul(a, b, out=out)
    product = xp.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
    if out is None:
        return product
    out[...] = product
    return out


def _lined(xp: Any, matrix: Any) -> Any:
    """Return a matrix whose elements are neighbours along an axis: itself, or a copy."""
    try:
        _layout(matrix)
    except ShapeError:
        return xp.ascontiguousarray(matrix)
    return matrix


def _add_by_matmul(xp: Any, a: Any, b: Any, out: Any, add: bool) -> None:
    product = xp.matmul(a.astype(out.dtype, copy=False), b.astype(out.dtype, copy=False))
    if add:
        out += product
    else:
        out[...] = product


def _by_gemm(cublas: _cupy.Cublas, a: Any, b: Any, out: Any, add: bool) -> None:
    """Call ``gemmEx``: matrices in memory by rows are, read by columns, their transposes, and out^T = b^T a^T."""
    (rows, inner), columns = a.shape, b.shape[1]
    if not out.size:
        return
    if not inner:
        if not add:
            out[...] = 0
        return
    transposed_b, leading_b = _layout(b)
    transposed_a, leading_a = _layout(a)
    transposed_out, leading_out = _layout(out)
    if transposed_out:
        raise ShapeError(message("product_into", "the columns of `out` lie apart", "elements of a row side by side"))
    wide = "float64" if a.dtype == np.float64 else "float32"
    functions, handle = cublas.functions, cublas.handle()
    operations = (functions.CUBLAS_OP_N, functions.CUBLAS_OP_T)
    mode, math_mode = functions.getPointerMode(handle), functions.getMathMode(handle)
    narrow = out.dtype.itemsize == 2 and not math_mode & _cupy.SUM_IN_FULL_PRECISION
    functions.setPointerMode(handle, functions.CUBLAS_POINTER_MODE_HOST)
    try:  # gemmEx sets the handle's stream to the current one itself
        if narrow:
            functions.setMathMode(handle, math_mode | _cupy.SUM_IN_FULL_PRECISION)
        functions.gemmEx(
            handle, operations[transposed_b], operations[transposed_a], columns, rows, inner,
            _ONE[wide].ctypes.data, b.data.ptr, _TYPES[b.dtype.name], leading_b,
            a.data.ptr, _TYPES[a.dtype.name], leading_a,
            (_ONE if add else _ZERO)[wide].ctypes.data, out.data.ptr, _TYPES[out.dtype.name], leading_out,
            functions.CUBLAS_COMPUTE_64F if wide == "float64" else functions.CUBLAS_COMPUTE_32F,
            functions.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
    finally:
        functions.setPointerMode(handle, mode)
        if narrow:
            functions.setMathMode(handle, math_mode)


def _layout(matrix: Any) -> tuple[bool, int]:
    """Return whether a matrix lies in memory by columns, and how many elements lie between its lines' beginnings."""
    (rows, columns), (down, across), size = matrix.shape, matrix.strides, matrix.dtype.itemsize
    by_columns = across != size and columns > 1  # strides of axes of size 1 mean nothing
    lines, length, stride, step = (columns, rows, across, down) if by_columns else (rows, columns, down, across)
    leading = stride // size if lines > 1 else length
    if (length > 1 and step != size) or leading < length:
        raise ShapeError(
            message("product_into", "the lines of a matrix lie apart or overlap", got=f"strides {matrix.strides}")
        )
    return by_columns, leading
