"""PyTorch, eager, on images in the other layout: contiguous for an NHWC row, channels last for an NCHW row."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.torch_peer import capture, finish, prepare_in_layout, to_numpy, unavailable, version
from benchmarks.shapes import Case

__all__ = ["capture", "finish", "prepare", "to_numpy", "unavailable", "version"]


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    if case.layout not in ("NHWC", "NCHW", "NDHWC") or not case.op.startswith("batch_norm"):
        return "no second layout"
    return prepare_in_layout(case, data, on_gpu, case.layout != "NCHW", lambda function: function)
