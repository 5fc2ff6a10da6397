"""Fixtures of the pytest-benchmark suites: the small shapes with --benchmark-disable, and a checked, timed body."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import gpulayers as gl
from benchmarks import data, own
from benchmarks.bytes_moved import minimum_bytes
from benchmarks.measure import TOLERANCE, error_of
from benchmarks.shapes import suite_cases
from benchmarks.truth import truth
from gpulayers import _cupy


def _chosen(config):
    return suite_cases(quick=bool(config.getoption("benchmark_disable", False)))


def pytest_generate_tests(metafunc):
    """Give every test its operations' cases: ``OPS`` of its module names the beginnings of the operations."""
    if "case" in metafunc.fixturenames:
        ops = metafunc.module.OPS
        chosen = [case for case in _chosen(metafunc.config) if case.op.startswith(ops)]
        metafunc.parametrize("case", chosen, ids=[f"{case.regime} {case.name}".replace(" ", "-") for case in chosen])


@pytest.fixture
def measure_case(benchmark):
    """Return a function that checks a case against float64 and then times it."""
    on_gpu = gl.gpu_available()

    def run(case):
        xp = _cupy.cupy() if on_gpu else np
        host = data.make(case)
        wanted = truth(case, host)
        with gl.device("gpu" if on_gpu else "cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            function = own.prepare(case, data.place(case, host, xp), xp)
            error = error_of(function(), wanted, gl.asnumpy)
            assert error <= TOLERANCE[case.dtype], case.name

            def timed():
                function()
                if on_gpu:  # pytest-benchmark times the host
                    xp.cuda.get_current_stream().synchronize()

            benchmark.group = f"{case.op} {case.mode} {case.layout} {case.dtype} {case.regime}"
            benchmark.extra_info.update(
                shape=list(case.shape), minimum_bytes=minimum_bytes(case), error=error, groups=case.groups,
                device="gpu" if on_gpu else "cpu",
            )  # fmt: skip
            benchmark.pedantic(timed, rounds=7, warmup_rounds=2, iterations=1)

    return run
