"""Dtype policies: ``tf.keras.mixed_precision``."""

from gpulayers.dtypes import Policy as Policy
from gpulayers.dtypes import global_policy as global_policy
from gpulayers.dtypes import set_global_policy as set_global_policy

__all__ = [
    "Policy",
    "global_policy",
    "set_global_policy",
]
