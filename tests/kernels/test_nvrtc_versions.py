"""Every kernel compiles with the oldest compilers that CuPy may find: those of CUDA 12.0 and 13.0."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from tests.kernels.nvrtc import OPTIONS, one_of_each

VERSIONS = {"12.0": "nvidia-cuda-nvrtc-cu12==12.0.*", "13.0": "nvidia-cuda-nvrtc==13.0.*"}


@pytest.fixture(scope="module", params=VERSIONS)
def compiler(request, tmp_path_factory):
    """Return NVRTC of a version, as a library."""
    folder = tmp_path_factory.mktemp("nvrtc")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run([*pip, VERSIONS[request.param]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NVRTC {request.param} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    (builtins,) = folder.rglob("libnvrtc-builtins.so.??.?")
    ctypes.CDLL(str(builtins))  # which the other one then finds
    return ctypes.CDLL(str(next(builtins.parent.glob("libnvrtc.so.??"))))


def log_of(library, text, options):
    """Return (status, the compiler's log)."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    status = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode()


@pytest.mark.slow
@pytest.mark.parametrize("specialisation", one_of_each(), ids=lambda s: s.name)
def test_compiles(compiler, specialisation):
    """What a compiler does not know is seldom in one dtype alone, so one of each kernel is enough."""
    status, log = log_of(compiler, specialisation.text, (*OPTIONS, "-arch=sm_90"))
    assert status == 0, log
    assert log_of(compiler, specialisation.text + "undefined_name", (*OPTIONS, "-arch=sm_90"))[0] != 0
