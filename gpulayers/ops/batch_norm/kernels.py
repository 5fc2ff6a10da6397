"""The kernel body of batch normalisation: the five functions of ``batch_norm.numpy_body`` on device arrays.

What is launched is decided by `gpulayers.ops.batch_norm.plan.choose`; what the kernels do stands in
``kernels/batch_norm.cu``. Nothing is allocated but outputs; partial sums live in the workspace of the device and
stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpulayers.device import array_module
from gpulayers.launch import (
    Kernel,
    Place,
    Prepared,
    alignment_of,
    contiguous,
    division,
    place_of,
    remember,
    workspace_pieces,
)
from gpulayers.ops.batch_norm import plan as batch_norm_plan
from gpulayers.ops.batch_norm.layout import Layout
from gpulayers.ops.batch_norm.moving import MovingStatistics, Renorm
from gpulayers.ops.batch_norm.plan import CLUSTER, Access, Plan, choose

__all__ = ["backward", "forward", "inference", "inference_backward", "statistics"]

_GEOMETRY = [
    *[(name, "int64") for name in ("rows", "groups", "spread", "channels", "inner")],
    *[(name, "int64") for name in ("slab_channels", "splits", "share")],
    *[(f"{name}_multiplier", "uint64") for name in ("spread", "inner")],
    *[(f"{name}_shift", "int32") for name in ("spread", "inner")],
]
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
_OUTPUT = [
    ("residual", "const STORAGE*"),
    ("y", "STORAGE*"),
    ("relu", "int32"),
    ("affine", "PARAMETER*"),
    ("bits", "uint8*"),
]
_INPUTS = [("x", "const STORAGE*"), ("saved", "const PARAMETER*"), ("epsilon", "float64")]
_GRADIENTS = [
    *[(name, "const STORAGE*") for name in ("dy", "y")],
    ("bits", "const uint8*"),
    ("affine", "const PARAMETER*"),
    ("recompute", "int32"),
    ("dx", "STORAGE*"),
    ("tables", "PARAMETER*"),
]
_KEPT = [("kept_units", "int32")]
_SUMS = [("dresidual", "STORAGE*"), ("dgamma", "PARAMETER*"), ("dbeta", "PARAMETER*")]

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_DEFINES = {
    "STORAGE": _DTYPES,
    "PARAMETER": ("float32", "float64"),
    "PACKET": (1, 2, 4, 8),
    "CHANNELS_LAST": (False, True),
    "FOLDED": (False, True),
    "RAGGED": (False, True),
}


def _exists(defines: dict[str, Any]) -> bool:
    """Say whether there is a specialisation.

    Packets have at most 16 bytes, and 16 bytes where columns are folded or rows ragged; 8 bytes of float64 fit any row.
    """
    size = defines["PACKET"] * {"float64": 8, "float32": 4}.get(defines["STORAGE"], 2)
    double = defines["STORAGE"] == "float64"
    last, folded, ragged = (defines[name] for name in ("CHANNELS_LAST", "FOLDED", "RAGGED"))
    if (defines["PARAMETER"] == "float64") != double or size > 16 or (size < 16 and (folded or ragged)):
        return False
    return not (folded and not last) and not (ragged and (last or double))


def _kernel(name: str, *fields: list[tuple[str, str]], one_launch: bool = False) -> Kernel:
    extra = {"CLUSTER": (1, CLUSTER)} if one_launch else {}
    return Kernel(
        "batch_norm.cu",
        name,
        arguments=[*_GEOMETRY, *(field for part in fields for field in part)],
        defines={**_DEFINES, **extra},
        where=_exists,
    )


_statistics = _kernel("gl_bn_statistics", _SCRATCH, _STATISTICS)
_normalise = _kernel("gl_bn_normalise", _INPUTS, _GIVEN, _OUTPUT)
_forward = _kernel("gl_bn_forward", _SCRATCH, _STATISTICS, _GIVEN, _OUTPUT, one_launch=True)
_forward_grid = _kernel("gl_bn_forward_grid", _SCRATCH, _STATISTICS, _GIVEN, _OUTPUT, _KEPT)
_sums = _kernel("gl_bn_sums", _SCRATCH, _INPUTS, _GIVEN, _GRADIENTS, _SUMS)
_apply = _kernel("gl_bn_apply", _INPUTS, _GRADIENTS)
_backward = _kernel("gl_bn_backward", _SCRATCH, _INPUTS, _GIVEN, _GRADIENTS, _SUMS, one_launch=True)
_backward_grid = _kernel("gl_bn_backward_grid", _SCRATCH, _INPUTS, _GIVEN, _GRADIENTS, _SUMS, _KEPT)


class _Launch:
    """What all calls of one shape, dtype and alignment share: the plan, the arguments that stay, prepared launches."""

    def __init__(self, place: Place, layout: Layout, storage: Any, dtype: Any, plan: Plan) -> None:
        self._place, self.plan = place, plan
        geometry = dict(zip(("rows", "groups", "spread", "channels", "inner"), layout, strict=False))
        how = plan.access
        units_of_row = how.units_of_row(layout.inner)
        units = layout.samples // layout.inner * units_of_row
        self._fixed: dict[str, Any] = {**geometry, "slab_channels": plan.slab_channels, "splits": plan.splits}
        self._fixed["share"] = units // plan.splits
        for name, divisor in (("spread", layout.spread), ("inner", layout.inner if how.folded else units_of_row)):
            self._fixed[f"{name}_multiplier"], self._fixed[f"{name}_shift"] = division(divisor)
        self._defines = _defines(plan.access, storage, dtype)
        self._blocks = plan.slabs * plan.splits
        self._groups = layout.groups
        self._counters = plan.slabs * (layout.groups + 1)
        if plan.regime == "grid":
            self._counters = (-(-self._counters // 32) + plan.slabs) * 32  # and gates in lines of their own
        pieces = {
            "moments": (np.dtype(np.float64), 2 * layout.slots),
            "parts": (dtype, 2 * plan.splits * layout.slots),
        }
        per_channel = (dtype, layout.channels)
        results = {"saved": (dtype, 3 * layout.slots), "mean": per_channel, "variance": per_channel}
        more = {"": {}, "tables": {"tables": (dtype, 3 * layout.slots)}, "results": results}
        self._scratch = {
            name: (("counters", *pieces, *added), (*pieces.values(), *added.values())) for name, added in more.items()
        }
        self._prepared: dict[Any, Prepared] = {}

    def scratch(self, more: str = "") -> dict[str, Any]:
        """Return the workspace as arguments: partial sums, moments in double, counters.

        `more`: ``"tables"`` for those of two backward sweeps, or ``"results"`` for what of a forward step nobody keeps.
        """
        names, pieces = self._scratch[more]
        return dict(zip(names, workspace_pieces(self._place, self._counters, pieces), strict=True))

    def run(self, kernel: Kernel, values: dict[str, Any]) -> None:
        """Launch with one block per slab, group and split, or per slab (and split) where blocks take all the groups.

        Fields that `values` does not name are null pointers and zeros.
        """
        key = kernel, *values
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(kernel, values)
        prepared(values)

    def _prepare(self, kernel: Kernel, names: Iterable[str]) -> Prepared:
        plan, defines, blocks, shared = self.plan, self._defines, self._blocks * self._groups, 0
        fixed = {**kernel.nothing(names), **self._fixed}
        if plan.regime == "grid":
            shared, fixed["kept_units"] = plan.shared, plan.kept_units
        elif "CLUSTER" in kernel.defines:
            blocks, shared = self._blocks, plan.shared
            defines = {**defines, "CLUSTER": CLUSTER if plan.regime == "cluster" else 1}
        return kernel.prepare(
            self._place,
            fixed,
            grid=(blocks,),
            block=(plan.lanes, plan.depth),
            defines=defines,
            shared=shared,
            cooperative=plan.regime == "grid",
        )


def _defines(access: Access, storage: Any, dtype: Any) -> dict[str, Any]:
    how = {name.upper(): value for name, value in access._asdict().items()}
    return {"STORAGE": storage, "PARAMETER": dtype, **how}


def _plan(layout: Layout, dtype: Any, x: Any, alignment: int, device: Any, kept: int, grid: Kernel | None) -> Plan:
    """Return the plan; a grid that waits for itself only where the device holds all its blocks at a time.

    The plan counts on the launch bounds, the occupancy of the specialisation has the last word: blocks that wait must
    not keep others from starting.
    """
    question = layout, x.dtype.itemsize, alignment, device, kept, grid is not None
    plan = choose(*question)
    if plan.regime != "grid" or grid is None:
        return plan
    specialisation = grid.specialise(_defines(plan.access, x.dtype, dtype))
    held = specialisation.resident_blocks(x, plan.lanes * plan.depth, plan.shared) * device.multiprocessors
    return plan if plan.slabs * plan.splits * layout.groups <= held else choose(*question, grid=False)


_launches: dict[Any, _Launch] = {}


def _launch(layout: Layout, dtype: Any, arrays: Sequence[Any], kept: int = 1, grid: Kernel | None = None) -> _Launch:
    """Return what calls with arrays like these share; the first of `arrays` is x, those that are None do not count.

    `kept` arrays would stay on chip between two sweeps, in one launch of `grid`; it is None for operations of one.
    """
    x = arrays[0]
    place = place_of(x)
    device, alignment = place.launcher.properties(x), alignment_of(*[array for array in arrays if array is not None])
    key = place, device, layout, x.dtype, alignment, kept, grid, batch_norm_plan.forced
    found = _launches.get(key)
    if found is None:
        plan = _plan(layout, dtype, x, alignment, device, kept, grid)
        found = remember(_launches, key, _Launch(place, layout, x.dtype, dtype, plan))
    return found


def _parameters(dtype: Any, *values: Any) -> Sequence[Any]:
    """Return per-channel values in the parameter dtype, contiguous; None stays None."""
    given = [array for array in values if array is not None]
    if given:
        is_contiguous = place_of(given[0]).launcher.is_contiguous
        if not all([array.dtype == dtype and is_contiguous(array) for array in given]):
            return [None if v is None else contiguous(v.astype(dtype, copy=False).reshape(-1))[0] for v in values]
    return values


def _renorm(renorm: Renorm, dtype: Any) -> dict[str, Any]:
    """Return renorm's old statistics, and its clips: those that live on the device as arrays, the others as numbers."""
    numbers, arrays = [0.0, float("inf"), float("inf")], [None, None, None]
    for index, clip in enumerate(renorm[2:]):
        if clip is None:
            continue
        if array_module(clip).__name__ != "numpy":
            (arrays[index],) = _parameters(dtype, clip)
        else:
            numbers[index] = float(clip)
    old_mean, old_stddev = _parameters(dtype, renorm.mean, renorm.stddev)
    return {
        "old_mean": old_mean,
        "old_stddev": old_stddev,
        "limits": numbers,
        "limit_arrays": arrays,
    }


def _moving(moving: MovingStatistics, count: int) -> dict[str, Any]:
    mean, variance, decay, stddev, renorm_mean, renorm_stddev, renorm_decay, unbiased, skip_nonfinite, skipped = moving
    values = {
        "moving_mean": mean,
        "moving_variance": variance,
        "decay": float(decay),
        "unbiased": count / max(count - 1, 1) if unbiased else 1.0,
    }
    if skip_nonfinite:
        values.update(skip_nonfinite=1, skipped=skipped)
    if stddev is not None or renorm_mean is not None or renorm_stddev is not None:
        values.update(moving_stddev=stddev, renorm_mean=renorm_mean, renorm_stddev=renorm_stddev)
        values["renorm_decay"] = float(renorm_decay)
    return values


def _results(xp: Any, layout: Layout, renorm: Renorm | None, dtype: Any) -> dict[str, Any]:
    """Return new arrays for what a training step leaves besides y."""
    return {
        "saved": xp.ndarray((3 if renorm is None else 5, layout.groups, layout.channels), dtype),
        "mean": xp.ndarray(layout.channels, dtype),
        "variance": xp.ndarray(layout.channels, dtype),
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
    only_y: bool = False,
) -> tuple[Any, Any, Any, Any, Any]:
    """Return (y, mean, variance, saved, mask) of a training step, and update `moving` in place.

    With `only_y` (not for renorm) the other results are scratch, which the next call overwrites, and mask is None.
    `mask` is what `backward` needs of a ReLU: without residual the bytes of each channel's factor and shift, from
    which it gets the same output again, to the bit; else a byte for every 16 bytes of x. None where it needs y itself
    (`Access.leaves_bits` says no), or nothing.
    """
    xp = array_module(x)
    y = xp.ndarray(x.shape, x.dtype)
    if x.size == 0:
        zeros = xp.zeros(layout.channels, dtype), xp.zeros(layout.channels, dtype)
        return (y, *zeros, xp.zeros((3 if renorm is None else 5, layout.groups, layout.channels), dtype), None)
    launch = _launch(layout, dtype, (x, y, residual), grid=_forward_grid)
    values = launch.scratch("results") if only_y else {**launch.scratch(), **_results(xp, layout, renorm, dtype)}
    values.update(x=x, epsilon=float(epsilon))
    if renorm is not None:
        values.update(_renorm(renorm, dtype))
    if moving is not None:
        values.update(_moving(moving, layout.samples))
    gamma, beta = _parameters(dtype, gamma, beta)
    given = {
        "gamma": gamma,
        "beta": beta,
        "renormed": int(renorm is not None),
        "residual": residual,
        "y": y,
        "relu": int(relu),
    }
    mask = None
    if relu and residual is None and not only_y:
        given["affine"] = xp.ndarray((2 * layout.slots,), dtype)
        mask = given["affine"].view("uint8")
    elif relu and residual is not None and launch.plan.access.leaves_bits(x.itemsize):
        mask = given["bits"] = xp.ndarray((x.nbytes // 16,), np.uint8)
    if launch.plan.regime == "sweeps":
        launch.run(_statistics, values)
        launch.run(_normalise, {"x": x, "saved": values["saved"], "epsilon": float(epsilon), **given})
    else:
        kernel = _forward_grid if launch.plan.regime == "grid" else _forward
        launch.run(kernel, {**values, **given})
    return y, values["mean"], values["variance"], values["saved"], mask


def statistics(x: Any, layout: Layout, dtype: Any) -> tuple[Any, Any]:
    """Return mean and biased variance, shape (groups, C)."""
    xp = array_module(x)
    if x.size == 0:
        return xp.zeros(layout[1:4:2], dtype), xp.zeros(layout[1:4:2], dtype)
    launch = _launch(layout, dtype, (x,))
    mean, variance = (xp.ndarray(layout[1:4:2], dtype) for _ in range(2))
    values = {"x": x, "epsilon": 0.0, "group_mean": mean, "group_variance": variance}
    launch.run(_statistics, {**launch.scratch("results"), **values})
    return mean, variance


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
    y = array_module(x).ndarray(x.shape, x.dtype)
    if x.size:
        launch = _launch(layout, dtype, (x, y, residual))
        values = {"x": x, "residual": residual, "y": y, "relu": int(relu)}
        launch.run(_normalise, {**values, **_given(gamma, beta, mean, variance, epsilon, dtype)})
    return y


def _given(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float, dtype: Any) -> dict[str, Any]:
    """Return the arguments of a step with given statistics."""
    names = ("gamma", "beta", "given_mean", "given_variance")
    values = dict(zip(names, _parameters(dtype, gamma, beta, mean, variance), strict=True))
    values["epsilon"] = float(epsilon)
    return values


def _gradient_outputs(x: Any, layout: Layout, own_residual: bool, dtype: Any) -> dict[str, Any]:
    new = array_module(x).ndarray
    return {
        "dx": new(x.shape, x.dtype),
        "dresidual": new(x.shape, x.dtype) if own_residual else None,
        "dgamma": new(layout.channels, dtype),
        "dbeta": new(layout.channels, dtype),
    }


def _empty_gradients(dy: Any, x: Any, layout: Layout, residual: bool, dtype: Any) -> tuple[Any, Any, Any, Any]:
    xp = array_module(x)
    zeros = xp.zeros(layout.channels, dtype), xp.zeros(layout.channels, dtype)
    return (xp.empty(x.shape, x.dtype), *zeros, dy if residual else None)


def backward(
    dy: Any, x: Any, layout: Layout, gamma: Any, saved: Any, y: Any, residual: bool, dtype: Any, mask: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of a training step.

    With a ReLU, `y` is given, or as `mask` its bits (uint8), or the forward's factors and shifts (`dtype`).
    """
    if x.size == 0:
        return _empty_gradients(dy, x, layout, residual, dtype)
    relu = y is not None or mask is not None
    own_residual = residual and relu  # without a ReLU the residual's gradient is dy itself
    outputs = _gradient_outputs(x, layout, own_residual, dtype)
    launch = _launch(layout, dtype, (x, dy, y, outputs["dx"], outputs["dresidual"]), 2, _backward_grid)
    scratch = launch.scratch("tables")
    gamma, kept = _parameters(dtype, gamma, saved)
    given = {"gamma": gamma, "renormed": int(saved.shape[0] == 5)}
    inputs = {"x": x, "saved": kept, "dy": dy, "y": y}
    if mask is not None and mask.dtype == dtype:
        inputs.update(affine=mask, recompute=1)
    elif mask is not None:
        inputs["bits"] = mask
    if launch.plan.regime == "sweeps":
        launch.run(_sums, {**scratch, **given, **inputs, **outputs})
        second = {**inputs, "dx": outputs["dx"], "tables": scratch["tables"]}
        if own_residual:  # the first sweep has left g there: one array to read instead of two
            second.update(dy=outputs["dresidual"], y=None, recompute=0, bits=None)
        launch.run(_apply, second)
    else:
        kernel = _backward_grid if launch.plan.regime == "grid" else _backward
        launch.run(kernel, {**scratch, **given, **inputs, **outputs})
    dresidual = outputs["dresidual"] if own_residual else dy
    return outputs["dx"], outputs["dgamma"], outputs["dbeta"], dresidual if residual else None


def passed(x: Any, layout: Layout, saved: Any, dtype: Any, mask: Any) -> Any:
    """Return 1 where the ReLU of a training step let its value pass, else 0: an array like x."""
    ones = array_module(x).ones(x.shape, x.dtype)
    return backward(ones, x, layout, None, saved, None, True, dtype, mask)[3]


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
    beta: Any = None,
    recompute: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Return (dx, dgamma, dbeta, dresidual) of inference, the moving statistics constant.

    `recompute`: there was a ReLU and no residual, so the kernel can tell the output's sign from x and `beta`.
    """
    if x.size == 0:
        return _empty_gradients(dy, x, layout, residual, dtype)
    own_residual = residual and y is not None
    outputs = _gradient_outputs(x, layout, own_residual, dtype)
    launch = _launch(layout, dtype, (x, dy, y, outputs["dx"], outputs["dresidual"]))
    values = {**launch.scratch(), **outputs, "x": x, "dy": dy, "y": y, "recompute": int(recompute)}
    launch.run(_sums, {**values, **_given(gamma, beta, mean, variance, epsilon, dtype)})
    dresidual = outputs["dresidual"] if own_residual else dy
    return outputs["dx"], outputs["dgamma"], outputs["dbeta"], dresidual if residual else None
