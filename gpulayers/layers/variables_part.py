"""Variables of a layer: making them, listing them, reading and setting their values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers import constraints, initializers, regularizers
from gpulayers.device import asnumpy, device, is_array
from gpulayers.dtypes import Policy, TensorShape, as_dtype, is_floating
from gpulayers.errors import LayerError, NotBuiltError, ShapeError, message
from gpulayers.layers.books import unique
from gpulayers.layers.hooks import LayerHooks
from gpulayers.ops.operation import Recordable
from gpulayers.variables import flat_variables

__all__ = ["VariablesPart"]


class VariablesPart(LayerHooks):
    """The part of a layer that keeps its variables."""

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
        ----------
        - `name`: a legacy layer needs one, since its variables are shared by it.
        - `shape`: an int n means ``(n,)``, None a scalar.
        - `dtype`: else the layer's, else float32.
        - `initializer`: name, configuration or callable ``(shape, dtype=...)``; None: the scope's, else Glorot uniform
          for floating dtypes and zeros for integers and bools.
        - `regularizer`: gives an unconditional loss; not added again for a shared variable.
        - `trainable`: what `trainable_weights` lists while the layer is trainable. A legacy layer that is not trainable
          now makes the variable non-trainable for good.
        - `constraint`: applied by optimizers after each update.
        - `partitioner`: cuts the variable; the result is then a `PartitionedVariable`. None: the scope's; False: none.
        - also `use_resource`, `synchronization`, `aggregation`, `experimental_autocast`, `collections`.

        State written: the layer's lists, the graph's collections. Raises TypeError for other keywords and for a legacy
        layer's variable without a name; ValueError if the shape is not fully known, the name exists, or an existing
        variable differs.
        """
        allowed = {"use_resource", "synchronization", "aggregation", "experimental_autocast", "collections", "getter"}
        for keyword in kwargs:
            if keyword not in allowed:
                raise TypeError("Unknown keyword argument:", keyword)
        if kwargs.get("synchronization") in ("ON_READ", "on_read"):
            if trainable:
                raise LayerError(message(self._name, "a variable with synchronization ON_READ cannot be trainable"))
            trainable = False
        trainable = self._makes_trainable(trainable is None or bool(trainable))
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
                trainable=trainable,
                constraint=constraints.get(constraint),
                partitioner=partitioner,
                autocast=kwargs.get("experimental_autocast", True) and self._autocast and is_floating(dtype),
                collections=kwargs.get("collections"),
            )
        for part in flat_variables(variable):
            self._weight_book.add(part, trainable)
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
        # A partial, not a closure: a copy of the layer then regularizes the copied variable.
        self._add_loss_function(functools.partial(regularizer, variable), conditional=False)

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
