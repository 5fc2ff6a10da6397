"""The launches of ``kernels/recurrent.cu``: one time step of a recurrent cell's elementwise work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpulayers.errors import ShapeError, message
from gpulayers.launch import Kernel, Prepared, device_properties, is_aligned, place_of, remember

__all__ = ["DTYPES", "KERNELS", "launch_step", "threads_per_block"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
_IN, _OUT, _MASK = "const STORAGE*", "STORAGE*", "const uint8*"
_SIZES = [("rows", "int32"), ("units", "int32"), ("hard", "int32"), ("vectors", "int32")]
_SUMS = [("gates", _IN), ("bias", _IN)]
_END = [("h", _IN), ("mask", _MASK), ("x", _IN), ("previous", _IN), ("new_h", _OUT), ("output", _OUT), *_SIZES]
_START_BACK = [
    ("d_h", _IN), ("recurrent_mask", _IN), ("d_output", _IN), ("mask", _MASK), ("later", _MASK), ("carry", _OUT),
    ("pending", _OUT), ("d_counted", _OUT), ("d_gates", _OUT), *_SIZES, ("always", "int32"),
]  # fmt: skip
_ORDER = ("order", "int32[4]")

_FIELDS: dict[str, list[tuple[str, str]]] = {
    "gl_lstm_forward": [*_SUMS, ("c", _IN), ("new_c", _OUT), *_END, _ORDER],
    "gl_lstm_backward": [*_START_BACK, *_SUMS, ("c", _IN), ("d_c", _OUT), _ORDER],
    "gl_gru_forward": [*_SUMS, *_END],
    "gl_gru_backward": [*_START_BACK, *_SUMS, ("h", _IN)],
    "gl_gru_reset_forward": [*_SUMS, ("entering", _IN), ("reset", _OUT), *_SIZES],
    "gl_gru_candidate_forward": [*_SUMS, *_END],
    "gl_gru_candidate_backward": [*_START_BACK, *_SUMS, ("h", _IN)],
    "gl_gru_reset_backward": [
        ("q", _IN), ("recurrent_mask", _IN), ("mask", _MASK), ("carry", _OUT), ("d_gates", _OUT), *_SUMS, ("h", _IN),
        *_SIZES,
    ],
    "gl_simple_rnn_forward": [("bias", _IN), *_END],
    "gl_simple_rnn_backward": [*_START_BACK, ("new_h", _IN)],
}  # fmt: skip

KERNELS = {
    name: Kernel("recurrent.cu", name, arguments=fields, defines={"STORAGE": DTYPES})
    for name, fields in _FIELDS.items()
}


_STORAGE_FIELDS = {name: [field for field, kind in fields if kind in (_IN, _OUT)] for name, fields in _FIELDS.items()}


def threads_per_block(threads: int, multiprocessors: int) -> int:
    """Return the largest of 256, 128 and 64 threads with which every multiprocessor gets a block; 64 if none does.

    Large blocks cost fewer block starts; a small step in large blocks would leave multiprocessors, and with them a part
    of the memory bandwidth, without work.

    >>> [threads_per_block(n, 132) for n in (512, 132 * 128, 1 << 20)]
    [64, 128, 256]
    """
    return next((size for size in (256, 128) if threads >= size * multiprocessors), 64)


_prepared: dict[Any, Prepared] = {}


def launch_step(name: str, rows: int, units: int, *, hard: bool = False, **values: Any) -> None:
    """Launch one kernel of ``recurrent.cu`` over (rows, units); what is not given is a null pointer or 0.

    16-byte accesses are used where `units` and every address allow them. Raises ShapeError for 2^31 values or more.
    """
    arrays = [values[field] for field in _STORAGE_FIELDS[name] if values.get(field) is not None]
    first, aligned = arrays[0], is_aligned(*arrays)
    kernel, place = KERNELS[name], place_of(first)
    key = kernel, rows, units, hard, aligned, first.dtype, place, place.launcher.properties(first), *values
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = remember(_prepared, key, _prepare(kernel, rows, units, hard, aligned, first, values))
    prepared(values)


def _prepare(
    kernel: Kernel, rows: int, units: int, hard: bool, aligned: bool, like: Any, names: Iterable[str]
) -> Prepared:
    """Return the launch for all steps of these sizes that have values for the same fields."""
    if rows * units >= 2**31:
        raise ShapeError(message(kernel.name, "one step is too large", "fewer than 2^31 values", rows * units))
    width = 16 // like.dtype.itemsize
    width = width if aligned and units % width == 0 else 1
    threads = rows * (units // width)
    block = threads_per_block(threads, device_properties(like).multiprocessors)
    sizes = {"rows": rows, "units": units, "hard": int(hard), "vectors": int(width > 1)}
    return kernel.prepare(
        place_of(like),
        {**kernel.nothing(names), **sizes},
        grid=(-(-threads // block),),
        block=(block,),
        defines={"STORAGE": like.dtype},
    )
