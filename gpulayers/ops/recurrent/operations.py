"""Recurrent steps and whole sequences as operations: the array functions with shape rules and gradient rules.

Operands are named in the attribute `names`, so that a call records only what it has. What a forward saves for its
backward travels as one opaque last output, `Saved`; nothing else may look into it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gpulayers.errors import DTypeError, ShapeError, message
from gpulayers.ops.operation import GradientContext, Operation, Spec, as_arrays, pullback, state
from gpulayers.ops.recurrent import device as recurrent_device
from gpulayers.ops.recurrent import gru as recurrent_gru
from gpulayers.ops.recurrent import lstm as recurrent_lstm
from gpulayers.ops.recurrent import simple as recurrent_simple
from gpulayers.ops.recurrent.composed import composed_sequence
from gpulayers.ops.shaping import expand_dims

__all__ = ["FAMILIES", "Keep", "Saved", "SavingOperation", "length_mask", "recurrent_sequence", "recurrent_step"]


class Saved:
    """Arrays that a forward keeps for its backward. Passes through tapes and graphs as a value without elements."""

    __slots__ = ("arrays",)
    shape = ()
    ndim = 0
    dtype = np.dtype(object)

    def __init__(self, held: tuple[Any, ...]) -> None:
        self.arrays = held


class Keep:
    """Whether a recorded sequence has to save: set by the gradient rule, read by each run of the forward."""

    __slots__ = ("wanted",)

    def __init__(self) -> None:
        self.wanted = False


class Family(NamedTuple):
    """One kind of cell: the names of its states, how many gates its kernels hold, where its host functions are."""

    name: str
    states: tuple[str, ...]
    gates: int
    host: ModuleType

    def function(self, xp: Any, what: str) -> Any:
        """Return the array function ``<name>_<what>`` for arrays of module `xp`, which the operation knows already."""
        return getattr(self.host if xp is np else recurrent_device, f"{self.name}_{what}")


_FAMILIES = (
    Family("lstm", ("h", "c"), 4, recurrent_lstm),
    Family("gru", ("h",), 3, recurrent_gru),
    Family("simple_rnn", ("h",), 1, recurrent_simple),
)
FAMILIES = {family.name: family for family in _FAMILIES}
"""The kinds of cells with fused operations, by name."""

_MASKS = ("mask", "input_mask", "recurrent_mask")
_FORWARD_ONLY = ("forget_bias",)


class SavingOperation(Operation):
    """An operation some of whose inputs may be `Saved`."""

    __slots__ = ()

    def as_arrays(self, inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Return the array module, and the inputs as arrays; what was saved stays as it is."""
        for value in inputs:
            if type(value) is not np.ndarray and type(value) is not Saved:
                break
        else:
            return np, inputs
        xp, converted = as_arrays(self.name, [value for value in inputs if type(value) is not Saved])
        remaining = iter(converted)
        return xp, [value if type(value) is Saved else next(remaining) for value in inputs]


def _weights(named: dict[str, Any]) -> tuple[Any, Any]:
    """Return the kernel for the inputs and the one for the state; legacy cells have them in one, inputs first."""
    kernel = named["kernel"]
    if "recurrent_kernel" in named:
        return kernel, named["recurrent_kernel"]
    depth = named["x"].shape[-1]
    return kernel[:depth], kernel[depth:]


def _run_forward(
    family: Family, xp: Any, whole: bool, named: dict[str, Any], save: bool, settings: dict[str, Any]
) -> Any:
    operands = (named["x"], *(named[s] for s in family.states), *_weights(named), named.get("bias"))
    if not whole:
        return family.function(xp, "step")(*operands, **settings)
    return family.function(xp, "sequence")(
        *operands, **{name: named.get(name) for name in _MASKS}, save=save, **settings
    )


def _forward(
    family: Family,
    whole: bool,
    xp: Any,
    *values: Any,
    names: tuple[str, ...],
    keep: Keep | None = None,
    **settings: Any,
) -> tuple[Any, ...]:
    named = dict(zip(names, values, strict=True))
    save = state.recorders > 0 or (keep is not None and keep.wanted)
    *results, saved = _run_forward(family, xp, whole, named, save, settings)
    return (*results, Saved(saved))


def _spec(family: Family, whole: bool, *specs: Spec, names: tuple[str, ...], residual: bool = False, **_: Any) -> Any:
    named = dict(zip(names, specs, strict=True))
    x, kernel = named["x"], named["kernel"]
    units = kernel.shape[-1] // family.gates  # type: ignore[index,operator]  # variables have known shapes
    lead = x.shape[:-1] if x.shape is not None else (None,) * (2 if whole else 1)
    depth = None if x.shape is None else x.shape[-1]
    expected = kernel.shape[0] - (0 if "recurrent_kernel" in named else units)  # type: ignore[index,operator]
    if depth is not None and depth != expected:
        raise ShapeError(message(family.name, "the inputs do not fit the kernel", f"depth {expected}", depth))
    if residual and depth is not None and depth != units:
        raise ShapeError(message(family.name, "the inputs cannot be added to the outputs", f"depth {units}", depth))
    states = [Spec((lead[-1], units), x.dtype) for _ in family.states]
    return Spec((*lead, units), x.dtype), *states, Spec((), Saved.dtype)


def _gradient(family: Family, backward: Operation, c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    names = c["names"]
    arrived = [(f"d_{name}", g) for name, g in zip(("output", *family.states), gs, strict=False) if g is not None]
    settings = {key: value for key, value in c.attributes.items() if key not in ("names", "keep")}
    if c.attributes.get("keep") is not None:
        c["keep"].wanted = True
    operands = [c.inputs[index] for index in range(len(names))]
    found = backward(
        *(g for _, g in arrived), c.outputs[-1], *operands,
        names=(*(name for name, _ in arrived), "saved", *names), **settings,
    )  # fmt: skip
    return (*found, *([None] * (len(names) - len(found))))


def _backward(
    family: Family, whole: bool, xp: Any, *values: Any, names: tuple[str, ...], **settings: Any
) -> tuple[Any, ...]:
    """Return the gradients of x, the states, the kernels and the bias, each in its operand's dtype."""
    named = dict(zip(names, values, strict=True))
    saved = named["saved"].arrays
    if whole and not saved:  # the forward ran before anyone asked for a gradient
        saved = _run_forward(family, xp, whole, named, True, settings)[-1]
    masks = {name: named.get(name) for name in _MASKS} if whole else {}
    keywords = {key: value for key, value in settings.items() if key not in _FORWARD_ONLY}
    cotangents = [named.get(f"d_{name}") for name in ("output", *family.states)]
    function = family.function(xp, "sequence_backward" if whole else "step_backward")
    found = list(function(*cotangents, saved, *_weights(named), **masks, **keywords))
    d_bias = found.pop()
    if "recurrent_kernel" not in named:
        d_recurrent = found.pop()
        found[-1] = xp.concatenate([found[-1], d_recurrent])
    if "bias" in named:
        found.append(d_bias)
    order = [name for name in names if name in _differentiated(family)]
    return tuple(
        g if g.dtype == named[name].dtype else g.astype(named[name].dtype) for name, g in zip(order, found, strict=True)
    )


def _differentiated(family: Family) -> tuple[str, ...]:
    return ("x", *family.states, "kernel", "recurrent_kernel", "bias")


def _backward_spec(family: Family, *specs: Spec, names: tuple[str, ...], **_: Any) -> Any:
    return tuple(spec for name, spec in zip(names, specs, strict=True) if name in _differentiated(family))


def _composed(family: Family, whole: bool, named: dict[str, Any], settings: dict[str, Any]) -> list[Any]:
    """Compute what the fused operation computes by ordinary operations."""
    x = named["x"] if whole else expand_dims(named["x"], axis=0)
    options = {**settings, **({name: named.get(name) for name in _MASKS} if whole else {})}
    kernel, recurrent_kernel = _weights(named)
    outputs, *states = composed_sequence(
        family.name, x, [named[s] for s in family.states], kernel, recurrent_kernel, named.get("bias"), **options
    )
    return [outputs if whole else outputs[0], *states]


def _second_gradient(family: Family, whole: bool, c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    """Differentiate the gradients: those of the composed cell, which equal the fused ones, have gradients in turn."""
    settings = dict(c.attributes)
    names = settings.pop("names")
    given = {name: c.inputs[index] for index, name in enumerate(names) if name != "saved"}
    operands = [name for name in names if name in _differentiated(family)]
    free = [name for name in names if name.startswith("d_")] + operands

    def first_gradients(*values: Any) -> list[Any]:
        named = {**given, **dict(zip(free, values, strict=True))}

        def forward(*own: Any) -> list[Any]:
            return _composed(family, whole, {**named, **dict(zip(operands, own, strict=True))}, settings)

        cotangents = [named.get(f"d_{name}") for name in ("output", *family.states)]
        return pullback(forward, [named[name] for name in operands], cotangents)

    found = dict(zip(free, pullback(first_gradients, [given[name] for name in free], gs), strict=True))
    return tuple(found.get(name) for name in names)


def _make(family: Family, whole: bool) -> Operation:
    """Make the pair of operations of one family: for one step, or for a whole sequence."""
    name = f"{family.name}_{'sequence' if whole else 'step'}"
    backward = SavingOperation(
        f"{name}_gradient",
        functools.partial(_backward, family, whole),
        spec=functools.partial(_backward_spec, family),
        gradient=functools.partial(_second_gradient, family, whole),
        doc=f"Gradients of `{name}`: x, states, kernels, bias.",
    )
    operation = SavingOperation(
        name,
        functools.partial(_forward, family, whole),
        spec=functools.partial(_spec, family, whole),
        gradient=functools.partial(_gradient, family, backward),
        doc=f"See `gpulayers.ops.recurrent.arrays.{name}`; operands as the attribute `names` says.",
    )
    return operation


_STEPS = {family.name: _make(family, whole=False) for family in _FAMILIES}
_SEQUENCES = {family.name: _make(family, whole=True) for family in _FAMILIES}


def recurrent_step(
    kind: str,
    x: Any,
    states: Sequence[Any],
    kernel: Any,
    recurrent_kernel: Any = None,
    bias: Any = None,
    **settings: Any,
) -> tuple[Any, list[Any]]:
    """Compute one step of a cell of `kind` (a key of `FAMILIES`); return the output and the new states.

    `x` (N, D), `states` (N, U) each, `kernel` (D, gates*U), `recurrent_kernel` (U, gates*U), or None where `kernel` is
    both, one above the other. `settings`: keywords of the array function (`residual`, `recurrent_activation`, ...).
    Raises ShapeError where widths do not fit.

    >>> zeros = np.zeros((1, 2))
    >>> recurrent_step("simple_rnn", zeros + 1, [zeros], np.zeros((4, 2)), residual=True)
    (array([[1., 1.]]), [array([[0., 0.]])])
    """
    names, values = _operands(kind, x, states, kernel, recurrent_kernel, bias)
    output, *new_states, _ = _STEPS[kind](*values, names=names, **settings)
    return output, new_states


def recurrent_sequence(
    kind: str,
    x: Any,
    states: Sequence[Any],
    kernel: Any,
    recurrent_kernel: Any = None,
    bias: Any = None,
    *,
    mask: Any = None,
    input_mask: Any = None,
    recurrent_mask: Any = None,
    **settings: Any,
) -> tuple[Any, list[Any]]:
    """Run a cell of `kind` over a whole sequence `x` (T, N, D); return the outputs (T, N, U) and the last states.

    Weights and `settings` as in `recurrent_step`, masks and further settings as in
    `gpulayers.ops.recurrent.arrays.lstm_sequence`. Memory for the backward pass is kept only where something records.

    >>> outputs, states = recurrent_sequence("simple_rnn", np.ones((3, 1, 2)), [np.zeros((1, 2))], np.zeros((4, 2)))
    >>> outputs.shape
    (3, 1, 2)
    """
    names, values = _operands(kind, x, states, kernel, recurrent_kernel, bias)
    given = [(n, v) for n, v in zip(_MASKS, (mask, input_mask, recurrent_mask), strict=True) if v is not None]
    results = _SEQUENCES[kind](
        *values, *(v for _, v in given), names=names + tuple(n for n, _ in given), keep=Keep(), **settings
    )
    outputs, *new_states, _ = results
    return outputs, new_states


def _operands(
    kind: str, x: Any, states: Sequence[Any], kernel: Any, recurrent_kernel: Any, bias: Any
) -> tuple[tuple[str, ...], list[Any]]:
    names, values = ("x", *FAMILIES[kind].states, "kernel"), [x, *states, kernel]
    if recurrent_kernel is not None:
        names, values = (*names, "recurrent_kernel"), [*values, recurrent_kernel]
    if bias is not None:
        names, values = (*names, "bias"), [*values, bias]
    return names, values


def _length_mask(xp: Any, lengths: Any, x: Any) -> Any:
    time, batch = x.shape[:2]
    if lengths.shape != (batch,):
        raise ShapeError(
            message("sequence_length", "is not one length for each row", f"shape ({batch},)", lengths.shape)
        )
    if xp is np and batch and (lengths.max() > time or lengths.min() < 0):
        raise ShapeError(
            message(
                "sequence_length", "is beyond the time axis", f"0 to {time}", lengths.tolist(), "Pad or cut the inputs."
            )
        )
    return xp.arange(time)[:, None] < lengths[None, :]


def _length_mask_spec(lengths: Spec, x: Spec) -> Spec:
    if lengths.shape is not None and len(lengths.shape) != 1:
        raise ShapeError(message("sequence_length", "is not a vector", "rank 1", f"shape {lengths.shape}"))
    if np.dtype(lengths.dtype).kind not in "iu":
        raise DTypeError(message("sequence_length", "is not made of integers", "an integer dtype", lengths.dtype))
    return Spec((None, None) if x.shape is None else tuple(x.shape[:2]), np.dtype(bool))


length_mask = Operation(
    "length_mask",
    _length_mask,
    spec=_length_mask_spec,
    type="SequenceMask",
    doc="""Return the mask (T, N) that is True at the first `lengths[n]` steps of row n of `x` (T, N, ...).

    Raises ShapeError for a length below 0 or beyond T in an array of the host. Lengths that are on a device are not
    read back, which would wait for it: one below 0 counts as 0, one beyond T as T.
    """,
)
