"""Worked cases recorded from TensorFlow 2.15.1: where they are and how a test walks over them.

`examples.*` came with the behaviour reference; `more.*` is written by `generate.py`. Both have one schema: a JSON list
of cases, each naming its arrays, and an `.npz` holding them under ``case name/array name``. bfloat16 arrays are stored
as float32 (a case's `stored_as` says so) and handed out as float32 here; `config["input_dtype"]` has the real dtype.

    from tests.reference.cases import cases, case

    @pytest.mark.parametrize("case", cases("batch_normalization"), ids=str)
    def test_case(case): ...
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
SETS = ("examples", "more")

# Recorded behaviour that the contract contradicts. The data stays, so that the difference can be shown.
_UNROLLED_BACKWARDS = (
    "unrolled backwards, the reference zeroes outputs by the mask in input order; its own loop, which unrolling must "
    "agree with, by the mask in processing order"
)
EXCLUDED: dict[str, str] = {
    **{f"rnn_pair_{number:03d}": _UNROLLED_BACKWARDS for number in (5, 26, 37, 48, 52)},
    "bn_training_tensor_virtual": (
        "the reference makes the whole batch one group when training is a tensor; the page promises sub-batches"
    ),
}


@dataclass(frozen=True)
class Case:
    """One recorded case; `arrays` maps the names listed in `kinds()` to host arrays."""

    name: str
    kind: str
    mode: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(repr=False)
    expect: Any = None
    tolerance: float = 0.0
    notes: str = ""
    stored_as: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def with_prefix(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays whose names start with `prefix`, under the rest of the name, in recorded order."""
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    def numbered(self, prefix: str) -> list[np.ndarray]:
        """Return the arrays `prefix0`, `prefix1`, ... in order."""
        found = []
        while f"{prefix}{len(found)}" in self.arrays:
            found.append(self.arrays[f"{prefix}{len(found)}"])
        return found


@functools.cache
def _stored(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def _load() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name in SETS:
        if not (DATA / f"{name}.json").exists():
            continue
        with np.load(DATA / f"{name}.npz") as stored:
            for entry in _stored(name)["cases"]:
                entry = {key: value for key, value in entry.items() if key != "section"}
                entry["arrays"] = {array: stored[spec["key"]] for array, spec in entry["arrays"].items()}
                if entry["name"] in found:
                    raise ValueError(f"{entry['name']}: the name is taken twice in {DATA}")
                found[entry["name"]] = Case(**entry)
    for case in found.values():
        for array in case.arrays.values():
            array.setflags(write=False)
    return found


def kinds() -> dict[str, str]:
    """Return what each kind of case means, in words."""
    found: dict[str, str] = {}
    for name in SETS:
        if (DATA / f"{name}.json").exists():
            found.update(_stored(name)["kinds"])
    return found


def residual_function(
    text: str | None, concatenate: Callable[[list[Any], int], Any]
) -> Callable[[Any, Any], Any] | None:
    """Return the function that a recurrent case's `config["residual_fn"]` describes, None for the default one."""
    return {
        None: None,
        "0.5*inputs - outputs": lambda inputs, outputs: 0.5 * inputs - outputs,
        "inputs * outputs": lambda inputs, outputs: inputs * outputs,
        "concat([inputs, 2*outputs], -1)": lambda inputs, outputs: concatenate([inputs, 2 * outputs], -1),
    }[text]


def case(name: str) -> Case:
    """Return one case by its name, an excluded one too."""
    return _load()[name]


def cases(
    kind: str | None = None, *, where: Callable[[Case], bool] | None = None, excluded: bool = False
) -> list[Case]:
    """Return the cases of one kind (or all), those in `EXCLUDED` only if asked for."""
    return [
        found
        for found in _load().values()
        if (kind is None or found.kind == kind)
        and (excluded or found.name not in EXCLUDED)
        and (where is None or where(found))
    ]
