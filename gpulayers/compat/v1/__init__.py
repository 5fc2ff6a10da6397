"""The names of TensorFlow 1: ``import gpulayers.compat.v1 as tf``. What is in `gpulayers` too is the same object."""

from typing import Any as _Any

import gpulayers as _top
from gpulayers import legacy_losses as losses
from gpulayers import metrics as metrics
from gpulayers.compat.v1 import keras as keras
from gpulayers.compat.v1 import train as train
from gpulayers.trace.graph import enter_default_graph as disable_eager_execution
from gpulayers.trace.graph import enter_default_graph as disable_v2_behavior
from gpulayers.trace.graph import leave_default_graph as enable_eager_execution
from gpulayers.trace.graph import leave_default_graph as enable_v2_behavior

globals().update({name: value for name, value in vars(_top).items() if name[0] != "_" and name not in globals()})


def __getattr__(name: str) -> _Any:
    if name == "bfloat16":  # a dtype of the optional package ml_dtypes
        return _top.bfloat16
    raise AttributeError(f"module 'gpulayers.compat.v1' has no attribute {name!r}")
