"""Exception types, and the one form that every message takes.

Every type here also subclasses the built-in that TensorFlow programs catch (``ValueError``, ``TypeError``,
``RuntimeError``), so ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "GradientError",
    "GraphError",
    "KernelError",
    "LayerError",
    "NotBuiltError",
    "ShapeError",
    "StateError",
    "StructureError",
    "UninitializedError",
    "message",
]


def message(name: str, wrong: str, expected: object = None, got: object = None, do: str = "") -> str:
    """Format an error text: what is wrong, what was expected, what came, and what to do.

    Parameters: `name` of the layer or operation; `wrong`, a clause without a final stop; `expected` and `got`, shown
    with ``str``; `do`, a sentence.

    >>> message("dense", "rank is too low", "at least 2", 1, "Add a batch axis.")
    'dense: rank is too low. Expected at least 2; got 1. Add a batch axis.'
    >>> message("dense", "not built")
    'dense: not built.'
    """
    text = f"{name}: {wrong}."
    if expected is not None and got is not None:
        text += f" Expected {expected}; got {got}."
    elif expected is not None:
        text += f" Expected {expected}."
    elif got is not None:
        text += f" Got {got}."
    return f"{text} {do}" if do else text


class ShapeError(ValueError):
    """A shape, rank, axis or size does not fit."""


class DTypeError(TypeError):
    """A dtype is unknown, not supported here, or not the one required."""


class StructureError(ValueError):
    """Two nested structures differ."""


class DeviceError(TypeError):
    """Host and device arrays are mixed, or a device is asked for that cannot be used."""


class GraphError(ValueError):
    """A graph is used wrongly: a foreign tensor is fetched, a feed is missing, a name is not legal."""


class GradientError(RuntimeError, ValueError):
    """A gradient cannot be computed: nothing was recorded, a value changed since, or an operation has no rule."""


class UninitializedError(RuntimeError):
    """A variable of a graph is read before it was given its initial value."""


class NotBuiltError(ValueError):
    """A layer is asked for something that exists only after it was built."""


class LayerError(ValueError):
    """A layer's contract is broken: `call` returned nothing, variables were created too late, and so on."""


class StateError(RuntimeError):
    """A method is not available in the mode the program runs in (eager, tape or graph)."""


class KernelError(RuntimeError):
    """A CUDA kernel cannot be found, compiled or launched."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign, or does not match the variables."""
