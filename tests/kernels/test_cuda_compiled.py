"""What programs compiled for a CUDA GPU, without one, move to and from its memory."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="compiling for CUDA needs wheels that are not installed;"
        " benchmarks/support/compilers.py lists them",
    ),
    pytest.mark.skipif(
        not (ROOT / "benchmarks").is_dir(),
        reason="there is no benchmarks/ beside tests/",
    ),
]


@pytest.mark.parametrize(
    ("shape", "joint"), (("8192x4096", 1.0), ("32768x128", 1.0), ("4096x768", 0.79))
)
def test_on_cuda_the_norm_moves_no_more_bytes_than_flaxs(shape, joint, tmp_path):
    """In one jit, in a block, in scanned layers: `benchmarks/support/programs.py`."""
    results = tmp_path / "results.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_only", "--platform", "cuda"]
        + ["--norms", "ours", "flax", "--programs", "joint", "block", "layers"]
        + ["--shape", shape, "--json", str(results)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    cases = json.loads(results.read_text())["results"]
    ours = [case for case in cases if case["norm"] == "ours"]
    assert len(ours) == 6
    for case in ours:  # the third number a row makes the thousandth
        most = joint if case["program"] == "joint" else 1
        assert case["over flax"] <= most + 0.001, case
