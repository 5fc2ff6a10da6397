"""A double of CuPy's low-level cuBLAS module: it computes on raw addresses, by columns, as the library does."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpulayers._cupy import Cublas

CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = 0, 1, -1
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70
CUBLAS_TF32_TENSOR_OP_MATH = 3
HANDLE = 1234


def _dtype(cuda_type: int) -> np.dtype:
    if cuda_type == 14:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({0: np.float32, 1: np.float64, 2: np.float16}[cuda_type])


def _matrix(address: int, cuda_type: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """Return the (rows, columns) matrix that lies at `address` by columns, `leading` elements apart."""
    if leading < max(1, rows):
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE")
    dtype = _dtype(cuda_type)
    count = leading * (columns - 1) + rows
    memory = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (dtype.itemsize, leading * dtype.itemsize))


class FakeCublas:
    """What `gpulayers` uses of ``cupy_backends.cuda.libs.cublas``; `calls` records the arguments of each product."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT
    CUBLAS_POINTER_MODE_HOST = CUBLAS_POINTER_MODE_HOST
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.pointer_mode = CUBLAS_POINTER_MODE_DEVICE  # someone else's: it has to be put back
        self.math_modes = {HANDLE: CUBLAS_TF32_TENSOR_OP_MATH}  # someone else's too

    def getPointerMode(self, handle: int) -> int:  # noqa: N802
        return self.pointer_mode

    def setPointerMode(self, handle: int, mode: int) -> None:  # noqa: N802
        self.pointer_mode = mode

    def getMathMode(self, handle: int) -> int:  # noqa: N802
        return self.math_modes[handle]

    def setMathMode(self, handle: int, mode: int) -> None:  # noqa: N802
        self.math_modes[handle] = mode

    def gemmEx(  # noqa: N802
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int,
        b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute_type: int, algorithm: int,
    ) -> None:  # fmt: skip
        """C = alpha op(A) op(B) + beta C, all by columns."""
        if self.pointer_mode != CUBLAS_POINTER_MODE_HOST or handle not in self.math_modes:
            raise ValueError("host addresses of alpha and beta need the host pointer mode")
        scalar, wide = (
            (ctypes.c_double, np.float64) if compute_type == CUBLAS_COMPUTE_64F else (ctypes.c_float, np.float32)
        )
        factor, keep = scalar.from_address(alpha).value, scalar.from_address(beta).value
        left = _matrix(a, a_type, k, m, lda).T if transa else _matrix(a, a_type, m, k, lda)
        right = _matrix(b, b_type, n, k, ldb).T if transb else _matrix(b, b_type, k, n, ldb)
        out = _matrix(c, c_type, m, n, ldc)
        product = factor * (left.astype(wide) @ right.astype(wide))
        out[...] = (product + keep * out.astype(wide)) if keep else product
        self.calls.append({"transposed": (transa, transb), "sizes": (m, n, k), "leading": (lda, ldb, ldc),
                           "types": (a_type, b_type, c_type), "compute": compute_type, "beta": keep,
                           "math": self.math_modes[handle]})  # fmt: skip


def fake_cublas() -> tuple[FakeCublas, Cublas]:
    """Return a double, and it as `gpulayers._cupy.cublas` returns the library."""
    functions = FakeCublas()
    return functions, Cublas(functions, lambda: HANDLE)
