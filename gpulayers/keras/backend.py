"""Settings of the whole program: ``tf.keras.backend``."""

from gpulayers.layers.calling import learning_phase as learning_phase
from gpulayers.layers.calling import set_learning_phase as set_learning_phase
from gpulayers.layers.naming import reset_names as clear_session

__all__ = [
    "clear_session",
    "learning_phase",
    "set_learning_phase",
]
