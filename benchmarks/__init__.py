"""Timings, `python -m benchmarks.speed.NAME`, which print tables and can write JSON."""
