"""torch.compile of the eager batch normalisation, in the row's own layout.

On a GPU compiled for the row's own sizes, PyTorch's best; on a CPU, where that takes too long, for any sizes.
"""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.peers.torch_peer import capture, finish, prepare_in_layout, to_numpy, version
from benchmarks.peers.torch_peer import unavailable as torch_unavailable
from benchmarks.shapes import Case

__all__ = ["capture", "finish", "prepare", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import shutil

    if reason := torch_unavailable(on_gpu):
        return reason
    return "" if on_gpu or shutil.which("g++") else "torch.compile needs g++ on a CPU"


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    import torch
    import torch._dynamo.config
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward row goes through its graph many times
    torch._dynamo.config.recompile_limit = 1000  # every row compiles anew; beyond the limit PyTorch runs eagerly
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    if case.op not in ("batch_norm", "batch_norm_relu_residual"):
        return "only batch normalisation is compiled here"
    if not on_gpu and not case.regime.startswith(("resnet50", "fused")):
        return "on a CPU only the ResNet-50 list is compiled: each compilation takes several seconds"
    compiled = functools.partial(torch.compile, dynamic=not on_gpu)
    return prepare_in_layout(case, data, on_gpu, None, compiled)
