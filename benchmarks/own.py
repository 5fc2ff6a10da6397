"""gpulayers' part of every row: host or device arrays, the functions that a program would call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import gpulayers as gl
from benchmarks.data import split_parameters
from benchmarks.shapes import Case, axis_of
from benchmarks.truth import EPSILON, LIMITS
from gpulayers.ops.batch_norm import arrays as batch_norm_arrays
from gpulayers.ops.batch_norm.arrays import MovingStatistics, Renorm
from gpulayers.ops.recurrent import arrays as recurrent_arrays

__all__ = ["prepare"]

Function = Callable[[], dict[str, Any]]


def _norm(case: Case, d: dict[str, Any], xp: Any) -> Function:
    keywords: dict[str, Any] = {"axis": axis_of(case), "epsilon": EPSILON}
    relu = {"activation": "relu"} if case.op.endswith("residual") else {}
    residual = {"residual": d["residual"]} if relu else {}
    if case.mode == "inference":
        statistics = d["moving_mean"], d["moving_variance"]
        call = batch_norm_arrays.inference
        return lambda: {"y": call(d["x"], d["gamma"], d["beta"], *statistics, **keywords, **relu, **residual)}
    moving = MovingStatistics(d["moving_mean"].copy(), d["moving_variance"].copy(), 0.01)
    if case.op == "batch_norm_renorm":
        moving = moving._replace(
            stddev=xp.sqrt(d["moving_variance"]), renorm_mean=d["renorm_mean"].copy(),
            renorm_stddev=d["renorm_stddev"].copy(), renorm_decay=0.0,
        )  # fmt: skip
        keywords["renorm"] = Renorm(d["renorm_mean"], d["renorm_stddev"], *(np.float32(LIMITS[n]) for n in LIMITS))
    keywords["groups"] = case.groups

    def forward() -> Any:
        return batch_norm_arrays.forward(d["x"], d["gamma"], d["beta"], moving=moving, **keywords, **relu, **residual)

    if case.mode == "forward":
        return lambda: forward()._asdict()
    given = {"axis": keywords["axis"], "groups": case.groups, **relu, **({"residual": True} if relu else {})}

    def backward(first: Any) -> dict[str, Any]:
        mask = {"mask": first.mask} if relu else {}
        return batch_norm_arrays.backward(d["dy"], d["x"], d["gamma"], first.saved, **given, **mask)._asdict()

    def step() -> dict[str, Any]:
        first = forward()
        return {**first._asdict(), **backward(first)}

    return step if case.mode == "step" else functools.partial(backward, forward())


def _recurrent(case: Case, d: dict[str, Any]) -> Function:
    cell, kind = case.op.split("_")
    kind = {"cell": "step"}.get(kind, kind)
    states = (d["h"], d["c"]) if cell == "lstm" else (d["h"],)
    weights = d["kernel"], d["recurrent_kernel"]
    call = getattr(recurrent_arrays, f"{cell}_{kind}")
    names = ("output", "h", "c")[: 1 + len(states)]

    def forward() -> dict[str, Any]:
        return dict(zip(names, call(d["x"], *states, *weights, d["bias"], residual=True), strict=False))

    if case.mode == "forward":
        return forward
    saved = call(d["x"], *states, *weights, d["bias"], residual=True)[-1]
    back = getattr(recurrent_arrays, f"{cell}_{kind}_backward")
    nothing = (None,) * len(states)

    def backward() -> dict[str, Any]:
        found = back(d["dy"], *nothing, saved, *weights, residual=True)
        names = ("dx", *("dh", "dc")[: len(states)], "dkernel", "drecurrent_kernel")
        return dict(zip(names, found, strict=False))

    return backward


def _digits(d: dict[str, Any]) -> Function:
    from gpulayers.ops.batch_norm.operations import batch_norm_training
    from gpulayers.optimizers import Momentum

    names = ("kernel_1", "gamma", "beta", "kernel_2", "bias_2")
    parameters = {name: gl.Variable(d[name], name=name) for name in names}
    optimizer = Momentum(0.1)
    x, labels, p = d["x"], d["labels"], parameters

    def step() -> dict[str, Any]:
        with gl.GradientTape() as tape:
            u = gl.ops.matmul(x, p["kernel_1"])
            n = batch_norm_training(
                u, p["gamma"], p["beta"], given=("gamma", "beta"), axis=(1,), epsilon=EPSILON, activation="relu"
            )[0]
            logits = gl.ops.matmul(n, p["kernel_2"]) + p["bias_2"]
            loss = gl.reduce_mean(gl.ops.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = list(p.values())
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {name: variable.value for name, variable in p.items()}

    return step


def _optimizer(case: Case, d: dict[str, Any], xp: Any) -> Function:
    from gpulayers.optimizers import Adam, Momentum

    variables = [gl.Variable(piece, name=f"w{i}") for i, piece in enumerate(split_parameters(d["parameters"]))]
    pairs = list(zip(split_parameters(d["gradients"]), variables, strict=True))
    optimizer = Adam(0.01) if case.op == "adam" else Momentum(0.01)

    def step() -> dict[str, Any]:
        optimizer.apply_gradients(pairs)
        return {"parameters": variables}

    return step


def prepare(case: Case, d: dict[str, Any], xp: Any) -> Function:
    """Return the function that is timed; it returns results by name, as arrays of `xp`.

    `d` holds arrays of `xp`. Everything that a training program would do once is done here.
    """
    if case.op.startswith("batch_norm"):
        return _norm(case, d, xp)
    if case.op.endswith(("_cell", "_sequence")):
        return _recurrent(case, d)
    if case.op == "residual_add":
        if xp is np:
            return lambda: {"y": gl.ops.add(d["x"], d["residual"])}
        from gpulayers.ops.residual_kernels import residual_add

        return lambda: {"y": residual_add([d["x"]], [d["residual"]])[0]}
    if case.op == "dense":
        return lambda: {"y": gl.ops.add(gl.ops.matmul(d["x"], d["kernel"]), d["bias"])}
    if case.op == "conv2d":
        return lambda: {"y": gl.ops.convolution(d["x"], d["kernel"], padding="SAME")}
    return _digits(d) if case.op == "digits" else _optimizer(case, d, xp)
