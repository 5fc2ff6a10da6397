"""Optimizers and checkpoints under the names of ``tf.train``."""

from gpulayers.checkpoint import Saver as Saver
from gpulayers.checkpoint import latest_checkpoint as latest_checkpoint
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
    "Saver",
    "exponential_decay",
    "latest_checkpoint",
    "piecewise_constant",
]
