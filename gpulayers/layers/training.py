"""What `training` may be: the check that layers which behave otherwise in training share."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers import ops
from gpulayers.device import is_array
from gpulayers.dtypes import TensorShape
from gpulayers.errors import message
from gpulayers.layers.calling import learning_phase
from gpulayers.ops.batch_norm.operations import training_flag
from gpulayers.ops.operation import Recordable
from gpulayers.trace import GraphTensor, StoredValue, active_graph, as_value

__all__ = ["checked_training"]


def checked_training(name: str, training: Any) -> Any:
    """Return `training` as True, False or a boolean graph tensor; None is the learning phase, False if none is set.

    Raises TypeError, with `name` in front, for anything but a bool, 0, 1, or a scalar array, variable or tensor.
    """
    if training is None:
        training = learning_phase()
    if training is None:
        return False
    if isinstance(training, StoredValue) and active_graph() is not None:
        training = ops.identity(training)  # read when the graph runs
    return _graph_flag(name, training) if isinstance(training, GraphTensor) else _flag(name, training)


def _flag(name: str, training: Any) -> bool:
    """Return `training` as a bool. Raises TypeError unless it is a bool, 0, 1, or an array of one of these."""
    if isinstance(training, Recordable):
        training = as_value(training)
    if isinstance(training, int | float):
        scalar = training in (0, 1)
    else:
        scalar = is_array(training) and training.shape == () and training.item() in (0, 1)
    if not scalar:
        raise _wrong_training(name, repr(training))
    return bool(training)


def _graph_flag(name: str, training: GraphTensor) -> Any:
    """Return `training` as a boolean tensor; what is not known of it yet is checked when the graph runs."""
    shape = TensorShape(training.shape)
    if shape.rank not in (0, None):
        raise _wrong_training(name, f"a tensor of shape {shape}")
    known = shape.rank == 0 and training.dtype == np.bool_
    return training if known else training_flag(training, name=name)


def _wrong_training(name: str, got: str) -> TypeError:
    return TypeError(message(name, "training is not a bool", "True, False, 0, 1 or a scalar of these", got))
