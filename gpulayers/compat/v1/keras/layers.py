"""The layers of ``tf.compat.v1.keras.layers``. What is in `gpulayers.keras.layers` too is the same object."""

from gpulayers.keras import layers as _modern
from gpulayers.nn.cells_v1 import GRU as GRU
from gpulayers.nn.cells_v1 import LSTM as LSTM
from gpulayers.nn.cells_v1 import GRUCell as GRUCell
from gpulayers.nn.cells_v1 import LSTMCell as LSTMCell

__all__ = list(_modern.__all__)

globals().update({name: getattr(_modern, name) for name in __all__ if name not in globals()})
