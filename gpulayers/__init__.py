"""Layers on CuPy arrays with the contract of ``tf.layers``, and on NumPy arrays where there is no GPU.

What ``tf.layers`` programs use stands here under TensorFlow's names: ``import gpulayers as tf`` runs them. This file
only names things. Importing it touches no driver; the modern family, optimizers and the v1 face are loaded when they
are asked for.
"""

from __future__ import annotations

import importlib as _importlib
from types import SimpleNamespace as _Namespace
from typing import Any as _Any

from gpulayers import constraints as constraints
from gpulayers import errors as errors
from gpulayers import initializers as initializers
from gpulayers import layers as layers
from gpulayers import nest as nest
from gpulayers import nn as nn
from gpulayers import ops as ops
from gpulayers import regularizers as regularizers
from gpulayers.cuda_graph import cuda_graph as cuda_graph
from gpulayers.device import Device as Device
from gpulayers.device import array_module as array_module
from gpulayers.device import asarray as asarray
from gpulayers.device import asnumpy as asnumpy
from gpulayers.device import current_device as current_device
from gpulayers.device import device as device
from gpulayers.device import gpu_available as gpu_available
from gpulayers.device import gpu_unavailable_reason as gpu_unavailable_reason
from gpulayers.device import set_device as set_device
from gpulayers.dtypes import TensorShape as TensorShape
from gpulayers.dtypes import as_dtype as as_dtype
from gpulayers.dtypes import bool_ as bool
from gpulayers.dtypes import bool_ as bool_
from gpulayers.dtypes import complex64 as complex64
from gpulayers.dtypes import complex128 as complex128
from gpulayers.dtypes import float16 as float16
from gpulayers.dtypes import float32 as float32
from gpulayers.dtypes import float64 as float64
from gpulayers.dtypes import int8 as int8
from gpulayers.dtypes import int16 as int16
from gpulayers.dtypes import int32 as int32
from gpulayers.dtypes import int64 as int64
from gpulayers.dtypes import uint8 as uint8
from gpulayers.dtypes import uint16 as uint16
from gpulayers.dtypes import uint32 as uint32
from gpulayers.dtypes import uint64 as uint64
from gpulayers.initializers import constant_initializer as constant_initializer
from gpulayers.initializers import glorot_normal_initializer as glorot_normal_initializer
from gpulayers.initializers import glorot_uniform_initializer as glorot_uniform_initializer
from gpulayers.initializers import ones_initializer as ones_initializer
from gpulayers.initializers import orthogonal_initializer as orthogonal_initializer
from gpulayers.initializers import random_normal_initializer as random_normal_initializer
from gpulayers.initializers import random_uniform_initializer as random_uniform_initializer
from gpulayers.initializers import truncated_normal_initializer as truncated_normal_initializer
from gpulayers.initializers import variance_scaling_initializer as variance_scaling_initializer
from gpulayers.initializers import zeros_initializer as zeros_initializer
from gpulayers.layers.calling import no_state_updates as no_state_updates
from gpulayers.ops.aliases import TOP as _TOP
from gpulayers.ops.clipping import clip_by_global_norm as clip_by_global_norm
from gpulayers.ops.clipping import clip_by_norm as clip_by_norm
from gpulayers.ops.clipping import global_norm as global_norm
from gpulayers.ops.random import set_seed as set_random_seed
from gpulayers.scopes import AUTO_REUSE as AUTO_REUSE
from gpulayers.scopes import VariableScope as VariableScope
from gpulayers.scopes import add_to_collection as add_to_collection
from gpulayers.scopes import add_to_collections as add_to_collections
from gpulayers.scopes import get_collection as get_collection
from gpulayers.scopes import get_collection_ref as get_collection_ref
from gpulayers.scopes import get_variable as get_variable
from gpulayers.scopes import get_variable_scope as get_variable_scope
from gpulayers.scopes import global_variables as global_variables
from gpulayers.scopes import local_variables as local_variables
from gpulayers.scopes import name_scope as name_scope
from gpulayers.scopes import trainable_variables as trainable_variables
from gpulayers.scopes import variable_scope as variable_scope
from gpulayers.trace import GradientTape as GradientTape
from gpulayers.trace import Graph as Graph
from gpulayers.trace import GraphKeys as GraphKeys
from gpulayers.trace import Session as Session
from gpulayers.trace import Tensor as Tensor
from gpulayers.trace import UnconnectedGradients as UnconnectedGradients
from gpulayers.trace import cond as cond
from gpulayers.trace import control_dependencies as control_dependencies
from gpulayers.trace import custom_gradient as custom_gradient
from gpulayers.trace import executing_eagerly as executing_eagerly
from gpulayers.trace import function as function
from gpulayers.trace import get_default_graph as get_default_graph
from gpulayers.trace import get_default_session as get_default_session
from gpulayers.trace import gradients as gradients
from gpulayers.trace import group as group
from gpulayers.trace import no_op as no_op
from gpulayers.trace import placeholder as placeholder
from gpulayers.trace import placeholder_with_default as placeholder_with_default
from gpulayers.trace import reset_default_graph as reset_default_graph
from gpulayers.trace import stop_recording as stop_recording
from gpulayers.variables import PartitionedVariable as PartitionedVariable
from gpulayers.variables import Variable as Variable
from gpulayers.variables import assign as assign
from gpulayers.variables import assign_add as assign_add
from gpulayers.variables import assign_sub as assign_sub
from gpulayers.variables import fixed_size_partitioner as fixed_size_partitioner
from gpulayers.variables import global_variables_initializer as global_variables_initializer
from gpulayers.variables import local_variables_initializer as local_variables_initializer
from gpulayers.variables import variable_axis_size_partitioner as variable_axis_size_partitioner
from gpulayers.variables import variables_initializer as variables_initializer

__version__ = "0.1.0"

globals().update(_TOP)  # gl.reduce_mean, gl.matmul, gl.random_uniform and so on, see gpulayers.ops.aliases

math = _Namespace(**_TOP)
random = _Namespace(
    normal=ops.random_normal,
    set_seed=set_random_seed,
    truncated_normal=ops.truncated_normal,
    uniform=ops.random_uniform,
)

_LATER = {
    "checkpoint": "gpulayers.checkpoint",
    "compat": "gpulayers.compat",
    "data": "gpulayers.data",
    "keras": "gpulayers.keras",
    "losses": "gpulayers.losses",
    "metrics": "gpulayers.metrics",
    "optimizers": "gpulayers.optimizers",
    "train": "gpulayers.compat.v1.train",
}


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _importlib.import_module(_LATER[name])
    if name == "bfloat16":  # a dtype of the optional package ml_dtypes
        return as_dtype("bfloat16")
    raise AttributeError(f"module 'gpulayers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
