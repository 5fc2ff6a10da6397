"""The launches of ``kernels/recurrent.cu``: one time step of a recurrent cell's elementwise work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.errors import ShapeError, message
from gpulayers.launch import Kernel, Prepared, device_properties, division, launcher_of, place_of, remember

__all__ = ["DTYPES", "KERNELS", "packet_width", "prepare_step", "threads_per_block"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
PACKETS = (8, 4, 2, 1)  # values of a row that a thread may take: 16 bytes of the narrowest dtype, and fewer
_BUSY = 128  # threads that a multiprocessor should have, before a thread takes more values than it must
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_IN, _OUT, _MASK = "const STORAGE*", "STORAGE*", "const uint8*"
_WIDE_IN, _WIDE = "const WIDE*", "WIDE*"  # what is added up over the steps
_SIZES = [("rows", "int32"), ("units", "int32"), ("row_multiplier", "uint64"), ("row_shift", "int32")]
_SUMS = [("gates", _IN), ("bias", _IN)]
_END = [
    ("h", _IN), ("mask", _MASK), ("x", _IN), ("previous", _IN), ("recurrent_mask", _IN), ("new_h", _OUT),
    ("output", _OUT), ("dropped", _OUT), *_SIZES,
]  # fmt: skip
_START_BACK = [
    ("d_h", _WIDE_IN), ("recurrent_mask", _IN), ("d_output", _IN), ("mask", _MASK), ("later", _MASK), ("carry", _WIDE),
    ("pending", _WIDE), ("d_counted", _OUT), ("d_gates", _OUT), *_SIZES, ("always", "int32"),
]  # fmt: skip
_ORDER = ("order", "int32[4]")

_FIELDS: dict[str, list[tuple[str, str]]] = {
    "gl_lstm_forward": [*_SUMS, ("c", _IN), ("new_c", _OUT), *_END, _ORDER],
    "gl_lstm_backward": [*_START_BACK, *_SUMS, ("c", _IN), ("d_c", _WIDE), _ORDER],
    "gl_gru_forward": [*_SUMS, *_END],
    "gl_gru_backward": [*_START_BACK, *_SUMS, ("h", _IN)],
    "gl_gru_reset_forward": [*_SUMS, ("entering", _IN), ("reset", _OUT), *_SIZES],
    "gl_gru_candidate_forward": [*_SUMS, *_END],
    "gl_gru_candidate_backward": [*_START_BACK, *_SUMS, ("h", _IN)],
    "gl_gru_reset_backward": [
        ("q", _WIDE_IN), ("recurrent_mask", _IN), ("mask", _MASK), ("carry", _WIDE), ("d_gates", _OUT), *_SUMS,
        ("h", _IN), *_SIZES,
    ],
    "gl_simple_rnn_forward": [("bias", _IN), *_END],
    "gl_simple_rnn_backward": [*_START_BACK, ("new_h", _IN)],
}  # fmt: skip


def _exists(chosen: dict[str, Any]) -> bool:
    wide = "float64" if chosen["STORAGE"] == "float64" else "float32"
    return chosen["WIDE"] == wide and chosen["PACKET"] * _BYTES[chosen["STORAGE"]] <= 16


def _kernel(name: str, dtypes: Sequence[str] = DTYPES, **more: Any) -> Kernel:
    defines = {"STORAGE": dtypes, "WIDE": ("float32", "float64"), "PACKET": PACKETS}
    if "simple_rnn" not in name:  # which has no gates
        defines["HARD"] = (False, True)
    return Kernel("recurrent.cu", name, arguments=_FIELDS[name], defines=defines, where=_exists, **more)


KERNELS = {name: _kernel(name) for name in _FIELDS}


def threads_per_block(threads: int, multiprocessors: int) -> int:
    """Return the largest of 256, 128 and 64 threads with which every multiprocessor gets a block; 64 if none does.

    Large blocks cost fewer block starts; a small step in large blocks would leave multiprocessors, and with them a part
    of the memory bandwidth, without work.

    >>> [threads_per_block(n, 132) for n in (512, 132 * 128, 1 << 20)]
    [64, 128, 256]
    """
    return next((size for size in (256, 128) if threads >= size * multiprocessors), 64)


def packet_width(rows: int, units: int, itemsize: int, alignment: int, multiprocessors: int) -> int:
    """Return how many neighbouring values a thread takes: as many as 16 bytes hold while all multiprocessors are busy.

    A step too small for that is spread over more threads, with accesses of 8 and 4 bytes or of one value. `alignment`:
    a number of bytes of which all addresses are multiples.

    >>> [packet_width(rows, 256, 2, 256, 132) for rows in (4096, 256, 128, 32)]
    [8, 2, 1, 1]
    >>> [packet_width(4096, units, 2, 256, 132) for units in (256, 300, 50, 5)]
    [8, 4, 2, 1]
    """
    fitting = [
        width
        for width in PACKETS
        if width * itemsize <= 16 and units % width == 0 and alignment % (width * itemsize) == 0
    ]
    busy = (width for width in fitting if rows * (units // width) >= _BUSY * multiprocessors)
    return next(busy, fitting[-1])


_prepared: dict[Any, Prepared] = {}


def prepare_step(
    name: str, rows: int, units: int, arrays: Sequence[Any], *, hard: bool = False, **numbers: Any
) -> Prepared:
    """Return the launch of one kernel of ``recurrent.cu`` over (rows, units), for all steps of a sequence.

    It is called with every pointer of the kernel, None for those that are left out. `arrays`: those of the sequence, in
    which the steps lie one behind the other, the first one of the steps' dtype; they say how wide accesses may be.
    Those of another dtype are buffers of our own, aligned for any access. `hard`: the gates are hard sigmoids.
    `numbers`: `order` and `always`, where the kernel has them.

    Raises ShapeError for 2^31 values or more.
    """
    if rows * units >= 2**31:
        raise ShapeError(message(name, "one step is too large", "fewer than 2^31 values", rows * units))
    first, kernel = arrays[0], KERNELS[name]
    place, multiprocessors = place_of(first), device_properties(first).multiprocessors
    width = packet_width(rows, units, first.dtype.itemsize, _alignment(arrays), multiprocessors)
    key = kernel, rows, units, hard, width, first.dtype, place, multiprocessors, *numbers.items()
    found = _prepared.get(key)
    if found is not None:
        return found
    threads = rows * (units // width)
    block = threads_per_block(threads, multiprocessors)
    multiplier, shift = division(max(1, units // width))
    sizes = {"rows": rows, "units": units, "row_multiplier": multiplier, "row_shift": shift}
    wide = "float64" if first.dtype.itemsize == 8 else "float32"
    defines = {"STORAGE": first.dtype, "WIDE": wide, "PACKET": width, "HARD": hard}
    made = kernel.prepare(
        place,
        {**sizes, **numbers},
        grid=(-(-threads // block),),
        block=(block,),
        defines={define: defines[define] for define in kernel.defines},
    )
    return remember(_prepared, key, made)


def _alignment(arrays: Sequence[Any]) -> int:
    """Return the largest power of two up to 16 of which the addresses of all arrays are multiples."""
    pointer, bits = launcher_of(arrays[0]).pointer, 16
    for array in arrays:
        if array is not None:
            bits |= pointer(array)
    return bits & -bits
