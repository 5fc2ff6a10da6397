"""The residual addition."""

from __future__ import annotations

OPS = ("residual",)


def test_residual(case, measure_case):
    measure_case(case)
