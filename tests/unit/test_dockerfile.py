"""The container without a container engine: its file parsed and linted, its entry point run, its RUN lines executed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


# -- a parser for the part of the language that the file uses ----------------------------------------------------------


@dataclass
class Stage:
    """One FROM and the instructions below it, as (keyword, rest) with continuation lines joined."""

    parent: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == keyword]

    def last(self, keyword: str) -> str:
        return self.all(keyword)[-1]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Return the arguments before the first FROM and the stages."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in joined.splitlines():
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            stages.append(Stage(parent, name))
        elif stages:
            stages[-1].instructions.append((keyword, rest))
        else:
            arguments |= dict([rest.split("=", 1)])
    return arguments, stages


ARGUMENTS, STAGES = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
BY_NAME = {stage.name: stage for stage in STAGES}


def lineage(name: str) -> list[Stage]:
    """Return a stage and the stages of this file below it, the lowest first."""
    stage = BY_NAME[name]
    return [*(lineage(stage.parent) if stage.parent in BY_NAME else []), stage]


def settings(keyword: str, name: str) -> dict[str, str]:
    """Return the ENV or ARG settings that hold in a stage."""
    found = {}
    for stage in lineage(name):
        for rest in stage.all(keyword):
            found |= dict(part.split("=", 1) for part in shlex.split(rest) if "=" in part)
    return found


def copies(stage: Stage) -> list[tuple[str | None, list[str], str]]:
    """Return (from stage, sources, target) of every COPY."""
    found = []
    for rest in stage.all("COPY"):
        words = rest.split()
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        found.append((flags.get("from"), sources, target))
    return found


# -- what the file says ------------------------------------------------------------------------------------------------


def test_stages_and_bases():
    assert [stage.name for stage in STAGES] == ["wheel", "base", "test", "runtime"], "the default stage is the last"
    assert ARGUMENTS == {"PYTHON": "3.12"}
    for stage in STAGES:
        assert stage.parent in BY_NAME or stage.parent == "python:${PYTHON}-slim"
    assert not BY_NAME["runtime"].all("RUN"), "the image carries no build tools"


def test_cuda_argument_names_an_extra():
    with open(ROOT / "pyproject.toml", encoding="utf-8") as file:
        extras = re.findall(r"^(\w+) = \[", file.read().split("[project.optional-dependencies]")[1], re.MULTILINE)
    assert settings("ARG", "base")["CUDA"] == "cuda12"
    asked = [re.search(r"gpulayers\[([^\]]*)\]", run).group(1) for s in STAGES for run in s.all("RUN") if "[" in run]
    assert len(asked) == 2
    assert set(",".join(asked).split(",")) <= {*extras, "${CUDA}"}
    assert {"cuda12", "cuda13"} <= set(extras)


def test_driver_is_asked_for():
    assert settings("ENV", "runtime")["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(settings("ENV", "runtime")["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}
    assert "CUPY_CACHE_DIR" not in settings("ENV", "runtime"), "a shared cache folder breaks root-versus-user runs"


@pytest.mark.parametrize("name", ["runtime", "test"])
def test_user_home_volume_and_entry_point(name):
    (create,) = [run for run in BY_NAME["base"].all("RUN") if "useradd" in run]
    assert "--create-home" in create and "--uid 1000" in create
    assert BY_NAME[name].last("USER") == "1000:1000"
    assert BY_NAME[name].last("VOLUME") == "/home/gpulayers/.cupy"
    assert "/home/gpulayers/.cupy" in create, "a volume on a folder that does not exist belongs to root"
    (copied,) = [target for _, sources, target in copies(BY_NAME["base"]) if sources == ["docker/entrypoint.sh"]]
    assert json.loads(BY_NAME[name].last("ENTRYPOINT")) == [Path(copied).name]
    assert json.loads(BY_NAME["runtime"].last("CMD")) == []
    assert json.loads(BY_NAME["test"].last("CMD")) == ["python", "-m", "pytest"]


def test_copied_files_exist_and_reach_the_builder():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for stage in STAGES:
        for source_stage, sources, _ in copies(stage):
            for source in sources:
                assert source_stage in BY_NAME if source_stage else (ROOT / source).exists()
                assert source not in ignored
    needed = {path.split("/")[0] for path in ("pyproject.toml", "gpulayers", "kernels", "tests", "docker", "README.md")}
    assert not needed & set(ignored)
    build_inputs = {source for _, sources, _ in copies(BY_NAME["wheel"]) for source in sources}
    assert build_inputs == {"pyproject.toml", "README.md", "LICENSE", "gpulayers", "kernels"}


def test_hadolint():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: install gpulayers[dev]")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


# -- the entry point ---------------------------------------------------------------------------------------------------


def enter(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point as the container does, with this Python and a `python -m gpulayers` that says what it got."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir(exist_ok=True)
    python = bin_folder / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1 $2" = "-m gpulayers" ]; then shift 2; echo "main job:$*"; else\n'
        f'exec {shlex.quote(sys.executable)} "$@"; fi\n'
    )
    python.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        **environment,
    }
    env.pop("CUPY_CACHE_DIR", None)
    return subprocess.run(["sh", ENTRYPOINT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "main job:"),
        (["--help"], "main job:--help"),
        (["--epochs", "3"], "main job:--epochs 3"),
        (["echo", "a b", "c"], "a b c"),
        (["python", "-c", "print('given')"], "given"),
    ],
)
def test_entry_point_runs_the_job_or_the_command(tmp_path, arguments, printed):
    done = enter(tmp_path, *arguments)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert re.match(r"gpulayers: (GPU \d|no GPU, NumPy computes\. \S)", line)


def test_entry_point_passes_the_exit_status_on(tmp_path):
    assert enter(tmp_path, "sh", "-c", "exit 7").returncode == 7


def test_entry_point_names_an_unwritable_home(tmp_path):
    done = enter(tmp_path, "sh", "-c", "echo $CUPY_CACHE_DIR", HOME=str(tmp_path / "none"))
    assert "is not writable" in done.stderr
    assert Path(done.stdout.strip()).is_dir()


# -- the RUN lines in a clean root -------------------------------------------------------------------------------------

# What a container engine would share with a build: name resolution, certificates and the settings of pip.
SHARED = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf", "/usr/local/share/ca-certificates"]


class CleanRoot:
    """A Debian made by debootstrap that stands in for python:slim. Stages that descend from one another share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",  # Debian's Python guards itself; the image's own does not
            "PIP_ROOT_USER_ACTION": "ignore",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        passed = ("PIP_", "SSL_CERT", "REQUESTS_CA", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
        self.environment |= {key: value for key, value in os.environ.items() if key.upper().startswith(passed)}
        for path in SHARED:
            # Removed first: a link in the root would lead out of it, to the machine's own files.
            if Path(path).is_dir():
                shutil.rmtree(self.inside(path), ignore_errors=True)
                shutil.copytree(path, self.inside(path), ignore_dangling_symlinks=True)
            elif Path(path).is_file():
                self.inside(path).unlink(missing_ok=True)
                shutil.copy(path, self.inside(path))
        python = self.inside("/usr/local/bin/python")
        python.unlink(missing_ok=True)
        python.symlink_to("/usr/bin/python3")

    def inside(self, path: str | Path) -> Path:
        return self.folder / str(path).lstrip("/")

    def run(self, script: str, workdir: str = "/", user: str = "0:0", **environment: str) -> str:
        """Run a line of shell in the root, as RUN does; return what it printed."""
        command = ["chroot", f"--userspec={user}", str(self.folder), "/bin/sh", "-c", f"cd {workdir} && {script}"]
        output = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}  # whatever the locale here is
        done = subprocess.run(command, env=self.environment | environment, timeout=1500, **output)
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def copy(self, sources: list[Path], target: str, workdir: str) -> None:
        """Copy as COPY does: a folder's contents, or files into a folder; the target is made."""
        to = self.inside(Path(workdir) / target)
        into = len(sources) > 1 or target.endswith(("/", "."))
        for source in sources:
            if source.is_dir():
                skip = shutil.ignore_patterns(".git", "__pycache__", ".venv", "*.egg-info", ".*_cache", ".hypothesis")
                shutil.copytree(source, to, dirs_exist_ok=True, ignore=skip)
            else:
                place = to / source.name if into else to
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
                place.chmod(source.stat().st_mode)


def execute(stage: Stage, root: CleanRoot, roots: dict[str, CleanRoot]) -> None:
    """Carry out the instructions of one stage that change files."""
    workdir = "/"
    for keyword, rest in stage.instructions:
        if keyword in ("ENV", "ARG"):
            root.environment |= dict(part.split("=", 1) for part in shlex.split(rest) if "=" in part)
        elif keyword == "WORKDIR":
            workdir = rest
            root.inside(workdir).mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY":
            ((source_stage, sources, target),) = copies(Stage("", "", [(keyword, rest)]))
            where = roots[source_stage].inside if source_stage else lambda source: ROOT / source
            root.copy([where(source) for source in sources], target, workdir)
        elif keyword == "RUN":
            root.run(rest, workdir)


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    if os.geteuid() != 0 or shutil.which("debootstrap") is None or shutil.which("chroot") is None:
        pytest.skip("a clean root needs root rights, chroot and debootstrap")
    folder = tmp_path_factory.mktemp("debian") / "root"
    include = "--include=python3,python3-pip,python3-venv,ca-certificates"
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", include, "bookworm", folder], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def built(debian, tmp_path_factory):
    """Return the root of every stage after its instructions; gigabytes, so removed at once."""
    roots: dict[str, CleanRoot] = {}
    folder = tmp_path_factory.mktemp("stages")
    try:
        for stage in STAGES:
            if stage.parent in roots:
                roots[stage.name] = roots[stage.parent]
            else:
                copied = folder / stage.name
                subprocess.run(["cp", "--archive", "--reflink=auto", debian, copied], check=True)
                roots[stage.name] = CleanRoot(copied)
            execute(stage, roots[stage.name], roots)
        yield roots
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_every_run_line_in_a_clean_root(built):
    root, home = built["runtime"], {"HOME": "/home/gpulayers"}
    enter = "gpulayers-entrypoint"
    assert root.run(f"{enter} id -un", "/home/gpulayers", "1000:1000", **home).strip() == "gpulayers"
    assert "cupy" in root.run(f"{enter} python -m pip list", "/home/gpulayers", "1000:1000", **home)
    folders = root.run(
        f"{enter} python -c 'from gpulayers.launch.source import kernel_folder; print(kernel_folder())'",
        "/home/gpulayers", "1000:1000", **home,
    )  # fmt: skip
    assert folders.strip().endswith("gpulayers/_kernels")
    assert root.run("stat -c %U:%a /home/gpulayers/.cupy").strip() == "gpulayers:700"
    assert "usage" in root.run(f"{enter} --help", "/home/gpulayers", "1000:1000", **home).lower()
    root.run("chown -R 1000:1000 /home/gpulayers/checkout")
    workdir = BY_NAME["test"].last("WORKDIR")
    tests = root.run(f"{enter} python -m pytest -q tests/unit/test_rooms.py", workdir, "1000:1000", **home)
    assert " passed" in tests
