"""The order of the rooms: a module imports only what stands above it, CuPy has one door, and no machine is named."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gpulayers"

# Each line may import the lines above it, and names on its own line. A name stands for the module or the folder.
ORDER = [
    ["errors", "data"],
    ["nest", "serialization"],
    ["_cupy"],
    ["device"],
    ["dtypes"],
    ["launch"],
    ["ops"],
    ["trace"],
    ["initializers", "regularizers", "constraints"],
    ["variables", "scopes"],
    ["metrics", "losses", "legacy_losses"],
    ["layers"],
    ["nn"],
    ["optimizers", "checkpoint", "model", "cuda_graph", "graph_memory", "report"],
    ["keras", "compat", "__init__"],
    ["examples", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the room of a file of the package: its first folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, root: Path = ROOT) -> list[tuple[int, str]]:
    """Return (line, absolute module name) for every import in a file, the ones inside functions too."""
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            found += [(node.lineno, f"{stem}.{alias.name}") for alias in node.names]
    return found


def guarded_by_type_checking(path: Path) -> set[int]:
    """Return the lines under `if TYPE_CHECKING:`: they name types and import nothing at run time."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                lines |= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def target_room(module: str) -> str | None:
    """Return the room that an absolute module name leads to, or None outside the package."""
    parts = module.split(".")
    if parts[0] != "gpulayers":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def upward_imports(path: Path, root: Path = ROOT) -> list[str]:
    """Return a complaint for every import that leads to a lower line of the plan."""
    here = path.relative_to(root / "gpulayers").parts[0].removesuffix(".py")
    types_only = guarded_by_type_checking(path)
    return [
        f"{path.name}:{line}: {here} imports {module}"
        for line, module in imported_modules(path, root)
        if line not in types_only
        and (there := target_room(module)) is not None
        and there != here
        and LEVEL[there] > LEVEL[here]
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_what_stands_above(path):
    assert room(path) in LEVEL, f"{room(path)} has no line in ORDER: give it one"
    assert not upward_imports(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_one_file_imports_cupy(path):
    doors = [line for line, module in imported_modules(path) if re.match(r"cupyx?(\.|$|_backends)", module)]
    assert path == PACKAGE / "_cupy.py" or not doors


def test_an_upward_import_is_noticed(tmp_path):
    folder = tmp_path / "gpulayers" / "ops"
    folder.mkdir(parents=True)
    for text, wrong in [
        ("from gpulayers import layers", 1),
        ("from gpulayers.layers import core", 1),
        ("from ..layers.core import Layer", 1),
        ("from .. import layers", 1),
        ("def f():\n    import gpulayers.nn", 1),
        ("import gpulayers", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gpulayers.layers import core", 0),
        ("from gpulayers import dtypes\nfrom gpulayers.ops import arithmetic\nimport numpy", 0),
    ]:
        (folder / "one.py").write_text(text)
        assert len(upward_imports(folder / "one.py", tmp_path)) == wrong, text


def committed_text_files() -> list[Path]:
    """Return the tracked files, or every file below the root where there is no repository (an unpacked archive)."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        names = [name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        skip = {".venv", "__pycache__", "build", "dist"}
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and not skip & set(path.relative_to(ROOT).parts)
        ]
    binary = {".npz", ".png", ".npy", ".gz"}
    return [ROOT / name for name in names if Path(name).suffix not in binary and (ROOT / name).is_file()]


# Written in pieces so that this file does not name what it forbids.
MACHINE_PATHS = re.compile("|".join([r"(?<![\w.])/" + "work/", r"\.\./" + "shared", "/" + "root/", r"\." + "library/"]))


def test_no_committed_file_names_a_machine_path():
    found = []
    for path in committed_text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
