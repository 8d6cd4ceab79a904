"""Benchmarks: one command each, `python -m benchmarks.NAME --help`.

A table on the screen, JSON with `--json FILE`. Nothing here is timed by a test.
"""
