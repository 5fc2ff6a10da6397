"""Every specialisation compiles for every architecture, and keeps its values in registers."""

from __future__ import annotations

import re

import pytest

from gpulayers.launch import kernel_list
from tests.kernels.nvrtc import (
    ARCHITECTURES,
    BETWEEN,
    RELATIVES,
    compile_for,
    one_of_each,
    parse,
    ptx_for,
    supported,
    unusable_reason,
)

pytestmark = pytest.mark.skipif(bool(unusable_reason()), reason=unusable_reason() or "NVRTC is there")

SPECIALISATIONS, ONE_OF_EACH = kernel_list(), one_of_each()


def check(specialisation, architecture):
    if architecture < specialisation.minimum_arch:
        pytest.skip(f"needs sm_{specialisation.minimum_arch}")
    if not supported(architecture):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    found = compile_for(specialisation.text, specialisation.name, architecture)
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), found
    assert found.shared <= 48 * 1024, found  # what a launch without the opt-in gets


@pytest.mark.parametrize("specialisation", ONE_OF_EACH, ids=repr)
def test_compiles_without_spills(specialisation):
    check(specialisation, 90)


SLOW = [pytest.param(architecture, marks=pytest.mark.slow) for architecture in ARCHITECTURES]
LONG = [pytest.param(architecture, marks=pytest.mark.long) for architecture in BETWEEN]


@pytest.mark.parametrize("architecture", SLOW + LONG)
@pytest.mark.parametrize("specialisation", SPECIALISATIONS, ids=repr)
def test_every_specialisation_compiles_without_spills(specialisation, architecture):
    check(specialisation, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BETWEEN + RELATIVES)
@pytest.mark.parametrize("specialisation", ONE_OF_EACH, ids=repr)
def test_compiles_without_spills_for_others(specialisation, architecture):
    check(specialisation, architecture)


@pytest.mark.parametrize(
    "name", ["gl_bn_sums", "gl_bn_apply", "gl_bn_backward", "gl_bn_forward", "gl_bn_statistics", "gl_global_norm"]
)
def test_shared_memory_can_be_read_16_bytes_at_a_time(name):
    """What lies 4 or 8 bytes off is a misaligned address on a GPU; on a CPU it works."""
    specialisation = [s for s in SPECIALISATIONS if s.name == name and "float32" in s.defines.values()][-1]
    ptx = ptx_for(specialisation.text, name, 90)
    assert set(re.findall(r"\.shared \.align (\d+)", ptx)) == {"16"}


def test_offsets_are_checked_where_the_compiler_can():
    """NVRTC before CUDA 13.4 knows no offsetof in any spelling: there the check must vanish, not the kernel."""
    text = next(s for s in SPECIALISATIONS if s.name == "gl_residual_add").text
    wrong = text.replace("GL_LIES_AT(gl_residual_add_arguments, y, 8)", "GL_LIES_AT(gl_residual_add_arguments, y, 12)")
    assert wrong != text
    question = "#if __has_builtin(__builtin_offsetof)\n#error it has one\n#endif\n"
    try:
        ptx_for(question + text, "gl_residual_add", 90)
    except AssertionError as error:
        assert "it has one" in str(error)
        with pytest.raises(AssertionError, match="gl_residual_add: y"):
            ptx_for(wrong, "gl_residual_add", 90)
    older = "#define __builtin_offsetof(...) unknown\n" + text.replace("__has_builtin(__builtin_offsetof)", "0")
    assert ".entry gl_residual_add(" in ptx_for(older, "gl_residual_add", 90)


def test_a_spill_is_seen():
    text = """
    extern "C" __global__ void __launch_bounds__(1024) gl_spilling(const float* x, float* out) {
        float kept[128];
        #pragma unroll
        for (int i = 0; i < 128; ++i) kept[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 128; ++i) out[i * 1024 + threadIdx.x] = kept[127 - i] * kept[i];
    }
    """
    found = compile_for(text, "gl_spilling", 90)
    assert found.spill_stores > 0
    assert found.registers <= 64


def test_a_text_that_does_not_compile_is_reported():
    with pytest.raises(AssertionError, match="undefined_name"):
        compile_for('extern "C" __global__ void gl_wrong() { undefined_name; }', "gl_wrong", 90)


def test_the_report_of_the_named_entry_is_read():
    log = (
        "ptxas info    : Compiling entry function 'a' for 'sm_90'\n"
        "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info : Used 7 registers\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_90'\n"
        "    0 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 30 registers, 2048 bytes smem\n"
    )
    assert parse(log, "b") == (30, 0, 4, 12, 2048)


def test_the_list_has_every_dtype_of_the_residual_add():
    names = {s.defines["STORAGE"] for s in SPECIALISATIONS if s.name == "gl_residual_add"}
    assert names == {"float16", "bfloat16", "float32", "float64"}
