"""Benchmarks: one command each, `python -m benchmarks.NAME --help`; see README.md.

A command prints a table, and writes JSON with `--json FILE`. What commands share is in
`support`, and what they measured in `results/`. Tests run them, but time nothing.
"""
