"""What both families of layers share: lifecycle, variables, losses, updates, nodes, masks, configuration.

A family is a subclass that fills in the hooks at the end of `CoreLayer`: how names and scopes are settled, how a
variable is made, whether inputs are cast, whether sub-layers are tracked, and what happens around a call.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpulayers import constraints, initializers, nest, ops, regularizers
from gpulayers.device import asarray, asnumpy, current_device, device, is_array, kind_of
from gpulayers.dtypes import Policy, TensorShape, as_dtype, is_floating
from gpulayers.errors import DeviceError, LayerError, NotBuiltError, ShapeError, StateError, message
from gpulayers.layers.books import Entry, LossBook, WeightBook, reachable, unique
from gpulayers.layers.calling import call_context, learning_phase, signature_of
from gpulayers.layers.masks import mask_of, set_mask
from gpulayers.layers.naming import snake_case
from gpulayers.layers.nodes import CallNode, History, NodeBook
from gpulayers.layers.spec import InputSpec, check_inputs, check_spec_structure
from gpulayers.metrics import Mean
from gpulayers.ops.operation import Recordable
from gpulayers.trace import (
    FunctionGraph,
    GraphTensor,
    Node,
    RecordedTensor,
    active_graph,
    active_tapes,
    as_recorded,
    autocast,
)
from gpulayers.trace.graph import new_placeholder
from gpulayers.variables import Variable, flat_variables

__all__ = ["CoreLayer"]

_KEYWORDS = {
    "input_dim", "input_shape", "batch_input_shape", "batch_size", "weights", "implementation", "dynamic", "autocast",
}  # fmt: skip


class CoreLayer:
    """Common part of the two `Layer` classes; not used directly."""

    _takes: frozenset[str] = frozenset()  # keywords that a family's constructor takes besides
    _autocast_default = False

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
        self._metrics: list[Any] = []
        self._metrics_lock = threading.Lock()
        self._set_policy(dtype)
        self.activity_regularizer = None if activity_regularizer is None else regularizers.get(activity_regularizer)
        self._settle_name(name, kwargs)

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
        """Whether it was made with ``dynamic=True``: it cannot be used on graph tensors without `compute_output_shape`."""
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

        `inputs`: array, tensor, or nested structure of them. Host arrays are copied to the layer's device.
        Other arguments go to `call`. Returns what `call` returns: arrays for arrays, tensors where something records.
        State written: variables at the first call; losses, metrics, and what `call` itself updates.
        Raises ValueError for inputs that do not fit `input_spec`, and if `call` returns None.
        """
        inputs = self._convert(inputs)
        symbolic = active_graph() is not None or _has_graph_tensor(inputs) or _has_graph_tensor((args, kwargs))
        if active_tapes():
            inputs, args, kwargs = as_recorded(inputs), as_recorded(args), as_recorded(kwargs)
        with self._around_call(inputs, kwargs, symbolic) as kwargs:
            signature = signature_of(self.call)
            self._settle_mask(signature, inputs, args, kwargs)
            training = self._settle_training(signature, args, kwargs)
            if self._input_spec is not None:
                check_inputs(self._input_spec, inputs, self._name)
            if not self.built:
                self._build_for(inputs)
            context = call_context
            saved = (context.depth, context.training)
            if context.depth == 0:
                context.root = self
                if not symbolic:
                    self._forget_call_losses()
            context.depth, context.training = saved[0] + 1, training
            try:
                outputs = self._call_in_dtype(inputs, args, kwargs)
            finally:
                context.depth, context.training = saved
            if outputs is None:
                raise LayerError(
                    message(self._name, "A layer's `call` method should return a tensor or a list of tensors, not None")
                )
            if self.activity_regularizer is not None:
                self._add_activity_losses(inputs, outputs)
            self._set_output_masks(inputs, kwargs.get("mask"), outputs)
            if symbolic:
                outputs = self._record_node(inputs, args, kwargs, outputs)
            self._finish_call(symbolic)
        return outputs

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer: the same as ``layer(inputs, ...)``."""
        return self(inputs, *args, **kwargs)

    def _convert(self, inputs: Any) -> Any:
        """Turn arrays and numbers into arrays of the layer's device; tensors and variables stay."""
        if nest.is_nested(inputs):
            return nest.map_structure(self._convert_one, inputs)
        return self._convert_one(inputs)

    def _convert_one(self, value: Any) -> Any:
        if isinstance(value, Recordable) or value is None:
            return value
        if type(value) is np.ndarray and self._device.kind == "cpu":
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
            masks = nest.map_structure(mask_of, inputs)
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
            value = learning_phase()
        if value is not None and (signature.training or "training" in kwargs):
            kwargs["training"] = value
        return value

    def _build_for(self, inputs: Any) -> None:
        leaves = nest.flatten(inputs)
        if self._policy.compute_dtype is None and leaves and hasattr(leaves[0], "dtype"):
            self._policy = Policy(as_dtype(leaves[0].dtype).name)
        shapes = nest.map_structure(lambda x: TensorShape(x.shape) if hasattr(x, "shape") else None, inputs)
        with device(self._device), self._around_build():
            self.build(shapes)
        self.built = True
        if self._initial_weights is not None:
            self.set_weights(self._initial_weights)
            self._initial_weights = None

    def _call_in_dtype(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `call`, its first argument and its variables cast to the compute dtype where the family casts."""
        if not self._autocast or self._policy.compute_dtype is None:
            with autocast(None) if call_context.depth > 1 else contextlib.nullcontext():
                return self.call(inputs, *args, **kwargs)
        compute = as_dtype(self._policy.compute_dtype)
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
        if mask is None and not nest.is_nested(inputs):
            mask = mask_of(inputs)
        if mask is None and not overridden:
            return
        result = self.compute_mask(inputs, mask)
        flat_outputs, flat_masks = nest.flatten(outputs), nest.flatten(result)
        if len(flat_masks) != len(flat_outputs):
            flat_masks = [result] * len(flat_outputs) if result is None else (flat_masks + [None] * len(flat_outputs))
        for output, one in zip(flat_outputs, flat_masks, strict=False):
            if one is not None or mask_of(output) is not None:
                set_mask(output, one)

    def _record_node(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        outputs = self._own_outputs(inputs, outputs)
        self._node_book.nodes.append(CallNode(inputs, args, kwargs, outputs))
        for index, output in enumerate(nest.flatten(outputs)):
            if isinstance(output, GraphTensor) and not any(output is x for x in nest.flatten(inputs)):
                output._keras_history = History(self, len(self._node_book.nodes) - 1, index)
        return outputs

    # --- variables ----------------------------------------------------------------------------------------------------

    def add_weight(
        self,
        name: str | None = None,
        shape: Any = None,
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        trainable: bool | None = None,
        constraint: Any = None,
        partitioner: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make a variable of the layer, or share an existing one where the scope says so; return it.

        Parameters

        - `name`, `shape` (an int n means ``(n,)``, None a scalar).
        - `dtype`: else the layer's, else float32.
        - `initializer`: name, configuration or callable ``(shape, dtype=...)``; None: the scope's, else Glorot uniform
          for floating dtypes and zeros for integers and bools.
        - `regularizer`: gives an unconditional loss; not added again for a shared variable.
        - `trainable`: counts only if the layer is trainable now.
        - `constraint`: applied by optimizers after each update.
        - `partitioner`: cuts the variable; the result is then a `PartitionedVariable`.
        - also `use_resource`, `synchronization`, `aggregation`, `experimental_autocast`, `collections`.

        State written: the layer's lists, the graph's collections. Raises TypeError for other keywords; ValueError if the
        shape is not fully known, the name exists, or an existing variable differs.
        """
        allowed = {"use_resource", "synchronization", "aggregation", "experimental_autocast", "collections", "getter"}
        for keyword in kwargs:
            if keyword not in allowed:
                raise TypeError("Unknown keyword argument:", keyword)
        if kwargs.get("synchronization") in ("ON_READ", "on_read"):
            if trainable:
                raise LayerError(message(self._name, "a variable with synchronization ON_READ cannot be trainable"))
            trainable = False
        trainable = True if trainable is None else trainable
        shape = () if shape is None else shape
        dtype = as_dtype(dtype if dtype is not None else (self.dtype or "float32"))
        if self._policy.variable_dtype is None:
            self._policy = Policy(dtype.name)
        initializer = self._initializer(initializer, dtype)
        with device(self._device):
            variable, is_new = self._make_variable(
                name=name,
                shape=TensorShape(shape),
                dtype=dtype,
                initializer=initializer,
                trainable=bool(trainable) and self._trainable,
                constraint=constraints.get(constraint),
                partitioner=partitioner,
                autocast=kwargs.get("experimental_autocast", True) and self._autocast and is_floating(dtype),
                collections=kwargs.get("collections"),
            )
        for part in flat_variables(variable):
            self._weight_book.add(part)
            if regularizer is not None and is_new:
                self._add_weight_loss(regularizers.get(regularizer), part)
        return variable

    def add_variable(
        self,
        name: str,
        shape: Any,
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        trainable: bool = True,
        constraint: Any = None,
        partitioner: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make a variable: `add_weight` with the arguments of ``tf.layers.Layer.add_variable``."""
        return self.add_weight(
            name, shape, dtype, initializer, regularizer, trainable, constraint, partitioner, **kwargs
        )

    def _initializer(self, initializer: Any, dtype: Any) -> Any:
        if initializer is None or (callable(initializer) and not isinstance(initializer, type)):
            return initializer
        if is_array(initializer) or isinstance(initializer, Recordable):
            raise ValueError(f"Could not interpret initializer identifier: {initializer!r}")
        return initializers.get(initializer)

    def _add_weight_loss(self, regularizer: Callable[[Any], Any], variable: Any) -> None:
        self._loss_book_add_function(lambda: regularizer(variable), conditional=False)

    @property
    def trainable_weights(self) -> list[Any]:
        """Variables that training changes: own first, then those of tracked sub-layers. Empty if not `trainable`."""
        return self._weight_lists()[0]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """Variables that training does not change."""
        return self._weight_lists()[1]

    @property
    def weights(self) -> list[Any]:
        """All variables: trainable ones first, each in order of creation."""
        trainable, fixed = self._weight_lists()
        return unique(trainable + fixed)

    @property
    def trainable_variables(self) -> list[Any]:
        """The same as `trainable_weights`."""
        return self.trainable_weights

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The same as `non_trainable_weights`."""
        return self.non_trainable_weights

    @property
    def variables(self) -> list[Any]:
        """The same as `weights`."""
        return self.weights

    def _weight_lists(self) -> tuple[list[Any], list[Any]]:
        trainable, fixed = self._weight_book.lists(self._trainable)
        trainable, fixed = list(trainable), list(fixed)
        for variable in self._attribute_variables():
            (trainable if variable.trainable and self._trainable else fixed).append(variable)
        for child in self._children():
            inner_trainable, inner_fixed = child._weight_lists()
            if self._trainable:
                trainable += inner_trainable
                fixed += inner_fixed
            else:
                fixed += inner_trainable + inner_fixed
        return unique(trainable), unique(fixed)

    def count_params(self) -> int:
        """Return the number of elements of all variables. Raises ValueError before the layer is built."""
        if not self.built:
            raise NotBuiltError(
                f"You tried to call `count_params` on {self._name}, but the layer isn't built. "
                "You can build it manually via: `layer.build(batch_input_shape)`."
            )
        return int(sum(np.prod(variable.shape, dtype=np.int64) for variable in self.weights))

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of `weights` as NumPy arrays."""
        return [asnumpy(variable.numpy()) for variable in self.weights]

    def set_weights(self, weights: Any) -> None:
        """Assign arrays to `weights`, in their order, cast to each variable's dtype.

        Raises ValueError if the number or a shape differs; then nothing is changed.
        """
        variables, weights = self.weights, list(weights)
        if len(variables) != len(weights):
            raise ShapeError(
                f'You called `set_weights(weights)` on layer "{self._name}" with a weight list of length '
                f"{len(weights)}, but the layer was expecting {len(variables)} weights."
            )
        values = [value if hasattr(value, "shape") else np.asarray(value) for value in weights]
        for variable, value in zip(variables, values, strict=True):
            if tuple(value.shape) != tuple(variable.shape):
                raise ShapeError(
                    f"Layer weight shape {tuple(variable.shape)} not compatible with provided weight shape "
                    f"{tuple(value.shape)}"
                )
        for variable, value in zip(variables, values, strict=True):
            variable.store(variable.accept(value))

    # --- losses, updates, metrics -------------------------------------------------------------------------------------

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """Add one loss or a nested list: tensors, arrays, numbers, functions without arguments, None (skipped).

        `inputs`: None marks them unconditional, anything else as depending on the inputs of a call (see
        `get_losses_for`). A function is evaluated whenever `losses` is read (in a graph: once, now), so that gradients
        reach variables. State written: `losses`; in a graph, a legacy layer's REGULARIZATION_LOSSES.
        """
        for loss in nest.flatten(losses):
            if loss is None:
                continue
            if callable(loss) and not isinstance(loss, Recordable):
                self._loss_book_add_function(loss, inputs is not None)
                continue
            if not isinstance(loss, Recordable) and not is_array(loss):
                loss = asarray(loss, dtype="float32") if active_graph() is None else ops.identity(float(loss))
            self._check_loss(loss)
            self._loss_book.tensors.append(Entry(loss, inputs is not None))
            if not isinstance(loss, GraphTensor):
                root = call_context.root if call_context.depth else self
                root._books_with_losses.append(self._loss_book)
            self._publish_loss(loss)

    def _loss_book_add_function(self, function: Callable[[], Any], conditional: bool) -> None:
        self._loss_book.add_function(function, conditional)

    def _evaluate_loss(self, function: Callable[[], Any]) -> Any:
        with autocast(None):
            value = function()
        if value is None or isinstance(value, Recordable) or is_array(value):
            return value
        return asarray(value)

    def _loss_entries(self) -> list[Entry]:
        entries = self._loss_book.entries(self._evaluate_loss)
        for child in self._children():
            entries += child._loss_entries()
        return entries

    @property
    def losses(self) -> list[Any]:
        """Losses added by the layer, its activity regularizer and its weights' regularizers, in this order.

        First tensor losses in the order added, then functions and regularizers; then those of tracked sub-layers.
        """
        return [entry.value for entry in self._loss_entries()]

    def add_update(self, updates: Any, inputs: Any = None) -> None:
        """Add an operation to be run with each training step: a node, tensor, or function that returns one.

        `inputs` as in `add_loss`. In eager mode a function is called now (unless the layer is not trainable), and
        nothing is kept: everything else has happened already. State written: `updates`.
        """
        eager = active_graph() is None and not any(isinstance(u, GraphTensor | Node) for u in nest.flatten(updates))
        for update in nest.flatten(updates):
            if update is None:
                continue
            if callable(update) and not isinstance(update, Recordable):
                if eager and not self._trainable:
                    continue
                update = update()
            if not eager and isinstance(update, GraphTensor | Node):
                self._loss_book.updates.append(Entry(update, inputs is not None))

    def _update_entries(self) -> list[Entry]:
        if not self._trainable and not self.stateful:
            return []
        entries = list(self._loss_book.updates)
        for child in self._children():
            entries += child._update_entries()
        return entries

    @property
    def updates(self) -> list[Any]:
        """Operations to run with each training step of a graph; empty if not trainable (and not `stateful`)."""
        return [entry.value for entry in self._update_entries()]

    def get_losses_for(self, inputs: Any) -> list[Any]:
        """Return the losses that are computed from `inputs`, or for None the unconditional ones.

        `inputs`: a tensor, variable, or list of them. Raises RuntimeError in eager mode for a legacy layer.
        """
        self._require_graph("get_losses_for")
        return _select(self._loss_entries(), inputs)

    def get_updates_for(self, inputs: Any) -> list[Any]:
        """Return the updates that are computed from `inputs`, or for None the unconditional ones; as `get_losses_for`."""
        self._require_graph("get_updates_for")
        return _select(self._update_entries(), inputs)

    @property
    def metrics(self) -> list[Any]:
        """Metric objects: own first, then those of tracked sub-layers."""
        found = list(self._metrics)
        for child in self._children():
            found += child.metrics
        return unique(found)

    def add_metric(self, value: Any, name: str | None = None, aggregation: str | None = None, **_: Any) -> None:
        """Follow a value over calls: a `Mean` metric called `name`, updated at each call.

        Raises ValueError without a name, for an `aggregation` other than None and ``"mean"``, and in eager mode outside
        `call`, where there is no call to follow.
        """
        if aggregation not in (None, "mean"):
            raise ValueError(message(self._name, "unknown aggregation", "None or 'mean'", repr(aggregation)))
        metric = getattr(value, "_metric_object", None)
        if name is None and metric is None:
            raise ValueError(f"{self._name}: Please provide a name for your metric like `self.add_metric(value, name='x')`.")
        if not isinstance(value, GraphTensor) and call_context.depth == 0:
            raise ValueError(
                f"{self._name}: Expected a symbolic Tensor for the metric value, received: {value!r}. "
                "Call add_metric inside `call`, or on a tensor that comes from Input."
            )
        with self._metrics_lock:
            found = next((m for m in self._metrics if m.name == name), None)
            if found is None:
                found = Mean(name=name)
                self._metrics.append(found)
        self._follow_metric(found, value)

    # --- nodes --------------------------------------------------------------------------------------------------------

    @property
    def input(self) -> Any:
        """Input of the layer's single recorded call. Raises AttributeError if there is none, or more than one."""
        self._require_graph("input")
        return self._node_book.only(self._name, "inputs")

    @property
    def output(self) -> Any:
        """Output of the layer's single recorded call. Raises AttributeError if there is none, or more than one."""
        self._require_graph("output")
        return self._node_book.only(self._name, "outputs")

    @property
    def input_shape(self) -> Any:
        """Input shape of all recorded calls, tuples with None. Raises AttributeError if there is none, or they differ."""
        self._require_graph("input_shape")
        return self._node_book.only_shape(self._name, "inputs")

    @property
    def output_shape(self) -> Any:
        """Output shape of all recorded calls. Raises AttributeError if there is none, or they differ."""
        self._require_graph("output_shape")
        return self._node_book.only_shape(self._name, "outputs")

    @property
    def input_mask(self) -> Any:
        """Mask of `input`, None where it has none."""
        return self._node_book.masks(self.input)

    @property
    def output_mask(self) -> Any:
        """Mask of `output`, None where it has none."""
        return self._node_book.masks(self.output)

    def get_input_at(self, node_index: int) -> Any:
        """Return the input of recorded call `node_index`.

        Raises RuntimeError if the layer has no recorded call, ValueError if it has fewer.
        """
        self._require_graph("get_input_at")
        return self._node_book.at(node_index, "inputs", "input")

    def get_output_at(self, node_index: int) -> Any:
        """Return the output of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_output_at")
        return self._node_book.at(node_index, "outputs", "output")

    def get_input_shape_at(self, node_index: int) -> Any:
        """Return the input shape of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_input_shape_at")
        return _shapes(self._node_book.at(node_index, "inputs", "input shape"))

    def get_output_shape_at(self, node_index: int) -> Any:
        """Return the output shape of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_output_shape_at")
        return _shapes(self._node_book.at(node_index, "outputs", "output shape"))

    def get_input_mask_at(self, node_index: int) -> Any:
        """Return the mask of the input of recorded call `node_index`."""
        return self._node_book.masks(self.get_input_at(node_index))

    def get_output_mask_at(self, node_index: int) -> Any:
        """Return the mask of the output of recorded call `node_index`."""
        return self._node_book.masks(self.get_output_at(node_index))

    # --- shapes, masks, configuration ---------------------------------------------------------------------------------

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output shape for an input shape; tuples, lists and `TensorShape` are taken, None inside allowed.

        The base runs `call` on a tensor without data, building the layer if needed. Raises TypeError for something that
        is no shape, ValueError for one that is incomplete or does not fit.
        """
        shapes = as_shape_structure(input_shape, self._name)
        graph = FunctionGraph()
        dtype = self.compute_dtype or "float32"
        tensors = nest.map_structure(lambda s: new_placeholder(graph, dtype, s, "shape_probe"), shapes)
        kept = list(self._node_book.nodes), list(self._loss_book.tensors), list(self._loss_book.updates)
        try:
            with graph.as_default():
                outputs = self(tensors)
        finally:
            self._node_book.nodes[:], self._loss_book.tensors[:], self._loss_book.updates[:] = kept
        return nest.map_structure(lambda t: t.shape, outputs)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return the mask of the outputs: the inputs' if the layer supports masking, else None.

        Raises TypeError for a mask that a layer without masking would lose.
        """
        if not self.supports_masking:
            if any(m is not None for m in nest.flatten(mask)):
                raise TypeError(
                    message(f"Layer {self._name}", "does not support masking, but was passed an input_mask", got=repr(mask))
                )
            return None
        return mask

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make such a layer: `name`, `trainable`, `dtype`, and what a subclass adds.

        Raises NotImplementedError if the subclass's constructor takes more and it does not override this.
        """
        parameters = list(inspect.signature(type(self).__init__).parameters)[1:]
        config: dict[str, Any] = {"name": self._name, "trainable": self._trainable, "dtype": self._dtype_config()}
        if hasattr(self, "_batch_input_shape"):
            config["batch_input_shape"] = self._batch_input_shape
        if self._dynamic:
            config["dynamic"] = True
        known = {"trainable", "name", "dtype", "activity_regularizer", "args", "kwargs", *config}
        if type(self).get_config is CoreLayer.get_config and set(parameters) - known:
            raise NotImplementedError(
                f"{type(self).__name__}: Layers with arguments in `__init__` must override `get_config`."
            )
        return config

    def _dtype_config(self) -> Any:
        return None if self._policy.name == "_infer" else self._policy.name

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer from the dictionary that `get_config` returned: same name, not built."""
        return cls(**config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the layer without running its constructor: variables and settings are copied, tensors and graphs shared.

        Variables of the copy are new, with the same names and values; `name` and scope are equal. A layer that was built
        in a graph cannot be copied (NotImplementedError).
        """
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        shared = {"_graph", "_metrics_lock", "_policy", "_device"}
        for key, value in self.__dict__.items():
            if key in shared or _is_tensor_or_list(value):
                copied = value
            elif key in ("_scope", "_current_scope"):
                copied = copy.copy(value)
            else:
                copied = copy.deepcopy(value, memo)
            result.__dict__[key] = copied
        return result

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

    def name_scope(self) -> str:
        """Return the name with a slash behind it."""
        return f"{self._name}/"

    def __repr__(self) -> str:
        return f"<{type(self).__module__.rpartition('.')[0]}.{type(self).__name__} {self._name!r} built={self.built}>"

    # --- hooks for the two families -----------------------------------------------------------------------------------

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        """Set `_name` (and what the family needs for scopes)."""
        self._name: str = name or snake_case(type(self).__name__)

    def _default_policy(self) -> Policy:
        """Return the policy of a layer that was given no dtype."""
        return Policy("_infer")

    def _around_call(self, inputs: Any, kwargs: dict[str, Any], symbolic: bool) -> Any:
        """Return a context around the whole call; it yields the keywords to use."""
        return contextlib.nullcontext(dict(kwargs))

    def _around_build(self) -> Any:
        """Return a context around `build`."""
        return contextlib.nullcontext()

    def _make_variable(self, **settings: Any) -> tuple[Any, bool]:
        """Make or share a variable; return it, and whether it is new."""
        raise TypeError(message(type(self).__name__, "belongs to no family of layers", do="Use a subclass of Layer."))

    def _children(self) -> list[Any]:
        """Return the tracked sub-layers."""
        return []

    def _attribute_variables(self) -> list[Any]:
        """Return variables that were assigned as attributes rather than made with `add_weight`."""
        return []

    def _forget_call_losses(self) -> None:
        """Forget what the last outermost eager call left behind."""
        for book in self._books_with_losses:
            book.clear_tensors()
        self._books_with_losses.clear()

    def _check_loss(self, loss: Any) -> None:
        """Refuse a loss that the family cannot keep."""

    def _publish_loss(self, loss: Any) -> None:
        """Tell the graph about a loss."""

    def _follow_metric(self, metric: Any, value: Any) -> None:
        """Update a metric at this call."""
        metric(value)

    def _own_outputs(self, inputs: Any, outputs: Any) -> Any:
        """Return outputs that may carry this layer's history."""
        return outputs

    def _finish_call(self, symbolic: bool) -> None:
        """Do what the family does after a call."""

    def _require_graph(self, what: str) -> None:
        """Raise where the family refuses `what` in eager mode."""


def as_shape_structure(value: Any, name: str) -> Any:
    """Turn a shape, or nested structure of shapes, into `TensorShape`s. Raises TypeError for anything else."""
    if isinstance(value, TensorShape):
        return value
    if isinstance(value, dict):
        return {key: as_shape_structure(v, name) for key, v in value.items()}
    if isinstance(value, list | tuple):
        if all(v is None or hasattr(v, "__index__") for v in value):
            return TensorShape(value)
        return type(value)([as_shape_structure(v, name) for v in value])
    raise TypeError(message(name, "not a shape", "a TensorShape or a tuple of sizes", repr(value)))


def _shapes(structure: Any) -> Any:
    return nest.map_structure(lambda t: tuple(t.shape), structure)


def _select(entries: list[Entry], inputs: Any) -> list[Any]:
    if inputs is None:
        return [entry.value for entry in entries if not entry.conditional]
    return reachable(entries, nest.flatten(inputs))


def _has_graph_tensor(structure: Any) -> bool:
    if isinstance(structure, GraphTensor):
        return True
    if isinstance(structure, list | tuple):
        return any(_has_graph_tensor(v) for v in structure)
    return isinstance(structure, dict) and any(_has_graph_tensor(v) for v in structure.values())


def _given_by_position(name: str, signature: Any, args: tuple[Any, ...]) -> bool:
    return bool(args) and name in signature.names and signature.names.index(name) - 1 < len(args)


def _cast_floating(value: Any, dtype: np.dtype) -> Any:
    current = getattr(value, "dtype", None)
    if current is None or current == dtype or not is_floating(current):
        return value
    return ops.cast(value, dtype)


def _is_number_like(value: Any) -> bool:
    return isinstance(value, int | float | complex) or hasattr(value, "__dlpack_device__") or hasattr(
        value, "__cuda_array_interface__"
    ) or hasattr(value, "__array__")


def _is_tensor_or_list(value: Any) -> bool:
    if isinstance(value, GraphTensor | RecordedTensor):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, GraphTensor | RecordedTensor) for v in value)


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
