"""The TPU kernels as the TPU compiler sees them: bytes, layouts, limits; without a TPU.

They need the `libtpu` wheel, which `make compiled` installs. Only one process at a time
can hold that compiler, so all tests run in the same process.
"""

import functools
import itertools
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln
from jax_layernorm._kernels.pallas_tpu import _backward

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
compilers = pytest.importorskip(
    "benchmarks.support.compilers", reason="no benchmarks here"
)
reason = compilers.unavailable("tpu")
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

from benchmarks import compile_only, tpu_layers  # noqa: E402
from benchmarks.support import hlo_bytes, programs, shapes, tpu_passes  # noqa: E402

pytestmark = pytest.mark.xdist_group("libtpu")
CASES = [
    ("v5e", "8192x4096", "bfloat16"),
    ("v5e", "16384x1024", "float32"),
    ("v6e", "32768x128", "float32"),
    ("v6e", "4096x16384", "bfloat16"),
    ("v5p", "8192x5120", "bfloat16"),
    ("v7x", "8192x4096", "float32"),
]
WIDTHS = (  # one of each kind: narrow, odd, in registers, in tiles, and the widest of each
    64, 128, 256, 640, 1000, 1024, 2048, 2304, 5120, 8192, 16384, 19584, 24576, 32768,
)  # fmt: skip
TOO_WIDE = {
    24576: [("add backward", "float32")],
    32768: [(name, "float32") for name in ("backward", "add forward", "add backward")],
}


@pytest.mark.parametrize("name", tpu_passes.PASSES)
@pytest.mark.parametrize(("generation", "shape", "dtype"), CASES)
def test_each_array_crosses_memory_once(generation, shape, dtype, name):
    shape = shapes.parse(shape)
    device = compilers.device("tpu", generation)
    made = tpu_passes.program(name, "pallas_tpu", shape, dtype)
    compiled = compilers.compile_for("tpu", device, *made)
    moved = hlo_bytes.total(compiled.as_text())
    array = math.prod(shape) * jnp.dtype(dtype).itemsize
    small = 12 * shape.rows + 4 * 64 * shape.features  # statistics; parameters' sums
    floor = programs.FLOOR_ARRAYS[name] * array
    assert floor <= moved <= 1.001 * floor + small
    assert compiled.memory_analysis().temp_size_in_bytes <= array / 64


@pytest.mark.parametrize(
    ("shape", "dtype", "program"),
    [
        *itertools.product(
            ("8192x768", "8192x2048", "2048x8192"), ("bfloat16", "float32"), ["joint"]
        ),
        ("8192x768", "float32", "block"),  # which takes the compiler a minute
        ("8192x2048", "bfloat16", "block"),
    ],
)
def test_the_xla_implementation_moves_no_more_bytes_than_flaxs(shape, dtype, program):
    """Except eight elements of a row, which are read to guess its mean."""
    shape, device = shapes.parse(shape), compilers.device("tpu", "v5e")
    moved = {
        norm: compile_only.measure("tpu", device, program, norm, shape, dtype)["bytes"]
        for norm in ("xla", "flax")
    }
    few = 8 * shape.rows * jnp.dtype(dtype).itemsize
    saved = 3 * 4 * shape.rows  # statistics, written and read
    assert moved["xla"] <= moved["flax"] + few + 2 * saved


def test_the_kernels_of_a_decoder_are_told_apart():
    """`benchmarks.tpu_layers` needs this to count their cycles."""
    shape, device = shapes.parse("1024x256"), compilers.device("tpu", "v5e")
    norm, add_norm = tpu_layers.norm_called("fused add")
    made = programs.decoder(
        norm, add_norm, shape, tpu_layers.DTYPE,
        layers=None, attention=programs.flash_attention,
    )  # fmt: skip
    hlo = compilers.compile_for("tpu", device, *made).as_text()
    kernels = [
        tpu_layers.kernel_of(line.strip(), math.prod(shape)) for line in hlo.split("\n")
    ]
    attention = ["attention forward", "attention dq", "attention dkv"]
    assert sorted(k for k in kernels if k) == sorted([*tpu_passes.PASSES, *attention])


@pytest.mark.parametrize("features", WIDTHS)
def test_whatever_it_takes_compiles(features):
    """On the chip with the least fast memory; blocks of every kind, and ragged ones."""
    device = compilers.device("tpu", "v5e")
    refused = []
    cases = itertools.product((1, 4097), tpu_passes.PASSES, ("bfloat16", "float32"))
    for rows, name, dtype in cases:
        shape = shapes.Shape(rows, features)
        try:
            made = tpu_passes.program(name, "pallas_tpu", shape, dtype)
            hlo = compilers.compile_for("tpu", device, *made).as_text()
        except NotImplementedError as error:
            refused.append((name, dtype, "fit into fast memory" in str(error)))
        else:
            assert "tpu_custom_call" in hlo, (rows, name, dtype)
    assert refused == 2 * [(*case, True) for case in TOO_WIDE.get(features, [])]


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("features", (2304, 5120, 16384))
def test_the_statistics_of_as_many_rows_as_are_read_at_once_fit(features, dtype):
    rows = _backward.AT_ONCE
    made = tpu_passes.program(
        "add backward", "pallas_tpu", shapes.Shape(rows, features), dtype
    )
    device = compilers.device("tpu", "v5e")
    hlo = compilers.compile_for("tpu", device, *made).as_text()
    assert "tpu_custom_call" in hlo


@pytest.mark.parametrize("features", (128, 1024, 16384))
def test_rounding_before_the_scale_compiles(features):
    norm = functools.partial(
        jln.layer_norm, round_before_scale=True, implementation="pallas_tpu"
    )

    def both(params, x, dy):
        y, pullback = jax.vjp(norm, params, x)
        return y, *pullback(dy)

    x = jax.ShapeDtypeStruct((4096, features), "bfloat16")
    params = {k: jax.ShapeDtypeStruct((features,), x.dtype) for k in ("scale", "bias")}
    device = compilers.device("tpu", "v5e")
    hlo = compilers.compile_for("tpu", device, both, (params, x, x)).as_text()
    assert len(re.findall("layer_norm_(?:for|back)ward.*tpu_custom_call", hlo)) == 2


LAYOUTS = {  # of x and of the parameters over two by two chips
    "batch": (P("data"), P(None)),
    "features": (P(None, "model"), P("model")),
    "both": (P("data", "model"), P("model")),
}
SPLIT = {  # collectives of both passes together; and kernels
    (AxisType.Auto, "batch"): (1, 0),
    (AxisType.Auto, "features"): (4, 0),
    (AxisType.Auto, "both"): (5, 0),
    (AxisType.Explicit, "batch"): (1, 2),
    (AxisType.Explicit, "features"): (2, 0),
    (AxisType.Explicit, "both"): (3, 0),
    ("shard_map", "batch"): (1, 2),
    ("shard_map", "features"): (2, 0),
    ("shard_map", "both"): (3, 0),
}


@pytest.mark.parametrize(("kind", "layout"), SPLIT)
def test_split_over_four_chips(kind, layout):
    chips = np.array(compilers.devices("tpu", "v5e")).reshape(2, 2)
    types = (AxisType.Explicit if kind == AxisType.Explicit else AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(chips, ("data", "model"), axis_types=types)
    of_x, of_params = LAYOUTS[layout]
    by_kernels = SPLIT[kind, layout][1] > 0
    norm = functools.partial(
        jln.layer_norm, implementation="pallas_tpu" if by_kernels else None
    )
    if kind == "shard_map":
        if layout != "batch":
            norm = functools.partial(norm, axis_name="model")
        norm = jax.shard_map(
            norm, mesh=mesh, in_specs=(of_params, of_x), out_specs=of_x
        )

    def run(params, x, dy):
        y, pullback = jax.vjp(norm, params, x)
        return y, pullback(dy)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        )

    x = struct((2048, 1024), "float32", of_x)
    params = dict.fromkeys(("scale", "bias"), struct((1024,), "float32", of_params))
    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(params, x, x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    collectives = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
        r"(?:-start)?\(",
        text,
    )
    kernels = re.findall(r"%layer_norm_\w+[\w.]* = ", text)
    assert (len(collectives), len(kernels)) == SPLIT[kind, layout], collectives
    assert "all-gather" not in collectives or kind != AxisType.Auto
