"""The modern family under TensorFlow's names: ``tf.keras``. This file only names things."""

import importlib as _importlib
from typing import Any as _Any

from gpulayers import constraints as constraints
from gpulayers import initializers as initializers
from gpulayers import losses as losses
from gpulayers import metrics as metrics
from gpulayers import regularizers as regularizers
from gpulayers.keras import backend as backend
from gpulayers.keras import layers as layers
from gpulayers.keras import mixed_precision as mixed_precision
from gpulayers.keras import utils as utils
from gpulayers.layers.input import Input as Input
from gpulayers.ops import activations as activations


def __getattr__(name: str) -> _Any:
    if name in ("models", "optimizers"):
        return _importlib.import_module(f"gpulayers.{'optimizers' if name == 'optimizers' else 'keras.models'}")
    if name in ("Model", "Sequential"):
        return getattr(_importlib.import_module("gpulayers.model"), name)
    raise AttributeError(f"module 'gpulayers.keras' has no attribute {name!r}")
