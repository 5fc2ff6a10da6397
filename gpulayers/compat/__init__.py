"""Names of older programs: ``tf.compat``."""

from gpulayers.compat import v1 as v1
