"""What the programs' command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import gpulayers as gl

__all__ = ["choose_device", "positive"]


def positive(kind: type) -> Callable[[str], Any]:
    """Return an argument type for argparse: a number of this kind, above 0.

    >>> positive(int)("3")
    3
    """

    def parse(given: str) -> Any:
        value = kind(given)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {given}")
        return value

    parse.__name__ = kind.__name__
    return parse


def choose_device(program: str, wanted: str | None) -> None:
    """Make the device asked for the default one; end the program with a line where it cannot be used."""
    if wanted is None:
        return
    try:
        gl.set_device(wanted)
    except gl.errors.DeviceError as error:
        raise SystemExit(f"{program}: error: {error}") from error
