"""What all optimizers share: checking, clipping, slots, constraints, and the one node that updates in a graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpulayers import ops, serialization
from gpulayers.device import array_module, asarray, asnumpy, device
from gpulayers.dtypes import is_floating, parameter_dtype
from gpulayers.errors import DTypeError, GradientError, ShapeError, message
from gpulayers.ops.clipping import clip_by_global_norm, clip_by_norm
from gpulayers.ops.operation import Operation
from gpulayers.optimizers import schedules
from gpulayers.trace import (
    GradientTape,
    GraphKeys,
    GraphTensor,
    Replays,
    active_graph,
    active_replays,
    as_value,
    gradients,
    stop_recording,
)
from gpulayers.variables import Variable, flat_variables

__all__ = ["Optimizer"]


def _apply_forward(
    xp: Any, *values: Any, optimizer: Optimizer, variables: Sequence[Variable], counter: Variable | None
) -> None:
    count = len(variables)
    optimizer._update(values[-count:], variables, values[0] if len(values) > count else None, counter)


_apply_gradients = Operation(
    "apply_gradients",
    _apply_forward,
    spec=lambda *specs, **_: None,
    type="ApplyGradients",
    stateful=True,
    doc="Update variables by gradients. Inputs: the learning rate if it is a graph tensor, then the gradients.",
)


class Optimizer:
    """Base of optimizers.

    Parameters

    - `learning_rate`: a number; a schedule or other function of the number of updates made, or of nothing; a Variable,
      or in a graph a tensor (these two are copied to the host at each update, which waits for a GPU).
    - `clipvalue`: limit every gradient's entries to ``+-clipvalue``; `clipnorm`: each gradient's length;
      `global_clipnorm`: the length of all together. At most one of the two lengths.
    - `name`: begins the names of the optimizer's variables.

    State written: the variables, in place; `iterations`, the number of updates made, which lives on the host; slots,
    variables that start from 0 (float32 for 16-bit variables). Constraints of variables are applied after each update.

    The update is the same eagerly and in a graph or `function`, where `apply_gradients` returns a node that does it.
    """

    slot_names: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        learning_rate: Any,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        self.name = name
        self.learning_rate = learning_rate
        if clipnorm is not None and global_clipnorm is not None:
            raise ValueError(message(name, "clipnorm and global_clipnorm exclude each other", "one of them"))
        for what, limit in (("clipnorm", clipnorm), ("clipvalue", clipvalue), ("global_clipnorm", global_clipnorm)):
            if limit is not None and not limit > 0:
                raise ValueError(message(name, f"{what} is not positive", "more than 0, or None", limit))
        self.clipnorm, self.clipvalue, self.global_clipnorm = clipnorm, clipvalue, global_clipnorm
        self._iterations: Variable | None = None
        self._slots: dict[int, tuple[Variable, dict[str, Variable]]] = {}  # keeps the variable, so its id stays its own

    # --- learning rate ------------------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> Any:
        """The learning rate as it was given: assign a new one at any time, graphs take it up at their next run."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            if not value >= 0:
                raise ValueError(message(self.name, "the learning rate is negative", "0 or more", value))
        elif not (callable(value) or isinstance(value, Variable | GraphTensor)):
            raise ValueError(
                message(self.name, "not a learning rate", "a number, Variable or function of the step", repr(value))
            )
        self._learning_rate = value
        self._takes_step = _takes_an_argument(value)

    lr = learning_rate

    def _rate(self, step: int, given: Any) -> float:
        """Return the learning rate as a number; `given` is the value of a graph tensor."""
        rate = self._learning_rate
        if given is not None:
            rate = given
        elif not isinstance(rate, Variable) and callable(rate):
            rate = rate(step) if self._takes_step else rate()
        if isinstance(rate, int | float):
            return float(rate)
        return float(asnumpy(as_value(rate)))

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def iterations(self) -> Variable:
        """The number of updates made: an int64 variable on the host."""
        if self._iterations is None:
            with device("cpu"):
                self._iterations = Variable(0, trainable=False, name=f"{self.name}/iterations", dtype="int64", shape=())
        return self._iterations

    def build(self, var_list: Iterable[Variable]) -> None:
        """Make `iterations` and the slots of `var_list` now; otherwise the first update does."""
        _ = self.iterations
        for variable in var_list:
            if id(variable) not in self._slots:
                made = {name: self._new_slot(variable, name) for name in self.slot_names}
                self._slots[id(variable)] = (variable, made)

    def _new_slot(self, variable: Variable, name: str) -> Variable:
        dtype = parameter_dtype(variable.static_dtype)
        with device(variable.device):
            return Variable(
                lambda: ops.zeros(variable.static_shape, dtype),
                trainable=False,
                name=f"{self.name}/{variable.name.partition(':')[0]}/{name}",
                dtype=dtype,
                shape=variable.static_shape,
            )

    def get_slot(self, variable: Variable, name: str) -> Variable | None:
        """Return the slot called `name` of a variable, or None if there is none."""
        return self._slots.get(id(variable), (variable, {}))[1].get(name)

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots."""
        return list(self.slot_names)

    @property
    def variables(self) -> list[Variable]:
        """`iterations` and all slots: what to save to go on training later."""
        return [self.iterations, *(slot for _, slots in self._slots.values() for slot in slots.values())]

    # --- updating -----------------------------------------------------------------------------------------------------

    def minimize(
        self, loss: Any, var_list: Any = None, tape: GradientTape | None = None, name: str | None = None
    ) -> Any:
        """Compute the gradients of `loss` and apply them.

        `loss`: a function without arguments; or a value recorded on `tape`; or a graph tensor. `var_list`: variables,
        nested at will, or a function that returns them; if not given, those that were watched (eager) or the graph's
        trainable ones. Returns None, or in a graph the node that updates.
        """
        return self.apply_gradients(self.compute_gradients(loss, var_list, tape), name=name)

    def compute_gradients(
        self, loss: Any, var_list: Any = None, tape: GradientTape | None = None, grad_loss: Any = None
    ) -> list[tuple[Any, Variable]]:
        """Return (gradient, variable) pairs; a gradient is None where the loss does not depend on the variable.

        Raises ValueError for a loss that is neither a function, nor recorded on a `tape`, nor a graph tensor.
        """
        if callable(loss) and not isinstance(loss, GraphTensor):
            with GradientTape() if tape is None else tape as tape:
                loss = loss()
        variables = flat_variables(var_list() if callable(var_list) else var_list) if var_list is not None else None
        if isinstance(loss, GraphTensor):
            if variables is None:
                variables = loss.graph.get_collection(GraphKeys.TRAINABLE_VARIABLES)
            found = gradients(loss, variables, grad_loss) if variables else []
        elif tape is None:
            raise GradientError(
                message(
                    self.name,
                    "the loss was computed already and no tape is given",
                    "a function that computes the loss, or tape=",
                    type(loss).__name__,
                )
            )
        else:
            if variables is None:
                variables = [variable for variable in tape.watched_variables() if isinstance(variable, Variable)]
            found = tape.gradient(loss, variables, grad_loss)
        return list(zip(found, variables, strict=True))

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Variable]], name: str | None = None) -> Any:
        """Update the variables. Returns None, or in a graph the node that updates.

        Pairs whose gradient is None are left out with a warning. Raises ValueError if all are, for a gradient of
        another shape, a variable given twice, or one that is not a floating Variable; nothing is changed then.
        """
        return self._apply(grads_and_vars, None)

    def _apply(self, grads_and_vars: Iterable[tuple[Any, Variable]], counter: Variable | None) -> Any:
        grads, variables = self._checked(list(grads_and_vars))
        graph = active_graph() or next((g.graph for g in grads if isinstance(g, GraphTensor)), None)
        if graph is None:
            with stop_recording():
                self.build(variables)
                self._update(self._clipped([as_value(g) for g in grads]), variables, None, counter)
            return None
        with graph.as_default():
            self.build(variables)
            rate = [self._learning_rate] if isinstance(self._learning_rate, GraphTensor) else []
            inputs = [*rate, *self._clipped(grads)]
            return _apply_gradients(*inputs, optimizer=self, variables=tuple(variables), counter=counter)

    def _checked(self, pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Variable]]:
        """Return gradients and variables without the pairs that have no gradient."""
        for _, variable in pairs:
            if not isinstance(variable, Variable) or not is_floating(variable.static_dtype):
                raise _NotTrainable(message(self.name, "cannot be trained", "a floating Variable", repr(variable)))
        missing = [variable.name for gradient, variable in pairs if gradient is None]
        if len(missing) == len(pairs):
            raise GradientError(
                message(self.name, "no gradients were given for any variable", got=missing or "an empty list")
            )
        if missing:
            warnings.warn(f"{self.name}: no gradient was given for {', '.join(missing)}; left unchanged.", stacklevel=5)
        given = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
        if len({id(variable) for _, variable in given}) != len(given):
            raise ValueError(message(self.name, "a variable is given twice", "different variables"))
        for gradient, variable in given:
            shape = gradient.shape if hasattr(gradient, "shape") else np.shape(gradient)
            fits = shape.is_compatible_with(variable.static_shape) if hasattr(shape, "is_compatible_with") else (
                tuple(shape) == variable.static_shape
            )
            if not fits:
                raise ShapeError(message(variable.name, "its gradient has another shape", variable.static_shape, shape))
        return [gradient for gradient, _ in given], [variable for _, variable in given]

    def _clipped(self, grads: Sequence[Any]) -> list[Any]:
        """Return the gradients, limited as asked; by operations, so that a graph records it."""
        grads = list(grads)
        if self.clipvalue is not None:
            grads = [ops.clip(g, -self.clipvalue, self.clipvalue) for g in grads]
        if self.clipnorm is not None:
            grads = [clip_by_norm(g, self.clipnorm) for g in grads]
        if self.global_clipnorm is not None:
            grads = clip_by_global_norm(grads, self.global_clipnorm)[0]
        return grads

    def _update(
        self, grads: Sequence[Any], variables: Sequence[Variable], given_rate: Any, counter: Variable | None
    ) -> None:
        """Do one update now. All that can fail on wrong input is done before the first write."""
        replays = active_replays()
        host_numbers = self._present_numbers(given_rate, counter, replays)
        groups: dict[Any, list[int]] = {}
        for index, variable in enumerate(variables):
            groups.setdefault(variable.device, []).append(index)
        ready = [_beside(g, v) for g, v in zip(grads, variables, strict=True)]
        for members in groups.values():
            chosen = [variables[index] for index in members]
            with device(chosen[0].device):
                params = [variable.writable() for variable in chosen]
                slots = [[self._slots[id(v)][1][name].writable() for v in chosen] for name in self.slot_names]
                numbers = host_numbers
                if numbers is None and replays is not None:
                    numbers = replays.numbers(params[0], self._next_numbers)
                xp = array_module(params[0])
                self._update_arrays(xp, params, [ready[index] for index in members], slots, numbers, chosen)
        if host_numbers is None and replays is not None:
            replays.each_time(lambda: self._count(counter))
        else:
            self._count(counter)
        for variable in variables:
            _constrain(variable, in_place=replays is not None)

    def _present_numbers(self, given_rate: Any, counter: Variable | None, replays: Replays | None) -> Any:
        """Return the numbers of this update; None while a step is captured: each replay has its own."""
        if replays is None:
            return self._next_numbers(given_rate)
        if given_rate is not None:
            replays.refuse(f"{self.name}: the learning rate is a graph tensor, which the host reads in every call")
        replays.claim(self.iterations, *([] if counter is None else [counter]))
        return None if replays.capturing else replays.ask(lambda: self._next_numbers(given_rate))

    def _next_numbers(self, given_rate: Any = None) -> tuple[float, ...]:
        done = int(self.iterations.read())
        return self._numbers(self._rate(done, given_rate), done + 1)

    def _count(self, counter: Variable | None) -> None:
        self.iterations.writable()[...] += 1
        if counter is not None:
            counter.store(counter.read() + 1)

    def _numbers(self, rate: float, step: int) -> tuple[float, ...]:
        """Return what `_update_arrays` computes with in update number `step`, counted from 1."""
        raise NotImplementedError(message(type(self).__name__, "does not define its numbers"))

    def _update_arrays(
        self,
        xp: Any,
        params: Sequence[Any],
        grads: Sequence[Any],
        slots: Sequence[Sequence[Any]],
        numbers: Any,
        variables: Sequence[Variable],
    ) -> None:
        """Update arrays in place; `slots` holds a list for each of `slot_names`.

        `numbers`: what `_numbers` returned, or a device array of it that the kernels read when they run.
        """
        raise NotImplementedError(message(type(self).__name__, "does not define its update"))

    # --- configuration ------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data.

        Raises ValueError for a learning rate that is a function other than a schedule: it has no data form.
        """
        rate = self._learning_rate
        if isinstance(rate, schedules.LearningRateSchedule):
            rate = serialization.serialize(rate)
        elif isinstance(rate, GraphTensor) or (callable(rate) and not isinstance(rate, Variable)):
            wanted = "a number or a schedule"
            raise ValueError(message(self.name, "its learning rate has no data form", wanted, repr(rate)))
        else:
            rate = self._rate(0, None)
        return {
            "name": self.name,
            "learning_rate": rate,
            "clipnorm": self.clipnorm,
            "clipvalue": self.clipvalue,
            "global_clipnorm": self.global_clipnorm,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make an optimizer from what `get_config` returned; its state starts anew."""
        rate = config.get("learning_rate")
        if isinstance(rate, dict):
            known = {name: getattr(schedules, name) for name in schedules.__all__}
            config = {**config, "learning_rate": serialization.deserialize(rate, custom_objects, known, "schedule")}
        return cls(**config)


class _NotTrainable(DTypeError, ValueError):
    """Something given to an optimizer is not a floating variable."""


def _beside(gradient: Any, variable: Variable) -> Any:
    """Return a gradient as an array where its variable lives, of its dtype or float32 for 16 bits."""
    value, parameter = as_value(gradient), variable.read()
    if type(value) is not type(parameter):
        value = asarray(value, dtype=variable.static_dtype, device=variable.device)
    if value.dtype != parameter.dtype:
        value = value.astype(parameter_dtype(parameter.dtype))
    return value


def _constrain(variable: Variable, in_place: bool) -> None:
    """Apply a variable's constraint, if any; `in_place` keeps the array, which a captured graph goes on using."""
    if variable.constraint is None:
        return
    if in_place:
        array = variable.writable()
        array[...] = variable.accept(variable.constraint(array))
    else:
        variable.store(variable.accept(variable.constraint(variable.read())))


def _takes_an_argument(function: Any) -> bool:
    if not callable(function) or isinstance(function, Variable | GraphTensor):
        return False
    if isinstance(function, schedules.LearningRateSchedule):
        return True
    try:
        parameters: Iterable[Any] = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


