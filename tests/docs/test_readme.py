"""Every Python block of the README runs, one after the other as a reader would."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore:batch_normalization is a legacy function:DeprecationWarning")
def test_the_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["dx"].shape == (64, 8)
    assert names["dgamma"].shape == (8,)
    assert names["y"].shape == (4, 10, 32)
