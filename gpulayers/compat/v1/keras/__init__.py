"""The modern family of TensorFlow 1: ``tf.compat.v1.keras``. What is in `gpulayers.keras` too is the same object."""

from gpulayers import keras as _modern
from gpulayers.compat.v1.keras import layers as layers

globals().update({name: value for name, value in vars(_modern).items() if name[0] != "_" and name not in globals()})
