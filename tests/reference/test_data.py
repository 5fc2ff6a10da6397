"""The recorded data is well-formed: every test that walks over it may rely on this."""

import numpy as np
import pytest

from tests.reference import cases as recorded

ALL = recorded.cases(excluded=True)


def test_examples_are_complete():
    counts = {}
    for case in ALL:
        if case.name in {entry["name"] for entry in recorded._stored("examples")["cases"]}:
            counts[case.kind] = counts.get(case.kind, 0) + 1
    assert counts["batch_normalization"] == 51
    assert counts["rnn_cell_step"] + counts["rnn_layer"] + counts["dynamic_rnn"] == 31
    assert sum(counts.values()) == 88


def test_excluded_names_exist():
    assert set(recorded.EXCLUDED) <= {case.name for case in ALL}
    assert all(recorded.EXCLUDED.values())


@pytest.mark.parametrize("name", [name for name in recorded.SETS if (recorded.DATA / f"{name}.json").exists()])
def test_arrays_and_list_agree(name):
    listed = {}
    for entry in recorded._stored(name)["cases"]:
        for array, spec in entry["arrays"].items():
            assert spec["key"] == f"{entry['name']}/{array}"
            listed[spec["key"]] = (spec["shape"], spec["dtype"])
    with np.load(recorded.DATA / f"{name}.npz") as stored:
        assert {key: (list(stored[key].shape), str(stored[key].dtype)) for key in stored.files} == listed


@pytest.mark.parametrize("case", ALL, ids=str)
def test_case_is_usable(case):
    assert case.kind in recorded.kinds()
    assert case.mode in ("graph", "eager")
    assert case.tolerance > 0 or case.expect is not None
    for name, array in case.arrays.items():
        if array.dtype.kind == "f":
            assert np.isfinite(array).all(), name
        assert not array.flags.writeable
    if case.kind == "batch_normalization":
        for step in case.config["steps"]:
            assert case.arrays[step["x"]].shape == case.arrays[step["y"]].shape
        assert len(case.numbered("x")) == len(case.config["steps"])
        assert {name.split(".", 1)[1] for name in case.arrays if name.startswith("after")} == set(
            case.with_prefix("init.")
        )
    if case.with_prefix("grad.") and case.kind != "loss":
        assert "w" in case.arrays or "w0" in case.arrays, "the cotangent is missing"
