"""GRU and LSTM of ``tf.compat.v1.keras.layers``: the modern cells and layers with the defaults of TensorFlow 1."""

from __future__ import annotations

from typing import Any

from gpulayers.nn import cells_modern, rnn_layers

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell"]


class GRUCell(cells_modern.GRUCell):
    """`gl.keras.layers.GRUCell` with ``recurrent_activation="hard_sigmoid"`` and ``reset_after=False``.

    `implementation` only stands in the configuration: both compute the same, here by the same operations.

    >>> import gpulayers as gl
    >>> cell = gl.compat.v1.keras.layers.GRUCell(2)
    >>> cell.get_config()["recurrent_activation"], cell.reset_after, cell.implementation
    ('hard_sigmoid', False, 1)
    """

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "hard_sigmoid",
        *arguments: Any,
        reset_after: bool = False,
        implementation: int = 1,
        **kwargs: Any,
    ) -> None:
        kwargs["reset_after"] = reset_after
        super().__init__(units, activation, recurrent_activation, *arguments, **kwargs)
        self.implementation = implementation


class LSTMCell(cells_modern.LSTMCell):
    """`gl.keras.layers.LSTMCell` with ``recurrent_activation="hard_sigmoid"``.

    `implementation` only stands in the configuration: both compute the same, here by the same operations.

    >>> import gpulayers as gl
    >>> gl.compat.v1.keras.layers.LSTMCell(2).get_config()["recurrent_activation"]
    'hard_sigmoid'
    """

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "hard_sigmoid",
        *arguments: Any,
        implementation: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, activation, recurrent_activation, *arguments, **kwargs)
        self.implementation = implementation


class GRU(rnn_layers.GRU):
    """`RNN` over the `GRUCell` of this module: takes the arguments of both.

    >>> import gpulayers as gl
    >>> gl.compat.v1.keras.layers.GRU(4).reset_after
    False
    """

    _cell_class = GRUCell


class LSTM(rnn_layers.LSTM):
    """`RNN` over the `LSTMCell` of this module: takes the arguments of both.

    >>> import gpulayers as gl
    >>> gl.compat.v1.keras.layers.LSTM(4).get_config()["recurrent_activation"]
    'hard_sigmoid'
    """

    _cell_class = LSTMCell
