"""Which cells have a fused form, and what a cell must offer to have one."""

from __future__ import annotations

import functools
from typing import Any

from gpulayers import ops
from gpulayers.ops import activations

__all__ = ["FusedCell", "Sequence", "gate_name", "is_tanh", "keeps"]


class Sequence:
    """How a whole sequence is run: everything but the data. `mask` is (T, N) or None."""

    __slots__ = ("go_backwards", "mask", "masks", "residual", "zero_output_for_mask")

    def __init__(
        self, mask: Any, zero_output_for_mask: bool, go_backwards: bool, residual: bool, masks: tuple[Any, Any]
    ) -> None:
        self.mask, self.zero_output_for_mask, self.go_backwards = mask, zero_output_for_mask, go_backwards
        self.residual, self.masks = residual, masks

    def settings(self) -> dict[str, Any]:
        """Return the keywords of `recurrent_sequence`."""
        found: dict[str, Any] = {"residual": self.residual}
        if self.mask is not None:
            found.update(mask=self.mask, zero_output_for_mask=self.zero_output_for_mask)
        if self.go_backwards:
            found["go_backwards"] = True
        for name, mask in zip(("input_mask", "recurrent_mask"), self.masks, strict=True):
            if mask is not None:
                found[name] = mask
        return found


class FusedCell:
    """A cell with fused operations. States are flat lists in the order of its `state_size`."""

    def fuses(self) -> bool:
        """Say whether the fused operations compute what `call` does: its settings allow it, no subclass changed it."""
        return keeps(self, "call") and self._settings_fuse()

    def _settings_fuse(self) -> bool:
        """Say whether activations and options have a fused form."""
        return False

    def advance(self, inputs: Any, state: Any, training: Any, residual: bool) -> tuple[Any, Any]:
        """Compute one step, adding `inputs` to the output if `residual`. State in, state out: in the cell's layout."""
        raise TypeError(f"{type(self).__name__}: has no fused step.")

    def run_sequence(self, x: Any, states: list[Any], how: Sequence) -> tuple[Any, list[Any]]:
        """Run the cell over `x` (T, N, D) from `states`; return the outputs (T, N, U) and the last states."""
        raise TypeError(f"{type(self).__name__}: has no fused sequence.")

    def sequence_masks(self, x: Any, states: list[Any], training: Any) -> tuple[Any, Any]:
        """Draw the dropout masks of one layer call; (None, None) for cells without dropout."""
        return None, None


_FORMS = ("run_sequence", "_fused_form", "_fused_cells")


def keeps(cell: Any, *methods: str) -> bool:
    """Say whether the fused form of a cell stands for these methods of it: no subclass changed one of them.

    A class that gives a fused form answers for what it inherits and overrides; a subclass that overrides a method gives
    a form anew or has none.
    """
    kind: Any = type(cell)
    return _class_keeps(kind, methods)


@functools.lru_cache(maxsize=4096)
def _class_keeps(kind: Any, methods: tuple[str, ...]) -> bool:
    for one in kind.__mro__:
        found = vars(one)
        if any(form in found for form in _FORMS):
            return True
        if any(method in found for method in methods):
            return False
    return True


def is_tanh(activation: Any) -> bool:
    """Say whether an activation is the one that the fused operations have built in."""
    return activation is ops.tanh


def gate_name(activation: Any) -> str | None:
    """Return the name of a gate function with a fused form, None for others."""
    if activation is activations.sigmoid:
        return "sigmoid"
    return "hard_sigmoid" if activation is activations.hard_sigmoid else None
