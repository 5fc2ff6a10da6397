"""Dense and convolution for context, a training step of a digits network, optimizer steps."""

from __future__ import annotations

OPS = ("dense", "conv2d", "digits", "momentum", "adam")


def test_training(case, measure_case):
    measure_case(case)
