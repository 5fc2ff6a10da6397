"""The legacy cells and their wrappers: ``tf.nn.rnn_cell``."""

from gpulayers.nn.cells_legacy import BasicLSTMCell as BasicLSTMCell
from gpulayers.nn.cells_legacy import BasicRNNCell as BasicRNNCell
from gpulayers.nn.cells_legacy import GRUCell as GRUCell
from gpulayers.nn.cells_legacy import LSTMCell as LSTMCell
from gpulayers.nn.cells_legacy import MultiRNNCell as MultiRNNCell
from gpulayers.nn.cells_legacy import RNNCell as RNNCell
from gpulayers.nn.states import LSTMStateTuple as LSTMStateTuple
from gpulayers.nn.wrappers_legacy import DeviceWrapper as DeviceWrapper
from gpulayers.nn.wrappers_legacy import DropoutWrapper as DropoutWrapper
from gpulayers.nn.wrappers_legacy import ResidualWrapper as ResidualWrapper

__all__ = [
    "BasicLSTMCell",
    "BasicRNNCell",
    "DeviceWrapper",
    "DropoutWrapper",
    "GRUCell",
    "LSTMCell",
    "LSTMStateTuple",
    "MultiRNNCell",
    "RNNCell",
    "ResidualWrapper",
]
