"""The maths and the variables of the batch normalisation layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from gpulayers import constraints, initializers, ops, regularizers
from gpulayers.device import is_array
from gpulayers.dtypes import TensorShape, as_dtype, is_floating, parameter_dtype
from gpulayers.errors import GraphError, LayerError, ShapeError, message
from gpulayers.layers.calling import state_updates_allowed
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.spec import InputSpec
from gpulayers.layers.training import checked_training
from gpulayers.ops.batch_norm import arrays as batch_norm_arrays
from gpulayers.ops.batch_norm.operations import (
    MovingVariables,
    adjusted,
    asked_clip,
    batch_norm_inference,
    batch_norm_training,
    sub_batches,
    update_moving,
)
from gpulayers.ops.operation import Recordable, state
from gpulayers.trace import (
    active_graph,
    active_replays,
    active_tapes,
    cond,
    control_dependencies,
    symbolic_graph,
)
from gpulayers.variables import PartitionedVariable

__all__ = ["BatchNormalizationMixin"]

_CLIPS = ("rmax", "rmin", "dmax")


class BatchNormalizationMixin(CoreLayer):
    """The maths and the variables of batch normalisation, for both families."""

    _trainable_false_means_inference = False
    _own_call: Any = None  # the `call` that `_shortcut` may stand in for
    _fused_must_be_possible = False

    def __init__(
        self,
        axis: Any = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
        name: Any = None,
        activation: Any = None,
        skip_nonfinite_updates: bool = False,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=trainable, name=name, **kwargs)
        self.axis = _checked_axis(self._name, axis)
        self.momentum, self.center, self.scale = momentum, center, scale
        self.epsilon = _checked_epsilon(self._name, epsilon)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.renorm, self.virtual_batch_size, self.adjustment = renorm, virtual_batch_size, adjustment
        self.activation = ops.activations.get(activation)
        self.skip_nonfinite_updates = skip_nonfinite_updates
        self.fused = fused
        self.supports_masking = True
        if renorm:
            clipping = dict(renorm_clipping or {})
            if set(clipping) - set(_CLIPS):
                raise ValueError(
                    message(self._name, "Received invalid keys for `renorm_clipping`", list(_CLIPS), list(clipping))
                )
            self.renorm_clipping, self.renorm_momentum = clipping, renorm_momentum
        self._warned_single = False

    # --- build --------------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Make the variables for inputs of this shape; settles `axis` and `fused`.

        Raises ValueError for an axis that is out of range or given twice, unknown rank or size of a normalised axis,
        and for a `virtual_batch_size` that is not positive or does not go with the other arguments.
        """
        shape = TensorShape(input_shape)
        rank = _known_rank(self._name, shape)
        axes = self._resolved_axes(shape)
        self._check_virtual_batch(axes)
        self.fused = self._can_fuse(shape, axes)
        sizes = {axis: shape[axis] for axis in axes}
        if None in sizes.values():
            raise ShapeError(message(self._name, "Input has undefined `axis` dimension", axes, shape))
        self.input_spec = InputSpec(ndim=rank, axes=sizes)
        self._kept_axes = tuple(sorted(axes))
        self._fitting_shape = TensorShape([sizes.get(axis) for axis in range(rank)])
        if len(axes) == 1 and self.virtual_batch_size is None:
            parameter_shape = [sizes[axes[0]]]
        else:
            parameter_shape = [sizes.get(axis, 1) for axis in range(rank)]
        if self.virtual_batch_size is not None:
            parameter_shape.insert(1, 1)
            axes = [axis + 1 for axis in axes]
        self.axis = axes
        self._make_variables(parameter_shape, parameter_dtype(self.dtype or "float32"))
        self.built = True

    def _resolved_axes(self, shape: TensorShape) -> list[int]:
        rank = shape.rank or 0
        given = [self.axis] if isinstance(self.axis, int) else list(self.axis)
        if not given:
            raise IndexError(message(self._name, "axis is empty", "at least one axis", given))
        axes = [axis + rank if axis < 0 else axis for axis in given]
        if any(axis < 0 or axis >= rank for axis in axes):
            raise ShapeError(
                message(self._name, "Expected 0 <= axis < inputs.rank", f"axis in [-{rank}, {rank})", given)
            )
        if len(set(axes)) != len(axes):
            raise ShapeError(f"{self._name}: Duplicate axis: {tuple(axes)}. Expected different axes; got {given}.")
        return axes

    def _check_virtual_batch(self, axes: list[int]) -> None:
        size = self.virtual_batch_size
        if size is None:
            return
        if size <= 0:
            raise ValueError(
                message(
                    self._name,
                    "virtual_batch_size must be a positive integer that divides the true batch size",
                    got=size,
                )
            )
        if 0 in axes:
            raise ValueError(message(self._name, "When using virtual_batch_size, axis cannot include 0", got=axes))
        if self.adjustment is not None:
            raise ValueError(message(self._name, "When using virtual_batch_size, adjustment cannot be specified"))

    def _can_fuse(self, shape: TensorShape, axes: list[int]) -> bool:
        """Say whether TensorFlow would take its fused path: that decides the estimator of the moving variance."""
        plain_options = not self.renorm and self.virtual_batch_size is None and self.adjustment is None
        allowed = {4: ([1], [3]), 5: ([1], [4])}.get(shape.rank or 0, ())
        possible = plain_options and axes in allowed and as_dtype(self.dtype or "float32").itemsize <= 4
        if self.fused and not possible and self._fused_must_be_possible:
            raise ValueError(
                message(
                    self._name,
                    "fused=True is not possible here",
                    "rank 4 or 5, one axis (1 or the last), no renorm, virtual_batch_size or adjustment, not float64",
                    f"rank {shape.rank}, axis {axes}, dtype {self.dtype}",
                )
            )
        return possible and self.fused in (None, True)

    def _make_variables(self, shape: list[Any], dtype: np.dtype) -> None:
        def add(name: str, initializer: Any, trainable: bool = False, **keywords: Any) -> Any:
            if not trainable:  # statistics are never partitioned, whatever the scope says
                keywords["partitioner"] = False
            return self.add_weight(
                name,
                shape,
                dtype,
                initializer=initializer,
                trainable=trainable,
                experimental_autocast=False,
                **keywords,
            )

        self.gamma = self.beta = None
        if self.scale:
            options = {"regularizer": self.gamma_regularizer, "constraint": self.gamma_constraint}
            self.gamma = add("gamma", self.gamma_initializer, trainable=True, **options)
        if self.center:
            options = {"regularizer": self.beta_regularizer, "constraint": self.beta_constraint}
            self.beta = add("beta", self.beta_initializer, trainable=True, **options)
        self.moving_mean = add("moving_mean", self.moving_mean_initializer)
        self.moving_variance = add("moving_variance", self.moving_variance_initializer)
        if self.renorm:
            root = _SquareRoot(self.moving_variance_initializer)
            self.moving_stddev = add("moving_stddev", root)
            self.renorm_mean = add("renorm_mean", self.moving_mean_initializer)
            self.renorm_stddev = add("renorm_stddev", root)
        if self.skip_nonfinite_updates:
            self.skipped_updates = self.add_weight(
                "skipped_updates", (), "int64", initializer="zeros", trainable=False, partitioner=False
            )

    # --- call ---------------------------------------------------------------------------------------------------------

    def _normalise(self, inputs: Any, training: Any, mask: Any, residual: Any) -> Any:
        """Compute the output for `training` of any kind, and update the moving statistics."""
        if not is_floating(inputs.dtype):
            raise TypeError(message(self._name, "input is not floating", "a floating dtype", inputs.dtype))
        if not is_floating(self.compute_dtype):
            raise TypeError(message(self._name, "dtype is not floating", "a floating dtype", self.compute_dtype))
        if self.virtual_batch_size is not None and not isinstance(self.virtual_batch_size, int | np.integer):
            raise TypeError(message(self._name, "virtual_batch_size is not an integer", got=self.virtual_batch_size))
        if inputs.dtype != self.compute_dtype:
            inputs = ops.cast(inputs, self.compute_dtype)
        if residual is not None and getattr(residual, "dtype", None) != self.compute_dtype:
            residual = ops.cast(residual, self.compute_dtype)
        training = self._checked_training(training)
        if training is not False:
            self._refuse_branch()
        if self.fused and mask is not None:
            warnings.warn(
                f"{self._name}: masking is not supported by the fused path, the mask is ignored", stacklevel=4
            )
            mask = None
        if training is False:
            return self._inference(inputs, residual, self._adjustment(inputs, training))
        adjustment = self._adjustment(inputs, training)
        if training is True:
            self._warn_about_single_values(tuple(inputs.shape), stacklevel=5)
            y, mean, variance = self._training(inputs, mask, residual, adjustment, in_place=active_graph() is None)
            self._record_updates(inputs, mean, variance, True)
            return y
        y, mean, variance = cond(
            training,
            lambda: self._training(inputs, mask, residual, adjustment, in_place=False),
            lambda: self._without_statistics(inputs, residual),
        )
        self._record_updates(inputs, mean, variance, training)
        return y

    def _checked_training(self, training: Any) -> Any:
        """Return True, False, or a graph tensor."""
        training = checked_training(self._name, training)
        return False if self._trainable_false_means_inference and not self._trainable else training

    def _refuse_branch(self) -> None:
        """Raise GraphError in a branch of a graph's `cond`: updates recorded there could not be run with the step."""
        graph = active_graph()
        if (
            graph is not None
            and graph.owner is not graph
            and graph.initializes_variables_in_session
            and self._updates_statistics()
        ):
            raise GraphError(
                message(
                    self._name,
                    "a training call inside a branch of `cond`, whose updates no session could run",
                    "a call outside of the branches",
                    do="Pass the condition instead: layer(x, training=tensor). Inside a branch, trainable=False or "
                    "gl.no_state_updates() leave the updates out.",
                )
            )

    def _training(self, x: Any, mask: Any, residual: Any, adjustment: Any, in_place: bool) -> list[Any]:
        """Normalise by batch statistics; return the output, and mean and variance for the moving statistics."""
        named: dict[str, Any] = {}
        relu = self._fused_relu and adjustment is None
        if adjustment is None:
            named = {"gamma": self.gamma, "beta": self.beta, "residual": residual}
        if mask is not None:
            named["weights"] = _mask_weights(mask, x)
        if self.renorm:
            named["renorm_mean"], named["renorm_stddev"] = self.renorm_mean, self.renorm_stddev
            named.update({key: self._clip(key) for key in _CLIPS})
        named = {key: value for key, value in named.items() if value is not None}
        y, mean, variance, *_ = batch_norm_training(
            _raised(x) if adjustment is not None else x,
            *[_whole(value) for value in named.values()],
            given=tuple(named),
            axis=self._kept_axes,
            epsilon=self.epsilon,
            virtual_batch_size=self.virtual_batch_size,
            activation="relu" if relu else None,
            moving=self._moving() if in_place and self._updates_statistics() else None,
            lonely=None if active_graph() is None else self._warn_about_single_values,
        )
        if adjustment is not None:
            y = self._adjusted(y, adjustment, x.dtype)
            if residual is not None:
                y = y + residual
        return [y if relu or self.activation is ops.activations.linear else self.activation(y), mean, variance]

    def _clip(self, key: str) -> Any:
        """Return a clip of renorm, or None. A function is asked now, or where something records when that runs."""
        clip = self.renorm_clipping.get(key)
        if not callable(clip):
            return clip
        value = self._ask(clip)
        if active_graph() is None or value is None or isinstance(value, Recordable):
            return value
        return asked_clip(ask=lambda: self._ask(clip))

    def _ask(self, clip: Callable[[], Any]) -> Any:
        if (replays := active_replays()) is not None:
            replays.refuse(f"{self._name} has a function in renorm_clipping, which the host asks in every call")
        return clip()

    def _inference(self, x: Any, residual: Any, adjustment: Any = None) -> Any:
        named = {"gamma": self.gamma, "beta": self.beta, "residual": residual}
        named = {key: value for key, value in named.items() if value is not None}
        y = batch_norm_inference(
            x,
            *map(_constant, (self.moving_mean, self.moving_variance)),
            *[_whole(value) for value in named.values()],
            given=tuple(named),
            axis=self._kept_axes,
            epsilon=self.epsilon,
            activation="relu" if self._fused_relu else None,
        )
        return y if self._fused_relu or self.activation is ops.activations.linear else self.activation(y)

    def _without_statistics(self, x: Any, residual: Any) -> list[Any]:
        """Return what `_training` returns, by inference: the statistics are placeholders that no update uses."""
        flat = ops.reshape(self.moving_mean, (-1,))
        return [self._inference(x, residual), flat, ops.reshape(self.moving_variance, (-1,))]

    @property
    def _fused_relu(self) -> bool:
        return self.activation is ops.activations.relu

    def _adjustment(self, x: Any, training: Any) -> Any:
        """Ask for (scale, bias), unless the call is known not to train; host arrays are copied, as inputs are."""
        if self.adjustment is None or training is False:
            return None
        return [self._convert_one(v) if is_array(v) else v for v in self.adjustment(ops.shape_of(x))]

    def _adjusted(self, n: Any, adjustment: Any, dtype: Any) -> Any:
        """Return ``(n scale + bias) gamma + beta``, computed in the dtype of the parameters; may overwrite `n`.

        What broadcasts is put together first: it is smaller.
        """
        scale, bias = adjustment
        shape = [size if axis in self._kept_axes else 1 for axis, size in enumerate(tuple(n.shape))]
        if self.gamma is not None:
            gamma = ops.reshape(_whole(self.gamma), shape)
            scale, bias = scale * gamma, bias * gamma
        if self.beta is not None:
            bias = bias + ops.reshape(_whole(self.beta), shape)
        y = adjusted(n, scale, bias, overwrite=not state.recorders)
        return ops.cast(y, dtype) if y.dtype != dtype else y

    def _warn_about_single_values(self, shape: tuple[Any, ...], stacklevel: int = 2) -> None:
        """Warn, once, where each channel has one value; a graph asks when it runs, for sizes it does not know."""
        if self._warned_single or None in shape or 0 in shape or self.virtual_batch_size == 0:
            return
        groups = sub_batches(shape[0], self.virtual_batch_size)
        if math.prod(size for axis, size in enumerate(shape) if axis not in self._kept_axes) == groups:
            self._warned_single = True
            warnings.warn(
                f"{self._name}: training with one value per channel (input shape {shape}): the variance is 0 and the "
                "output is beta. The usual cause is a last batch of one row; drop it, or use larger batches.",
                stacklevel=stacklevel,
            )

    def _shortcut(self, inputs: Any, training: Any) -> Callable[[Any], Any] | None:
        plain = not self.renorm and self.adjustment is None and self.virtual_batch_size is None
        relu = self._fused_relu
        variables = [self.gamma, self.beta, self.moving_mean, self.moving_variance]
        if (
            not plain
            or getattr(self.call, "__func__", None) is not type(self)._own_call
            or inputs.dtype != self.compute_dtype
            or not (relu or self.activation is ops.activations.linear)
            or any(isinstance(variable, PartitionedVariable) for variable in variables)
            or 0 in inputs.shape
        ):
            return None
        prepared = batch_norm_arrays.Prepared(inputs, self._kept_axes)
        gamma, beta, mean, variance = variables

        def infer(x: Any) -> Any:
            scale, offset = _value(gamma), _value(beta)
            return prepared.inference(x, scale, offset, mean.read(), variance.read(), self.epsilon, relu)

        def train(x: Any) -> Any:
            if self._trainable_false_means_inference and not self._trainable:
                return infer(x)
            moving = self._moving().arrays() if self._updates_statistics() else None
            return prepared.forward(x, _value(gamma), _value(beta), self.epsilon, relu, moving)

        return train if training else infer

    # --- moving statistics --------------------------------------------------------------------------------------------

    def _updates_statistics(self) -> bool:
        return self._trainable and state_updates_allowed()

    def _moving(self) -> MovingVariables:
        more = (
            (self.moving_stddev, self.renorm_mean, self.renorm_stddev, 1 - self.renorm_momentum) if self.renorm else ()
        )
        moving = MovingVariables(self.moving_mean, self.moving_variance, 1 - self.momentum, *more)
        if self.fused or self.skip_nonfinite_updates:
            counter = self.skipped_updates if self.skip_nonfinite_updates else None
            moving = moving._replace(
                unbiased=bool(self.fused), skip_nonfinite=self.skip_nonfinite_updates, skipped=counter
            )
        return moving

    def _record_updates(self, x: Any, mean: Any, variance: Any, training: Any) -> None:
        """Add the two updates of a graph; nothing in eager mode, where they have happened, and for `Input` tensors.

        A graph gets those of a layer that is not trainable too: `updates` hides them until it is.
        """
        graph = active_graph()
        if graph is None or graph is symbolic_graph() or not state_updates_allowed():
            return
        if not self._trainable and (graph.owner is not graph or not graph.initializes_variables_in_session):
            return
        size = ops.size(x)
        moving = self._moving()
        for part in ("mean", "variance"):
            with control_dependencies([mean]):
                update = update_moving(mean, variance, training, size, moving=moving, epsilon=self.epsilon, part=part)
            self.add_update(update, inputs=x)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `input_shape` as a `TensorShape`; sizes may be None.

        Raises TypeError for something that is no shape, ValueError for unknown rank, for one that `axis` does not go
        with, and once built for another rank or another size of a normalised axis.
        """
        shape = as_shape_structure(input_shape, self._name)
        if not isinstance(shape, TensorShape):
            raise TypeError(message(self._name, "takes one input", "one shape", repr(input_shape)))
        _known_rank(self._name, shape)
        if not self.built:
            self._resolved_axes(shape)
        elif not shape.is_compatible_with(self._fitting_shape):
            raise ShapeError(message(self._name, "the shape does not fit the layer", self._fitting_shape, shape))
        return shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments; `fused` and `adjustment` are left out, the latter with a warning."""
        if self.adjustment is not None:
            warnings.warn(f"{self._name}: `adjustment` is a function and is not part of the config", stacklevel=2)
        config: dict[str, Any] = {
            "axis": self._axis_of_inputs(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
        }
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            config[f"{name}_initializer"] = initializers.serialize(getattr(self, f"{name}_initializer"))
        for name in ("beta", "gamma"):
            config[f"{name}_regularizer"] = regularizers.serialize(getattr(self, f"{name}_regularizer"))
        for name in ("beta", "gamma"):
            config[f"{name}_constraint"] = constraints.serialize(getattr(self, f"{name}_constraint"))
        if self.renorm:
            config.update(renorm=True, renorm_clipping=dict(self.renorm_clipping), renorm_momentum=self.renorm_momentum)
        if self.virtual_batch_size is not None:
            config["virtual_batch_size"] = self.virtual_batch_size
        if self.activation is not ops.activations.linear:
            config["activation"] = ops.activations.serialize(self.activation)
        if self.skip_nonfinite_updates:
            config["skip_nonfinite_updates"] = True
        return {**super().get_config(), **config}

    def _axis_of_inputs(self) -> Any:
        """Return `axis` as the constructor takes it: `build` counts the axis of sub-batches, inputs do not have it."""
        if isinstance(self.axis, int):
            return self.axis
        shift = int(self.built and self.virtual_batch_size is not None)
        return [axis - shift for axis in self.axis]


class _SquareRoot:
    """The square root of what an initializer gives."""

    def __init__(self, initializer: Any) -> None:
        self.initializer = initializer

    def __call__(self, shape: Any, dtype: Any = None, **keywords: Any) -> Any:
        return ops.sqrt(self.initializer(shape, dtype=dtype, **keywords))


def _known_rank(name: str, shape: TensorShape) -> int:
    """Return the rank. Raises ShapeError if it is unknown or 0."""
    if not shape.rank:
        raise ShapeError(message(name, "Input has undefined rank", "rank 1 or more", shape))
    return shape.rank


def _checked_axis(name: str, axis: Any) -> Any:
    """Return a copy of `axis`. Raises TypeError unless it is an int or a list or tuple of ints."""
    if isinstance(axis, list | tuple) and all(type(a) is int or isinstance(a, np.integer) for a in axis):
        return [int(a) for a in axis]
    if type(axis) is int:
        return axis
    raise TypeError(message(name, "axis is of a wrong type", "an int, or a list or tuple of ints", repr(axis)))


def _checked_epsilon(name: str, epsilon: Any) -> Any:
    """Return `epsilon`. Raises ValueError unless it is a number."""
    if isinstance(epsilon, Real) or (is_array(epsilon) and epsilon.shape == ()):
        return epsilon
    raise LayerError(message(name, "epsilon is not a number", "a small positive number", repr(epsilon)))


def _mask_weights(mask: Any, x: Any) -> Any:
    """Return a mask of all axes but the last as weights of all axes."""
    return ops.expand_dims(ops.cast(mask, parameter_dtype(x.dtype)), -1)


def _value(variable: Any) -> Any:
    """Return the array of a variable, None for None."""
    return None if variable is None else variable.read()


def _constant(variable: Any) -> Any:
    """Return what inference reads: on a tape a value that stays, though the layer may go on to train on it.

    A step that may be captured gets a copy, else the next update makes one: a captured update cannot change arrays.
    """
    if not active_tapes() or active_graph() is not None:
        return variable
    return ops.stop_gradient(variable) if active_replays() is None else variable.read().copy()


def _whole(value: Any) -> Any:
    return value.as_tensor() if isinstance(value, PartitionedVariable) else value


def _raised(x: Any) -> Any:
    """Return 16-bit data as float32: what follows is computed there."""
    dtype = parameter_dtype(x.dtype)
    return x if x.dtype == dtype else ops.cast(x, dtype)
