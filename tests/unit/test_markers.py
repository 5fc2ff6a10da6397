"""GPU tests skip with a reason where CuPy imports and no device answers, and misspelt markers are errors."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpulayers.device import gpu_available

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, text: str, *arguments: str) -> tuple[int, str]:
    """Run pytest with this project's settings on one file of its own."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_one.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.skipif(gpu_available(), reason="a GPU answers here: the tests run instead")
@pytest.mark.parametrize("marker", ["gpu", "multi_gpu"])
def test_gpu_tests_skip_with_a_reason(tmp_path, marker):
    text = f"import pytest\n@pytest.mark.{marker}\ndef test_on_gpu():\n    raise AssertionError\n"
    for arguments in ([], ["-m", marker]):
        folder = tmp_path / str(len(arguments))
        folder.mkdir()
        status, output = run(folder, text, *arguments)
        assert status == 0 and "1 skipped" in output, output
        assert "no GPU: CuPy" in output, output


@pytest.mark.parametrize(
    "text",
    [
        "import pytest\n@pytest.mark.gqu\ndef test_one(): pass\n",
        "import warnings\ndef test_one(): warnings.warn('any')\n",
        "import pytest\n@pytest.mark.xfail\ndef test_one(): pass\n",
    ],
    ids=["unknown_marker", "warning", "unexpected_pass"],
)
def test_sloppiness_fails(tmp_path, text):
    assert run(tmp_path, text)[0] != 0


def test_slow_tests_run_when_asked(tmp_path):
    text = "import pytest\n@pytest.mark.slow\ndef test_one(): pass\ndef test_two(): pass\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "1 passed, 1 deselected" in run(tmp_path / "a", text)[1]
    assert "1 passed, 1 deselected" in run(tmp_path / "b", text, "-m", "slow")[1]


@pytest.mark.parametrize("more", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=["alone", "workers"])
def test_a_run_that_is_stopped_says_what_failed(tmp_path, more):
    """By `timeout`, or by whoever lent the machine: as by Ctrl-C."""
    if more:
        pytest.importorskip("xdist")
    text = (
        "import pathlib, time\ndef test_bad():\n    assert 1 == 2, 'the reason'\n"
        "def test_slow():\n    time.sleep(1)\n    pathlib.Path('under way').touch()\n    time.sleep(60)\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_one.py").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *more, "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "under way").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 2 and "the reason" in printed and "1 failed" in printed, printed


def test_files_that_need_a_missing_package_are_left_out_with_the_reason(tmp_path):
    """With a package that nobody has in the place of those that a bare GPU machine lacks."""
    (tmp_path / "tests").mkdir()
    text = (ROOT / "tests" / "conftest.py").read_text()
    assert "hypothesis" in text and "scipy" in text
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = re.sub(r"^PACKAGES = .*$", 'PACKAGES = ("no_such_package",)', text, flags=re.MULTILINE)
    (tmp_path / "tests" / "conftest.py").write_text(changed.replace('_is_missing("ml_dtypes")', "True"))
    (tmp_path / "tests" / "shared.py").write_text("from no_such_package import something\n")
    (tmp_path / "tests" / "test_with.py").write_text("from tests.shared import something\n")
    (tmp_path / "tests" / "test_without.py").write_text(
        "import pytest\n@pytest.mark.parametrize('d', ['float32', 'bfloat16'])\ndef test_one(d): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout, done.stdout
    assert "LEFT OUT, no_such_package is not installed" in done.stdout and "bfloat16 needs ml_dtypes" in done.stdout
    assert "tests/shared.py, tests/test_with.py" in done.stdout
