"""The residual add on device arrays: all leaves of a structure in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.device import array_module
from gpulayers.dtypes import dtype_name
from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.launch import Kernel, contiguous, device_properties, is_aligned

__all__ = ["residual_add"]

LEAVES = 32  # per launch: the pointer tables stay far below the 4 KB that every driver takes
_THREADS = 256
_BUSY = 2  # blocks that a multiprocessor should have, before a thread takes more vectors than one
_DTYPES = ("float16", "bfloat16", "float32", "float64")

_one = Kernel(
    "residual.cu",
    "gl_residual_add",
    arguments=[
        ("x", "const STORAGE*"),
        ("y", "const STORAGE*"),
        ("out", "STORAGE*"),
        ("count", "int64"),
        ("vector", "int32"),
    ],
    defines={"STORAGE": _DTYPES, "STEPS": (4, 2, 1)},
)
_leaves = Kernel(
    "residual.cu",
    "gl_residual_add_leaves",
    arguments=[
        ("x", f"const STORAGE*[{LEAVES}]"),
        ("y", f"const STORAGE*[{LEAVES}]"),
        ("out", f"STORAGE*[{LEAVES}]"),
        ("counts", f"int64[{LEAVES}]"),
        ("first_block", f"int32[{LEAVES}]"),
        ("vectors", "uint32"),
        ("leaves", "int32"),
    ],
    defines={"STORAGE": _DTYPES, "STEPS": (4, 2, 1)},
)


def residual_add(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Return ``[x + y for x, y in zip(inputs, outputs)]``, one launch for up to 32 leaves of one dtype.

    Parameters: two equally long sequences of device arrays; the arrays of a pair have one shape and one dtype among
    float16, bfloat16, float32 and float64. Pairs of different dtypes are launched separately. Arrays that are not
    C-contiguous are copied first.

    Returns new C-contiguous arrays. 16-bit sums are formed in float32 and rounded once.

    Raises ShapeError if the sequences or a pair's shapes differ, DTypeError if a pair's dtypes differ or are others.
    """
    if len(inputs) != len(outputs):
        raise ShapeError(message("residual_add", "the structures differ", len(inputs), len(outputs)))
    results: list[Any] = []
    groups: dict[Any, list[tuple[Any, ...]]] = {}
    for x, y in zip(inputs, outputs, strict=True):
        dtype = x.dtype
        if x.shape != y.shape:
            raise ShapeError(message("residual_add", "shapes differ", x.shape, y.shape))
        if dtype != y.dtype or dtype_name(dtype) not in _DTYPES:
            raise DTypeError(message("residual_add", "no kernel for these dtypes", _DTYPES, (dtype.name, y.dtype.name)))
        module = array_module(x)
        results.append(module.ndarray(x.shape, dtype))
        if x.size:
            leaf = (*contiguous(x, y), results[-1])
            groups.setdefault(dtype, []).append(leaf)
    for dtype, leaves in groups.items():
        for start in range(0, len(leaves), LEAVES):
            _launch(dtype, leaves[start : start + LEAVES])
    return results


def _launch(dtype: Any, leaves: Sequence[tuple[Any, ...]]) -> None:
    vectors, packets, total = 0, [], 0
    for number, (x, y, out) in enumerate(leaves):
        vector = is_aligned(x, y, out)
        vectors |= vector << number
        packets.append(-(-x.size // (16 // x.dtype.itemsize if vector else 1)))
        total += packets[-1]
    steps = _steps(total, device_properties(leaves[0][0]).multiprocessors)
    first_block, blocks = [], 0
    for count in packets:
        first_block.append(blocks)
        blocks += -(-count // (_THREADS * steps))
    if len(leaves) == 1:
        kernel, (x, y, out) = _one, leaves[0]
        values = {"x": x, "y": y, "out": out, "count": x.size, "vector": vectors}
    else:
        kernel, (xs, ys, results) = _leaves, zip(*leaves, strict=True)
        values = {
            "x": xs,
            "y": ys,
            "out": results,
            "counts": [x.size for x in xs],
            "first_block": first_block,
            "vectors": vectors,
            "leaves": len(leaves),
        }
    kernel.launch(values, grid=(blocks,), block=(_THREADS,), defines={"STORAGE": dtype, "STEPS": steps})


def _steps(packets: int, multiprocessors: int) -> int:
    """Return how many packets a thread takes: several if all multiprocessors have work without that.

    >>> [_steps(256 * blocks, 132) for blocks in (1, 528, 2000)]
    [1, 2, 4]
    """
    most = packets // (_THREADS * _BUSY * multiprocessors)
    return 4 if most >= 4 else 2 if most >= 2 else 1
