"""Functions and recurrent cells under TensorFlow's names: ``tf.nn``. This file only names things."""

from gpulayers.ops.aliases import NN as _NN

globals().update(_NN)
