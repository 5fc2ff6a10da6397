"""Every operation: forward, dtype, shape rule and gradients, eagerly, under a tape and in a graph.

The truth is NumPy or SciPy for values, and central differences along a random direction for gradients, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpulayers import ops
from gpulayers.device import is_array
from gpulayers.ops.operation import OPERATIONS, Operation
from gpulayers.trace import GradientTape, Graph, Session, gradients, placeholder
from tests.ops.cases import Case
from tests.ops.network_cases import CASES
from tests.ops.test_random import DRAWS

STEP = 1e-6

# Families whose truth needs tests of their own kind, and the file under tests/ that holds them.
ELSEWHERE = {
    "batch_norm": "layers/test_batch_normalization_cases.py",
    "batch_norm_second": "ops/test_batch_norm_second_order.py",
    "random": "ops/test_random.py",
    "recurrent": "ops/test_recurrent_arrays.py",
    "residual": "kernels/test_residual.py",
}


def listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, list | tuple) else [result]


def floating(case: Case) -> list[int]:
    return [i for i, a in enumerate(case.arrays) if a.dtype.kind == "f"]


def parametrize(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[f"{c.id}#{i}" for i, c in enumerate(cases)])


@parametrize(CASES)
def test_forward_and_dtype(case: Case) -> None:
    before = [a.copy() for a in case.arrays]
    results = listed(case.call(*case.arrays))
    truths = listed(case.reference(*case.arrays))
    assert len(results) == len(truths)
    for result, truth in zip(results, truths, strict=True):
        assert is_array(result)
        assert result.shape == np.shape(truth)
        assert result.dtype == np.asarray(truth).dtype
        np.testing.assert_allclose(result, truth, rtol=case.tolerance, atol=case.tolerance)
    for array, copy in zip(case.arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)  # nothing writes into its inputs


def weights(case: Case) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.standard_normal(np.shape(y)) for y in listed(case.call(*case.arrays))]


def weighted_sum(case: Case, arrays: Any, cotangents: list[np.ndarray]) -> Any:
    return sum(ops.sum(y * u) for y, u in zip(listed(case.call(*arrays)), cotangents, strict=True))


def tape_gradients(case: Case, arrays: Any, cotangents: list[np.ndarray]) -> list[Any]:
    with GradientTape() as tape:
        values = list(arrays)
        watched = []
        for index in floating(case):
            values[index] = tape.watch(values[index])
            watched.append(values[index])
        target = weighted_sum(case, values, cotangents)
    return tape.gradient(target, watched, unconnected_gradients="zero")


def directions(case: Case) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.standard_normal(case.arrays[i].shape) for i in floating(case)]


def shifted(case: Case, along: list[np.ndarray], step: float) -> list[np.ndarray]:
    arrays = list(case.arrays)
    for index, direction in zip(floating(case), along, strict=True):
        arrays[index] = np.asarray(arrays[index] + step * direction)
    return arrays


@parametrize([c for c in CASES if c.first])
def test_gradient_against_differences(case: Case) -> None:
    cotangents, along = weights(case), directions(case)
    grads = tape_gradients(case, case.arrays, cotangents)
    for index, gradient in zip(floating(case), grads, strict=True):
        assert is_array(gradient)
        assert (gradient.shape, gradient.dtype) == (case.arrays[index].shape, case.arrays[index].dtype)
    slope = sum(float(np.sum(g * v)) for g, v in zip(grads, along, strict=True))
    ends = [float(weighted_sum(case, shifted(case, along, s), cotangents)) for s in (STEP, -STEP)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * STEP), rtol=2e-6, atol=1e-7)


def directional(case: Case, arrays: Any, cotangents: list[np.ndarray], along: list[np.ndarray]) -> Any:
    grads = tape_gradients(case, arrays, cotangents)
    return sum(ops.sum(g * v) for g, v in zip(grads, along, strict=True))


@parametrize([c for c in CASES if c.first and c.second])
def test_gradient_of_gradient(case: Case) -> None:
    cotangents, along = weights(case), directions(case)
    with GradientTape() as tape:
        values = list(case.arrays)
        watched = []
        for index in floating(case):
            values[index] = tape.watch(values[index])
            watched.append(values[index])
        slope = directional(case, values, cotangents, along)
    if is_array(slope):  # linear: the gradient does not depend on the inputs
        second = [np.zeros(case.arrays[i].shape) for i in floating(case)]
    else:
        second = tape.gradient(slope, watched, unconnected_gradients="zero")
    other = list(reversed(directions(case))) if len(along) == 1 else along
    curve = sum(float(np.sum(g * v)) for g, v in zip(second, other, strict=True))
    ends = [float(np.asarray(directional(case, shifted(case, other, s), cotangents, along))) for s in (STEP, -STEP)]
    np.testing.assert_allclose(curve, (ends[0] - ends[1]) / (2 * STEP), rtol=5e-6, atol=1e-6)


def compatible(static: Any, shape: tuple[int, ...]) -> bool:
    if static.rank is None:
        return True
    sizes = tuple(static)
    return len(sizes) == len(shape) and all(a is None or a == b for a, b in zip(sizes, shape, strict=True))


@pytest.mark.parametrize("known", [True, False], ids=["sizes known", "sizes unknown"])
@parametrize(CASES)
def test_graph(case: Case, known: bool) -> None:
    truths = listed(case.call(*case.arrays))
    cotangents = weights(case) if case.first else []
    with Graph().as_default():
        inputs = []
        for array in case.arrays:
            shape = array.shape if known else tuple(None if i == 0 else n for i, n in enumerate(array.shape))
            inputs.append(placeholder(array.dtype, shape))
        feeds = dict(zip(inputs, case.arrays, strict=True))
        try:
            outputs = listed(case.call(*inputs))
        except ValueError as error:
            if not known and "unknown" in str(error):
                return  # said so, in words: the operation needs this size now
            raise
        for output, truth in zip(outputs, truths, strict=True):
            assert output.dtype == truth.dtype
            assert compatible(output.shape, truth.shape), (output.shape, truth.shape)
            if known and case.static:
                assert output.shape.is_fully_defined()
        sources = [inputs[i] for i in floating(case)] if case.first else []
        target = weighted_sum(case, inputs, cotangents) if case.first else None
        slopes = [g for g in gradients(target, sources)] if sources else []
        with Session() as session:
            values, grads = session.run((outputs, [g for g in slopes if g is not None]), feeds)
    for value, truth in zip(values, truths, strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-13, atol=1e-13)
    if sources:
        wanted = tape_gradients(case, case.arrays, cotangents)
        present = [w for w, g in zip(wanted, slopes, strict=True) if g is not None]
        for value, truth in zip(grads, present, strict=True):
            np.testing.assert_allclose(value, truth, rtol=1e-12, atol=1e-12)


def test_every_operation_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that no case runs, forwards or through a gradient, fails here."""
    seen: set[str] = set()
    run = Operation.run

    def watching(self: Operation, inputs: Any, attributes: Any) -> Any:
        seen.add(self.name)
        return run(self, inputs, attributes)

    monkeypatch.setattr(Operation, "run", watching)
    for case in CASES:
        case.call(*case.arrays)
        if case.first:
            cotangents, along = weights(case), directions(case)
            with GradientTape() as tape:
                values = [tape.watch(a) if a.dtype.kind == "f" else a for a in case.arrays]
                slope = directional(case, values, cotangents, along)
            if case.second and not is_array(slope):
                tape.gradient(slope, [values[i] for i in floating(case)])
    for draw in DRAWS.values():
        draw((2,))
    for case in CASES:
        if not case.static:
            test_graph(case, known=False)
    with Graph().as_default():
        unknown = placeholder("float64", (None, None))
        target = ops.sum(ops.mean(unknown, 0))
        gradient = gradients(target, [unknown])
        with Session() as session:
            session.run(gradient, {unknown: np.ones((2, 3))})
    here = Path(__file__).parent.parent
    missing = []
    for name, operation in OPERATIONS.items():
        room, _, family = operation.forward.__module__.rpartition(".")
        covered = name in seen or (family in ELSEWHERE and (here / ELSEWHERE[family]).exists())
        if room == "gpulayers.ops" and not covered:
            missing.append(name)
    assert not missing
    assert len(seen) > 100
