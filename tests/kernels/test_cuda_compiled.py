"""Programs compiled for CUDA GPUs, without a GPU: bytes moved, registers, spills.

`test_cuda.py` has the values of our kernels, by emulation.
"""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_layernorm as jln
from jax_layernorm._kernels import cuda
from jax_layernorm._kernels.cuda import _compile, _tiles

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


def compile_only(tmp_path, *arguments):
    results = tmp_path / "results.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_only", "--platform", "cuda"]
        + [*arguments, "--json", str(results)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return json.loads(results.read_text())["results"]


@pytest.mark.parametrize(
    ("shape", "joint"), (("8192x4096", 1.0), ("32768x128", 1.0), ("4096x768", 0.79))
)
def test_on_cuda_the_norm_moves_no_more_bytes_than_flaxs(shape, joint, tmp_path):
    """In one jit, in a block, in scanned layers; see `benchmarks/support/programs.py`."""
    cases = compile_only(
        tmp_path, "--norms", "ours", "flax", "--programs", "joint", "block", "layers",
        "--shape", shape,
    )  # fmt: skip
    ours = [case for case in cases if case["norm"] == "ours"]
    assert len(ours) == 6
    for case in ours:  # the thousandth is the third number of each row
        most = joint if case["program"] == "joint" else 1
        assert case["over flax"] <= most + 0.001, case


@pytest.mark.parametrize("shape", ("8192x1024", "16384x4096"))
def test_the_cuda_kernels_move_the_least_bytes(shape, tmp_path):
    """In whole programs, because XLA copies nothing to call them."""
    programs = ("joint", "add joint")
    cases = compile_only(
        tmp_path, "--norms", "cuda", "--shape", shape, "--programs", *programs
    )
    assert [case["program"] for case in cases] == [p for p in programs for _ in "12"]
    for case in cases:
        assert case["over the floor"] <= 1.03, case


# ---- our kernels, compiled by NVRTC

GPUS = [_tiles.Gpu(*gpu) for gpu in ((80, 108), (90, 132), (100, 148), (120, 170))]
FEATURES = (64, 100, 128, 768, 1000, 1024, 4096, 8192, 16384, 65536)
FROM_SHAPES = (128, 768, 1000, 1024, 4096, 16384)  # benchmarks/support/shapes.py


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability}")
def test_registers_suffice(gpu):
    """No spill at the shapes of the benchmarks, at most 16 bytes at any other."""
    for features, dtype, direction, adds in itertools.product(
        FEATURES, ("bfloat16", "float32"), ("forward", "backward"), (False, True)
    ):
        macros, tile = kernel_of(direction, features, dtype, gpu, adds=adds)
        if tile is None:
            assert gpu.capability in (80, 120)
            assert features > 8192 or (adds and dtype == "float32")
            continue
        image, log = _compile.compiled(macros, gpu.capability, "--ptxas-options=-v")
        spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
        case = (features, dtype, direction, adds, spilled)
        assert spilled <= (0 if features in FROM_SHAPES else 16), case
        assert image.data.startswith(b"\x7fELF")


@pytest.mark.parametrize("features", (768, 4096))
def test_registers_suffice_for_rounding_before_the_scale(features):
    for direction, adds in itertools.product(("forward", "backward"), (False, True)):
        macros, _ = kernel_of(
            direction, features, "bfloat16", GPUS[1], adds=adds, rounds=True
        )
        _, log = _compile.compiled(macros, 90, "--ptxas-options=-v")
        assert re.search(r"(\d+) bytes spill stores", log)[1] == "0", (direction, adds)


def kernel_of(direction, features, dtype, gpu, *, adds, rounds=False):
    """Macros and tile of a layer norm's kernel that does the most."""
    dtype, f32 = jnp.dtype(dtype), jnp.dtype("float32")
    read = [dtype.itemsize] * (1 + (direction == "backward") + adds)
    tile = _tiles.tile(direction, 8192, features, read, dtype.itemsize, gpu)
    if tile is None:
        return None, None
    arrays = {"X": dtype, "SCALE": f32}
    has = {"CENTER": True, "ROUND": rounds, "HAS_SCALE": True, "SCALE_OFFSET": 0.0}
    if direction == "forward":
        arrays |= {"RESIDUAL": dtype, "RESIDUAL_OUT": dtype, "BIAS": f32, "Y": dtype}
        arrays |= {"PRODUCT": f32, "SUM": f32}
        has |= {"HAS_RESIDUAL": adds, "HAS_BIAS": True, "HAS_STATISTICS": True}
        has |= {"EPSILON": 1e-6}
    else:
        arrays |= {"DY": dtype}
        has |= {"HAS_DRESIDUAL_OUT": adds, "HAS_DMEAN": False, "HAS_DRSTD": False}
        has |= dict.fromkeys(("WITH_DX", "WITH_DSCALE", "WITH_DBIAS"), True)
        has |= {"FETCH_FIRST": tile.cluster in _tiles.FETCH_FIRST}
    return cuda._macros(direction.upper(), features, tile, arrays, **has), tile


def test_an_image_is_the_same_each_time_and_compiled_once():
    """So JAX's persistent cache finds it, and lowering stays cheap."""
    macros, _ = kernel_of("forward", 768, "bfloat16", GPUS[1], adds=False)
    first = _compile.image(macros, 90)
    assert _compile.image(macros, 90) is first
    assert _compile.compiled(macros, 90)[0] == first
    ptx = _compile.image(macros, 0).data
    assert b".target sm_80" in ptx and ptx.endswith(b"\0")


def test_the_pauses_of_the_device_plan_compile():
    from benchmarks import cuda_device

    for direction in ("forward", "backward"):
        macros, tile = kernel_of(direction, 65536, "bfloat16", GPUS[1], adds=False)
        assert tile.cluster > 1
        images = {_compile.image(macros, 90)}
        for old, new in cuda_device.SKEWS.values():
            with cuda_device.source_with(old, new):
                images.add(_compile.image(macros, 90))
        assert len(images) == 1 + len(cuda_device.SKEWS)


def test_the_error_has_what_the_compiler_says():
    with pytest.raises(RuntimeError, match=r"cannot compile norm.cu:(.|\n)*error"):
        _compile.image(("JLN_FORWARD",), 90)


def test_by_name_it_is_lowered_without_a_gpu():
    x = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16)
    params = jax.eval_shape(lambda: jln.init_params(1024))

    def loss(params, x):
        y = jln.layer_norm(params, x, implementation="cuda")
        return jnp.sum(y.astype(jnp.float32))

    lowered = (
        jax.jit(jax.grad(loss)).trace(params, x).lower(lowering_platforms=("cuda",))
    )
    calls = re.findall(r'custom_call @(\w+)\(.*?kernel = "(\w+)"', lowered.as_text())
    kernels = ["norm_forward", "norm_backward", "norm_sum_parts"]
    assert calls == [("jax_layernorm_cuda_launch", kernel) for kernel in kernels]
