"""Functions, recurrent cells of both families, their wrappers, and the loops they run in: ``tf.nn``."""

from gpulayers.ops.aliases import NN as _NN

globals().update(_NN)  # gl.nn.relu, gl.nn.conv2d and so on, see gpulayers.ops.aliases
