"""Recurrent steps and sequences on plain arrays, host or device: one signature, two bodies.

NumPy arrays run `recurrent.lstm`, `recurrent.gru` and `recurrent.simple`, where the parameters and results are
described; device arrays run `recurrent.device` with the same plan and the gate kernels of ``kernels/recurrent.cu``.
What a forward function saves belongs to its own backward function and is never read by anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from gpulayers.device import array_module
from gpulayers.ops.recurrent import device as recurrent_device
from gpulayers.ops.recurrent import gru as recurrent_gru
from gpulayers.ops.recurrent import lstm as recurrent_lstm
from gpulayers.ops.recurrent import simple as recurrent_simple
from gpulayers.ops.recurrent.common import mask_from_lengths
from gpulayers.ops.recurrent.gru import legacy_gru_gradients, legacy_gru_weights
from gpulayers.ops.recurrent.lstm import GATE_ORDERS

__all__ = [
    "GATE_ORDERS",
    "gru_sequence",
    "gru_sequence_backward",
    "gru_step",
    "gru_step_backward",
    "legacy_gru_gradients",
    "legacy_gru_weights",
    "lstm_sequence",
    "lstm_sequence_backward",
    "lstm_step",
    "lstm_step_backward",
    "mask_from_lengths",
    "simple_rnn_sequence",
    "simple_rnn_sequence_backward",
    "simple_rnn_step",
    "simple_rnn_step_backward",
]


def _for_host_and_device(host_module: ModuleType, name: str) -> Callable[..., Any]:
    """Make the function that calls `name` of `host_module` for NumPy arrays, of `recurrent.device` for others."""
    host, device = getattr(host_module, name), getattr(recurrent_device, name)

    @functools.wraps(host)
    def call(*arrays: Any, **keywords: Any) -> Any:
        # The weights are the last positional arrays of every function; cotangents before them may be None.
        known = [array for array in arrays if array is not None and not isinstance(array, tuple)]
        return (host if array_module(*known) is np else device)(*arrays, **keywords)

    return call


lstm_step = _for_host_and_device(recurrent_lstm, "lstm_step")
lstm_step_backward = _for_host_and_device(recurrent_lstm, "lstm_step_backward")
lstm_sequence = _for_host_and_device(recurrent_lstm, "lstm_sequence")
lstm_sequence_backward = _for_host_and_device(recurrent_lstm, "lstm_sequence_backward")
gru_step = _for_host_and_device(recurrent_gru, "gru_step")
gru_step_backward = _for_host_and_device(recurrent_gru, "gru_step_backward")
gru_sequence = _for_host_and_device(recurrent_gru, "gru_sequence")
gru_sequence_backward = _for_host_and_device(recurrent_gru, "gru_sequence_backward")
simple_rnn_step = _for_host_and_device(recurrent_simple, "simple_rnn_step")
simple_rnn_step_backward = _for_host_and_device(recurrent_simple, "simple_rnn_step_backward")
simple_rnn_sequence = _for_host_and_device(recurrent_simple, "simple_rnn_sequence")
simple_rnn_sequence_backward = _for_host_and_device(recurrent_simple, "simple_rnn_sequence_backward")
