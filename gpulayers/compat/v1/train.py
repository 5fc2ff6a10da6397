"""Optimizers, the step counter and checkpoints under the names of ``tf.train``."""

from gpulayers.checkpoint import Saver as Saver
from gpulayers.checkpoint import latest_checkpoint as latest_checkpoint
from gpulayers.optimizers.global_step import create_global_step as create_global_step
from gpulayers.optimizers.global_step import get_global_step as get_global_step
from gpulayers.optimizers.global_step import get_or_create_global_step as get_or_create_global_step
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
    "create_global_step",
    "exponential_decay",
    "get_global_step",
    "get_or_create_global_step",
    "latest_checkpoint",
    "piecewise_constant",
]
