"""The TPU kernels: their values in interpret mode, and what they are lowered to.

Interpret mode, on CPU, shows values, what is read past the end, and what is read before
it is written, but neither layouts nor limits; `test_tpu_compiled.py` tests those.
Lowering for a TPU needs no TPU, and shows which implementation a program runs.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import rounded
from jax import export, lax

import jax_layernorm as jln
from jax_layernorm import _kernels
from jax_layernorm._kernels import pallas_tpu
from jax_layernorm._kernels.pallas_tpu import _backward, _blocks, _forward

FUNCTIONS = (jln.layer_norm, jln.rms_norm)
DTYPES = ("float32", "bfloat16")
SHAPES = ((1, 128), (37, 64), (300, 128), (90, 256), (130, 768), (21, 1000), (40, 2304))
"""One of each kind of block; ragged and odd ones."""


class OnTheCpu:
    """Runs the TPU kernels on the CPU, wherever they would run on a TPU."""

    def __init__(self):
        self.ran = []

    platforms = ("cpu",)

    not_default = staticmethod(pallas_tpu.not_default)

    def forward(self, problem):
        return functools.partial(self.run, "forward", pallas_tpu.forward(problem))

    def backward(self, problem):
        return functools.partial(self.run, "backward", pallas_tpu.backward(problem))

    def run(self, name, function, *operands, **static):
        self.ran.append(name)
        return function(*operands, **static)


@pytest.fixture
def interpreted(monkeypatch, quick_compilation):
    """`implementation="pallas_tpu"` runs the kernels here, interpreted.

    XLA's fusions are off, because two fusions that use the same sum compute it twice, in
    two orders. On a TPU a kernel computes each sum once.
    """
    kernel = OnTheCpu()
    monkeypatch.setitem(_kernels.KERNELS, "pallas_tpu", kernel)
    jax.clear_caches()
    # Interpreted as array operations. Scratch memory and rows past the end hold NaN.
    call = functools.partial(_blocks.pl.pallas_call, interpret=True)
    monkeypatch.setattr(_blocks.pl, "pallas_call", call)
    yield kernel
    jax.clear_caches()


def draw(shape, *, offset=0.0, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x, residual, dy, dresidual_out = rng.normal(size=(4, *shape))
    scale, bias = rng.normal(size=(2, shape[-1])) + [[1], [0]]
    whole = (jnp.asarray(a, dtype) for a in (x + offset, residual, dy, dresidual_out))
    params = {
        "scale": jnp.asarray(scale, "float32"),
        "bias": jnp.asarray(bias, "float32"),
    }
    return params, *whole


def value_and_gradients(function, params, x, dy, **options):
    def run(params, x, dy):
        norm = functools.partial(function, implementation="pallas_tpu", **options)
        y, pullback = jax.vjp(norm, params, x)
        return y, *pullback(dy)

    return jax.jit(run)(params, x, dy)


@pytest.mark.parametrize(
    ("function", "dtype", "shape"),
    [
        (FUNCTIONS[(i + j) % 2], dtype, shape)  # each function at each shape
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_values_and_gradients_are_right(function, dtype, shape, interpreted):
    params, x, _, dy, _ = draw(shape, dtype=dtype)
    out = value_and_gradients(function, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    oracle.assert_right(out, params, x, dy, center=function is jln.layer_norm)


@pytest.mark.parametrize(
    ("case", "features"),
    [
        (case, (128, 768, 2304)[i % 3])
        for i, case in enumerate(rounded.CASES)
        if "float16" not in (case.dtype, case.scale)
    ],
    ids=str,
)
def test_each_result_is_rounded_as_jax_would(case, features, interpreted):
    rounded.check(case, (37, features), "pallas_tpu")
    assert interpreted.ran[:2] == ["forward", "backward"]


@pytest.mark.parametrize(("rows", "at_once"), ((33, _backward.AT_ONCE), (290, 0)))
def test_blocks_of_a_few_rows_find_their_statistics(
    rows, at_once, interpreted, monkeypatch
):
    """As in very wide rows; the statistics of a few rows, or of all, are read at once."""
    features = 2304
    monkeypatch.setattr(_backward, "AT_ONCE", at_once)
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 32 * features * 4)
    params, x, _, dy, _ = draw((rows, features), offset=10)
    x = x * jnp.arange(1.0, 1 + rows)[:, None]
    out = value_and_gradients(jln.layer_norm, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    oracle.assert_right(out, params, x, dy)


@pytest.mark.parametrize(("offset", "dtype"), ((1e6, "float32"), (1e2, "bfloat16")))
@pytest.mark.parametrize("shape", ((20, 128), (20, 384), (20, 2304)), ids=str)
def test_offset_costs_no_accuracy(shape, dtype, offset, interpreted):
    params, x, _, dy, _ = draw(shape, offset=offset, dtype=dtype)
    out = value_and_gradients(jln.layer_norm, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    oracle.assert_right(out, params, x, dy)


def test_scale_offset_dtype_and_missing_parameters_count(interpreted):
    params, x, _, dy, _ = draw((20, 256), dtype="bfloat16")
    dy = dy.astype("float32")
    for own in (params, {"scale": params["scale"]}, {"bias": params["bias"]}, {}):
        offset = {"scale_offset": 1.0} if "scale" in own else {}
        out = value_and_gradients(
            jln.layer_norm, own, x, dy, dtype=jnp.float32, epsilon=1e-3, **offset
        )
        oracle.assert_right(out, own, x, dy, epsilon=1e-3, **offset)
    assert interpreted.ran == ["forward", "backward"] * 4


@pytest.mark.parametrize(("features", "dtype"), ((128, "bfloat16"), (2304, "float32")))
def test_gradients_of_parameters_alone_are_right(features, dtype, interpreted):
    params, x, _, dy, _ = draw((20, features), dtype=dtype)

    def gradients(params):
        norm = functools.partial(jln.layer_norm, x=x, implementation="pallas_tpu")
        return jax.vjp(norm, params)[1](dy)

    (dparams,) = jax.jit(gradients)(params)
    assert interpreted.ran == ["forward", "backward"]
    expected = oracle.norm(x, **params, dy=dy)
    oracle.assert_close(dparams["scale"], expected.dscale, against=expected.dscale_size)
    oracle.assert_close(dparams["bias"], expected.dbias, against=expected.dbias_size)


@pytest.mark.parametrize(("features", "dtype"), ((128, "bfloat16"), (2304, "float32")))
def test_residual_is_added_in_both_passes(features, dtype, interpreted):
    """A float32 stream to which a `dtype` branch is added."""
    params, x, _, dy, _ = draw((50, features), dtype=dtype)
    *_, residual, _, dresidual_out = draw((50, features), seed=1)

    @jax.jit
    def run(params, x, residual, dy, dresidual_out):
        norm = functools.partial(jln.add_layer_norm, implementation="pallas_tpu")
        out, pullback = jax.vjp(norm, params, x, residual)
        return *out, *pullback((dy, dresidual_out))

    y, residual_out, dparams, dx, dresidual = run(
        params, x, residual, dy, dresidual_out
    )
    assert interpreted.ran == ["forward", "backward"]
    np.testing.assert_array_equal(residual_out, residual + x.astype("float32"))
    oracle.assert_right(
        (y, dparams, dresidual), params, residual_out, dy, dresidual_out
    )
    np.testing.assert_array_equal(dx, dresidual.astype(dtype))


@pytest.mark.parametrize(("rows", "dtype"), ((5, "bfloat16"), (150, "float32")))
@pytest.mark.parametrize("features", (128, 256, 384, 2304))
def test_statistics_are_right(features, rows, dtype, interpreted):
    params, x, *_ = draw((rows, features), offset=100, dtype=dtype)
    run = functools.partial(
        jln.layer_norm, return_statistics=True, implementation="pallas_tpu"
    )
    _, (mean, rstd) = jax.jit(run)(params, x)
    assert interpreted.ran == ["forward"]
    expected = oracle.norm(x)
    assert mean.dtype == rstd.dtype == jnp.float32
    oracle.assert_close(mean, expected.mean, against=expected.mean_size)
    oracle.assert_close(rstd, expected.rstd)


@pytest.mark.parametrize("itemsizes", ((4, 4), (2, 2), (4, 2, 2, 4)))
@pytest.mark.parametrize("features", (2304, 4096, 8192))
def test_the_order_of_a_rows_sums_does_not_depend_on_how_many_rows_there_are(
    features, itemsizes
):
    """Values would not show it, because XLA takes the sums of interpreted kernels."""
    for module, backward in ((_forward, False), (_backward, True)):
        cuts = [
            _blocks.blocks(rows, features, itemsizes, module.STEP, backward=backward)
            for rows in (*range(1, 300), 1024, 5000)
        ]
        tiles = [_blocks.tiles(cut, features, module.TILE_REGISTERS) for cut in cuts]
        assert len({tile.rows for tile in tiles}) > 1
        assert len({tile.columns for tile in tiles}) == 1


def test_the_rsqrt_for_bfloat16_is_right_to_a_part_of_its_last_place():
    squares = np.geomspace(1e-37, 3e38, 1000, dtype="float32")
    right = 1 / np.sqrt(squares.astype("float64"))
    np.testing.assert_allclose(_forward._rsqrt_for_half(squares), right, rtol=1e-5)
    special = np.array([0, np.inf, np.nan], "float32")
    expected = [np.inf, 0, np.nan]
    np.testing.assert_array_equal(_forward._rsqrt_for_half(special), expected)


def test_few_rows_are_computed_once(monkeypatch):
    """And not a second time until the statistics of 128 rows fill a register."""
    grids, call = [], _blocks.call

    def noted(*args, grid, **options):
        grids.append(grid)
        return call(*args, grid=grid, **options)

    monkeypatch.setattr(_blocks, "call", noted)
    norm = functools.partial(
        jln.layer_norm, {}, return_statistics=True, implementation="pallas_tpu"
    )
    for rows, blocks in ((1, 1), (16, 1), (1024, 8)):
        lowered(norm, jax.ShapeDtypeStruct((rows, 4096), "bfloat16"))
        assert math.prod(grids.pop()) == blocks


@pytest.mark.parametrize(
    ("features", "dtype"),
    ((128, "float32"), (256, "bfloat16"), (768, "float32"), (2304, "bfloat16")),
)
def test_a_row_of_nan_stays_alone_and_a_constant_one_is_the_bias(
    features, dtype, interpreted
):
    params, x, _, dy, _ = draw((20, features), dtype=dtype)
    x = x.at[3, 5].set(jnp.nan).at[4].set(1234.567).at[5].set(0)
    y, _, dx = value_and_gradients(jln.layer_norm, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    for array in (y, dx):
        rows = np.isnan(np.asarray(array, "float32"))
        assert rows[3].all() and not np.delete(rows, 3, 0).any()
    for row in (4, 5):
        np.testing.assert_array_equal(y[row], params["bias"].astype(dtype))


@pytest.mark.parametrize(("features", "dtype"), ((128, "bfloat16"), (2304, "float32")))
def test_epsilon_may_be_0(features, dtype, interpreted):
    """Even if rows past the end have no variance."""
    params, x, _, dy, _ = draw((37, features), dtype=dtype)
    out = value_and_gradients(jln.layer_norm, params, x, dy, epsilon=0.0)
    oracle.assert_right(out, params, x, dy, epsilon=0.0)


@pytest.mark.parametrize("features", (256, 2304))
def test_where_squares_overflow_y_is_the_bias_and_dx_is_0(features, interpreted):
    params, x, _, dy, _ = draw((20, features))
    y, _, dx = value_and_gradients(jln.layer_norm, params, x.at[3].mul(1e25), dy)
    assert interpreted.ran == ["forward", "backward"]
    np.testing.assert_array_equal(y[3], params["bias"])
    np.testing.assert_array_equal(dx[3], 0)
    assert np.isfinite(y).all() and np.isfinite(dx).all()


def test_vmap_and_scan_keep_the_kernel(interpreted):
    params, x, _, dy, _ = draw((3, 20, 128))
    norm = functools.partial(jln.layer_norm, implementation="pallas_tpu")

    @jax.jit
    def mapped(x, dy):  # no parameters, because they would have gradients per example
        y, pullback = jax.vjp(jax.vmap(functools.partial(norm, {})), x)
        return y, {}, *pullback(dy)

    def step(_, each):
        return None, value_and_gradients(jln.layer_norm, params, *each)

    out = mapped(x, dy)
    assert interpreted.ran == ["forward", "backward"]
    oracle.assert_right(out, {}, x, dy)
    y, dparams, dx = lax.scan(step, None, (x, dy))[1]
    for i in range(len(x)):
        each = jax.tree.map(lambda a, i=i: a[i], (y, dparams, dx))
        oracle.assert_right(each, params, x[i], dy[i])
    assert interpreted.ran == ["forward", "backward"] * 2


def lowered(function, *arguments, platforms=("tpu",)):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=platforms).as_text()


def kernels_of(text):
    return re.findall(r'kernel_name = "(layer_norm_\w+)"', text)


@pytest.mark.parametrize(("x64", "dtype"), ((False, "bfloat16"), (True, "float32")))
@pytest.mark.parametrize("shape", (*SHAPES, (8192, 5120), (4096, 16384)), ids=str)
def test_both_passes_lower_to_one_kernel_each(shape, dtype, x64):
    with jax.enable_x64(x64):
        x = jax.ShapeDtypeStruct(shape, dtype)
        params = {"scale": jax.ShapeDtypeStruct(shape[-1:], "float32")}
        run = functools.partial(value_and_gradients, jln.layer_norm)
        found = kernels_of(lowered(run, params, x, x))
    assert found == ["layer_norm_forward", "layer_norm_backward"]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    (
        ((8, 128), "float16", "x has the dtype float16"),
        ((8, 65536), "float32", "blocks of more than 32768 do not"),
        ((0, 128), "float32", "x is empty"),
    ),
)
def test_it_says_at_lowering_what_it_cannot_run(shape, dtype, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    norm = functools.partial(jln.layer_norm, {}, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match=reason):
        lowered(norm, x)
    assert kernels_of(lowered(functools.partial(jln.layer_norm, {}), x)) == []


def test_it_runs_only_by_name_until_it_has_run_on_a_tpu():
    x = jax.ShapeDtypeStruct((64, 1024), "bfloat16")
    norm = functools.partial(jln.layer_norm, {})
    named = functools.partial(norm, implementation="pallas_tpu")
    assert kernels_of(lowered(norm, x)) == []
    assert kernels_of(lowered(named, x)) == ["layer_norm_forward"]
    choice = jln.explain({}, x)["tpu"]
    assert choice.implementation == "xla"
    assert "it has not run on a TPU yet" in choice.reasons["pallas_tpu"]
    choice = jln.explain({}, x, implementation="pallas_tpu")["tpu"]
    assert choice.implementation == "pallas_tpu"


def test_one_exported_program_holds_what_each_platform_runs():
    x = jax.ShapeDtypeStruct((64, 128), "float32")
    function = jax.jit(functools.partial(jln.layer_norm, {}))
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    ones = jnp.ones((64, 128))
    np.testing.assert_array_equal(exported.call(ones), function(ones))
