"""Residual LSTM and GRU cells, and whole sequences, both ways."""

from __future__ import annotations

OPS = ("lstm", "gru")


def test_recurrent(case, measure_case):
    measure_case(case)
