"""Layers joined into one: ``tf.keras.models``."""

from gpulayers.model import Model as Model
from gpulayers.model import Sequential as Sequential

__all__ = [
    "Model",
    "Sequential",
]
