"""The kernel body of batch normalisation: the five functions of ``batch_norm_numpy`` on device arrays.

What is launched is decided by `gpulayers.ops.batch_norm_plan.choose`; what the kernels do stands in
``kernels/batch_norm.cu``. Nothing is allocated but outputs; partial sums live in the workspace of the device and
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers.device import array_module
from gpulayers.launch import Kernel, device_properties, is_aligned, workspace
from gpulayers.ops.batch_norm_moving import MovingStatistics, Renorm
from gpulayers.ops.batch_norm_plan import CLUSTER, Layout, Plan, choose

__all__ = ["backward", "forward", "inference", "inference_backward", "statistics"]

_GEOMETRY = [(name, "int64") for name in ("rows", "groups", "spread", "channels", "inner", "splits")]
_SCRATCH = [("parts", "PARAMETER*"), ("moments", "float64*"), ("counters", "uint32*")]
_STATISTICS = [
    ("x", "const STORAGE*"),
    ("saved", "PARAMETER*"),
    *[(name, "PARAMETER*") for name in ("mean", "variance", "group_mean", "group_variance")],
    *[(name, "const PARAMETER*") for name in ("old_mean", "old_stddev")],
    ("limit_arrays", "const PARAMETER*[3]"),
    ("limits", "float64[3]"),
    *[(f"moving_{name}", "PARAMETER*") for name in ("mean", "variance", "stddev")],
    *[(name, "PARAMETER*") for name in ("renorm_mean", "renorm_stddev")],
    ("skipped", "int64*"),
    *[(name, "float64") for name in ("decay", "renorm_decay", "unbiased", "epsilon")],
    ("skip_nonfinite", "int32"),
]
_GIVEN = [
    *[(name, "const PARAMETER*") for name in ("gamma", "beta", "given_mean", "given_variance")],
    ("renormed", "int32"),
]
_OUTPUT = [("residual", "const STORAGE*"), ("y", "STORAGE*"), ("relu", "int32")]
_INPUTS = [("x", "const STORAGE*"), ("saved", "const PARAMETER*"), ("epsilon", "float64")]
_GRADIENTS = [("dy", "const STORAGE*"), ("y", "const STORAGE*"), ("dx", "STORAGE*"), ("tables", "PARAMETER*")]
_SUMS = [("dresidual", "STORAGE*"), ("dgamma", "PARAMETER*"), ("dbeta", "PARAMETER*")]

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_DEFINES = {
    "STORAGE": _DTYPES,
    "PARAMETER": ("float32", "float64"),
    "VECTOR": (False, True),
    "CHANNELS_LAST": (False, True),
}


def _kernel(name: str, *fields: list[tuple[str, str]], one_launch: bool = False) -> Kernel:
    extra = {"CLUSTER": (1, CLUSTER)} if one_launch else {}
    return Kernel(
        "batch_norm.cu",
        name,
        arguments=[*_GEOMETRY, *(field for part in fields for field in part)],
        defines={**_DEFINES, **extra},
        where=lambda d: (d["PARAMETER"] == "float64") == (d["STORAGE"] == "float64"),
    )


_statistics = _kernel("gl_bn_statistics", _SCRATCH, _STATISTICS)
_normalise = _kernel("gl_bn_normalise", _INPUTS, _GIVEN, _OUTPUT)
_forward = _kernel("gl_bn_forward", _SCRATCH, _STATISTICS, _GIVEN, _OUTPUT, one_launch=True)
_sums = _kernel("gl_bn_sums", _SCRATCH, _INPUTS, _GIVEN, _GRADIENTS, _SUMS)
_apply = _kernel("gl_bn_apply", _INPUTS, _GRADIENTS)
_backward = _kernel("gl_bn_backward", _SCRATCH, _INPUTS, _GIVEN, _GRADIENTS, _SUMS, one_launch=True)


class _Launch:
    """One call's plan and the arguments that all its launches share."""

    def __init__(
        self, layout: Layout, dtype: Any, arrays: Sequence[Any], kept: int = 1, one_launch: bool = True
    ) -> None:
        x = arrays[0]
        self.layout, self.dtype, self.x = layout, dtype, x
        present = [array for array in arrays if array is not None]
        self.plan: Plan = choose(layout, x.dtype.itemsize, is_aligned(*present), device_properties(x), kept, one_launch)
        geometry = dict(zip(("rows", "groups", "spread", "channels", "inner"), layout, strict=False))
        self.shared_values: dict[str, Any] = {**geometry, "splits": self.plan.splits}
        self.defines: dict[str, Any] = {
            "STORAGE": x.dtype.name,
            "PARAMETER": dtype.name,
            "VECTOR": self.plan.vector,
            "CHANNELS_LAST": self.plan.channels_last,
        }

    def scratch(self, tables: bool = False) -> dict[str, Any]:
        """Return the workspace as arguments: partial sums, moments in double, counters, and tables if wanted."""
        layout, plan, size = self.layout, self.plan, self.dtype.itemsize
        sizes = [16 * layout.slots, 2 * plan.splits * layout.slots * size, 3 * layout.slots * size if tables else 0]
        starts = [0, _round_up(sizes[0])]
        starts.append(starts[1] + _round_up(sizes[1]))
        counters, memory = workspace(
            self.x, counters=plan.slabs * (layout.groups + 1), scratch=starts[2] + _round_up(sizes[2])
        )
        pieces = [memory[start : start + length] for start, length in zip(starts, sizes, strict=True)]
        values = {
            "moments": pieces[0].view("float64"),
            "parts": pieces[1].view(self.dtype),
            "counters": counters,
        }
        if tables:
            values["tables"] = pieces[2].view(self.dtype)
        return values

    def run(self, kernel: Kernel, values: dict[str, Any]) -> None:
        """Launch with one block per slab, group and split, or per slab (and split) where one launch does it all."""
        plan, defines = self.plan, self.defines
        blocks = plan.slabs * plan.splits * self.layout.groups
        shared = 0
        if "CLUSTER" in kernel.defines:
            blocks = plan.slabs * plan.splits
            defines = {**defines, "CLUSTER": CLUSTER if plan.regime == "cluster" else 1}
            shared = plan.shared
        kernel.launch(
            {**self.shared_values, **values},
            grid=(blocks,),
            block=(plan.lanes, plan.depth),
            defines=defines,
            shared=shared,
        )


def _round_up(size: int) -> int:
    return -(-size // 256) * 256


def _parameter(values: Any, dtype: Any) -> Any:
    """Return per-channel values in the parameter dtype, contiguous; None stays None."""
    if values is None:
        return None
    if values.dtype != dtype:
        return values.astype(dtype).reshape(-1)
    return values if values.flags.c_contiguous else array_module(values).ascontiguousarray(values)


def _limits(renorm: Renorm | None, dtype: Any) -> dict[str, Any]:
    """Return the clips as numbers, and those that live on the device as arrays."""
    numbers, arrays = [0.0, float("inf"), float("inf")], [None, None, None]
    for index, clip in enumerate(renorm[2:] if renorm is not None else ()):
        if clip is None:
            continue
        if array_module(clip).__name__ != "numpy":
            arrays[index] = _parameter(clip, dtype)
        else:
            numbers[index] = float(clip)
    return {"limits": numbers, "limit_arrays": arrays}


def _moving(moving: MovingStatistics | None, count: int) -> dict[str, Any]:
    fields = MovingStatistics(None, None, 0.0) if moving is None else moving
    return {
        "moving_mean": fields.mean,
        "moving_variance": fields.variance,
        "moving_stddev": fields.stddev,
        "renorm_mean": fields.renorm_mean,
        "renorm_stddev": fields.renorm_stddev,
        "skipped": fields.skipped,
        "decay": float(fields.decay),
        "renorm_decay": float(fields.renorm_decay),
        "unbiased": count / max(count - 1, 1) if fields.unbiased else 1.0,
        "skip_nonfinite": int(fields.skip_nonfinite),
    }


def _statistics_values(
    x: Any, layout: Layout, epsilon: float, renorm: Renorm | None, moving: MovingStatistics | None, dtype: Any
) -> dict[str, Any]:
    """Return the statistics' arguments, with new arrays for what a training step returns."""
    xp = array_module(x)
    per_channel = xp.empty((2, layout.channels), dtype)
    return {
        "x": x,
        "saved": xp.empty((3 if renorm is None else 5, layout.groups, layout.channels), dtype),
        "mean": per_channel[0],
        "variance": per_channel[1],
        "group_mean": None,
        "group_variance": None,
        "old_mean": None if renorm is None else _parameter(renorm.mean, dtype),
        "old_stddev": None if renorm is None else _parameter(renorm.stddev, dtype),
        "epsilon": float(epsilon),
        **_limits(renorm, dtype),
        **_moving(moving, layout.samples),
    }


def forward(
    x: Any,
    layout: Layout,
    gamma: Any,
    beta: Any,
    epsilon: float,
    renorm: Renorm | None,
    residual: Any,
    relu: bool,
    moving: MovingStatistics | None,
    dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return (y, mean, variance, saved) of a training step, and update `moving` in place."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)
    if x.size == 0:
        zeros = xp.zeros(layout.channels, dtype), xp.zeros(layout.channels, dtype)
        return (y, *zeros, xp.zeros((3 if renorm is None else 5, layout.groups, layout.channels), dtype))
    launch = _Launch(layout, dtype, (x, y, residual))
    values = _statistics_values(x, layout, epsilon, renorm, moving, dtype)
    given = {
        "gamma": _parameter(gamma, dtype),
        "beta": _parameter(beta, dtype),
        "given_mean": None,
        "given_variance": None,
        "renormed": int(renorm is not None),
        "residual": residual,
        "y": y,
        "relu": int(relu),
    }
    if launch.plan.regime == "sweeps":
        launch.run(_statistics, {**launch.scratch(), **values})
        launch.run(_normalise, {"x": x, "saved": values["saved"], "epsilon": float(epsilon), **given})
    else:
        launch.run(_forward, {**launch.scratch(), **values, **given})
    return y, values["mean"], values["variance"], values["saved"]


def statistics(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any]:
    """Return mean and biased variance, shape (groups, C)."""
    xp = array_module(x)
    if x.size == 0:
        return xp.zeros(layout[1:4:2], dtype), xp.zeros(layout[1:4:2], dtype)
    launch = _Launch(layout, dtype, (x,), one_launch=False)
    values = _statistics_values(x, layout, 0.0, None, None, dtype)
    values["group_mean"], values["group_variance"] = (xp.empty(layout[1:4:2], dtype) for _ in range(2))
    launch.run(_statistics, {**launch.scratch(), **values})
    return values["group_mean"], values["group_variance"]


def inference(
    x: Any,
    layout: Layout,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    epsilon: float,
    residual: Any,
    relu: bool,
    dtype: Any,
) -> Any:
    """Return ``(x - mean) * gamma / sqrt(variance + epsilon) + beta`` (+ residual, then ReLU)."""
    y = array_module(x).empty(x.shape, x.dtype)
    if x.size:
        launch = _Launch(layout, dtype, (x, y, residual), one_launch=False)
        values = {"x": x, "saved": None, "residual": residual, "y": y, "relu": int(relu)}
        launch.run(_normalise, {**values, **_given(gamma, beta, mean, variance, epsilon, dtype)})
    return y


def _given(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float, dtype: Any) -> dict[str, Any]:
    """Return the arguments of a step with given statistics."""
    return {
        "gamma": _parameter(gamma, dtype),
        "beta": _parameter(beta, dtype),
        "given_mean": _parameter(mean, dtype),
        "given_variance": _parameter(variance, dtype),
        "renormed": 0,
        "epsilon": float(epsilon),
    }


def _gradient_outputs(x: Any, layout: Layout, own_residual: bool, dtype: Any) -> dict[str, Any]:
    xp = array_module(x)
    per_channel = xp.empty((2, layout.channels), dtype)
    return {
        "dx": xp.empty(x.shape, x.dtype),
        "dresidual": xp.empty(x.shape, x.dtype) if own_residual else None,
        "dgamma": per_channel[0],
        "dbeta": per_channel[1],
    }


def _empty_gradients(dy: Any, x: Any, layout: Layout, residual: bool, dtype: Any) -> tuple[Any, Any, Any, Any]:
    xp = array_module(x)
    zeros = xp.zeros(layout.channels, dtype), xp.zeros(layout.channels, dtype)
    return (xp.empty(x.shape, x.dtype), *zeros, dy if residual else None)


def backward(
    dy: Any, x: Any, layout: Layout, gamma: Any, saved: Any, y: Any, residual: bool, dtype: Any
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of a training step; `y` is None where there was no ReLU."""
    if x.size == 0:
        return _empty_gradients(dy, x, layout, residual, dtype)
    own_residual = residual and y is not None  # without a ReLU the residual's gradient is dy itself
    outputs = _gradient_outputs(x, layout, own_residual, dtype)
    launch = _Launch(layout, dtype, (x, dy, y, outputs["dx"], outputs["dresidual"]), kept=2)
    scratch = launch.scratch(tables=True)
    given = _given(gamma, None, None, None, 0.0, dtype)
    given["renormed"] = int(saved.shape[0] == 5)
    inputs = {"x": x, "saved": _parameter(saved, dtype), "dy": dy, "y": y}
    if launch.plan.regime == "sweeps":
        launch.run(_sums, {**scratch, **given, **inputs, **outputs})
        second = {**inputs, "epsilon": 0.0, "dx": outputs["dx"], "tables": scratch["tables"]}
        if own_residual:  # the first sweep has left g there: one array to read instead of two
            second.update(dy=outputs["dresidual"], y=None)
        launch.run(_apply, second)
    else:
        launch.run(_backward, {**scratch, **given, **inputs, **outputs})
    dresidual = outputs["dresidual"] if own_residual else dy
    return outputs["dx"], outputs["dgamma"], outputs["dbeta"], dresidual if residual else None


def inference_backward(
    dy: Any,
    x: Any,
    layout: Layout,
    gamma: Any,
    mean: Any,
    variance: Any,
    epsilon: float,
    y: Any,
    residual: bool,
    dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of inference, the moving statistics constant."""
    if x.size == 0:
        return _empty_gradients(dy, x, layout, residual, dtype)
    own_residual = residual and y is not None
    outputs = _gradient_outputs(x, layout, own_residual, dtype)
    launch = _Launch(layout, dtype, (x, dy, y, outputs["dx"], outputs["dresidual"]), one_launch=False)
    values = {**launch.scratch(), **outputs, "tables": None, "x": x, "saved": None, "dy": dy, "y": y}
    launch.run(_sums, {**values, **_given(gamma, None, mean, variance, epsilon, dtype)})
    dresidual = outputs["dresidual"] if own_residual else dy
    return outputs["dx"], outputs["dgamma"], outputs["dbeta"], dresidual if residual else None
