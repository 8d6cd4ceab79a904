"""The TPU kernels as the TPU compiler sees them: bytes, layouts, limits; without a TPU.

Needs the `libtpu` wheel, which `make compiled` installs. One process at a time can hold
that compiler, so these run in one.
"""

import itertools
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
WIDTHS = (
    64, 128, 256, 384, 640, 768, 1000, 1024, 1152, 1536, 2048, 2304, 3072, 4096, 4608,
    5120, 6144, 7168, 8192, 12288, 16384, 19584, 24576, 32768,
)  # fmt: skip
TOO_WIDE = {
    24576: [("add backward", "float32")],
    32768: [(name, "float32") for name in ("backward", "add forward", "add backward")],
}


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


@pytest.mark.parametrize("features", WIDTHS)
def test_whatever_it_takes_compiles(features):
    """On the chip with the least fast memory; blocks of every kind, and ragged ones."""
    device = compilers.device("tpu", "v5e")
    refused = []
    cases = itertools.product(
        (1, 40, 4097), tpu_kernels.FLOORS, ("bfloat16", "float32")
    )
    for rows, name, dtype in cases:
        made = tpu_kernels.program(
            name, "pallas_tpu", shapes.Shape(rows, features), dtype
        )
        try:
            hlo = compilers.compile_for("tpu", device, *made).as_text()
        except NotImplementedError as error:
            refused.append((name, dtype, "fit into fast memory" in str(error)))
        else:
            assert "tpu_custom_call" in hlo, (rows, name, dtype)
    assert refused == 3 * [(*case, True) for case in TOO_WIDE.get(features, [])]
