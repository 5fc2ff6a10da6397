"""Batch normalisation as operations: the array functions with shape rules and gradient rules.

Optional operands are named in the attribute `given`, in the order in which they follow `x`; so a call records only what
it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers.dtypes import parameter_dtype
from gpulayers.errors import ShapeError, message
from gpulayers.ops.arithmetic import add, multiply
from gpulayers.ops.batch_norm import arrays
from gpulayers.ops.batch_norm import moving as moving_arrays
from gpulayers.ops.batch_norm.second import inference_second_gradient, training_second_gradient
from gpulayers.ops.operation import GradientContext, Operation, Spec, match
from gpulayers.ops.shaping import reshape

__all__ = [
    "MovingVariables",
    "adjusted",
    "asked_clip",
    "batch_norm_inference",
    "batch_norm_training",
    "sub_batches",
    "training_flag",
    "update_moving",
]


class MovingVariables(NamedTuple):
    """The variables that a training step updates, and how: `MovingStatistics` with variables for arrays."""

    mean: Any
    variance: Any
    decay: float
    stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None
    renorm_decay: float = 0.0
    unbiased: bool = False
    skip_nonfinite: bool = False
    skipped: Any = None

    def arrays(self) -> moving_arrays.MovingStatistics:
        """Return the arrays to write into."""
        return moving_arrays.MovingStatistics._make([v.writable() if hasattr(v, "writable") else v for v in self])


def sub_batches(batch: int | None, virtual_batch_size: int | None) -> int:
    """Return the number of sub-batches of a batch. Raises ShapeError if the size does not divide it."""
    if virtual_batch_size is None or batch is None:
        return 1
    if batch % virtual_batch_size or (batch and virtual_batch_size > batch):
        near = max(virtual_batch_size, batch - batch % virtual_batch_size)
        raise ShapeError(
            message(
                "batch_normalization",
                "virtual_batch_size does not divide the batch",
                f"a multiple of {virtual_batch_size}",
                batch,
                f"Use a batch of {near}, or drop the last short batch.",
            )
        )
    return max(batch // virtual_batch_size, 1)


def _operands(values: tuple[Any, ...], given: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(given, values, strict=True))


def _renorm(named: dict[str, Any]) -> moving_arrays.Renorm | None:
    if "renorm_mean" not in named:
        return None
    clips = (named.get("rmin"), named.get("rmax"), named.get("dmax"))
    return moving_arrays.Renorm(named["renorm_mean"], named["renorm_stddev"], *clips)


def _training(
    xp: Any,
    x: Any,
    *values: Any,
    given: tuple[str, ...],
    axis: tuple[int, ...],
    epsilon: float,
    virtual_batch_size: int | None = None,
    activation: str | None = None,
    moving: MovingVariables | None = None,
    lonely: Callable[[tuple[int, ...]], None] | None = None,
) -> Any:
    named = _operands(values, given)
    groups = sub_batches(x.shape[0], virtual_batch_size)
    found = arrays.forward(
        x,
        named.get("gamma"),
        named.get("beta"),
        axis=axis,
        epsilon=epsilon,
        groups=groups,
        weights=named.get("weights"),
        renorm=_renorm(named),
        residual=named.get("residual"),
        activation=activation,
        moving=None if moving is None else moving.arrays(),
    )
    if lonely is not None and x.size and x.size == groups * found.mean.size:
        lonely(tuple(x.shape))
    return tuple(found) if activation else tuple(found)[:4]


def _training_spec(
    x: Spec,
    *values: Spec,
    given: tuple[str, ...],
    axis: Any,
    virtual_batch_size: int | None = None,
    activation: str | None = None,
    **_: Any,
) -> Any:
    shape = x.shape or ()
    channels = 1
    for one in axis:
        channels *= shape[one]  # the layer has checked that these sizes are known
    batch = shape[0]
    groups = None if batch is None and virtual_batch_size is not None else sub_batches(batch, virtual_batch_size)
    statistic = Spec((channels,), parameter_dtype(x.dtype))
    saved = Spec((5 if "renorm_mean" in given else 3, groups, channels), statistic.dtype)
    mask = (Spec((None,), np.dtype("uint8")),) if activation else ()
    return (x, statistic, statistic, saved, *mask)


def _training_gradient(c: GradientContext, g: Any, *_: Any) -> tuple[Any, ...]:
    given, activation = c["given"], c["activation"] if "activation" in c.attributes else None
    named = {name: c.inputs[i + 1] for i, name in enumerate(given) if name in ("gamma", "weights")}
    present = [name for name in ("gamma", "weights") if name in named]
    operands = [named[name] for name in present] + ([c.outputs[4]] if activation else [])
    results = _training_backward(
        g,
        c.x,
        c.outputs[3],
        *operands,
        given=tuple(present) + (("mask",) if activation else ()),
        axis=c["axis"],
        virtual_batch_size=c.attributes.get("virtual_batch_size"),
        activation=activation,
        residual="residual" in given,
    )
    return _distribute(c, given, results)


def _distribute(c: GradientContext, given: tuple[str, ...], results: Any) -> tuple[Any, ...]:
    """Order gradients as the operands are; dgamma and dbeta take their variable's shape and dtype."""
    found = dict(zip(("dx", "gamma", "beta", "residual"), results, strict=False))
    gradients = [found["dx"]]
    for i, name in enumerate(given):
        gradient = found.get(name)
        if name in ("gamma", "beta") and c.needs[i + 1]:
            like = c.inputs[i + 1]
            gradient = match(reshape(gradient, tuple(like.shape)), like)
        gradients.append(gradient)
    return tuple(gradients)


def _backward(
    xp: Any,
    g: Any,
    x: Any,
    saved: Any,
    *values: Any,
    given: tuple[str, ...],
    axis: tuple[int, ...],
    virtual_batch_size: int | None,
    activation: str | None,
    residual: bool,
) -> Any:
    named = _operands(values, given)
    found = arrays.backward(
        g,
        x,
        named.get("gamma"),
        saved,
        axis=axis,
        groups=sub_batches(x.shape[0], virtual_batch_size),
        weights=named.get("weights"),
        mask=named.get("mask"),
        activation=activation,
        residual=residual,
    )
    return tuple(found) if residual else tuple(found)[:3]


def _backward_spec(g: Spec, x: Spec, saved: Spec, *values: Spec, residual: bool, **_: Any) -> Any:
    statistic = Spec(saved.shape[2:], saved.dtype)  # type: ignore[index]
    return (x, statistic, statistic, x) if residual else (x, statistic, statistic)


_training_backward = Operation(
    "batch_norm_training_gradient",
    _backward,
    spec=_backward_spec,
    gradient=training_second_gradient,
    kernel=_backward,
    type="FusedBatchNormGradV3",
    doc="Gradients of `batch_norm_training`: dx, dgamma, dbeta (C values each), and of a residual.",
)

class _TrainingOperation(Operation):
    """An operation whose numbers, the clips of renorm, meet parameters: they are not rounded to 16-bit data's dtype."""

    def as_arrays(self, inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        xp, arrays = super().as_arrays(inputs)
        return xp, [v if type(v) in (int, float) else array for v, array in zip(inputs, arrays, strict=True)]


batch_norm_training = _TrainingOperation(
    "batch_norm_training",
    _training,
    spec=_training_spec,
    gradient=_training_gradient,
    kernel=_training,
    type="FusedBatchNormV3",
    doc="""Normalise `x` with its own statistics; returns y, mean, variance (C values each, biased), `saved`,
    and with an activation `mask`: gradients need the mask, not y.

    Operands behind `x`, as `given` names them: gamma, beta, residual, weights, renorm_mean, renorm_stddev, rmin, rmax,
    dmax.
    Attributes: `axis`, the kept axes; `epsilon`; `virtual_batch_size`; `activation`; `moving`, variables to update in
    place; `lonely`, called with the shape where every channel has one value.
    See `gpulayers.ops.batch_norm.arrays.forward`. r and d of renorm carry no gradient.
    """,
)


def _inference(
    xp: Any,
    x: Any,
    mean: Any,
    variance: Any,
    *values: Any,
    given: tuple[str, ...],
    axis: tuple[int, ...],
    epsilon: float,
    activation: str | None = None,
) -> Any:
    named = _operands(values, given)
    return arrays.inference(
        x,
        named.get("gamma"),
        named.get("beta"),
        mean,
        variance,
        axis=axis,
        epsilon=epsilon,
        residual=named.get("residual"),
        activation=activation,
    )


def _inference_gradient(c: GradientContext, g: Any) -> tuple[Any, ...]:
    given, activation = c["given"], c.attributes.get("activation")
    present = [name for name in ("gamma", "beta") if name in given and (activation or name == "gamma")]
    operands = [c.inputs[3 + given.index(name)] for name in present]
    if activation:
        operands.append(c.outputs[0])
        present.append("y")
    results = _inference_backward(
        g,
        c.x,
        c.inputs[1],
        c.inputs[2],
        *operands,
        given=tuple(present),
        axis=c["axis"],
        epsilon=c["epsilon"],
        activation=activation,
        residual="residual" in given,
    )
    behind = GradientContext([c.x, *c.inputs[3:]], c.outputs, c.attributes, [c.needs[0], *c.needs[3:]])
    dx, *others = _distribute(behind, given, results)
    return dx, None, None, *others


def _inference_backward_forward(
    xp: Any,
    g: Any,
    x: Any,
    mean: Any,
    variance: Any,
    *values: Any,
    given: tuple[str, ...],
    axis: tuple[int, ...],
    epsilon: float,
    activation: str | None,
    residual: bool,
) -> Any:
    named = _operands(values, given)
    recompute = xp is not np and not residual  # a device tells the sign of y from x, with less to read
    found = arrays.inference_backward(
        g,
        x,
        named.get("gamma"),
        mean,
        variance,
        axis=axis,
        epsilon=epsilon,
        beta=named.get("beta"),
        y=None if recompute else named.get("y"),
        activation=activation,
        residual=residual,
    )
    return tuple(found) if residual else tuple(found)[:3]


def _inference_backward_spec(g: Spec, x: Spec, mean: Spec, *values: Spec, residual: bool, **_: Any) -> Any:
    sizes = (None,) if mean.shape is None else mean.shape
    statistic = Spec((None if None in sizes else math.prod(sizes),), parameter_dtype(x.dtype))  # type: ignore[arg-type]
    return (x, statistic, statistic, x) if residual else (x, statistic, statistic)


_inference_backward = Operation(
    "batch_norm_inference_gradient",
    _inference_backward_forward,
    spec=_inference_backward_spec,
    gradient=inference_second_gradient,
    kernel=_inference_backward_forward,
    type="BatchNormInferenceGrad",
    doc="Gradients of `batch_norm_inference`, its statistics being constants.",
)

batch_norm_inference = Operation(
    "batch_norm_inference",
    _inference,
    spec=lambda x, mean, variance, *values, **_: x,
    gradient=_inference_gradient,
    kernel=_inference,
    type="BatchNormInference",
    doc="""Normalise `x` with given statistics: operands x, mean, variance, then gamma, beta, residual as `given` says.

    See `gpulayers.ops.batch_norm.arrays.inference`. The statistics carry no gradient.
    """,
)


def _update(
    xp: Any, mean: Any, variance: Any, training: Any, size: Any, *, moving: MovingVariables, epsilon: float, part: str
) -> None:
    if int(size) and bool(training):
        step = moving_arrays.update_mean if part == "mean" else moving_arrays.update_variance
        step(moving.arrays(), mean, variance, epsilon, int(size) // mean.size, xp)


update_moving = Operation(
    "update_moving",
    _update,
    spec=lambda *specs, **_: None,
    type="AssignSubVariableOp",
    stateful=True,
    doc="""Take one step of the moving mean or variance in a graph: operands mean, variance, training, the size of x.

    Attributes: `moving`, the variables; `epsilon`; `part`, ``"mean"`` or ``"variance"`` (with renorm each also steps
    its own renorm statistic first). An empty x changes nothing.
    """,
)


def _training_flag(xp: Any, value: Any, *, name: str) -> Any:
    if value.shape != () or (xp is np and value not in (0, 1)):
        raise TypeError(message(name, "training is not a bool", "True, False, 0, 1 or a scalar of these", repr(value)))
    return value.astype(np.bool_)


training_flag = Operation(
    "training_flag",
    _training_flag,
    spec=lambda value, **_: Spec((), np.dtype(np.bool_)),
    type="Cast",
    doc="""Return a graph's value for `training` as a bool; `name` says whose it is.

    Raises TypeError for a value with axes and, where looking at it costs no transfer from a device, for one that is
    neither 0 nor 1.
    """,
)


asked_clip = Operation(
    "asked_clip",
    lambda xp, *, ask: ask(),
    spec=lambda **_: Spec((), np.dtype(np.float32)),
    stateful=True,
    doc="Return the number or scalar that ``ask()`` gives on the host whenever the recorded call runs.",
)


def _adjusted(xp: Any, n: Any, scale: Any, bias: Any, *, overwrite: bool = False) -> Any:
    fits = all(_fits_into(n, value) for value in (scale, bias))
    y = xp.multiply(n, scale, out=n if fits and overwrite else None)
    return xp.add(y, bias, out=y if fits else None)


def _fits_into(n: Any, value: Any) -> bool:
    """Say whether `n` combined with `value` keeps its shape and dtype."""
    if not hasattr(value, "dtype"):
        return True
    return np.broadcast_shapes(n.shape, value.shape) == n.shape and np.result_type(n.dtype, value.dtype) == n.dtype


adjusted = Operation(
    "adjusted",
    _adjusted,
    spec=lambda n, scale, bias, **_: add.spec(multiply.spec(n, scale), bias),
    gradient=(lambda c, g: g * c.inputs[1], lambda c, g: g * c.inputs[0], lambda c, g: g),
    broadcasts=True,
    doc="Return ``n * scale + bias``, which broadcast; with `overwrite`, in the memory of `n` where the result fits.",
)
