"""What both dropout wrappers compute: dropped inputs, states and outputs of a cell."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from numbers import Real
from typing import Any

from gpulayers import nest, ops
from gpulayers.dtypes import as_dtype
from gpulayers.errors import message
from gpulayers.nn.states import LSTMStateTuple, size_of
from gpulayers.trace import active_replays

__all__ = ["DropoutSettings", "default_filter"]


def default_filter(substate: Any) -> Any:
    """Say which parts of a state are dropped: all but `c` of an `LSTMStateTuple`."""
    return LSTMStateTuple(c=False, h=True) if isinstance(substate, LSTMStateTuple) else True


class DropoutSettings:
    """Probabilities of keeping, seeds, and the fixed noise of variational dropout."""

    def __init__(
        self, name: str, input_keep_prob: Any, output_keep_prob: Any, state_keep_prob: Any, variational: bool,
        input_size: Any, dtype: Any, seed: int | None, state_filter: Callable[[Any], Any] | None, cell: Any,
    ) -> None:  # fmt: skip
        self.keep = {"input": input_keep_prob, "state": state_keep_prob, "output": output_keep_prob}
        for kind, probability in self.keep.items():
            if isinstance(probability, Real) and not 0 <= float(probability) <= 1:
                raise ValueError(message(name, f"{kind}_keep_prob is not a probability", "0 to 1", probability))
        if state_filter is not None and not callable(state_filter):
            raise TypeError(message(name, "dropout_state_filter_visitor is not callable", got=repr(state_filter)))
        self.seed, self.state_filter = seed, state_filter or default_filter
        self.noise: dict[str, Any] = {}
        self._drawn: dict[tuple[str, int], int] = {}
        if variational:
            self._draw_noise(name, input_size, dtype, cell)

    def _draw_noise(self, name: str, input_size: Any, dtype: Any, cell: Any) -> None:
        if dtype is None:
            raise ValueError(message(name, "When variational_recurrent=True, dtype must be provided"))
        sizes = {"state": cell.state_size, "output": cell.output_size}
        if self._acts("input"):
            if input_size is None:
                raise ValueError(
                    message(name, "When variational_recurrent=True and inputs are dropped, input_size is needed")
                )
            sizes["input"] = input_size
        for kind, size in sizes.items():
            leaves = nest.flatten(size)
            self.noise[kind] = [
                ops.random_uniform(
                    (1, *size_of(one)), dtype=as_dtype(dtype), seed=self._seed_of(f"recurrent_{kind}", index)
                )
                for index, one in enumerate(leaves)
            ]

    def _acts(self, kind: str) -> bool:
        probability = self.keep[kind]
        return not isinstance(probability, Real) or probability < 1

    def _seed_of(self, kind: str, index: int) -> int | None:
        if self.seed is None:
            return None
        text = f"{self.seed}{kind}_{index}"
        return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) & 0x7FFFFFFF

    def _next_seed(self, kind: str, index: int) -> int | None:
        """Return the seed of the next draw: that of the tensor first, then others that follow from it."""
        seed = self._seed_of(kind, index)
        if seed is None:
            return None
        if (replays := active_replays()) is not None:
            replays.refuse("a dropout wrapper has a seed, so each mask comes from a seed that the host counts")
        count = self._drawn.get((kind, index), 0)
        self._drawn[kind, index] = count + 1
        return (seed + 0x9E3779B1 * count) & 0x7FFFFFFF  # a seeded draw starts its generator anew at every step

    def _drop_one(self, kind: str, index: int, value: Any) -> Any:
        keep, fixed = self.keep[kind], self.noise.get(kind)
        known = isinstance(keep, Real)
        if known and not keep:
            return ops.zeros_like(value)
        if known and fixed is None:
            return ops.dropout(value, 1 - keep, seed=self._next_seed(kind, index))
        if fixed is None:
            noise = ops.random_uniform(ops.shape_of(value), dtype=value.dtype, seed=self._next_seed(kind, index))
        else:
            noise = fixed[index]
        kept = ops.floor(noise + ops.cast(keep, noise.dtype))
        return value / ops.cast(keep, value.dtype) * ops.cast(kept, value.dtype)

    def drop(self, kind: str, values: Any) -> Any:
        """Drop every leaf of inputs or outputs."""
        if not self._acts(kind):
            return values
        leaves = nest.flatten(values)
        return nest.pack_sequence_as(values, [self._drop_one(kind, i, v) for i, v in enumerate(leaves)])

    def drop_state(self, state: Any) -> Any:
        """Drop the parts of a state that the filter names."""
        if not self._acts("state"):
            return state
        chosen = nest.flatten(self._chosen(state, True))
        leaves = nest.flatten(state)
        dropped = [
            self._drop_one("state", i, v) if c else v for i, (v, c) in enumerate(zip(leaves, chosen, strict=True))
        ]
        return nest.pack_sequence_as(state, dropped)

    def _chosen(self, state: Any, wanted: Any) -> Any:
        """Return the structure of `state` with True where a leaf is dropped."""
        verdict = wanted and self.state_filter(state)
        if not nest.is_nested(state):
            return bool(verdict)
        children = nest.flatten(verdict) if nest.is_nested(verdict) else [verdict] * len(state)
        parts = [state[key] for key in state] if isinstance(state, dict) else list(state)
        return [self._chosen(part, child) for part, child in zip(parts, children, strict=True)]

    def around(self, inputs: Any, state: Any, cell: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Run `cell` with dropped inputs; drop its new state and output."""
        output, new_state = cell(self.drop("input", inputs), state)
        return self.drop("output", output), self.drop_state(new_state)
