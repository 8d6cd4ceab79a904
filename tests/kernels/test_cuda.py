"""The CUDA kernels without a GPU: values by emulation, the choice, the tiles, the launch.

The emulation (tests/kernels/cuda, tests/support/cuda_emulation.py) runs the same CUDA C++
on the CPU twice, with the threads in a different order, and demands the same bits.
`test_cuda_compiled.py` compiles the kernels for GPUs.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
from typing import NamedTuple

import cuda_emulation
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln
from jax_layernorm import _kernels
from jax_layernorm._kernels import cuda
from jax_layernorm._kernels.cuda import _compile, _tiles

H100, A100, CONSUMER = _tiles.Gpu(90, 132), _tiles.Gpu(80, 108), _tiles.Gpu(120, 170)
needs_a_compiler = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())
)


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: str = "float32"
    center: bool = True
    residual: str | None = None  # its dtype
    params: tuple[str, ...] = ("scale", "bias")
    params_dtype: str = "float32"
    axis: tuple[int, ...] = (-1,)
    offset: float = 0.0
    scale_offset: float = 0.0
    statistics: bool = False  # returned, and then they have cotangents
    gpu: _tiles.Gpu = cuda_emulation.GPU


def draw(case):
    """Parameters, x and the residual, if there is one, and the cotangents."""
    rng = np.random.default_rng(0)
    x, residual, dy, dresidual_out = rng.normal(size=(4, *case.shape))
    normalized = tuple(case.shape[axis] for axis in case.axis)
    params = {
        name: jnp.asarray(rng.normal(size=normalized), case.params_dtype)
        for name in case.params
    }
    arrays = [jnp.asarray(x + case.offset, case.dtype)]
    if case.residual is not None:
        arrays.append(jnp.asarray(residual, case.residual))
    dtype = jnp.result_type(*arrays)
    return (
        params,
        arrays,
        jnp.asarray(dy, case.dtype),
        jnp.asarray(dresidual_out, dtype),
    )


def function_of(case):
    name = "layer_norm" if case.center else "rms_norm"
    added = "" if case.residual is None else "add_"
    options = {"axis": case.axis, "scale_offset": case.scale_offset}
    if case.statistics:
        options["return_statistics"] = True
    function = getattr(jln, added + name)
    return functools.partial(function, implementation="cuda", **options)


def check(case):
    params, arrays, dy, dresidual_out = draw(case)

    def run(params, *arrays):
        out, pullback = jax.vjp(function_of(case), params, *arrays)
        y, *rest = jax.tree.leaves(out)
        cotangents = [dy]
        if case.residual is not None:
            cotangents.append(dresidual_out)
        cotangents += [jnp.cos(1.0 + a) for a in rest[len(cotangents) - 1 :]]
        grads = pullback(jax.tree.unflatten(jax.tree.structure(out), cotangents))
        return y, rest, cotangents, grads

    y, rest, cotangents, (dparams, *dx) = jax.jit(run)(params, *arrays)
    normalized, dmean, drstd = arrays[0], None, None
    if case.residual is not None:
        normalized, *rest = rest
        summed = sum(np.asarray(a, np.float32) for a in arrays)
        assert (normalized == jnp.asarray(summed, normalized.dtype)).all()
    if case.statistics:
        _, dmean, drstd = cotangents[-3:] if case.residual else [None, *cotangents[-2:]]
    right = oracle.norm(
        normalized, **params, dy=dy, axis=case.axis, center=case.center,
        scale_offset=case.scale_offset, dmean=dmean if case.center else None, drstd=drstd,
    )  # fmt: skip
    oracle.assert_close(y, right.y, against=right.y_size)
    if case.statistics:
        mean, rstd = rest
        oracle.assert_close(mean, right.mean, against=right.mean_size)
        oracle.assert_close(rstd, right.rstd)
    dx_right, size = right.dx, right.dx_size
    if case.residual is not None:
        dx_right = dx_right + np.asarray(dresidual_out, np.float64)
        size = size + np.abs(np.asarray(dresidual_out, np.float64)).max()
    for gradient in dx:
        oracle.assert_close(gradient, dx_right, against=size)
    rows = right.rstd.size
    for name in dparams:
        oracle.assert_close(
            dparams[name], getattr(right, f"d{name}"), summed=rows,
            against=getattr(right, f"d{name}_size"),
        )  # fmt: skip


@pytest.fixture
def emulated(monkeypatch, quick_compilation):
    """`emulated(gpu)` makes `implementation="cuda"` run here as on that GPU."""
    jax.clear_caches()
    yield functools.partial(cuda_emulation.install, monkeypatch)
    jax.clear_caches()


CASES = {
    "a row is one element": Case((70, 1), params=("bias",)),
    "rows share a warp": Case((70, 5), offset=3.0, statistics=True),
    "a row is half a warp": Case((101, 128), "bfloat16", residual="bfloat16"),
    "ragged": Case((37, 1000), residual="float32", params=("scale",), offset=100.0),
    "no vector fits": Case((23, 333), "float16", center=False, params_dtype="float16"),
    "whole warps": Case(
        (3, 9, 768), "bfloat16", center=False, residual="bfloat16", params=("scale",),
        params_dtype="bfloat16", scale_offset=1.0, statistics=True,
    ),
    "mixed": Case((11, 2048), "float32", residual="bfloat16", params=()),
    "two axes": Case((5, 8, 24), "bfloat16", axis=(-2, -1), residual="float32"),
    "large mean": Case((20, 512), offset=1e5),
    "cluster of 2": Case((7, 32768), "bfloat16", statistics=True),
    "ragged cluster": Case((4, 40000), center=False, params=("scale",)),
    "no clusters": Case((9, 8192), "bfloat16", residual="bfloat16", gpu=A100),
}  # fmt: skip


@needs_a_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_right(case, emulated):
    emulated(case.gpu)
    check(case)


@needs_a_compiler
@pytest.mark.parametrize("case", ("ragged", "ragged cluster"))
def test_rows_may_be_fetched_first_or_last(case, emulated, monkeypatch):
    """The way that each does not go by default."""
    monkeypatch.setattr(_tiles, "FETCH_FIRST", (1,))
    emulated()
    check(CASES[case])


@needs_a_compiler
@pytest.mark.parametrize("case", rounded.CASES, ids=str)
def test_each_result_is_rounded_as_jax_would(case, emulated):
    emulated()
    rounded.check(case, (19, 160), "cuda")


@needs_a_compiler
def test_only_what_is_wanted_is_computed(emulated):
    emulated()
    params, (x,), dy, _ = draw(Case((30, 96)))

    def loss(params, x):
        return jnp.sum(jln.layer_norm(params, x, implementation="cuda") * dy)

    right = oracle.norm(x, **params, dy=dy)
    dscale = jax.jit(jax.grad(lambda s: loss(params | {"scale": s}, x)))(
        params["scale"]
    )
    dbias = jax.jit(jax.grad(lambda b: loss(params | {"bias": b}, x)))(params["bias"])
    dx = jax.jit(jax.grad(loss, 1))(params, x)
    oracle.assert_close(dscale, right.dscale, summed=30)
    oracle.assert_close(dbias, right.dbias, summed=30)
    oracle.assert_close(dx, right.dx, against=right.dx_size)


@needs_a_compiler
def test_a_row_depends_on_that_row_alone(emulated):
    """Not on the number of rows, nor on a NaN or an overflow in another row."""
    emulated()
    params, (x,), dy, _ = draw(Case((40, 100)))
    x = x.at[3, 7].set(jnp.nan).at[5, 2].set(jnp.inf).at[9].multiply(1e30)

    @jax.jit
    def run(x, dy):
        norm = functools.partial(jln.layer_norm, params, implementation="cuda")
        y, pullback = jax.vjp(norm, x)
        return y, *pullback(dy)

    together = run(x, dy)
    for row in (2, 9, 39):
        alone = run(x[row : row + 1], dy[row : row + 1])
        for a, b in zip(together, alone, strict=True):
            assert jnp.isfinite(b).all()
            assert a[row].tobytes() == b[0].tobytes()
    for bad in (3, 5):
        assert jnp.isnan(together[0][bad]).any()
    oracle.assert_close(together[0][9], np.asarray(params["bias"], np.float64))


@needs_a_compiler
def test_vmapped_gradients_and_second_derivatives(emulated):
    emulated()
    params, (x,), dy, _ = draw(Case((3, 8, 96)))

    def loss(params, x, dy, **options):
        return jnp.sum(
            jnp.sin(jln.rms_norm({"scale": params["scale"]}, x, **options) * dy)
        )

    def values(**options):
        norm = functools.partial(loss, **options)
        each = jax.vmap(jax.grad(norm), (None, 0, 0))(params, x, dy)
        twice = jax.grad(lambda x: jnp.sum(jax.grad(norm, 1)(params, x, dy) ** 2))(x)
        return each, twice

    ours = jax.jit(functools.partial(values, implementation="cuda"))()
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(jax.jit(values)()), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


# ---- the emulation catches what would go wrong on a GPU

RAGGED = Case((100, 1000))  # several turns of the ring
CLUSTER = Case((7, 32768), "bfloat16")
PLANTED = {
    "waits for one copy too few": (
        "norm.cu", "async_wait<kStages - 2>()", "async_wait<kStages - 1>()", RAGGED),
    "no barrier in the sum over a row": (
        "row.cuh", "    barrier(1 + group, kThreads);\n", "", RAGGED),
    "both sums of a row in one place": (
        "norm.cu", "    turn = kCluster > 1 ? turn + 1 & 3 : turn ^ 1;\n", "", RAGGED),
    "no barrier in the tree of groups": (
        "norm.cu", "      barrier(0, kBlock);\n      if (group < n - half)",
        "      if (group < n - half)", RAGGED),
    "reads a row past the end": (
        "norm.cu", "if (row < rows) {\n      ring", "if (row <= rows) {\n      ring",
        RAGGED),
    "writes past the end of a row": (
        "row.cuh", "      if (!inside(v, t)) continue;\n      Bytes* to", "      Bytes* to",
        RAGGED),
    "fetches into the stage that is read": (
        "row.cuh", "return stage == 0 ? kStages - 1 : stage - 1", "return stage", RAGGED),
    "fetches into a stage that is under way": (
        "row.cuh", "return stage == 0 ? kStages - 1 : stage - 1",
        "return stage + 1 == kStages ? 0 : stage + 1", RAGGED),
    "in a cluster, fetches into the stage that is read": (
        "row.cuh", "return stage == 0 ? kStages - 1 : stage - 1", "return stage", CLUSTER),
    "sends to a block that has not begun": (
        "row.cuh", "  cluster_barrier();", "", CLUSTER),
    "only the block waits, not the cluster": (
        "row.cuh", "wait_for(arrived, turn >> 1 & 1);", "barrier(0, kBlock);", CLUSTER),
    "waits for the phase before": (
        "row.cuh", "turn >> 1 & 1", "turn >> 1 & 1 ^ 1", CLUSTER),
    "waits for its own block alone": (
        "row.cuh", "expect(arrived, parts *", "expect(arrived, kWarps *", CLUSTER),
    "a cluster's sums in one place": (
        "row.cuh", "sums.of[set]", "sums.of[0]", CLUSTER),
}  # fmt: skip


@needs_a_compiler
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, emulated, tmp_path):
    file, old, new, case = PLANTED[bug]
    for path in cuda_emulation.SOURCES.glob("*.cu*"):
        text = path.read_text()
        if path.name == file:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / path.name).write_text(text)
    emulated(case.gpu, tmp_path)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check(case)


# ---- which problems run, and how they are cut


@pytest.fixture
def available(monkeypatch):
    """`available(gpu)`: as on a machine with NVRTC, the library and this GPU."""
    monkeypatch.setattr(cuda, "_unavailable", lambda gpu: None)
    image = _compile.Image(b"image", "digest")
    monkeypatch.setattr(_compile, "image", lambda macros, capability: image)
    jax.clear_caches()
    yield lambda gpu=H100: monkeypatch.setattr(_tiles, "gpu", lambda: gpu)
    jax.clear_caches()


def test_it_is_the_default_where_a_gpu_has_timed_it(available):
    def choice(shape=(8192, 1024), dtype="bfloat16", **options):
        x = jax.ShapeDtypeStruct(shape, dtype)
        return jln.explain({}, x, **options)["cuda"]

    available(A100)
    assert choice().implementation == "xla"
    jax.clear_caches()
    available(H100)
    for found in (choice(), choice((4096, 128), "float32"), choice((2, 2048, 768))):
        assert found.implementation == "cuda" and found.reasons["xla"]
    x = jax.ShapeDtypeStruct((8192, 1024), "bfloat16")
    for found in (
        choice((4095, 1024)), choice((8192, 1032)), choice((8192, 120)),
        choice(dtype="float16"), choice(residual=x), choice(function=jln.rms_norm),
    ):  # fmt: skip
        assert found.implementation == "xla"
        assert "only for what a GPU has timed" in found.reasons["cuda"]


@pytest.mark.parametrize(
    ("shape", "dtype", "gpu", "options", "reason"),
    (
        ((8, 1024), "float64", H100, {}, "x has the dtype float64"),
        ((8, 1024), "float32", H100, {"dtype": "float64"}, "y has the dtype float64"),
        (
            (8, 8200),
            "bfloat16",
            A100,
            {},
            "a row has 8200 elements, more than the blocks",
        ),
        ((8, 65543), "float32", H100, {}, "compute capability 9.0 can hold"),
        (
            (8, 1024),
            "float32",
            H100,
            {"mask": np.ones((8, 1), bool)},
            "there is a mask",
        ),
        ((8, 64), "float32", H100, {"axis": 0}, "are not the last ones"),
    ),
)
def test_it_says_what_it_cannot_run(shape, dtype, gpu, options, reason, x64, available):
    available(gpu)
    found = jln.explain({}, jax.ShapeDtypeStruct(shape, dtype), **options)["cuda"]
    assert found.implementation == "xla"
    assert reason in found.reasons["cuda"]


def lowered(function, *arguments, **options):
    """The kernels of the program lowered for a GPU, in their order."""
    traced = jax.jit(function, **options).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'kernel = "(norm_\w+)"', text)


BOTH_PASSES = ["norm_forward", "norm_backward", "norm_sum_parts"]


def loss(params, x):
    return jnp.sum(jnp.sin(jln.layer_norm(params, x, implementation="cuda")))


def test_it_runs_on_each_device_where_the_rows_are_split(available):
    available()
    params, x = jln.init_params(128), jnp.ones((16, 128))
    gradients = jax.grad(loss, (0, 1))
    assert lowered(gradients, params, x) == BOTH_PASSES
    for kind in ("explicit", "shard_map", "automatic"):
        axis = AxisType.Auto if kind == "automatic" else AxisType.Explicit
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis,))
        rows = NamedSharding(mesh, P("data"))
        with jax.set_mesh(mesh):
            split, whole = jax.device_put(x, rows), jax.device_put(params, P())
            if kind == "automatic":
                with pytest.raises(NotImplementedError, match="splits no kernel"):
                    lowered(gradients, whole, split)
                default = jax.grad(lambda p, x: jnp.sum(jln.layer_norm(p, x) ** 2))
                assert lowered(default, whole, split) == []
            elif kind == "explicit":
                assert lowered(gradients, whole, split) == BOTH_PASSES
            else:
                mapped = jax.shard_map(
                    lambda p, x: jax.lax.psum(loss(p, x), "data"), out_specs=P()
                )
                assert lowered(jax.grad(mapped, (0, 1)), whole, split) == BOTH_PASSES


def test_an_exported_program_has_no_kernel(available):
    available()
    x = jax.ShapeDtypeStruct((16, 128), "float32")
    exported = jax.export.export(
        jax.jit(functools.partial(jln.layer_norm, {})), platforms=("cuda",)
    )(x)
    assert "custom_call" not in exported.mlir_module()
    named = jax.jit(functools.partial(jln.layer_norm, {}, implementation="cuda"))
    with pytest.raises(NotImplementedError, match="the program is exported"):
        jax.export.export(named, platforms=("cuda",))(x)


def test_norms_that_are_mapped_are_one_launch(available):
    """With one row of parameters; XLA sums the parameters' gradients of each example."""
    available()
    params, x = jln.init_params(128), jnp.ones((4, 16, 128))
    each = jax.vmap(jax.grad(loss, 1), (None, 0))
    assert lowered(each, params, x) == ["norm_forward", "norm_backward"]
    each = jax.vmap(jax.grad(loss), (None, 0))
    assert lowered(each, params, x) == ["norm_forward"]


def test_without_a_compiler_xla_runs_and_explain_says_why(monkeypatch):
    monkeypatch.setattr(_compile, "_nvrtc", lambda: "NVRTC is not installed")
    found = jln.explain({}, jax.ShapeDtypeStruct((8, 128), "float32"))["cuda"]
    assert found.implementation == "xla" and found.reasons["cuda"].startswith("NVRTC")
    with pytest.raises(NotImplementedError, match="NVRTC is not installed"):
        jln.layer_norm({}, jnp.ones((8, 128)), implementation="cuda")


def test_the_compiler_must_fit_the_driver_and_the_gpu(monkeypatch, tmp_path):
    wheel = tmp_path / "libnvrtc.so.13"
    monkeypatch.setattr(_compile, "_candidates", lambda: iter([(13, wheel)]))
    for driver, reason in (
        (12, "the driver knows CUDA 12"),
        (None, "is not installed"),
    ):
        monkeypatch.setattr(_compile, "_driver_version", lambda driver=driver: driver)
        _compile._nvrtc.cache_clear()
        try:
            assert reason in _compile.unavailable(90)
        finally:
            _compile._nvrtc.cache_clear()
    monkeypatch.setattr(_compile, "_nvrtc", object)
    monkeypatch.setattr(_compile, "_architectures", lambda library: [80, 90])
    assert _compile.unavailable(90) is _compile.unavailable(0) is None
    assert "too old for sm_100" in _compile.unavailable(100)
    assert "and this one has 7.5" in _compile.unavailable(75)


# threads of a row, groups, elements of a vector, cluster, stages, blocks, shared bytes
TILES = {  # of bfloat16 on an H100, for rows and features
    ("forward", 32768, 128): (8, 64, 8, 1, 3, 132, 50176),
    ("forward", 20000, 100): (8, 64, 4, 1, 3, 132, 50176),
    ("forward", 4096, 768): (64, 8, 8, 1, 3, 132, 49408),
    ("forward", 8192, 1024): (64, 8, 8, 1, 3, 132, 49408),
    ("forward", 16384, 4096): (256, 2, 8, 1, 3, 132, 49408),
    ("forward", 4096, 8192): (512, 1, 8, 1, 3, 132, 49408),
    ("forward", 2048, 16384): (512, 1, 8, 1, 3, 132, 98560),
    ("forward", 512, 65536): (512, 1, 8, 4, 3, 116, 99344),
    ("forward", 64, 4096): (256, 1, 8, 1, 3, 64, 24704),
    ("forward", 7, 33): (4, 8, 1, 1, 3, 1, 1856),
    ("backward", 32768, 128): (16, 40, 8, 1, 3, 132, 62080),
    ("backward", 20000, 100): (16, 40, 4, 1, 3, 132, 62080),
    ("backward", 4096, 768): (96, 8, 8, 1, 3, 132, 74112),
    ("backward", 8192, 1024): (64, 8, 8, 1, 3, 132, 98560),
    ("backward", 16384, 4096): (256, 2, 8, 1, 3, 132, 98560),
    ("backward", 4096, 8192): (512, 1, 8, 1, 3, 132, 98560),
    ("backward", 2048, 16384): (512, 1, 8, 2, 3, 132, 98832),
    ("backward", 512, 65536): (512, 1, 8, 8, 3, 112, 100368),
    ("backward", 64, 4096): (256, 1, 8, 1, 3, 64, 49280),
    ("backward", 7, 33): (8, 4, 1, 1, 3, 2, 1984),
}


@pytest.mark.parametrize("problem", TILES, ids=str)
def test_a_tile_changes_only_on_purpose(problem):
    """After a change, `python -m benchmarks.cuda_device` has to time it on a GPU."""
    direction, rows, features = problem
    read = (2,) if direction == "forward" else (2, 2)
    assert _tiles.tile(direction, rows, features, read, 2, H100) == TILES[problem]


def test_a_gpu_is_what_jax_says_of_the_device():
    device = types.SimpleNamespace(compute_capability="9.0", core_count=132)
    assert _tiles.gpu_of(device) == H100


@given(
    direction=st.sampled_from(("forward", "backward")),
    rows=st.integers(1, 1 << 40),
    features=st.integers(1, 70000),
    read=st.lists(st.sampled_from((2, 4)), min_size=1, max_size=3),
    gpu=st.sampled_from((H100, A100, CONSUMER, _tiles.UNKNOWN)),
)
@settings(max_examples=200, deadline=None)
def test_tiles_fit_the_gpu_and_do_not_depend_on_the_rows(
    direction, rows, features, read, gpu
):
    made, few = (
        _tiles.tile(direction, n, features, read, max(read), gpu) for n in (rows, 1)
    )
    if made is None:
        assert few is None
        return  # see below
    assert made.shared_bytes <= gpu.shared_bytes
    threads = made.threads * made.groups
    assert threads <= 1024 and threads % 32 == 0
    assert features % (made.cluster * made.vector) == 0
    assert made.blocks % made.cluster == 0
    assert made.blocks <= max(gpu.multiprocessors, made.cluster)
    # Sums over a row are taken in an order that these decide.
    assert made[0] == few[0] and made[2:4] == few[2:4]


def test_no_cluster_waits_for_a_second_turn():
    """An H100 has been seen to run 15 clusters of 8 at once, not 16."""
    clusters = {size: H100.at_once(size) for size in (1, 2, 4, 8)}
    assert clusters == {1: 132, 2: 66, 4: 29, 8: 14}
    assert _tiles.tile("backward", 512, 65536, (2, 2), 2, H100).workers == 14


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_features_to_65536_have_a_tile(direction, itemsize):
    read = [itemsize] * (2 if direction == "forward" else 3)
    for features in (1, 31, 8192, 12288, 16384, 40960, 65536):
        for gpu in (H100, CONSUMER)[: 2 if features <= 16384 else 1]:
            assert _tiles.tile(direction, 64, features, read, itemsize, gpu) is not None
    widest = 16384 if direction == "forward" else 8192
    assert _tiles.tile(direction, 64, widest, [itemsize], itemsize, A100) is not None
    assert _tiles.tile(direction, 64, widest + 8, [itemsize], itemsize, A100) is None


# ---- the launcher, with a driver that only prints what it is asked to do

MOCK = pathlib.Path(__file__).parent / "cuda" / "mock_driver.cc"


@pytest.fixture(scope="module")
def mocked():
    """`mocked(script)`: its standard output, in a process with the mock of the driver."""
    if cuda_emulation.missing() is not None:
        pytest.skip(cuda_emulation.missing())
    include = jax.ffi.include_dir()
    launcher = cuda_emulation.SOURCES / "launch.cc"
    if not launcher.exists():
        pytest.skip("an installed wheel has no source of the launcher")
    text = launcher.read_text() + include
    library = cuda_emulation.build(
        ".so",
        text,
        "-shared",
        "-DJLN_WITHOUT_STREAM",
        "-isystem",
        include,
        str(launcher),
    )
    driver = cuda_emulation.build(".so", MOCK.read_text(), "-shared", str(MOCK))
    folder = driver.with_suffix("")
    folder.mkdir(exist_ok=True)
    shutil.copy(driver, folder / "libcuda.so.1")

    def run(script, *arguments, with_driver=True):
        path = [str(pathlib.Path(cuda_emulation.__file__).parent), *sys.path]
        environment = {"PYTHONPATH": os.pathsep.join(path), "LAUNCHER": str(library)}
        environment["LD_LIBRARY_PATH"] = str(folder) if with_driver else ""
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], check=True, text=True,
            capture_output=True, env=os.environ | environment,
        ).stdout  # fmt: skip

    return run


SET_UP = """
import ctypes, os, sys, warnings
import jax, jax.numpy as jnp, numpy as np
import cuda_emulation, jax_layernorm as jln
from jax_layernorm._kernels import KERNELS, _library, cuda
library = ctypes.CDLL(os.environ["LAUNCHER"])
stages = {"initialize": "jax_layernorm_cuda_prepare", "execute": _library.CUDA_LAUNCH}
jax.ffi.register_ffi_target(
    _library.CUDA_LAUNCH,
    {s: jax.ffi.pycapsule(getattr(library, n)) for s, n in stages.items()},
    platform="cpu",
)
KERNELS["cuda"] = cuda_emulation.EmulatedCuda()
cuda._unavailable = lambda gpu: None
cuda._tiles.gpu = lambda: cuda._tiles.Gpu(90, 132)
cuda._compile.image = lambda macros, capability: cuda._compile.Image(
    macros[0].encode(), str(hash(macros)))
"""

RUN_TWICE = """
x, params = jnp.ones((8192, 4096), jnp.bfloat16), jln.init_params(4096)
@jax.jit
def run(params, x):
    y, pullback = jax.vjp(
        lambda p, x: jln.layer_norm(p, x, implementation="cuda"), params, x)
    return pullback(y)
for _ in range(2):
    jax.block_until_ready(run(params, x))
"""


def test_the_launcher_loads_once_and_launches_in_order(mocked):
    lines = [json.loads(line) for line in mocked(SET_UP + RUN_TWICE).splitlines()]
    kernels = ["norm_forward", "norm_backward", "norm_sum_parts"]
    loads = [line["image"] for line in lines if line["call"] == "load"]
    assert sorted(loads) == ["JLN_BACKWARD", "JLN_FORWARD", "JLN_SUM_PARTS"]
    launches = [line for line in lines if line["call"] == "launch"]
    assert [line["kernel"] for line in launches] == kernels * 2
    attributes = {
        line["kernel"]: line["value"] for line in lines if line["call"] == "attribute"
    }
    tile = _tiles.tile("forward", 8192, 4096, [2], 2, H100)
    first, second, third = launches[:3]
    assert attributes["norm_forward"] == first["shared"] == tile.shared_bytes
    assert first["grid"] == tile.blocks == 132
    assert first["block"] == tile.threads * tile.groups
    null = [p == 0 for p in first["pointers"]]
    names = cuda.PARAMETERS["norm_forward"]
    assert dict(zip(names, null, strict=True)) == {
        name: name in ("residual", "residual_out") for name in names
    }
    assert (first["number"], second["number"], third["number"]) == (8192, 8192, 132)
    # What the backward pass leaves is what the last kernel sums.
    parts = cuda.PARAMETERS["norm_backward"].index("parts")
    assert second["pointers"][parts] == third["pointers"][0] != 0


WRONG = """
image = {"image": b"x", "digest": "x", "kernel": "norm_forward"}
numbers = {"blocks": 1, "threads": 32, "shared_bytes": 0, "number": 4}
sizes = {name: np.int64(value) for name, value in numbers.items()}
def call(**changes):
    attributes = image | sizes | {
        "parameters": np.asarray([0, -1, 1]), "sizes": np.asarray([512, 512])} | changes
    x = jnp.zeros((4, 32))
    try:
        jax.block_until_ready(jax.ffi.ffi_call(_library.CUDA_LAUNCH, x)(x, **attributes))
    except jax.errors.JaxRuntimeError as error:
        print(str(error).splitlines()[0].partition("jax_layernorm: ")[2])
    else:
        print("nothing is wrong")
call(sizes=np.asarray([512]))
call(sizes=np.asarray([512, 1024]))
call(parameters=np.asarray([0, 2]))
call(threads=np.int64(2048))
call(digest="y", kernel="none such")
call(digest="z", image=b"bad")
"""


def test_the_launcher_refuses_what_is_wrong(mocked):
    lines = [line for line in mocked(SET_UP + WRONG).splitlines() if line[0] != "{"]
    assert lines == [
        "the call has 2 arrays; it needs 1",
        "array 1 has 512 bytes; it needs 1024",
        "there is no array 2",
        "no GPU launches 1 blocks of 2048 threads with 0 bytes of shared memory",
        "none such: what the mock says (CUDA's error 500)",
        "the kernel cannot be loaded: what the mock says (CUDA's error 200)",
    ]
    (line, *_) = mocked(SET_UP + WRONG, with_driver=False).splitlines()
    assert line.startswith("the CUDA driver does not load: libcuda.so.1")


def test_the_reason_of_every_other_platform():
    reasons = jln.explain({}, jax.ShapeDtypeStruct((8, 128), "float32"))
    assert reasons["rocm"].reasons["cuda"] == "it supports CUDA GPUs only"
    assert list(_kernels.KERNELS)[-1] == "xla"
