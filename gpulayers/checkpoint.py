"""Weights in a file: ``.npz``, or ``.safetensors`` where that package is installed.

A file holds arrays under their names and a note of the library, the format and each array's dtype; nothing in it is
ever executed (no pickle is written or read). It is written beside its place and then renamed, so that a program that
dies while writing leaves the old file. Loading reads and checks everything before it changes the first variable.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpulayers.device import asnumpy
from gpulayers.dtypes import as_dtype, dtype_name
from gpulayers.errors import CheckpointError, message
from gpulayers.trace import GraphKeys, active_graph
from gpulayers.variables import PartitionedVariable, Variable

__all__ = ["LoadReport", "Saver", "latest_checkpoint", "load_weights", "read_arrays", "save_weights"]

LIBRARY, FORMAT = "gpulayers", 1
NOTE = "__gpulayers__"  # the entry of an .npz that holds the note, as the bytes of a JSON text
SAFETENSORS = ".safetensors"
_STORED_AS = {"bfloat16": "uint16"}  # NumPy's format has no name for these: their bits are stored

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    IndexError,
    AttributeError,
    NotImplementedError,
    RecursionError,
    MemoryError,
    OverflowError,
)


class LoadReport(NamedTuple):
    """What `load_weights` did, by name: `loaded`, and what it left alone because it did not fit."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]


def _named(variables: Any) -> dict[str, Any]:
    """Return variables by name; a sequence's by their own names without ``:0``."""
    if isinstance(variables, Mapping):
        pairs = list(variables.items())
    else:
        pairs = [(variable.name.partition(":")[0], variable) for variable in variables]
    names = [name for name, _ in pairs]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(
            message("checkpoint", "names are taken twice", "different names", twice, "Pass a dictionary with your own.")
        )
    for name, variable in pairs:
        if not isinstance(name, str) or not name or name == NOTE:
            raise CheckpointError(message("checkpoint", "not a name for an entry", "a text", repr(name)))
        if not isinstance(variable, Variable | PartitionedVariable):
            raise CheckpointError(message("checkpoint", f"{name!r} is not a variable", "a Variable", repr(variable)))
    return dict(pairs)


def _dtype_of(variable: Any) -> str:
    return dtype_name(variable.static_dtype if isinstance(variable, Variable) else variable.dtype)


def _host(variable: Any) -> np.ndarray:
    if isinstance(variable, PartitionedVariable):  # part by part: in a graph, joining by operations would be recorded
        whole = np.concatenate([asnumpy(part.read()) for part in variable], axis=variable.axis)
    else:
        whole = asnumpy(variable.read())
    return np.asarray(whole, order="C")


# --- writing ----------------------------------------------------------------------------------------------------------


def save_weights(path: Any, named_variables: Any) -> Path:
    """Write variables to `path` and return it.

    Parameters: `path`, ``.safetensors`` in its name chooses that format, anything else is ``.npz``'s;
    `named_variables`, a dictionary, or variables, which go by their names without ``:0``. A partitioned variable is
    written as a whole. Raises CheckpointError for a name taken twice and for safetensors where the package is missing;
    OSError as the system does. The file appears complete or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_weights(Path(folder, "weights.npz"), {"w": Variable([1.0, 2.0])})
    ...     other = Variable([0.0, 0.0])
    ...     print(load_weights(path, {"w": other}).loaded, other.numpy())
    ['w'] [1. 2.]
    """
    arrays = {name: _host(variable) for name, variable in _named(named_variables).items()}
    path = Path(path)
    write = _write_safetensors if path.suffix == SAFETENSORS else _write_npz
    _write_atomically(path, lambda file: write(file, arrays))
    return path


def _write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Let `write` fill a new file beside `path`, then put it in the place of `path` in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _write_npz(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    entries = {name: {"dtype": dtype_name(a.dtype), "shape": list(a.shape)} for name, a in arrays.items()}
    note = json.dumps({"library": LIBRARY, "format": FORMAT, "entries": entries})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_entry(archive, NOTE, np.frombuffer(note.encode(), np.uint8))
        for name, array in arrays.items():
            bits = _STORED_AS.get(dtype_name(array.dtype))
            _write_entry(archive, name, array.view(bits) if bits else array)


def _write_entry(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # A ZipInfo of our own has a fixed date: equal weights give equal files.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def _safetensors(module: str = "safetensors") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(
            message("checkpoint", "the package safetensors is not installed", do="Install gpulayers[safetensors].")
        ) from error


# safetensors' names of dtypes; what is not here it cannot store.
_SAFE = {
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint", "float") for bits in (16, 32, 64)},
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "bfloat16": "BF16",
}


def _write_safetensors(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if (kind := dtype_name(array.dtype)) not in _SAFE:
            raise CheckpointError(message(name, "safetensors cannot store this dtype", ", ".join(_SAFE), kind))
    note = {"library": LIBRARY, "format": str(FORMAT)}
    file.write(_safetensors("safetensors.numpy").save(dict(arrays), note))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_arrays(path: Any) -> dict[str, np.ndarray]:
    """Return the arrays in a checkpoint by name.

    Raises CheckpointError for a file that is damaged, not from this library, or of a later format; FileNotFoundError if
    there is none.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        return _read_safetensors(path, content) if path.suffix == SAFETENSORS else _read_npz(path, content)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            message(str(path), f"is damaged or not a checkpoint ({type(error).__name__}: {error})")
        ) from error


def _check_note(path: Path, library: Any, version: Any) -> None:
    if library != LIBRARY:
        raise CheckpointError(message(str(path), "was not written by this library", LIBRARY, repr(library)))
    if int(version) != FORMAT:
        raise CheckpointError(
            message(str(path), "has another format", f"format {FORMAT}", version, "Use the version that wrote it.")
        )


def _read_npz(path: Path, content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if f"{NOTE}.npy" not in archive.namelist():
            raise CheckpointError(message(str(path), "was not written by this library", f"an entry {NOTE}"))
        note = json.loads(_read_entry(archive, NOTE).tobytes().decode())
        _check_note(path, note["library"], note["format"])
        return {name: _restored(archive, name, entry) for name, entry in note["entries"].items()}


def _read_entry(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as entry:
        array = np.asarray(np.lib.format.read_array(entry, allow_pickle=False))
        if entry.read(1):  # reading to the end is also what checks the sum
            raise ValueError(f"{name} has bytes behind its array")
    return array


def _restored(archive: zipfile.ZipFile, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """Return one array in the dtype that the note gives it."""
    dtype, array = as_dtype(entry["dtype"]), _read_entry(archive, name)
    stored = as_dtype(_STORED_AS.get(dtype.name, dtype))
    if array.dtype != stored or list(array.shape) != list(entry["shape"]):
        raise ValueError(f"{name} is not what the note says")
    return array.view(dtype)


def _read_safetensors(path: Path, content: bytes) -> dict[str, np.ndarray]:
    library = _safetensors()
    try:
        tensors = library.deserialize(content)
        length = int.from_bytes(content[:8], "little")
        note = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except library.SafetensorError as error:
        raise CheckpointError(message(str(path), f"is damaged or not a checkpoint ({error})")) from error
    _check_note(path, note.get("library"), note.get("format", 0))
    names = {short: long for long, short in _SAFE.items()}
    return {
        name: np.frombuffer(bytes(t["data"]), as_dtype(names[t["dtype"]])).reshape(t["shape"]) for name, t in tensors
    }


def load_weights(path: Any, named_variables: Any, strict: bool = True) -> LoadReport:
    """Give variables the values in a checkpoint, and return what was loaded.

    `named_variables` as for `save_weights`. With `strict`, every variable must be in the file and every entry of the
    file must be wanted, with the variable's shape and dtype. Otherwise what does not fit is left alone, and a dtype is
    converted. Raises CheckpointError with everything that does not fit, or if the file is damaged or foreign; no
    variable is changed then.
    """
    variables, arrays = _named(named_variables), read_arrays(path)
    report = _compare(variables, arrays, strict)
    if strict and (report.missing or report.unexpected or report.misfits):
        raise CheckpointError(_complaint(path, report))
    ready: list[tuple[Variable, Any]] = []
    for name in report.loaded:
        for variable, value in _pieces(variables[name], arrays[name]):
            ready.append((variable, variable.accept(value)))
    for variable, value in ready:
        variable.store(value)
    return report


def _compare(variables: Mapping[str, Any], arrays: Mapping[str, np.ndarray], strict: bool) -> LoadReport:
    loaded, misfits = [], []
    for name, variable in variables.items():
        if name not in arrays:
            continue
        array, wanted = arrays[name], (tuple(variable.shape), _dtype_of(variable))
        found = (tuple(array.shape), dtype_name(array.dtype))
        if wanted[0] != found[0] or (strict and wanted[1] != found[1]):
            misfits.append(f"{name}: {found[1]} {found[0]} in the file, the variable is {wanted[1]} {wanted[0]}")
        else:
            loaded.append(name)
    missing = [name for name in variables if name not in arrays]
    return LoadReport(loaded, missing, [name for name in arrays if name not in variables], misfits)


def _complaint(path: Any, report: LoadReport) -> str:
    parts = [
        ("missing in the file", report.missing),
        ("in the file but not wanted", report.unexpected),
        ("of another shape or dtype", report.misfits),
    ]
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
    return message(str(path), f"does not fit the variables ({found})", do="Pass strict=False to load what fits.")


def _pieces(variable: Any, array: np.ndarray) -> list[tuple[Variable, np.ndarray]]:
    """Return the plain variables of one entry, each with its part of the array."""
    if isinstance(variable, Variable):
        return [(variable, array)]
    parts = list(variable)
    cuts = np.cumsum([part.shape[variable.axis] for part in parts])[:-1]
    return list(zip(parts, np.split(array, cuts, axis=variable.axis), strict=True))


# --- compat.v1 --------------------------------------------------------------------------------------------------------

STATE_FILE = "checkpoint"


class Saver:
    """Save and restore the variables of a graph, keeping the last few files. Source: ``tf.compat.v1.train.Saver``.

    Parameters: `var_list`, variables or a dictionary of them, the graph's global variables at this moment if not given;
    `max_to_keep`, older files are deleted (0 or None: none is). Raises ValueError if there is nothing to save.
    Values live with the variables here, not with a session, so the `sess` arguments may be None.

    >>> import tempfile
    >>> w = Variable([1.0], name="w")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saver = Saver([w])
    ...     path = saver.save(None, f"{folder}/model", global_step=3)
    ...     _ = w.assign([5.0])
    ...     saver.restore(None, latest_checkpoint(folder))
    >>> Path(path).name, w.numpy()
    ('model-3', array([1.], dtype=float32))
    """

    def __init__(self, var_list: Any = None, max_to_keep: int | None = 5) -> None:
        if var_list is None:
            graph = active_graph()
            var_list = [] if graph is None else graph.get_collection(GraphKeys.GLOBAL_VARIABLES)
        self._variables = _named(var_list)
        if not self._variables:
            raise CheckpointError(message("Saver", "there is nothing to save", do="Make the variables first."))
        self._keep = max_to_keep or 0
        self.last_checkpoints: list[str] = []

    def save(self, sess: Any, save_path: Any, global_step: Any = None) -> str:
        """Write the variables to ``save_path`` or ``save_path-global_step``, and return the path written."""
        if global_step is not None:
            save_path = f"{save_path}-{int(global_step)}"
        path = str(save_weights(save_path, self._variables))
        self.last_checkpoints = [one for one in self.last_checkpoints if one != path] + [path]
        while self._keep and len(self.last_checkpoints) > self._keep:
            Path(self.last_checkpoints.pop(0)).unlink(missing_ok=True)
        self._write_state(Path(path).parent)
        return path

    def _write_state(self, folder: Path) -> None:
        names = [Path(path).name for path in self.last_checkpoints]
        text = json.dumps({"library": LIBRARY, "latest": names[-1], "all": names}, indent=1)
        _write_atomically(folder / STATE_FILE, lambda file: file.write(text.encode()))

    def restore(self, sess: Any, save_path: Any) -> None:
        """Give the variables the values in a file; what else is in the file is not looked at.

        Raises CheckpointError for variables that are not in it, or have another shape or dtype there.
        """
        arrays = read_arrays(save_path)
        report = _compare(self._variables, arrays, strict=True)
        if report.missing or report.misfits:
            raise CheckpointError(_complaint(save_path, report._replace(unexpected=[])))
        load_weights(save_path, self._variables, strict=False)


def latest_checkpoint(checkpoint_dir: Any, latest_filename: str | None = None) -> str | None:
    """Return the path that a `Saver` wrote last in a folder, or None.

    Source: ``tf.compat.v1.train.latest_checkpoint``.
    """
    folder = Path(checkpoint_dir)
    try:
        state = json.loads((folder / (latest_filename or STATE_FILE)).read_text(encoding="utf-8"))
        path = folder / Path(state["latest"]).name  # a name only: the state file leads nowhere else
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(path) if path.is_file() else None
