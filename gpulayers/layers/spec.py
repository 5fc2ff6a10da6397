"""InputSpec: what a layer asks of its inputs, and the check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpulayers import nest
from gpulayers.dtypes import TensorShape, dtype_name
from gpulayers.errors import ShapeError, message

__all__ = ["InputSpec", "check_inputs", "check_spec_structure"]


class InputSpec:
    """Dtype, rank, shape and sizes of certain axes that an input must have; what is None is not checked.

    Parameters: `dtype`; `shape`, including the batch axis, None where free (sets the rank); `ndim`, `max_ndim`,
    `min_ndim`; `axes`, a dictionary from axis (may be negative) to size or None; `allow_last_axis_squeeze`, to accept a
    missing or an additional last axis of size 1; `name`, to match a dictionary of inputs.

    Raises TypeError for `axes` that is not a dictionary with integer keys, ValueError for an axis beyond the rank.
    Source: ``tf.keras.layers.InputSpec``.

    >>> InputSpec(shape=(None, 3), dtype="float32", axes={1: 3})
    InputSpec(dtype=float32, shape=(None, 3), ndim=2, axes={1: 3})
    """

    def __init__(
        self,
        dtype: Any = None,
        shape: Any = None,
        ndim: int | None = None,
        max_ndim: int | None = None,
        min_ndim: int | None = None,
        axes: dict[int, int | None] | None = None,
        allow_last_axis_squeeze: bool = False,
        name: str | None = None,
    ) -> None:
        self.dtype = None if dtype is None else dtype_name(dtype)
        dims = None if shape is None else TensorShape(shape)
        self.shape = None if dims is None or dims.rank is None else tuple(dims)
        self.ndim = ndim if self.shape is None else len(self.shape)
        self.max_ndim, self.min_ndim, self.name = max_ndim, min_ndim, name
        self.allow_last_axis_squeeze = allow_last_axis_squeeze
        try:
            self.axes = {int(axis): size for axis, size in dict(axes or {}).items()}
        except (ValueError, TypeError) as error:
            raise TypeError(
                message("InputSpec", "Argument `axes` must be a dict with integer keys", got=repr(axes))
            ) from error
        limit = self.ndim if self.ndim is not None else self.max_ndim
        if self.axes and limit is not None and max(self.axes) > limit - 1:
            raise ShapeError(f"InputSpec: Axis {max(self.axes)} is greater than the maximum allowed value: {limit - 1}")

    def __repr__(self) -> str:
        fields = ("dtype", "shape", "ndim", "max_ndim", "min_ndim", "axes")
        shown = [f"{field}={getattr(self, field)}" for field in fields if getattr(self, field)]
        return f"InputSpec({', '.join(shown)})"

    def get_config(self) -> dict[str, Any]:
        """Return dtype, shape, ndim, max_ndim, min_ndim and axes."""
        return {k: getattr(self, k) for k in ("dtype", "shape", "ndim", "max_ndim", "min_ndim", "axes")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> InputSpec:
        """Make a spec from `get_config`'s dictionary."""
        return cls(**config)


def check_spec_structure(value: Any) -> None:
    """Raise TypeError unless `value` is a spec, None, or a nested structure of them."""
    for leaf in nest.flatten(value):
        if leaf is not None and not isinstance(leaf, InputSpec):
            raise TypeError(f"Layer input_spec must be an instance of InputSpec. Got: {leaf!r}")


def check_inputs(specs: Any, inputs: Any, layer_name: str) -> None:
    """Compare inputs with specs, leaf by leaf; the first mismatch raises ValueError (see `InputSpec`).

    Raises TypeError for an input without a shape. An input of unknown rank ends the check.
    """
    if type(specs) is InputSpec and type(inputs) is np.ndarray:
        problem = _mismatch(specs, inputs.shape, inputs.dtype)
        if problem:
            raise ShapeError(f"Input 0 of layer {layer_name} is incompatible with the layer: {problem}")
        return
    flat_specs = nest.flatten(specs)
    if isinstance(inputs, dict) and all(s is not None and s.name is not None for s in flat_specs):
        missing = [s.name for s in flat_specs if s.name not in inputs]
        if missing:
            raise ValueError(
                f'Missing data for input "{missing[0]}". You passed a data dictionary with keys {list(inputs)}.'
            )
        inputs = [inputs[s.name] for s in flat_specs]
    leaves = nest.flatten(inputs)
    for leaf in leaves:
        if not hasattr(leaf, "shape"):
            raise TypeError(f"Inputs to a layer should be tensors. Got: {leaf!r}")
    if len(leaves) != len(flat_specs):
        raise ValueError(
            f'Layer "{layer_name}" expects {len(flat_specs)} input(s), but it received {len(leaves)} input tensors.'
        )
    for index, (leaf, spec) in enumerate(zip(leaves, flat_specs, strict=True)):
        if spec is None:
            continue
        shape = TensorShape(leaf.shape)
        if shape.rank is None:
            return
        problem = _mismatch(spec, shape.as_list(), leaf.dtype)
        if problem:
            raise ShapeError(f"Input {index} of layer {layer_name} is incompatible with the layer: {problem}")


def _mismatch(spec: InputSpec, shape: Sequence[int | None], dtype: Any) -> str:
    """Return what does not fit, or an empty string."""
    rank = len(shape)
    if spec.ndim is not None and not spec.allow_last_axis_squeeze and rank != spec.ndim:
        return f"expected ndim={spec.ndim}, found ndim={rank}. Full shape received:{list(shape)}"
    if spec.max_ndim is not None and rank > spec.max_ndim:
        return f"expected max_ndim={spec.max_ndim}, found ndim={rank}"
    if spec.min_ndim is not None and rank < spec.min_ndim:
        return f"expected min_ndim={spec.min_ndim}, found ndim={rank}. Full shape received:{list(shape)}"
    if spec.dtype is not None and dtype_name(dtype) != spec.dtype:
        return f"expected dtype={spec.dtype}, found dtype={dtype_name(dtype)}"
    for axis, size in spec.axes.items():
        if size is not None and shape[axis] not in (size, None):
            wanted_axis = f"expected axis {axis} of input shape to have value {size}"
            return f"{wanted_axis}, but received input with shape {tuple(shape)}"
    if spec.shape is not None:
        expected, found = list(spec.shape), list(shape)
        if spec.allow_last_axis_squeeze:
            expected = expected[:-1] if expected and expected[-1] == 1 else expected
            found = found[:-1] if found and found[-1] == 1 else found
        for wanted, have in zip(expected, found, strict=False):
            if wanted is not None and have is not None and wanted != have:
                return f"expected shape={tuple(spec.shape)}, found shape={tuple(shape)}"
    return ""
