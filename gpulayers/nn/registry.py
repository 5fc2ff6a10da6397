"""Cells by name, for configurations."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from gpulayers import serialization
from gpulayers.errors import message

__all__ = ["cell_config", "find_function", "function_config", "is_modern_lstm", "make_cell", "register_cells"]

_MODERN: dict[str, type] = {}
_MODULES = ("cells_modern", "cells_legacy", "stacked", "wrappers", "wrappers_legacy")


def register_cells(*classes: type, legacy: bool = False) -> None:
    """Make cell classes known to `make_cell`: modern ones by name, legacy ones, whose names are taken, as
    ``nn.rnn_cell>Name``.
    """
    for one in classes:
        if legacy:
            serialization.register_serializable("nn.rnn_cell")(one)
        else:
            _MODERN[one.__name__] = one


def cell_config(cell: Any) -> Any:
    """Return ``{"class_name", "config"}`` of a cell (and the registered name of classes that need it)."""
    if not hasattr(cell, "get_config"):
        raise NotImplementedError(message(type(cell).__name__, "has no get_config, so it cannot be written as data"))
    config = {"class_name": type(cell).__name__, "config": cell.get_config()}
    registered = serialization.registered_name(type(cell))
    return {**config, "registered_name": registered} if registered else config


def make_cell(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Make the cell of a configuration; a live cell is returned as it is."""
    if hasattr(config, "call"):
        return config
    for name in _MODULES:  # our own cells, all of them: not what the configuration asks for
        importlib.import_module(f"gpulayers.nn.{name}")
    with serialization.custom_object_scope(custom_objects or {}):
        return serialization.deserialize(config, custom_objects, _MODERN, "cell")


def function_config(function: Any) -> Any:
    """Return what stands for a function in a configuration: its registered name, or the function where it has none."""
    return serialization.registered_name(function) or function


def find_function(function: Any, what: str, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Return the function that stands in a configuration as itself or by its name. ValueError for an unknown name."""
    return serialization.find(function, custom_objects, what=what) if isinstance(function, str) else function


def is_modern_lstm(cell: Any) -> bool:
    """Say whether a cell is the modern LSTMCell."""
    return "LSTMCell" in _MODERN and isinstance(cell, _MODERN["LSTMCell"])
