"""Automatic names of layers."""

from __future__ import annotations

import re
from typing import Any

from gpulayers.trace import active_graph

__all__ = ["reset_names", "snake_case", "unique_layer_name"]

_eager_counts: dict[str, int] = {}


def snake_case(name: str) -> str:
    """Return a class name as a layer name.

    >>> [snake_case(n) for n in ("Conv2D", "BatchNormalization", "LSTMCell", "HTTPServer2", "_Private")]
    ['conv2d', 'batch_normalization', 'lstm_cell', 'http_server2', 'private__private']
    """
    spaced = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", spaced).lower()
    return f"private{snake}" if snake.startswith("_") else snake


def _counts() -> dict[str, int]:
    graph = active_graph()
    if graph is None or not graph.initializes_variables_in_session:
        return _eager_counts
    counts: dict[str, int] = graph.scope_state.setdefault("layer_names", {})
    return counts


def unique_layer_name(base: str, zero_based: bool) -> str:
    """Return `base` with a number from one counter per graph (eager mode has its own).

    With `zero_based` (modern layers) the first has no number; otherwise (legacy layers) the first is number 1.
    """
    counts = _counts()
    counts[base] = counts.get(base, 0) + 1
    number = counts[base] - 1 if zero_based else counts[base]
    return f"{base}_{number}" if number else base


def reset_names() -> Any:
    """Start counting anew in eager mode."""
    _eager_counts.clear()
