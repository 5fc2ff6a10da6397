"""The legacy family under TensorFlow's names: ``tf.layers``. The modern family is ``gl.keras.layers``."""

from gpulayers.layers.batch_normalization_layers import LegacyBatchNormalization as BatchNormalization
from gpulayers.layers.convolution import LegacyConv1D as Conv1D
from gpulayers.layers.convolution import LegacyConv2D as Conv2D
from gpulayers.layers.dense_layers import LegacyDense as Dense
from gpulayers.layers.dropout_layers import LegacyDropout as Dropout
from gpulayers.layers.functional import average_pooling1d as average_pooling1d
from gpulayers.layers.functional import average_pooling2d as average_pooling2d
from gpulayers.layers.functional import batch_normalization as batch_normalization
from gpulayers.layers.functional import conv1d as conv1d
from gpulayers.layers.functional import conv2d as conv2d
from gpulayers.layers.functional import dense as dense
from gpulayers.layers.functional import dropout as dropout
from gpulayers.layers.functional import flatten as flatten
from gpulayers.layers.functional import max_pooling1d as max_pooling1d
from gpulayers.layers.functional import max_pooling2d as max_pooling2d
from gpulayers.layers.legacy import LegacyLayer as Layer
from gpulayers.layers.pooling import LegacyAveragePooling1D as AveragePooling1D
from gpulayers.layers.pooling import LegacyAveragePooling2D as AveragePooling2D
from gpulayers.layers.pooling import LegacyMaxPooling1D as MaxPooling1D
from gpulayers.layers.pooling import LegacyMaxPooling2D as MaxPooling2D
from gpulayers.layers.reshaping import LegacyFlatten as Flatten
from gpulayers.layers.spec import InputSpec as InputSpec

__all__ = [
    "AveragePooling1D",
    "AveragePooling2D",
    "BatchNormalization",
    "Conv1D",
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "InputSpec",
    "Layer",
    "MaxPooling1D",
    "MaxPooling2D",
    "average_pooling1d",
    "average_pooling2d",
    "batch_normalization",
    "conv1d",
    "conv2d",
    "dense",
    "dropout",
    "flatten",
    "max_pooling1d",
    "max_pooling2d",
]
