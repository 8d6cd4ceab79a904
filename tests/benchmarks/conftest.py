"""Makes `benchmarks/` importable, which is no part of an installed package."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
