"""Benchmark of Weir beside simple references: `python -m tests.performance`."""
