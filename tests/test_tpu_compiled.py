"""The TPU kernels as the TPU compiler sees them: bytes, layouts, limits; without a TPU.

Needs the `libtpu` wheel, which `make compiled` installs. One process at a time can hold
that compiler, so these run in one.
"""

import math
import pathlib
import sys

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
compilers = pytest.importorskip("benchmarks.compilers", reason="no benchmarks here")
reason = compilers.unavailable("tpu")
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

from benchmarks import hlo_bytes, shapes, tpu_kernels  # noqa: E402

pytestmark = pytest.mark.xdist_group("libtpu")
CASES = [
    ("v5e", "8192x4096", "bfloat16"),
    ("v5e", "16384x1024", "float32"),
    ("v6e", "32768x128", "float32"),
    ("v6e", "4096x16384", "bfloat16"),
    ("v5p", "8192x5120", "bfloat16"),
    ("v7x", "8192x4096", "float32"),
]


@pytest.mark.parametrize("name", tpu_kernels.FLOORS)
@pytest.mark.parametrize(("generation", "shape", "dtype"), CASES)
def test_each_array_crosses_memory_once(generation, shape, dtype, name):
    shape = shapes.parse(shape)
    device = compilers.device("tpu", generation)
    made = tpu_kernels.program(name, "pallas_tpu", shape, dtype)
    compiled = compilers.compile_for("tpu", device, *made)
    moved = hlo_bytes.total(compiled.as_text())
    array = math.prod(shape) * jnp.dtype(dtype).itemsize
    small = 12 * shape.rows + 4 * 64 * shape.features  # statistics; parameters' sums
    floor = tpu_kernels.FLOORS[name] * array
    assert floor <= moved <= 1.001 * floor + small
    assert compiled.memory_analysis().temp_size_in_bytes <= array / 64
