"""Functions, recurrent cells of both families, their wrappers, and the loops they run in: ``tf.nn``."""

import importlib as _importlib
from typing import Any as _Any

from gpulayers.ops.aliases import NN as _NN

globals().update(_NN)  # gl.nn.relu, gl.nn.conv2d and so on, see gpulayers.ops.aliases

_LATER = {
    "batch_normalization": "gpulayers.nn.batch_norm",
    "RNNCellDeviceWrapper": "gpulayers.nn.wrappers",
    "RNNCellDropoutWrapper": "gpulayers.nn.wrappers",
    "RNNCellResidualWrapper": "gpulayers.nn.wrappers",
    "dynamic_rnn": "gpulayers.nn.unrolled",
    "static_rnn": "gpulayers.nn.unrolled",
}


def __getattr__(name: str) -> _Any:
    if name in _LATER:  # half of the package's import time, and not every program has recurrent cells
        return getattr(_importlib.import_module(_LATER[name]), name)
    if name in ("batch_norm", "rnn_cell"):
        return _importlib.import_module(f"gpulayers.nn.{name}")
    raise AttributeError(f"module 'gpulayers.nn' has no attribute {name!r}")
