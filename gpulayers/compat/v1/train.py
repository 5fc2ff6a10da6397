"""Optimizers and checkpoints under the names of ``tf.train``."""

from gpulayers.optimizers.legacy import AdamOptimizer as AdamOptimizer
from gpulayers.optimizers.legacy import GradientDescentOptimizer as GradientDescentOptimizer
from gpulayers.optimizers.legacy import LegacyOptimizer as Optimizer
from gpulayers.optimizers.legacy import MomentumOptimizer as MomentumOptimizer
from gpulayers.optimizers.legacy import exponential_decay as exponential_decay
from gpulayers.optimizers.legacy import piecewise_constant as piecewise_constant

__all__ = [
    "AdamOptimizer",
    "GradientDescentOptimizer",
    "MomentumOptimizer",
    "Optimizer",
    "exponential_decay",
    "piecewise_constant",
]
