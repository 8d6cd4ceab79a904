"""Values and gradients against float64, at every dtype and offset."""

import functools

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion", "implementation")

OFFSETS = (0.0, 1e2, 1e4, 1e6)
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((7, 128), (3, 5, 96), (1, 1), (4, 1), (33,), (2, 3000), (1000, 8))


def draw(shape, *, offset=0.0, dtype="float32", seed=0):
    """`x`, `scale`, `bias` and a random cotangent; the spread of `x` is one."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) + offset).astype(jnp.dtype(dtype))
    scale, bias = rng.normal(size=(2, shape[-1])) + [[1], [0]]
    dy = rng.normal(size=shape).astype(jnp.dtype(dtype))
    return tuple(
        jnp.asarray(a, t)
        for a, t in zip(
            (x, scale, bias, dy), (dtype, "float32", "float32", dtype), strict=True
        )
    )


def forward_and_gradients(function, x, scale, bias, dy, *, jit=True, **options):
    """Both passes in one compiled program or, with `jit=False`, in one for each pass."""
    params = {"scale": scale, "bias": bias}

    def run(params, x, dy):
        norm = functools.partial(function, **implementations.chosen, **options)
        y, vjp = jax.vjp(norm, params, x)
        return y, *vjp(dy)

    y, dparams, dx = (jax.jit(run) if jit else run)(params, x, dy)
    return y, dx, dparams["scale"], dparams["bias"]


def assert_right(function, x, scale, bias, dy, *, center, jit=True):
    y, dx, dscale, dbias = forward_and_gradients(function, x, scale, bias, dy, jit=jit)
    expected = oracle.norm(x, scale, bias, dy, center=center)
    rows = dy.size // dy.shape[-1]
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dscale, expected.dscale, summed=rows)
    oracle.assert_close(dbias, expected.dbias, summed=rows)
    assert y.dtype == dx.dtype == x.dtype
    assert dscale.dtype == dbias.dtype == scale.dtype


@pytest.mark.parametrize("jit", (True, False), ids=("one program", "one for each pass"))
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_offset_costs_no_accuracy(dtype, offset, jit):
    if dtype == "float16" and offset > 6e4:
        offset = 6e4  # near the largest float16
    data = draw((64, 384), offset=offset, dtype=dtype)
    assert_right(jln.layer_norm, *data, center=True, jit=jit)


@pytest.mark.parametrize(
    ("function", "shape", "dtype"),
    [
        ((jln.layer_norm, jln.rms_norm)[(i + j) % 2], shape, dtype)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_values_and_gradients_are_right(function, shape, dtype):
    center = function is jln.layer_norm
    assert_right(function, *draw(shape, dtype=dtype), center=center)


def test_at_an_offset_of_1e4_the_forward_error_stays_under_2e_6():
    x, *_ = draw((256, 768), offset=1e4)
    y = jln.layer_norm({}, x, **implementations.chosen)
    assert np.max(np.abs(np.asarray(y, np.float64) - oracle.norm(x).y)) < 2e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("offset", (*OFFSETS, 1e12))
@pytest.mark.parametrize("function", (jln.layer_norm, jln.rms_norm))
def test_float64_is_computed_in_float64(function, offset):
    x, scale, bias, dy = draw((32, 100), offset=offset, dtype="float64")
    arguments = (x, scale.astype("float64"), bias.astype("float64"), dy)
    y, dx, dscale, dbias = forward_and_gradients(function, *arguments)
    center = function is jln.layer_norm
    wide = oracle.norm(
        *(np.asarray(a, np.longdouble) for a in arguments), center=center
    )
    # The oracle itself rounds in float64, so a few of its own roundings are allowed.
    for actual, expected in zip(
        (y, dx, dscale, dbias), (wide.y, wide.dx, wide.dscale, wide.dbias), strict=True
    ):
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=2e-14 * np.abs(expected).max()
        )


def test_one_outlier_of_1e15_does_not_spoil_dx():
    x, scale, bias, dy = draw((8, 256))
    x = x.at[:, 3].set(1e15)
    _, dx, *_ = forward_and_gradients(jln.layer_norm, x, scale, bias, dy)
    expected = oracle.norm(x, scale, bias, dy).dx
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("offset", OFFSETS)
def test_dx_is_orthogonal_to_ones_and_to_x_hat(offset):
    x, scale, bias, dy = draw((64, 512), offset=offset)
    _, dx, *_ = forward_and_gradients(jln.layer_norm, x, scale, bias, dy)
    x_hat, dx = oracle.norm(x).y, np.asarray(dx, np.float64)
    rounding = 512 * np.abs(dx).max() * np.finfo(np.float32).eps
    assert np.max(np.abs(dx.sum(-1))) < rounding
    assert np.max(np.abs((dx * x_hat).sum(-1))) < rounding
