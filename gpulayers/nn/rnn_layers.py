"""SimpleRNN, GRU and LSTM: a layer over its own cell, as ``tf.keras.layers``."""

from __future__ import annotations

from typing import Any

from gpulayers import regularizers
from gpulayers.nn.cells_modern import GRUCell, LSTMCell, SimpleRNNCell
from gpulayers.nn.rnn_layer import RNN

__all__ = ["GRU", "LSTM", "SimpleRNN"]

_LAYER = (
    "return_sequences", "return_state", "go_backwards", "stateful", "unroll", "time_major", "zero_output_for_mask",
    "name", "trainable", "dtype", "activity_regularizer", "batch_input_shape", "input_shape", "input_dim", "batch_size",
    "dynamic", "weights", "autocast",
)  # fmt: skip


class _CellLayer(RNN):
    """A layer that makes its cell from its own arguments; they can be read on it as on the cell."""

    _cell_class: Any

    def __init__(self, units: int, *args: Any, **kwargs: Any) -> None:
        layer = {key: kwargs.pop(key) for key in _LAYER if key in kwargs}
        shared = {key: layer[key] for key in ("dtype", "trainable") if key in layer}
        super().__init__(self._cell_class(units, *args, **shared, **kwargs), **layer)

    def __getattr__(self, name: str) -> Any:
        cell = self.__dict__.get("cell")
        if cell is None or name.startswith("_") or name not in cell.get_config():
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(cell, name)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the layer and of its cell in one dictionary."""
        own = super().get_config()
        del own["cell"]
        own["activity_regularizer"] = regularizers.serialize(self.activity_regularizer)
        return {**self.cell.get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make the layer from the dictionary of `get_config`."""
        return cls(**config)


class SimpleRNN(_CellLayer):
    """`RNN` over a `SimpleRNNCell`: takes the arguments of both.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.SimpleRNN(4)(np.zeros((2, 3, 5), "float32")).shape
    (2, 4)
    """

    _cell_class = SimpleRNNCell


class GRU(_CellLayer):
    """`RNN` over a `GRUCell`: takes the arguments of both.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.GRU(4, return_sequences=True)(np.zeros((2, 3, 5), "float32")).shape
    (2, 3, 4)
    """

    _cell_class = GRUCell


class LSTM(_CellLayer):
    """`RNN` over an `LSTMCell`: takes the arguments of both.

    >>> import numpy as np, gpulayers as gl
    >>> output, h, c = gl.keras.layers.LSTM(4, return_state=True)(np.zeros((2, 3, 5), "float32"))
    >>> output.shape, h.shape, c.shape
    ((2, 4), (2, 4), (2, 4))
    """

    _cell_class = LSTMCell
