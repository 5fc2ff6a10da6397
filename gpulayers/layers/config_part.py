"""Shapes, masks, configuration and copies of a layer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from gpulayers import nest, regularizers
from gpulayers.dtypes import TensorShape
from gpulayers.errors import message
from gpulayers.layers.calling import probing
from gpulayers.layers.hooks import LayerHooks
from gpulayers.trace import FunctionGraph, GraphTensor, RecordedTensor
from gpulayers.trace.graph import new_placeholder

__all__ = ["ConfigPart", "as_shape_structure"]


class ConfigPart(LayerHooks):
    """The part of a layer that knows its shapes, masks and configuration."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output shape for an input shape; tuples, lists and `TensorShape` are taken, None inside allowed.

        The base runs `call` on a tensor without data, building the layer if needed. Raises TypeError for something that
        is no shape, ValueError for one that is incomplete or does not fit.
        """
        shapes = as_shape_structure(input_shape, self._name)
        graph = FunctionGraph()
        dtype = self.compute_dtype or "float32"
        tensors = nest.map_structure(lambda s: new_placeholder(graph, dtype, s, "shape_probe"), shapes)
        with probing(), graph.as_default():
            outputs = self(tensors)  # type: ignore[operator]  # CoreLayer has the call
        return nest.map_structure(lambda t: t.shape, outputs)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return the mask of the outputs: the inputs' if the layer supports masking, else None.

        Raises TypeError for a mask that a layer without masking would lose.
        """
        if not self.supports_masking:
            if any(m is not None for m in nest.flatten(mask)):
                raise TypeError(
                    message(
                        f"Layer {self._name}", "does not support masking, but was passed an input_mask", got=repr(mask)
                    )
                )
            return None
        return mask

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make such a layer: `name`, `trainable`, `dtype`, and what a subclass adds.

        The activity regularizer is in it where no subclass overrides this; one that does adds it, as in TensorFlow.
        Raises NotImplementedError if the subclass's constructor takes more and it does not override this.
        """
        parameters = list(inspect.signature(type(self).__init__).parameters)[1:]
        config: dict[str, Any] = {"name": self._name, "trainable": self._trainable, "dtype": self._dtype_config()}
        if hasattr(self, "_batch_input_shape"):
            config["batch_input_shape"] = self._batch_input_shape
        if self._dynamic:
            config["dynamic"] = True
        if type(self).get_config is not ConfigPart.get_config:
            return config
        if self.activity_regularizer is not None:
            config["activity_regularizer"] = regularizers.serialize(self.activity_regularizer)
        if set(parameters) - {"trainable", "name", "dtype", "activity_regularizer", "args", "kwargs", *config}:
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

        Variables of the copy are new, with the same names and values; `name` and scope are equal. A layer that was
        built in a graph cannot be copied (NotImplementedError).
        """
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        shared = {"_graph", "_metrics_lock", "_policy", "_device"}
        for key, value in self.__dict__.items():
            if key in shared or _is_tensor_or_list(value):
                copied = value
            elif key in ("_scope", "_current_scope"):
                copied = copy.copy(value)
            elif key == "_shortcuts":
                copied = {}  # prepared for this layer's variables
            else:
                copied = copy.deepcopy(value, memo)
            result.__dict__[key] = copied
        return result

    def name_scope(self) -> str:
        """Return the name with a slash behind it."""
        return f"{self._name}/"

    def __repr__(self) -> str:
        return f"<{type(self).__module__.rpartition('.')[0]}.{type(self).__name__} {self._name!r} built={self.built}>"


def as_shape_structure(value: Any, name: str) -> Any:
    """Turn a shape, or nested structure of shapes, into `TensorShape`s. Raises TypeError for anything else."""
    if isinstance(value, TensorShape):
        return value
    if isinstance(value, dict):
        return {key: as_shape_structure(v, name) for key, v in value.items()}
    if isinstance(value, list | tuple):
        if all(v is None or hasattr(v, "__index__") for v in value):
            return TensorShape(value)
        parts = [as_shape_structure(v, name) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    raise TypeError(message(name, "not a shape", "a TensorShape or a tuple of sizes", repr(value)))


def _is_tensor_or_list(value: Any) -> bool:
    if isinstance(value, GraphTensor | RecordedTensor):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, GraphTensor | RecordedTensor) for v in value)
