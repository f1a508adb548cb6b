"""Timings: each script runs as `python -m benchmarks.NAME`, prints a table and can write JSON."""
