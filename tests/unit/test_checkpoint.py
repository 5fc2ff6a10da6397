"""Checkpoints: what goes in comes out; what is wrong is named, and changes nothing."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest

from gpulayers import checkpoint
from gpulayers.checkpoint import Saver, latest_checkpoint, load_weights, read_arrays, save_weights
from gpulayers.errors import CheckpointError
from gpulayers.optimizers import Adam
from gpulayers.scopes import get_variable
from gpulayers.trace import Graph, Session
from gpulayers.variables import Variable, fixed_size_partitioner, global_variables_initializer

RANDOM = np.random.default_rng(0)
DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"]
SHAPES = [(), (3,), (2, 3), (0, 4)]
SUFFIXES = [".npz", ".safetensors"]


def some(suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    return suffix


def variable(dtype="float32", shape=(3,), name="v"):
    return Variable((RANDOM.standard_normal(shape) * 10).astype(np.float32), dtype=dtype, name=name)


def zeros_like(v):
    return Variable(np.zeros(v.shape, v.dtype), name=v.name.partition(":")[0])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, suffix, dtype, shape):
    path = tmp_path / f"weights{some(suffix)}"
    saved = variable(dtype, shape)
    assert save_weights(path, {"layer/kernel:0": saved}) == path
    loaded = zeros_like(saved)
    report = load_weights(path, {"layer/kernel:0": loaded})
    assert report == (["layer/kernel:0"], [], [], [])
    assert loaded.numpy().dtype == saved.numpy().dtype
    assert loaded.numpy().tobytes() == saved.numpy().tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names_and_layouts(tmp_path, suffix):
    path = tmp_path / f"weights{some(suffix)}"
    names = ["file", "../up", "/root", "a b", "Größe", "v" * 300]
    saved = {name: variable(shape=(2, 3)) for name in names}
    saved["transposed"] = Variable(np.asfortranarray(RANDOM.standard_normal((3, 4))))
    save_weights(path, saved)
    assert os.listdir(tmp_path) == [path.name]
    for name, array in read_arrays(path).items():
        assert np.array_equal(array, saved[name].numpy())


def test_numpy_can_read_it(tmp_path):
    save_weights(tmp_path / "w.npz", {"a/b": Variable([1.0, 2.0])})
    with np.load(tmp_path / "w.npz", allow_pickle=False) as stored:
        assert stored["a/b"].tolist() == [1.0, 2.0]
        note = json.loads(stored["__gpulayers__"].tobytes())
    assert note["library"] == "gpulayers" and note["format"] == 1
    assert note["entries"] == {"a/b": {"dtype": "float32", "shape": [2]}}


def test_equal_weights_give_equal_files(tmp_path):
    v = variable()
    for name in ("a.npz", "b.npz"):
        save_weights(tmp_path / name, [v])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strict_loading_lists_everything_and_changes_nothing(tmp_path, suffix):
    path = tmp_path / f"weights{some(suffix)}"
    ones = {name: Variable([1.0]) for name in ("same", "extra", "shape")}
    save_weights(path, {**ones, "kind": Variable([1])})
    same, shape = Variable([0.0]), Variable([0.0, 0.0])
    wanted = {"same": same, "lacking": Variable([0.0]), "shape": shape, "kind": Variable([0.0])}
    with pytest.raises(CheckpointError) as error:
        load_weights(path, wanted)
    text = str(error.value)
    assert "missing in the file: lacking" in text and "not wanted: extra" in text
    assert "shape: float32 (1,) in the file, the variable is float32 (2,)" in text
    assert "kind: int32 (1,) in the file, the variable is float32 (1,)" in text
    assert same.numpy().tolist() == [0.0]
    report = load_weights(path, wanted, strict=False)
    assert report.loaded == ["same", "kind"] and report.missing == ["lacking"] and report.unexpected == ["extra"]
    assert len(report.misfits) == 1 and shape.numpy().tolist() == [0.0, 0.0]
    assert same.numpy().tolist() == [1.0] and wanted["kind"].numpy().tolist() == [1.0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_an_error_and_changes_nothing(tmp_path, suffix):
    path = tmp_path / f"weights{some(suffix)}"
    save_weights(path, {"a": variable(), "b": variable(shape=(2, 2))})
    content = path.read_bytes()
    kept = Variable([7.0, 7.0, 7.0])
    other = Variable(np.zeros((2, 2), np.float32))
    for size in [0, 1, 7, 8, 9, *range(20, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load_weights(path, {"a": kept, "b": other})
    assert kept.numpy().tolist() == [7.0, 7.0, 7.0] and not other.numpy().any()


def test_a_flipped_bit_in_an_array_is_noticed(tmp_path):
    path = tmp_path / "w.npz"
    save_weights(path, {"a": Variable(np.full(50, 3.0))})
    content = bytearray(path.read_bytes())
    place = content.find(np.full(50, 3.0).tobytes())
    content[place + 17] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_arrays(path)


def test_foreign_files(tmp_path):
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    np.save(tmp_path / "plain.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("weights")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("a.npy", b"not an array")
    for name in ("foreign.npz", "plain.npy", "text.npz", "zip.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(tmp_path / name, {"a": Variable(np.zeros(3))})


def test_a_foreign_safetensors_file(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not written by this library"):
        read_arrays(tmp_path / "foreign.safetensors")


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_weights(tmp_path / "w.npz", {"a": variable()})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 1; got 2"):
        read_arrays(tmp_path / "w.npz")


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_opened(tmp_path):
    sprung = tmp_path / "sprung"
    note = {"library": "gpulayers", "format": 1, "entries": {"a": {"dtype": "object", "shape": [1]}}}
    np.savez(
        tmp_path / "w.npz",
        a=np.array([Trap(sprung)], dtype=object),
        __gpulayers__=np.frombuffer(json.dumps(note).encode(), np.uint8),
    )
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "w.npz", {"a": Variable([1.0])})
    assert not sprung.exists()


@pytest.mark.parametrize(
    "note",
    [
        "[]",
        "3",
        "{",
        '{"library": "gpulayers"}',
        '{"library": "gpulayers", "format": "x", "entries": {}}',
        '{"library": "gpulayers", "format": 1, "entries": {"b": {"dtype": "float32", "shape": [3]}}}',
        '{"library": "gpulayers", "format": 1, "entries": {"a": {"dtype": "float64", "shape": [3]}}}',
        '{"library": "gpulayers", "format": 1, "entries": {"a": {"dtype": "os", "shape": [3]}}}',
        '{"library": "gpulayers", "format": 1, "entries": {"a": {"dtype": "float32", "shape": [4]}}}',
        '{"library": "gpulayers", "format": 1, "entries": ["a"]}',
    ],
)
def test_a_note_that_does_not_fit(tmp_path, note):
    np.savez(tmp_path / "w.npz", a=np.ones(3, np.float32), __gpulayers__=np.frombuffer(note.encode(), np.uint8))
    with pytest.raises(CheckpointError, match=r"w\.npz"):
        read_arrays(tmp_path / "w.npz")


def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    save_weights(path, {"a": Variable([1.0])})

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_write_entry", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, {"a": Variable([2.0])})
    monkeypatch.undo()
    assert read_arrays(path)["a"].tolist() == [1.0] and os.listdir(tmp_path) == ["w.npz"]


@pytest.mark.parametrize("wrong", [{"": 1}, {3: 1}, {"__gpulayers__": 1}])
def test_wrong_names(tmp_path, wrong):
    with pytest.raises(CheckpointError):
        save_weights(tmp_path / "w.npz", {name: Variable([1.0]) for name in wrong})


def test_names_taken_twice_and_no_variables(tmp_path):
    with pytest.raises(CheckpointError, match="taken twice"):
        save_weights(tmp_path / "w.npz", [variable(name="a"), variable(name="a")])
    with pytest.raises(CheckpointError, match="not a variable"):
        save_weights(tmp_path / "w.npz", {"a": np.ones(3)})
    assert not os.listdir(tmp_path)


def test_a_missing_file_is_the_system_s_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.npz", [variable()])


def test_safetensors_refuses_what_it_cannot_store(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(CheckpointError, match="complex64"):
        save_weights(tmp_path / "w.safetensors", {"a": Variable(np.ones(2, np.complex64))})
    assert not os.listdir(tmp_path)


def test_safetensors_where_it_is_not_installed(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(checkpoint.importlib, "import_module", absent)
    with pytest.raises(CheckpointError, match=r"gpulayers\[safetensors\]"):
        save_weights(tmp_path / "w.safetensors", {"a": Variable([1.0])})


def test_parts_are_saved_as_a_whole(tmp_path):
    with Graph().as_default():
        split = get_variable("w", (5, 2), initializer="random_normal", partitioner=fixed_size_partitioner(3))
        session = Session()
        session.run(global_variables_initializer())
        save_weights(tmp_path / "w.npz", {"w": split})
        values = session.run(split)
        session.run([part.assign(np.zeros(part.shape)) for part in split])
        load_weights(tmp_path / "w.npz", {"w": split})
        assert np.array_equal(session.run(split), values)
    assert np.array_equal(read_arrays(tmp_path / "w.npz")["w"], values)


def test_an_optimizer_s_variables(tmp_path):
    w, optimizer = Variable(np.ones(3), name="w"), Adam(0.1)
    optimizer.apply_gradients([(np.ones(3), w)])
    save_weights(tmp_path / "state.npz", [w, *optimizer.variables])
    other, again = Variable(np.zeros(3), name="w"), Adam(0.1)
    again.build([other])
    load_weights(tmp_path / "state.npz", [other, *again.variables])
    for one, two in ((optimizer, w), (again, other)):
        one.apply_gradients([(np.full(3, 2.0), two)])
    assert np.array_equal(w.numpy(), other.numpy())


# --- Saver ------------------------------------------------------------------------------------------------------------


def test_saver_in_a_graph(tmp_path):
    with Graph().as_default():
        v = Variable([1.0, 2.0], name="v")
        saver = Saver()
        with Session() as session:
            session.run(global_variables_initializer())
            path = saver.save(session, tmp_path / "model.ckpt", global_step=7)
            session.run(v.assign([0.0, 0.0]))
            saver.restore(session, path)
            assert session.run(v).tolist() == [1.0, 2.0]
    with Graph().as_default():
        Variable([1.0], name="other")
        with pytest.raises(CheckpointError, match="other"):
            Saver().restore(None, path)


def test_restore_initializes(tmp_path):
    with Graph().as_default():
        v = Variable([1.0], name="v")
        Session().run(v.initializer)
        path = Saver().save(None, tmp_path / "model")
    with Graph().as_default():
        fresh = Variable([0.0], name="v")
        Saver().restore(None, path)
        assert Session().run(fresh).tolist() == [1.0]


def test_saver_keeps_the_last_files(tmp_path):
    v = Variable([0.0], name="v")
    saver = Saver([v], max_to_keep=2)
    assert latest_checkpoint(tmp_path) is None
    for step in range(4):
        v.assign([float(step)])
        saver.save(None, tmp_path / "m", global_step=step)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m-2", "m-3"]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "m-3") == saver.last_checkpoints[-1]
    assert read_arrays(tmp_path / "m-2")["v"].tolist() == [2.0]
    (tmp_path / "checkpoint").write_text('{"latest": "../elsewhere"}')
    assert latest_checkpoint(tmp_path) is None


def test_saver_needs_variables():
    with pytest.raises(ValueError, match="nothing to save"):
        Saver()
