"""Where compiled kernels and compile reports are kept between runs."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


@functools.cache
def cache_folder() -> Path:
    """Return the folder of compiled kernels: GPULAYERS_EMULATION_CACHE, or one per user among the temporary files."""
    default = Path(tempfile.gettempdir()) / f"gpulayers-emulation-{os.getuid()}"
    folder = Path(os.environ.get("GPULAYERS_EMULATION_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
