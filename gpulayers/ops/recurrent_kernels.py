"""The launches of ``kernels/recurrent.cu``: one time step of a recurrent cell's elementwise work."""

from __future__ import annotations

from typing import Any

from gpulayers.errors import ShapeError, message
from gpulayers.launch import Kernel, vector_width

__all__ = ["DTYPES", "KERNELS", "launch_step"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
_THREADS = 256
_IN, _OUT = "const STORAGE*", "STORAGE*"
_SIZES = [("rows", "int32"), ("units", "int32"), ("hard", "int32"), ("vectors", "int32")]
_END = [("mask", "const uint8*"), ("x", _IN), ("previous", _IN), ("new_h", _OUT), ("output", _OUT), *_SIZES]
_START_BACK = [
    ("d_h", _IN),
    ("recurrent_mask", _IN),
    ("d_output", _IN),
    ("mask", "const uint8*"),
    ("carry", _OUT),
    ("pending", _OUT),
    ("d_counted", _OUT),
    *_SIZES,
    ("zero_output", "int32"),
]
_ORDER = ("order", "int32[4]")

_FIELDS: dict[str, list[tuple[str, str]]] = {
    "gl_lstm_forward": [
        ("gates", _OUT), ("product", _IN), ("bias", _IN), ("h", _IN), ("c", _IN), ("new_c", _OUT), *_END, _ORDER,
    ],
    "gl_lstm_backward": [*_START_BACK, ("gates", _IN), ("c", _IN), ("d_c", _OUT), ("d_gates", _OUT), _ORDER],
    "gl_gru_forward": [
        ("gates", _OUT), ("product", _IN), ("bias", _IN), ("inner_bias", _IN), ("h", _IN), ("inner", _OUT), *_END,
    ],
    "gl_gru_backward": [
        *_START_BACK, ("gates", _IN), ("inner", _IN), ("h", _IN), ("d_input", _OUT), ("d_state", _OUT),
    ],
    "gl_gru_reset_forward": [
        ("gates", _OUT), ("product", _IN), ("bias", _IN), ("entering", _IN), ("reset", _OUT), *_SIZES,
    ],
    "gl_gru_candidate_forward": [("gates", _OUT), ("product", _IN), ("bias", _IN), ("h", _IN), *_END],
    "gl_gru_candidate_backward": [
        *_START_BACK, ("gates", _IN), ("h", _IN), ("d_input", _OUT), ("d_candidate", _OUT), ("d_state", _OUT),
    ],
    "gl_gru_reset_backward": [
        ("q", _IN), ("gates", _IN), ("h", _IN), ("recurrent_mask", _IN), ("mask", "const uint8*"), ("carry", _OUT),
        ("d_input", _OUT), ("d_state", _OUT), *_SIZES,
    ],
    "gl_simple_rnn_forward": [("sums", _IN), ("product", _IN), ("bias", _IN), ("h", _IN), *_END],
    "gl_simple_rnn_backward": [*_START_BACK, ("new_h", _IN), ("d_sums", _OUT)],
}  # fmt: skip

KERNELS = {
    name: Kernel("recurrent.cu", name, arguments=fields, defines={"STORAGE": DTYPES})
    for name, fields in _FIELDS.items()
}


def launch_step(name: str, rows: int, units: int, *, hard: bool = False, **values: Any) -> None:
    """Launch one kernel of ``recurrent.cu`` over (rows, units); what is not given is a null pointer or 0.

    16-byte accesses are used where `units` and every address allow them. Raises ShapeError for 2^31 values or more.
    """
    if rows * units >= 2**31:
        raise ShapeError(message(name, "one step is too large", "fewer than 2^31 values", rows * units))
    fields = {field: values.get(field) for field, _ in _FIELDS[name]}
    arrays: list[Any] = [a for field, a in fields.items() if hasattr(a, "dtype") and field != "mask"]
    width = vector_width(arrays, units)
    fields.update(rows=rows, units=units, hard=int(hard), vectors=int(width > 1))
    if "zero_output" in fields:
        fields["zero_output"] = int(bool(fields["zero_output"]))
    threads = rows * (units // width)
    KERNELS[name].launch(
        fields, grid=(-(-threads // _THREADS),), block=(_THREADS,), defines={"STORAGE": arrays[0].dtype.name}
    )
