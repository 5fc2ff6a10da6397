"""What both families of layers share: construction and the life of a call. The other parts stand in `*_part.py`.

A family is a subclass that fills in the hooks of `LayerHooks`: how names and scopes are settled, how a variable is
made, whether sub-layers are tracked, and what happens around a call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers import nest, ops, regularizers
from gpulayers.device import asarray, current_device, device, is_array, kind_of
from gpulayers.dtypes import Policy, TensorShape, as_dtype, is_floating
from gpulayers.errors import DeviceError, LayerError, ShapeError, message
from gpulayers.layers.books import LossBook, WeightBook, unique
from gpulayers.layers.calling import Signature, call_context, set_phase, signature_of
from gpulayers.layers.config_part import ConfigPart
from gpulayers.layers.losses_part import LossesPart
from gpulayers.layers.masks import any_masks, mask_of, masks_of, set_mask
from gpulayers.layers.nodes import CallNode, History, NodeBook
from gpulayers.layers.nodes_part import NodesPart
from gpulayers.layers.spec import check_inputs, check_spec_structure
from gpulayers.layers.variables_part import VariablesPart
from gpulayers.ops.operation import Recordable, state
from gpulayers.trace import (
    GraphTensor,
    active_graph,
    active_tapes,
    as_recorded,
    autocast,
    autocast_dtype,
    recording_function,
)
from gpulayers.variables import Variable

__all__ = ["CoreLayer"]

_KEYWORDS = {
    "input_dim", "input_shape", "batch_input_shape", "batch_size", "weights", "implementation", "dynamic", "autocast",
}  # fmt: skip


class CoreLayer(VariablesPart, LossesPart, NodesPart, ConfigPart):
    """Common part of the two `Layer` classes; not used directly."""

    _takes: frozenset[str] = frozenset()  # keywords that a family's constructor takes besides
    _autocast_default = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "build" in cls.__dict__:
            cls.build = _marking(cls.__dict__["build"])  # type: ignore[method-assign]

    def __init__(
        self,
        trainable: bool = True,
        name: Any = None,
        dtype: Any = None,
        activity_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for keyword in kwargs:
            if keyword not in _KEYWORDS and keyword not in self._takes:
                raise TypeError("Keyword argument not understood:", keyword)
        self.built = False
        self.supports_masking = False
        self.stateful = False
        self._trainable = bool(trainable)
        self._device = current_device()
        self._dynamic = bool(kwargs.get("dynamic", False))
        self._autocast = bool(kwargs.get("autocast", self._autocast_default))
        self._input_spec: Any = None
        self._initial_weights = kwargs.get("weights")
        self._set_batch_input_shape(kwargs)
        self._weight_book, self._loss_book, self._node_book = WeightBook(), LossBook(), NodeBook()
        self._books_with_losses: list[LossBook] = []  # those to clear at the next outermost eager call
        self._shortcuts: dict[Any, Any] = {}
        self._metrics: list[Any] = []
        self._metrics_lock = threading.Lock()
        self._set_policy(dtype)
        self.activity_regularizer = None if activity_regularizer is None else regularizers.get(activity_regularizer)
        self._settle_name(name, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name[0] != "_" and "_shortcuts" in self.__dict__:
            self._shortcuts.clear()  # they were prepared for the layer as it was

    def _set_batch_input_shape(self, kwargs: dict[str, Any]) -> None:
        shape = kwargs.get("batch_input_shape")
        if shape is None and kwargs.get("input_dim") is not None:
            shape = (kwargs.get("batch_size"), int(kwargs["input_dim"]))
        if shape is None and kwargs.get("input_shape") is not None:
            shape = (kwargs.get("batch_size"), *kwargs["input_shape"])
        if shape is not None:
            self._batch_input_shape = tuple(shape)

    # --- identity -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the layer, a string."""
        return self._name

    @property
    def trainable(self) -> bool:
        """Whether its variables that were made trainable are listed as such. Settable."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for child in self._children():
            child.trainable = value

    @property
    def dtype(self) -> str | None:
        """Name of the dtype of its variables; None while it is not settled."""
        return self._policy.variable_dtype

    variable_dtype = dtype

    @property
    def compute_dtype(self) -> str | None:
        """Name of the dtype it computes in; None while it is not settled."""
        return self._policy.compute_dtype

    @property
    def dtype_policy(self) -> Policy:
        """The dtype policy."""
        return self._policy

    @property
    def dynamic(self) -> bool:
        """Whether it was made with ``dynamic=True``: it cannot be used on graph tensors without
        `compute_output_shape`.
        """
        return self._dynamic

    @property
    def input_spec(self) -> Any:
        """`InputSpec` (or nested structure of them) that inputs are checked against; None checks nothing. Settable.

        Raises TypeError when set to anything else.
        """
        return self._input_spec

    @input_spec.setter
    def input_spec(self, value: Any) -> None:
        check_spec_structure(value)
        self._input_spec = value

    @property
    def submodules(self) -> tuple[Any, ...]:
        """All layers reachable through attributes, lists and dictionaries of attributes, at any depth."""
        found: dict[int, Any] = {}
        pending = children_of(self)
        while pending:
            layer = pending.pop(0)
            if id(layer) not in found and layer is not self:
                found[id(layer)] = layer
                pending += children_of(layer)
        return tuple(found.values())

    def _set_policy(self, dtype: Any) -> None:
        if isinstance(dtype, Policy):
            self._policy = dtype
        elif isinstance(dtype, dict):
            self._policy = Policy(**dtype.get("config", dtype))
        elif isinstance(dtype, str) and dtype.startswith(("mixed_", "_infer")):
            self._policy = Policy(dtype)
        else:
            self._policy = self._default_policy() if dtype is None else Policy(as_dtype(dtype).name)

    # --- lifecycle ----------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Make the variables. Subclasses override it; the base only marks the layer as built.

        `input_shape`: a `TensorShape`, or a nested structure of them, as the inputs are. Called once, before the first
        `call`, or by hand.
        """
        self.built = True

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs. Subclasses override it; the base returns its input."""
        return inputs

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the layer if needed, check and convert the inputs, run `call`, and keep the books.

        `inputs`: array, tensor, or nested structure of them. Host arrays are copied to the layer's device; in a graph
        that a session runs, arrays become tensors.
        Other arguments go to `call`. Returns what `call` returns: arrays for arrays, tensors where something records.
        State written: variables at the first call; losses, metrics, and what `call` itself updates.
        Raises ValueError for inputs that do not fit `input_spec`, and if `call` returns None.
        """
        if not state.recorders:
            shortcut = self._shortcuts.get(_call_key(inputs, args, kwargs)) if self._shortcuts else None
            if shortcut is not None and not self._books_with_losses and not any_masks():
                return shortcut(inputs)
        elif active_tapes():
            inputs, args, kwargs = as_recorded(inputs), as_recorded(args), as_recorded(kwargs)
        inputs = self._in_graph(self._convert(inputs))
        symbolic = (state.recorders > 0 and active_graph() is not None) or _has_graph_tensor(inputs, args, kwargs)
        signature = signature_of(self.call)
        around = self._around_call(signature, kwargs, symbolic)
        if around is None:
            return self._call_once(signature, inputs, args, kwargs, symbolic)
        with around as kwargs:
            return self._call_once(signature, inputs, args, kwargs, symbolic)

    def _call_once(
        self, signature: Signature, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], symbolic: bool
    ) -> Any:
        self._settle_mask(signature, inputs, args, kwargs)
        context = call_context
        saved = (context.depth, context.training, context.name_prefix)
        training = self._settle_training(signature, args, kwargs)
        if self._input_spec is not None:
            check_inputs(self._input_spec, inputs, self._name)
        if saved[0] == 0:
            context.root = self
            context.number += 1
            if self._books_with_losses and not call_context.probing and (not symbolic or recording_function()):
                self._forget_call_losses()
        context.depth, context.training = saved[0] + 1, training
        context.name_prefix = f"{saved[2]}{self._name}/"
        try:
            if not self.built:
                self._build_for(inputs)
            outputs = self._call_in_dtype(inputs, args, kwargs)
            if outputs is None:
                raise LayerError(
                    message(self._name, "A layer's `call` method should return a tensor or a list of tensors, not None")
                )
            if self.activity_regularizer is not None:
                self._add_activity_losses(inputs, outputs)
        finally:
            context.depth, context.training, context.name_prefix = saved
        self._set_output_masks(inputs, kwargs.get("mask"), outputs)
        if symbolic:
            outputs = self._record_node(inputs, args, kwargs, outputs)
            self._finish_call()
        elif not state.recorders and self.activity_regularizer is None:
            self._learn_shortcut(inputs, args, kwargs, training)
        return outputs

    def _learn_shortcut(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], training: Any) -> None:
        """Keep what the layer offers for further calls like this one: same kind of array, shape, dtype and mode."""
        overridden = type(self).compute_mask is not CoreLayer.compute_mask
        key = None if overridden or len(self._shortcuts) >= _MOST_SHORTCUTS else _call_key(inputs, args, kwargs)
        if key is not None:
            self._shortcuts[key] = self._shortcut(inputs, training)

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer: the same as ``layer(inputs, ...)``."""
        return self(inputs, *args, **kwargs)

    def _convert(self, inputs: Any) -> Any:
        """Turn arrays and numbers into arrays of the layer's device; tensors and variables stay."""
        if type(inputs) is np.ndarray and self._device.kind == "cpu":
            return inputs
        if nest.is_nested(inputs):
            return nest.map_structure(self._convert_one, inputs)
        return self._convert_one(inputs)

    def _in_graph(self, inputs: Any) -> Any:
        """Return `inputs` with arrays as tensors of the graph in force, so that what is made of them can be run."""
        graph = active_graph() if state.recorders else None
        if graph is None or not graph.initializes_variables_in_session:
            return inputs
        return nest.map_structure(lambda value: ops.identity(value) if is_array(value) else value, inputs)

    def _convert_one(self, value: Any) -> Any:
        if isinstance(value, Recordable) or value is None:
            return value
        if is_array(value) and kind_of(value) not in ("cpu", self._device.kind):
            raise DeviceError(
                message(
                    self._name,
                    f"was made for the {self._device}, but its input is on another device",
                    do="Make the layer inside `with gl.device('gpu'):`, or copy the input with gl.asnumpy(x).",
                )
            )
        if is_array(value) and kind_of(value) == self._device.kind and not isinstance(value, np.generic):
            return value
        if isinstance(value, str | bytes) or (not is_array(value) and not _is_number_like(value)):
            return value
        return asarray(value, device=self._device)

    def _settle_mask(self, signature: Any, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not signature.mask or "mask" in kwargs or _given_by_position("mask", signature, args):
            return
        if nest.is_nested(inputs):
            masks = masks_of(inputs)
            if any(mask is not None for mask in nest.flatten(masks)):
                kwargs["mask"] = masks
            return
        mask = mask_of(inputs)
        if mask is not None:
            kwargs["mask"] = mask

    def _settle_training(self, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide the value of `training`, put it into the keywords, and return it."""
        if not (signature.training or signature.keywords):
            return kwargs.pop("training", call_context.training)
        if _given_by_position("training", signature, args):
            return args[signature.names.index("training") - 1]
        value = kwargs.get("training")
        if value is None:
            value = call_context.training
        if value is None:
            value = set_phase()
        if value is not None and (signature.training or "training" in kwargs):
            kwargs["training"] = value
        return value

    def _build_for(self, inputs: Any) -> None:
        leaves = nest.flatten(inputs)
        if self._policy.compute_dtype is None and leaves and hasattr(leaves[0], "dtype"):
            self._policy = Policy(as_dtype(leaves[0].dtype).name)
        shapes = nest.map_structure(lambda x: TensorShape(x.shape) if hasattr(x, "shape") else None, inputs)
        with device(self._device):
            self.build(shapes)
        self.built = True
        if self._initial_weights is not None:
            self.set_weights(self._initial_weights)
            self._initial_weights = None

    def _call_in_dtype(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `call`, its first argument and its variables cast to the compute dtype where the family casts."""
        if not self._autocast or self._policy.compute_dtype is None:
            if autocast_dtype() is None:
                return self.call(inputs, *args, **kwargs)
            with autocast(None):
                return self.call(inputs, *args, **kwargs)
        compute = as_dtype(self._policy.compute_dtype)
        if type(inputs) is not np.ndarray or inputs.dtype != compute:
            inputs = nest.map_structure(lambda x: _cast_floating(x, compute), inputs)
        if self._policy.variable_dtype == self._policy.compute_dtype and call_context.depth == 1:
            return self.call(inputs, *args, **kwargs)
        with autocast(compute):
            return self.call(inputs, *args, **kwargs)

    def _add_activity_losses(self, inputs: Any, outputs: Any) -> None:
        for output in nest.flatten(outputs):
            if not len(output.shape):
                raise ShapeError(message(self._name, "a scalar output has no batch axis for the activity regularizer"))
            loss = self.activity_regularizer(output)  # type: ignore[misc]
            if loss is None:
                raise LayerError(message(self._name, "the activity regularizer returned None", "a loss"))
            batch = tuple(output.shape)[0]
            count = ops.cast(ops.shape_of(output)[0], loss.dtype) if batch is None else float(batch)
            self.add_loss(loss / count, inputs=inputs)

    def _set_output_masks(self, inputs: Any, mask: Any, outputs: Any) -> None:
        overridden = type(self).compute_mask is not CoreLayer.compute_mask
        if not (self.supports_masking or overridden):
            return
        if mask is None:
            mask = masks_of(inputs)
        if not overridden and all(one is None for one in nest.flatten(mask)):
            return
        result = self.compute_mask(inputs, mask)
        flat_outputs, flat_masks = nest.flatten(outputs), nest.flatten(result)
        if len(flat_masks) != len(flat_outputs):
            flat_masks = [result] * len(flat_outputs) if result is None else (flat_masks + [None] * len(flat_outputs))
        for output, one in zip(flat_outputs, flat_masks, strict=False):
            if one is not None or mask_of(output) is not None:
                set_mask(output, one)

    def _record_node(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if recording_function():
            return outputs
        outputs = self._own_outputs(inputs, outputs)
        self._node_book.nodes.append(CallNode(inputs, args, kwargs, outputs))
        for index, output in enumerate(nest.flatten(outputs)):
            if isinstance(output, GraphTensor) and not any(output is x for x in nest.flatten(inputs)):
                output._keras_history = History(self, len(self._node_book.nodes) - 1, index)
        return outputs


_MOST_SHORTCUTS = 64  # shapes that keep changing would fill the memory with plans


def _call_key(inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a plan for a plain call depends on: array type, shape, dtype, `training`; None for other calls."""
    training = None
    if args or not (kwargs.keys() <= {"training"}) or not hasattr(inputs, "dtype"):
        return None
    if kwargs:
        training = kwargs["training"]
    if training is None:
        training = call_context.training
        if training is None:
            training = set_phase()
    if type(training) is not bool and training is not None:
        return None
    return type(inputs), inputs.shape, inputs.dtype, training


def _marking(build: Any) -> Any:
    """Return a `build` after which the layer counts as built, though the subclass may forget to say so."""

    @functools.wraps(build)
    def marked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = build(self, *arguments, **keywords)
        if getattr(type(self).build, "__wrapped__", None) is build:  # not while a subclass's build is still going on
            self.built = True
        return result

    return marked


def _has_graph_tensor(*structures: Any) -> bool:
    for value in structures:
        if isinstance(value, GraphTensor):
            return True
        if isinstance(value, dict):
            value = tuple(value.values())
        if isinstance(value, list | tuple) and _has_graph_tensor(*value):
            return True
    return False


def _given_by_position(name: str, signature: Any, args: tuple[Any, ...]) -> bool:
    return bool(args) and name in signature.names and signature.names.index(name) - 1 < len(args)


def _cast_floating(value: Any, dtype: np.dtype) -> Any:
    current = getattr(value, "dtype", None)
    if current is None or current == dtype or not is_floating(current):
        return value
    return ops.cast(value, dtype)


def _is_number_like(value: Any) -> bool:
    return (
        isinstance(value, int | float | complex)
        or hasattr(value, "__dlpack_device__")
        or hasattr(value, "__cuda_array_interface__")
        or hasattr(value, "__array__")
    )


def children_of(layer: Any) -> list[Any]:
    """Return the layers that are attributes of `layer`, directly or in lists, tuples and dictionaries, in order."""
    found: list[Any] = []
    for value in list(vars(layer).values()):
        if isinstance(value, CoreLayer | list | tuple | dict):
            found += _layers_of(value)
    return unique(found)


def _layers_of(value: Any) -> Iterator[Any]:
    if isinstance(value, CoreLayer):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _layers_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _layers_of(item)


def variables_in(layer: Any) -> list[Variable]:
    """Return the variables that are attributes of `layer`, directly or in lists and tuples, in order."""
    found = []
    for value in vars(layer).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Variable):
                found.append(item)
    return found
