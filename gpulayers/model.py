"""Model and Sequential: layers joined into one, called, trained, summarised, saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers import checkpoint, nest, ops
from gpulayers.device import asarray, asnumpy
from gpulayers.dtypes import TensorShape
from gpulayers.errors import GraphError, LayerError, ShapeError, message
from gpulayers.layers.books import unique
from gpulayers.layers.calling import call_context
from gpulayers.layers.core import children_of
from gpulayers.layers.input import Input, InputLayer
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.masks import mask_of, set_mask
from gpulayers.layers.modern import Layer
from gpulayers.layers.nodes import History, shape_tuple
from gpulayers.trace import GraphTensor

__all__ = ["Model", "Sequential"]


class _Replay:
    """The recorded calls between inputs and outputs, in the order to repeat them with other values."""

    def __init__(self, name: str, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.layers: dict[int, Any] = {}
        self.steps: list[tuple[Any, Any]] = []  # (layer, call node) or (None, graph node)
        self._given = {id(t) for t in inputs}
        self._done: set[int] = set()
        self._name = name
        for tensor in inputs:
            self._note_layer(tensor)
        for tensor in outputs:
            self.extend_to(tensor)

    def _note_layer(self, tensor: GraphTensor) -> None:
        history: History | None = getattr(tensor, "_keras_history", None)
        if history is not None:
            self.layers[id(history.layer)] = history.layer

    def extend_to(self, target: GraphTensor) -> None:
        """Add what `target` needs and the steps do not have yet. Raises ValueError if it needs another input."""
        pending: list[tuple[GraphTensor, bool]] = [(target, False)]
        while pending:
            tensor, ready = pending.pop()
            if id(tensor) in self._given or id(tensor) in self._done:
                continue
            history: History | None = getattr(tensor, "_keras_history", None)
            if history is not None and isinstance(history.layer, InputLayer) or tensor.node.type == "Placeholder":
                raise GraphError(
                    message(self._name, f"the graph is disconnected: {tensor.name!r} is needed, but it is not an input")
                )
            needs = self._needs(tensor, history)
            if not ready:
                pending.append((tensor, True))
                pending += [(t, False) for t in reversed(needs)]
            elif history is not None:
                node = history.layer._node_book.nodes[history.node_index]
                self.steps.append((history.layer, node))
                self._note_layer(tensor)
                self._done.update(id(t) for t in nest.flatten(node.outputs))
            else:
                self.steps.append((None, tensor.node))
                self._done.update(id(t) for t in tensor.node.outputs)

    def _needs(self, tensor: GraphTensor, history: History | None) -> list[GraphTensor]:
        if history is None:
            return [v for v in tensor.node.inputs if isinstance(v, GraphTensor)]
        node = history.layer._node_book.nodes[history.node_index]
        leaves = nest.flatten([node.inputs, list(node.arguments), node.keywords])
        return [v for v in leaves if isinstance(v, GraphTensor)]

    def run(self, values: Sequence[Any], training: Any, mask: Any) -> dict[int, Any]:
        """Repeat the steps; return values by the identity of the recorded tensors."""
        known = {id(t): v for t, v in zip(self.inputs, values, strict=True)}

        def fill(structure: Any) -> Any:
            return nest.map_structure(lambda v: known[id(v)] if isinstance(v, GraphTensor) else v, structure)

        for layer, node in self.steps:
            if layer is None:
                result = node.operation(*[fill(v) for v in node.inputs], **node.attributes)
                results = result if isinstance(result, tuple | list) else (result,)
                known.update((id(t), v) for t, v in zip(node.outputs, results, strict=True))
                continue
            keywords = {k: fill(v) for k, v in node.keywords.items() if k != "mask" or v is None or _explicit(node)}
            result = layer(fill(node.inputs), *fill(list(node.arguments)), **keywords)
            for tensor, value in zip(nest.flatten(node.outputs), nest.flatten(result), strict=True):
                known[id(tensor)] = value
        return known


def _explicit(node: Any) -> bool:
    """Say whether a recorded mask is data rather than the mask its input carried (which is found again by itself)."""
    carried = nest.map_structure(mask_of, node.inputs)
    return node.keywords.get("mask") is not carried


class Model(Layer):
    """Layers joined into one: made from symbolic tensors, or by subclassing.

    ``Model(inputs, outputs)``: the calls between them are repeated with real arrays when the model is called.
    Subclassing: assign layers in ``__init__`` and override `call`. Other parameters: `name`, `trainable`.

    `layers`, `weights`, `losses` and `metrics` cover all layers; `weights` goes layer by layer, trainable or not.
    `input`, `output` and their shapes are what the model was made of; a list of one tensor counts as that tensor.
    Raises ValueError if the outputs need other inputs, TypeError for a legacy layer: its variables are in scopes.
    Source: ``tf.keras.Model``.

    >>> import numpy as np, gpulayers as gl
    >>> x = gl.keras.Input((3,))
    >>> model = gl.keras.Model(x, gl.keras.layers.Dense(2, kernel_initializer="ones")(x))
    >>> model(np.ones((1, 3), "float32"))
    array([[3., 3.]], dtype=float32)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inputs, outputs, kwargs = _model_arguments(args, kwargs)
        super().__init__(**kwargs)
        self._replay: _Replay | None = None
        self._symbolic_losses: list[GraphTensor] = []
        self._symbolic_metrics: list[tuple[Any, GraphTensor]] = []
        if outputs is not None:
            self._join(inputs, outputs)

    def _join(self, inputs: Any, outputs: Any) -> None:
        for tensor in nest.flatten([inputs, outputs]):
            if not isinstance(tensor, GraphTensor):
                raise TypeError(message(self._name, "a model is made of symbolic tensors", "from Input", repr(tensor)))
        self.inputs, self.outputs = nest.flatten(inputs), nest.flatten(outputs)
        self._input_structure, self._output_structure = _one_of_one(inputs), _one_of_one(outputs)
        self._replay = _Replay(self._name, self.inputs, self.outputs)
        for layer in self._replay.layers.values():
            _refuse_legacy(layer, self._name)
        self._layers = list(self._replay.layers.values())
        self.input_names = [getattr(t, "_keras_history").layer.name for t in self.inputs]  # noqa: B009
        self.built = True

    @property
    def layers(self) -> list[Any]:
        """The layers, inputs included, in the order they are called."""
        return list(self._layers) if self._replay is not None else children_of(self)

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """Return a layer by name or index. Raises ValueError if there is none."""
        layers = self.layers
        if index is not None and -len(layers) <= index < len(layers):
            return layers[index]
        for layer in layers:
            if layer.name == name:
                return layer
        raise ValueError(message(self._name, "no such layer", [layer.name for layer in layers], name or index))

    @property
    def weights(self) -> list[Any]:
        """All variables, layer by layer, then the model's own: the order does not change with what is trainable."""
        return unique([*(w for child in self._children() for w in child.weights), *_own_weights(self)])

    @property
    def input(self) -> Any:
        """The symbolic inputs the model was made of; of a subclass, as ``Layer.input``."""
        return super().input if self._replay is None else self._input_structure

    @property
    def output(self) -> Any:
        """The symbolic outputs the model was made of; of a subclass, as ``Layer.output``."""
        return super().output if self._replay is None else self._output_structure

    @property
    def input_shape(self) -> Any:
        """Shapes of `input`, tuples with None."""
        return super().input_shape if self._replay is None else nest.map_structure(shape_tuple, self._input_structure)

    @property
    def output_shape(self) -> Any:
        """Shapes of `output`, tuples with None."""
        return super().output_shape if self._replay is None else nest.map_structure(shape_tuple, self._output_structure)

    def _children(self) -> list[Any]:
        children = super()._children()
        for child in children:
            _refuse_legacy(child, self._name)
        return children

    # --- calling ------------------------------------------------------------------------------------------------------

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Repeat the recorded calls with `inputs`. Subclasses override it."""
        if self._replay is None:
            raise LayerError(
                message(self._name, "does not say how to compute", do="Override `call`, or pass inputs and outputs.")
            )
        values = self._arrange(inputs)
        for value, tensor in zip(values, self.inputs, strict=True):
            _check_input(self._name, value, tensor)
        values = [ops.cast(v, t.dtype) if v.dtype != t.dtype else v for v, t in zip(values, self.inputs, strict=True)]
        if mask is not None:
            for value, one in zip(values, nest.flatten(mask), strict=False):
                set_mask(value, one)
        known = self._replay.run(values, training, mask)
        for loss in self._symbolic_losses:
            super().add_loss(known[id(loss)], inputs=inputs)
        for metric, tensor in self._symbolic_metrics:
            if not isinstance(known[id(tensor)], GraphTensor):
                metric(known[id(tensor)])
        return nest.map_structure(lambda t: known[id(t)], self._output_structure)

    def _arrange(self, inputs: Any) -> list[Any]:
        if isinstance(inputs, Mapping) and not isinstance(self._input_structure, Mapping):
            missing = [name for name in self.input_names if name not in inputs]
            if missing:
                raise ValueError(message(self._name, "an input is missing", self.input_names, sorted(inputs)))
            return [inputs[name] for name in self.input_names]
        values = nest.flatten(inputs)
        if len(values) != len(self.inputs):
            raise ShapeError(
                f'Layer "{self._name}" expects {len(self.inputs)} input(s), '
                f"but it received {len(values)} input tensors."
            )
        return values

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return the masks the outputs carry: the layers have set them already."""
        return mask

    def _set_output_masks(self, inputs: Any, mask: Any, outputs: Any) -> None:
        if self._replay is None:
            super()._set_output_masks(inputs, mask, outputs)

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """As ``Layer.add_loss``; a symbolic tensor of the model becomes the loss of each later call."""
        for loss in nest.flatten(losses):
            if isinstance(loss, GraphTensor) and self._replay is not None and call_context.depth == 0:
                self._replay.extend_to(loss)
                self._symbolic_losses.append(loss)
            else:
                super().add_loss(loss, inputs)

    @property
    def losses(self) -> list[Any]:
        """Losses of all layers, and those added to the model: symbolic until the model is called, then of that call."""
        found = super().losses
        called = len(self._loss_book.called)
        return found if called >= len(self._symbolic_losses) else [*self._symbolic_losses, *found]

    def add_metric(self, value: Any, name: str | None = None, aggregation: str | None = None, **keywords: Any) -> None:
        """As ``Layer.add_metric``; a symbolic tensor of the model is followed at each later call."""
        super().add_metric(value, name, aggregation, **keywords)
        if isinstance(value, GraphTensor) and self._replay is not None and call_context.depth == 0:
            self._replay.extend_to(value)
            self._symbolic_metrics.append((self._metrics[-1], value))

    def predict(self, x: Any, batch_size: int = 256) -> np.ndarray:
        """Call the model on slices of `x` without training, and return the results joined as a NumPy array."""
        count = len(x)
        parts = [asnumpy(self(asarray(x[i : i + batch_size]), training=False)) for i in range(0, count, batch_size)]
        return np.concatenate(parts) if parts else asnumpy(self(asarray(x), training=False))

    # --- showing and saving -------------------------------------------------------------------------------------------

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print a table of layers: name and class, output shape, number of parameters, bytes."""
        rows = [("Layer", "Output shape", "Params", "Bytes")]
        for layer in self.layers:
            size = sum(w.size * w.static_dtype.itemsize for w in layer.weights)
            count = layer.count_params() if layer.built else 0
            rows.append((f"{layer.name} ({type(layer).__name__})", _shown_shape(layer), f"{count:,}", f"{size:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        line = "-" * (sum(widths) + 6)
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        trainable = sum(w.size for w in self.trainable_weights)
        fixed = sum(w.size for w in self.non_trainable_weights)
        total = f"Parameters: {trainable + fixed:,} (trainable {trainable:,}, fixed {fixed:,})"
        for text in (f'Model "{self._name}"', line, lines[0], line, *lines[1:], line, total):
            print_fn(text)

    def named_weights(self) -> dict[str, Any]:
        """Return the variables by names that a second model of the same make has too.

        A variable's own name, its layers' names numbered anew from the model's first layer on, whatever is trainable:
        automatic numbers count all layers of a program, and would differ.
        """
        named: dict[str, Any] = {}
        prefixes: dict[str, str] = {}
        for variable in unique([*_in_order(self), *self.weights]):
            prefix, _, own = variable.name.partition(":")[0].rpartition("/")
            if prefix not in prefixes:
                bare = "/".join(re.sub(r"_\d+$", "", part) for part in prefix.split("/"))
                prefixes[prefix] = _unused(bare, prefixes.values())
            named[_unused(f"{prefixes[prefix]}/{own}" if prefix else own, named)] = variable
        return named

    def save_weights(self, path: Any) -> None:
        """Write the variables to ``.npz`` or ``.safetensors`` (see `gpulayers.checkpoint`)."""
        checkpoint.save_weights(path, self.named_weights())

    def load_weights(self, path: Any, strict: bool = True) -> Any:
        """Read the variables back. Raises CheckpointError, changing nothing, if names or shapes do not match."""
        return checkpoint.load_weights(path, self.named_weights(), strict=strict)


def _model_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    keywords = dict(kwargs)
    inputs = keywords.pop("inputs", args[0] if args else None)
    outputs = keywords.pop("outputs", args[1] if len(args) > 1 else None)
    if len(args) > 2:
        keywords.setdefault("name", args[2])
    if (inputs is None) != (outputs is None):
        raise LayerError(message("Model", "needs both inputs and outputs, or neither (when subclassed)"))
    return inputs, outputs, keywords


def _one_of_one(structure: Any) -> Any:
    """Return the element of a list of one tensor, anything else as it is."""
    return structure[0] if isinstance(structure, list) and len(nest.flatten(structure)) == 1 else structure


def _own_weights(layer: Any) -> list[Any]:
    """Return the variables of a layer without those of its sub-layers, in an order that stays."""
    book = layer._weight_book
    return [*book.trainable, *book.non_trainable, *layer._attribute_variables()]


def _in_order(layer: Any) -> list[Any]:
    """Return the variables of a layer, then those of its sub-layers, in an order that stays."""
    return [*_own_weights(layer), *(w for child in layer._children() for w in _in_order(child))]


def _refuse_legacy(layer: Any, name: str) -> None:
    if isinstance(layer, LegacyLayer):
        raise TypeError(
            message(
                name,
                f"legacy tf.layers.Layers cannot be part of a Model: {layer.name!r}",
                do="Use the layer of the same name in gl.keras.layers.",
            )
        )


def _check_input(name: str, value: Any, tensor: GraphTensor) -> None:
    shape = TensorShape(value.shape)
    if not tensor.shape.is_compatible_with(shape):
        raise ShapeError(
            f"Input 0 of layer {name} is incompatible with the layer: expected shape={tuple(tensor.shape)}, "
            f"found shape={tuple(shape)}"
        )


def _unused(name: str, taken: Collection[str]) -> str:
    """Return `name`, with a number behind it if it is taken."""
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _shown_shape(layer: Any) -> str:
    try:
        return str(layer.output_shape)
    except AttributeError:
        return "?"


class Sequential(Model):
    """A stack of layers, each called on what the one before returned.

    `layers`: a list, or nothing and `add` later; the first may be an `Input`. The stack is built at the first call, or
    by ``build(input_shape)``. Source: ``tf.keras.Sequential``.

    >>> import numpy as np, gpulayers as gl
    >>> stack = gl.keras.Sequential([gl.keras.layers.Dense(4), gl.keras.layers.Dense(2)])
    >>> stack(np.ones((3, 5), "float32")).shape
    (3, 2)
    """

    def __init__(self, layers: Sequence[Any] | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self._stack: list[Any] = []
        self._bottom: GraphTensor | None = None
        self._top: GraphTensor | None = None
        for layer in layers or ():
            self.add(layer)

    @property
    def layers(self) -> list[Any]:
        """The layers in order."""
        return list(self._stack)

    def add(self, layer: Any) -> None:
        """Put a layer on top. Raises TypeError for something that is not a modern layer."""
        if isinstance(layer, GraphTensor):
            self._bottom = self._top = layer
            return
        _refuse_legacy(layer, self._name)
        if not isinstance(layer, Layer):
            raise TypeError(message(self._name, "only layers can be added", "a layer", repr(layer)))
        if isinstance(layer, InputLayer):
            self._bottom = self._top = layer.output
            return
        if not self._stack and self._bottom is None and hasattr(layer, "_batch_input_shape"):
            self._bottom = self._top = Input(batch_shape=layer._batch_input_shape, dtype=layer.compute_dtype)
        self._stack.append(layer)
        if self._bottom is not None:
            self._top = layer(self._top)
            self._join(self._bottom, self._top)

    def pop(self) -> Any:
        """Remove the top layer and return it."""
        if not self._stack:
            raise TypeError(message(self._name, "there are no layers to remove"))
        layer = self._stack.pop()
        if self._bottom is not None:
            self._top = layer.get_input_at(-1)
            self._join(self._bottom, self._top)
        return layer

    def build(self, input_shape: Any) -> None:
        """Build every layer for inputs of this shape."""
        if not self._stack:
            raise LayerError(message(self._name, "has no layers", do="Add one first."))
        self.built = True
        if self._bottom is None and not call_context.depth:  # in a call, the layers are built as they are reached
            self.compute_output_shape(input_shape)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Call the layers one after the other."""
        if self._replay is not None:
            return super().call(inputs, training, mask)
        for layer in self._stack:
            inputs = layer(inputs)
        return inputs
