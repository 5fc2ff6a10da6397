"""Arrays by name, through files: how a row's data and results pass between the report and a peer's own Python.

NumPy's file format is the same in every version of NumPy that a peer may need; bfloat16, which it does not know, is
written as 16-bit integers. Nothing here may import more than NumPy: both sides use it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["load", "save"]


def _save_one(path: Path, array: np.ndarray) -> str:
    name = array.dtype.name
    np.save(path, array.view(np.uint16) if name == "bfloat16" else array)
    return name


def _load_one(path: Path, dtype: str) -> np.ndarray:
    array = np.load(path)
    if dtype != "bfloat16":
        return array
    import ml_dtypes

    return array.view(ml_dtypes.bfloat16)


def save(folder: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    """Write arrays, or lists of arrays, into `folder`; return what `load` needs: the dtypes by name."""
    return _for_each(folder, arrays, _save_one)


def load(folder: Path, dtypes: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays that `save` wrote."""
    return _for_each(folder, dtypes, _load_one)


def _for_each(folder: Path, values: dict[str, Any], work: Callable[[Path, Any], Any]) -> dict[str, Any]:
    """Return what `work` makes of each array's file and value, in the structure of `values`."""
    return {
        name: [work(folder / f"{name}.{i}.npy", part) for i, part in enumerate(value)]
        if isinstance(value, list)
        else work(folder / f"{name}.npy", value)
        for name, value in values.items()
    }
