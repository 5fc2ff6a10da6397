"""The modern layers: ``tf.keras.layers``."""

from gpulayers.layers.activation import ELU as ELU
from gpulayers.layers.activation import Activation as Activation
from gpulayers.layers.activation import LeakyReLU as LeakyReLU
from gpulayers.layers.activation import ReLU as ReLU
from gpulayers.layers.activation import Softmax as Softmax
from gpulayers.layers.batch_normalization_layers import BatchNormalization as BatchNormalization
from gpulayers.layers.convolution import Conv1D as Conv1D
from gpulayers.layers.convolution import Conv2D as Conv2D
from gpulayers.layers.dense_layers import Dense as Dense
from gpulayers.layers.dropout_layers import Dropout as Dropout
from gpulayers.layers.input import Input as Input
from gpulayers.layers.input import InputLayer as InputLayer
from gpulayers.layers.masking import Masking as Masking
from gpulayers.layers.merging import Add as Add
from gpulayers.layers.merging import Average as Average
from gpulayers.layers.merging import Concatenate as Concatenate
from gpulayers.layers.merging import Maximum as Maximum
from gpulayers.layers.merging import Minimum as Minimum
from gpulayers.layers.merging import Multiply as Multiply
from gpulayers.layers.merging import Subtract as Subtract
from gpulayers.layers.modern import Layer as Layer
from gpulayers.layers.pooling import AveragePooling1D as AveragePooling1D
from gpulayers.layers.pooling import AveragePooling2D as AveragePooling2D
from gpulayers.layers.pooling import GlobalAveragePooling1D as GlobalAveragePooling1D
from gpulayers.layers.pooling import GlobalAveragePooling2D as GlobalAveragePooling2D
from gpulayers.layers.pooling import GlobalMaxPooling1D as GlobalMaxPooling1D
from gpulayers.layers.pooling import GlobalMaxPooling2D as GlobalMaxPooling2D
from gpulayers.layers.pooling import MaxPooling1D as MaxPooling1D
from gpulayers.layers.pooling import MaxPooling2D as MaxPooling2D
from gpulayers.layers.reshaping import Flatten as Flatten
from gpulayers.layers.reshaping import Permute as Permute
from gpulayers.layers.reshaping import Reshape as Reshape
from gpulayers.layers.spec import InputSpec as InputSpec
from gpulayers.nn.cells_modern import GRUCell as GRUCell
from gpulayers.nn.cells_modern import LSTMCell as LSTMCell
from gpulayers.nn.cells_modern import SimpleRNNCell as SimpleRNNCell
from gpulayers.nn.rnn_layer import RNN as RNN
from gpulayers.nn.rnn_layers import GRU as GRU
from gpulayers.nn.rnn_layers import LSTM as LSTM
from gpulayers.nn.rnn_layers import SimpleRNN as SimpleRNN
from gpulayers.nn.stacked import StackedRNNCells as StackedRNNCells

__all__ = [
    "Activation",
    "Add",
    "Average",
    "AveragePooling1D",
    "AveragePooling2D",
    "BatchNormalization",
    "Concatenate",
    "Conv1D",
    "Conv2D",
    "Dense",
    "Dropout",
    "ELU",
    "Flatten",
    "GRU",
    "GRUCell",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "Input",
    "InputLayer",
    "InputSpec",
    "LSTM",
    "LSTMCell",
    "Layer",
    "LeakyReLU",
    "Masking",
    "MaxPooling1D",
    "MaxPooling2D",
    "Maximum",
    "Minimum",
    "Multiply",
    "Permute",
    "RNN",
    "ReLU",
    "Reshape",
    "SimpleRNN",
    "SimpleRNNCell",
    "Softmax",
    "StackedRNNCells",
    "Subtract",
]
