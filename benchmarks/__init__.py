"""Benchmarks: pytest-benchmark suites (``pytest benchmarks``) and a report (``python -m benchmarks``)."""
