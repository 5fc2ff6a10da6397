"""Turning objects into data and back: ``tf.keras.utils``."""

from gpulayers.serialization import custom_object_scope as custom_object_scope
from gpulayers.serialization import deserialize as deserialize
from gpulayers.serialization import register_serializable as register_keras_serializable
from gpulayers.serialization import register_serializable as register_serializable
from gpulayers.serialization import serialize as serialize
from gpulayers.serialization import to_json as to_json

__all__ = [
    "custom_object_scope",
    "deserialize",
    "register_keras_serializable",
    "register_serializable",
    "serialize",
    "to_json",
]
