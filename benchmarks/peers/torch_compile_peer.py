"""torch.compile of the eager batch normalisation, in the row's own layout, compiled once for all shapes of a rank."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.peers.torch_peer import prepare_in_layout, to_numpy, version
from benchmarks.peers.torch_peer import unavailable as torch_unavailable
from benchmarks.shapes import Case

__all__ = ["prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import shutil

    if reason := torch_unavailable(on_gpu):
        return reason
    return "" if on_gpu or shutil.which("g++") else "torch.compile needs g++ on a CPU"


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward row goes through its graph many times
    if case.op not in ("batch_norm", "batch_norm_relu_residual"):
        return "only batch normalisation is compiled here"
    if not on_gpu and not case.regime.startswith(("resnet50", "fused")):
        return "on a CPU only the ResNet-50 list is compiled: each compilation takes several seconds"
    compiled = functools.partial(torch.compile, dynamic=None if on_gpu else True)
    return prepare_in_layout(case, data, on_gpu, None, compiled)
