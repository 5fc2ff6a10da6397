"""Other ways to compute the same rows. A peer that is missing is a skipped column with its reason.

A peer is a module with ``unavailable(on_gpu) -> str`` (empty where it can run), ``version() -> str`` and
``prepare(case, data, on_gpu) -> function or str`` (a string says why it has no such operation). The function returns
results by name, and ``to_numpy(value)`` of the module turns one into a NumPy array in the row's own layout; it waits
for the device. Where a peer keeps another layout, the arrays are converted before the timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from benchmarks.peers.remote import Remote

__all__ = ["NAMES", "Peer", "close", "find", "said"]

NAMES = ("plain", "chainer_style", "torch", "torch_other_layout", "torch_compile", "jax_jit", "tensorflow", "thinc")


class Peer:
    """A peer that can run here, or the reason why it cannot."""

    def __init__(self, name: str, module: Any, reason: str) -> None:
        self.name, self.module, self.reason = name, module, reason


def said(error: Exception) -> str:
    """Return an error as one short line: a skipped entry of the report, with this reason."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def find(
    names: Sequence[str] = NAMES, on_gpu: bool = False, pythons: Mapping[str, str] = MappingProxyType({})
) -> list[Peer]:
    """Return a peer for each name, in order; those in `pythons` run in that Python. Raises ValueError for others."""
    for name in (*names, *pythons):
        if name not in NAMES:
            raise ValueError(f"benchmarks: no such peer. Expected some of {', '.join(NAMES)}; got {name!r}.")
    found = []
    for name in names:
        module: Any = None
        try:
            if name in pythons:
                module = Remote(name, pythons[name])
            else:
                module = importlib.import_module(f"benchmarks.peers.{name}_peer")
            reason = module.unavailable(on_gpu)
        except ImportError as error:
            reason = f"not installed ({error})"
        except Exception as error:  # libraries fail by errors of their own when they look for a GPU
            reason = said(error)
        found.append(Peer(name, None if reason else module, reason))
    return found


def close(found: Sequence[Peer]) -> None:
    """End the processes of peers that have one."""
    for peer in found:
        if isinstance(peer.module, Remote):
            peer.module.close()
