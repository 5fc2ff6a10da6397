"""Batch normalisation: plain, with residual and ReLU, renorm, ghost batches, several axes."""

from __future__ import annotations

OPS = ("batch_norm",)


def test_batch_norm(case, measure_case):
    measure_case(case)
