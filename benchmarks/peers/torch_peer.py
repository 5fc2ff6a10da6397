"""PyTorch, eager, in the row's own layout: channels last for NHWC, contiguous for NCHW.

A backward row times ``torch.autograd.grad`` on a graph that is kept, so it includes PyTorch's own dispatch and no
accumulation; a step records the graph and goes through it. PyTorch has no batch renormalisation and no several axes;
ghost batches are a loop over sub-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shapes import Case
from benchmarks.truth import EPSILON

__all__ = ["capture", "finish", "prepare", "prepare_in_layout", "to_numpy", "unavailable", "version"]


def unavailable(on_gpu: bool) -> str:
    import torch

    return "this PyTorch has no CUDA" if on_gpu and not torch.cuda.is_available() else ""


def version() -> str:
    import torch

    return f"PyTorch {torch.__version__}"


def to_numpy(value: Any) -> np.ndarray:
    value = value.detach()
    if value.dtype.itemsize == 2:
        value = value.float()
    return value.cpu().numpy()


def finish(results: Any) -> None:
    """Wait for the device where there is one."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Graph:
    """Captured calls, with the memory they work on, until `close`."""

    def __init__(self, graph: Any, *held: Any) -> None:
        self._graph, self._held = graph, held

    def launch(self) -> None:
        """Run all calls once, on the current stream."""
        self._graph.replay()

    def close(self) -> None:
        """Give the memory back to the device: the other libraries' pools cannot take it from PyTorch's."""
        import torch

        torch.cuda.synchronize()
        self._graph.reset()
        self._graph, self._held = None, ()
        torch.cuda.empty_cache()


def capture(prepare: Callable[[], Any], copies: int, calls: int) -> Any:
    """Return `calls` calls of what ``prepare()`` makes `copies` times as one graph, as many results being kept.

    Everything is done on the stream that is captured: a gradient runs on the stream of its forward pass. Threads of
    other libraries may go on meanwhile, hence the mode.
    """
    import torch

    stream = torch.cuda.Stream()
    graph, held = torch.cuda.CUDAGraph(), deque(maxlen=copies)
    with torch.cuda.stream(stream):
        functions = [prepare() for _ in range(copies)]
        for function in functions * 2:  # compiles, allocates workspaces
            held.append(function())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for number in range(calls):
            held.append(functions[number % copies]())
    return _Graph(graph, functions, held)


def _tensors(data: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    import torch

    found = {}
    for name, value in data.items():
        if value.dtype.name == "bfloat16":
            tensor = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(value)
        found[name] = tensor.cuda() if on_gpu else tensor
    return found


class _View:
    """Results of an image row, turned back to the row's layout when they are checked."""

    def __init__(self, tensor: Any, order: tuple[int, ...]) -> None:
        self.tensor, self.order = tensor, order

    def detach(self) -> Any:
        return self.tensor.detach().permute(self.order)


def _norm(case: Case, d: dict[str, Any], contiguous: bool | None, wrap: Any) -> Any:
    """`contiguous` asks for channels first (True) or last (False) in memory; None keeps what is there."""
    import torch
    from torch.nn import functional

    if case.op not in ("batch_norm", "batch_norm_relu_residual", "batch_norm_ghost"):
        return "PyTorch has no such operation"
    rank = len(case.shape)
    back: tuple[int, ...] | None = None
    for name in ("x", "dy", "residual"):
        if name not in d:
            continue
        if case.layout == "NTC":
            d[name] = d[name].reshape(-1, case.shape[-1])
        elif case.layout != "NCHW" and rank > 2:
            d[name] = d[name].permute(0, rank - 1, *range(1, rank - 1))
            back = (0, *range(2, rank), 1)
        if contiguous is not None:
            last = torch.channels_last if rank == 4 else torch.channels_last_3d
            d[name] = d[name].contiguous(memory_format=torch.contiguous_format if contiguous else last)
    x, gamma, beta = d["x"], d["gamma"], d["beta"]
    moving = [d["moving_mean"].clone(), d["moving_variance"].clone()]

    def shown(tensor: Any) -> Any:
        if case.layout == "NTC" and tensor.dim() == 2:
            return tensor.reshape(case.shape)
        return tensor if back is None else _View(tensor, back)

    def norm(x: Any, residual: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        if case.groups > 1:
            # unbind, because the gradient of slices would fill one array of x's size for each sub-batch
            parts = [
                functional.batch_norm(part, mean, variance, gamma, beta, True, 0.01, EPSILON)
                for part in x.reshape(-1, case.groups, x.shape[1]).unbind(1)
            ]
            return torch.stack(parts, 1).reshape(x.shape)
        y = functional.batch_norm(x, mean, variance, gamma, beta, case.mode != "inference", 0.01, EPSILON)
        return torch.relu(y + residual) if residual is not None else y

    call = wrap(norm)
    residual = d.get("residual")
    if case.mode in ("inference", "forward"):

        def forward() -> dict[str, Any]:
            with torch.no_grad():
                return {"y": shown(call(x, residual, gamma, beta, *moving))}

        return forward
    inputs = [x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()]
    inputs += [] if residual is None else [residual.requires_grad_()]

    def gradients(y: Any, keep: bool) -> dict[str, Any]:
        found = torch.autograd.grad(y, inputs, d["dy"], retain_graph=keep)
        named = dict(zip(("dx", "dgamma", "dbeta", "dresidual"), found, strict=False))
        return {name: shown(value) if value.dim() > 1 else value for name, value in named.items()}

    def step() -> dict[str, Any]:
        y = call(x, residual, gamma, beta, *moving)
        return {"y": shown(y), **gradients(y, False)}

    if case.mode == "step":
        return step
    y = call(x, residual, gamma, beta, *moving)
    return lambda: gradients(y, True)


def _reordered(value: Any, kind: str) -> Any:
    """Bring the GRU's gates from z, r, n to PyTorch's r, z, n, along the last axis."""
    import torch

    if kind == "lstm":
        return value
    z, r, n = value.chunk(3, dim=-1)
    return torch.cat([r, z, n], dim=-1)


def _recurrent(case: Case, d: dict[str, Any], on_gpu: bool) -> Any:
    import torch

    kind, form = case.op.split("_")
    weights = [_reordered(d[name], kind).T.contiguous() for name in ("kernel", "recurrent_kernel")]
    bias = _reordered(d["bias"], kind)
    biases = [bias, torch.zeros_like(bias)] if kind == "lstm" else [bias[0].contiguous(), bias[1].contiguous()]
    depth, units = case.shape[-2:]
    x, states = d["x"], (d["h"], d["c"]) if kind == "lstm" else (d["h"],)
    if form == "cell":
        cell = torch.lstm_cell if kind == "lstm" else torch.gru_cell

        def step() -> dict[str, Any]:
            with torch.no_grad():
                found = cell(x, states if kind == "lstm" else states[0], *weights, *biases)
                h = found[0] if kind == "lstm" else found
                return {"output": h + x, "h": h, **({"c": found[1]} if kind == "lstm" else {})}

        return step
    layer = (torch.nn.LSTM if kind == "lstm" else torch.nn.GRU)(depth, units)
    layer = layer.to(device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), [*weights, *biases], strict=True):
            parameter.copy_(value)
    initial = tuple(s[None] for s in states)
    initial = initial if kind == "lstm" else initial[0]
    if case.mode == "forward":

        def forward() -> dict[str, Any]:
            with torch.no_grad():
                output, last = layer(x, initial)
                named = {"h": last[0][0], "c": last[1][0]} if kind == "lstm" else {"h": last[0]}
                return {"output": output + x, **named}

        return forward
    inputs = [x.requires_grad_(), *list(layer.parameters())[:2], *list(layer.parameters())[2:]]
    output = layer(x, initial)[0] + x
    dy = d["dy"]

    def backward() -> dict[str, Any]:
        dx, dkernel, drecurrent = torch.autograd.grad(output, inputs, dy, retain_graph=True)[:3]
        back = _reordered if kind == "gru" else lambda value, _: value  # the same exchange undoes itself
        return {"dx": dx, "dkernel": back(dkernel.T, kind), "drecurrent_kernel": back(drecurrent.T, kind)}

    return backward


def _digits(d: dict[str, Any]) -> Any:
    import torch
    from torch.nn import functional

    names = ("kernel_1", "gamma", "beta", "kernel_2", "bias_2")
    p = {name: d[name].clone().requires_grad_() for name in names}
    optimizer = torch.optim.SGD(p.values(), lr=0.1, momentum=0.9)

    def step() -> dict[str, Any]:
        optimizer.zero_grad()
        u = d["x"] @ p["kernel_1"]
        h = torch.relu(functional.batch_norm(u, None, None, p["gamma"], p["beta"], True, 0.01, EPSILON))
        functional.cross_entropy(h @ p["kernel_2"] + p["bias_2"], d["labels"]).backward()
        optimizer.step()
        return p

    return step


def _optimizer(case: Case, d: dict[str, Any], data: dict[str, Any]) -> Any:
    import torch

    from benchmarks.data import split_parameters

    pieces = [len(piece) for piece in split_parameters(data["parameters"])]
    parameters = [piece.clone().requires_grad_() for piece in d["parameters"].split(pieces)]
    for parameter, gradient in zip(parameters, d["gradients"].split(pieces), strict=True):
        parameter.grad = gradient
    if case.op == "adam":
        optimizer: Any = torch.optim.Adam(parameters, lr=0.01, eps=1e-7, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)

    def step() -> dict[str, Any]:
        optimizer.step()
        return {"parameters": parameters}

    return step


def prepare_in_layout(case: Case, data: dict[str, Any], on_gpu: bool, contiguous: bool | None, wrap: Any) -> Any:
    """Return the function for a row; `wrap` is applied to the batch normalisation (the identity, or a compiler)."""
    import torch

    if case.dtype == "float16" and not on_gpu and not case.op.startswith("batch_norm"):
        return "no float16 on a CPU here"
    d = _tensors(data, on_gpu)
    if case.op.startswith("batch_norm"):
        return _norm(case, d, contiguous, wrap)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, d, on_gpu)
    if case.op == "residual_add":
        return lambda: {"y": d["x"] + d["residual"]}
    if case.op == "dense":
        weight = d["kernel"].T.contiguous()
        return lambda: {"y": torch.nn.functional.linear(d["x"], weight, d["bias"])}
    if case.op == "conv2d":
        x, kernel = d["x"].permute(0, 3, 1, 2), d["kernel"].permute(3, 2, 0, 1)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return lambda: {"y": _View(torch.nn.functional.conv2d(x, kernel, padding=1), (0, 2, 3, 1))}
    return _digits(d) if case.op == "digits" else _optimizer(case, d, data)


def prepare(case: Case, data: dict[str, Any], on_gpu: bool) -> Any:
    return prepare_in_layout(case, data, on_gpu, None, lambda function: function)
