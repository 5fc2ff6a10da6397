"""Initial values of variables, drawn on the host and placed on the default device.

>>> get("glorot_uniform")((2, 3)).shape
(2, 3)
"""

from __future__ import annotations

from typing import Any

from gpulayers import serialization
from gpulayers.initializers import legacy, modern
from gpulayers.initializers.draws import fans as fans
from gpulayers.initializers.legacy import *  # noqa: F403
from gpulayers.initializers.modern import *  # noqa: F403
from gpulayers.initializers.modern import (
    Constant,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Identity,
    LecunNormal,
    LecunUniform,
    Ones,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    VarianceScaling,
    Zeros,
)

__all__ = [*modern.__all__, *legacy.__all__, "deserialize", "fans", "get", "serialize"]

NAMES: dict[str, Any] = {
    "constant": Constant,
    "glorot_normal": GlorotNormal,
    "glorot_uniform": GlorotUniform,
    "he_normal": HeNormal,
    "he_uniform": HeUniform,
    "identity": Identity,
    "lecun_normal": LecunNormal,
    "lecun_uniform": LecunUniform,
    "normal": RandomNormal,
    "one": Ones,
    "ones": Ones,
    "orthogonal": Orthogonal,
    "random_normal": RandomNormal,
    "random_uniform": RandomUniform,
    "truncated_normal": TruncatedNormal,
    "uniform": RandomUniform,
    "variance_scaling": VarianceScaling,
    "zero": Zeros,
    "zeros": Zeros,
    **{name: getattr(modern, name) for name in modern.__all__ if name != "Initializer"},
    **{name: getattr(legacy, name) for name in legacy.__all__},
}


def get(identifier: Any) -> Any:
    """Return the initializer meant by a name, configuration, class or callable; None for None.

    Raises ValueError for an unknown name, a number, an array or a tensor.

    >>> get("zeros").get_config(), get({"class_name": "Constant", "config": {"value": 3}}).value
    ({}, 3)
    """
    if identifier is None or isinstance(identifier, str | dict):
        return deserialize(identifier)
    if callable(identifier):
        return identifier() if isinstance(identifier, type) else identifier
    raise ValueError(
        f"Could not interpret initializer identifier: {identifier!r}. Expected a name, a configuration or a callable."
    )


def deserialize(config: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    """Make an initializer from a name or a configuration."""
    return serialization.deserialize(config, custom_objects, NAMES, "initializer")


serialize = serialization.serialize
