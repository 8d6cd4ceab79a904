"""Inputs that are empty, extreme, constant, masked out, or not finite."""

import functools
import itertools

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_layernorm as jln
from jax_layernorm import _equations

pytestmark = pytest.mark.usefixtures("strict_promotion")

NORMS = {jln.layer_norm: True, jln.rms_norm: False}  # whether the mean is subtracted
ADDS = {jln.add_layer_norm: True, jln.add_rms_norm: False}
EVERY = NORMS | ADDS
TWO = (jln.layer_norm, jln.add_rms_norm)
"""With and without a mean, with and without a residual."""
MAX = float(np.finfo(np.float32).max)


def draw(shape, *, dtype="float32", param_dtype="float32", axis=-1, seed=0):
    """`x`, parameters of the normalized shape, and a cotangent."""
    rng = np.random.default_rng(seed)
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(shape[a] for a in axes)
    scale, bias = rng.normal(size=features) + 1, rng.normal(size=features)
    x, dy = rng.normal(size=(2, *shape))
    params = {"scale": scale, "bias": bias}
    return jax.tree.map(
        jnp.asarray, (x, params, dy), (dtype, dict.fromkeys(params, param_dtype), dtype)
    )


@functools.cache
def compiled(function, **options):
    @jax.jit
    def run(params, arrays, mask, dy):
        out, vjp = jax.vjp(
            lambda p, a: function(p, *a, mask=mask, return_statistics=True, **options),
            params,
            arrays,
        )
        cotangents = jax.tree.map(jnp.zeros_like, out[1:])
        dparams, darrays = vjp((dy, *cotangents))
        return out[0], out[-1], dparams, darrays[-1]

    return run


def forward_and_gradients(function, x, params, dy, *, mask=None, **options):
    """`y`, statistics, the gradients of params and `x`; the `add_*` halve `x` first."""
    arrays = (x / 2, x / 2) if function in ADDS else (x,)
    if mask is None:
        options |= implementations.chosen
    return compiled(function, **options)(params, arrays, mask, dy)


@pytest.mark.parametrize("masked", (False, True), ids=("no mask", "mask"))
@pytest.mark.parametrize(
    ("shape", "axis"),
    (
        ((0, 8), -1),
        ((3, 0, 8), -1),
        ((4, 0), -1),
        ((0,), 0),
        ((0, 0), -1),
        ((2, 0, 3), (0, 2)),
        ((2, 0, 3), (2, 1)),
        ((0, 4, 3), (-1, 1)),
    ),
    ids=str,
)
@pytest.mark.parametrize("function", TWO)
def test_empty_arrays_give_empty_results_and_zero_gradients(
    function, shape, axis, masked
):
    x, params, dy = draw(shape, axis=axis)
    mask = jnp.ones(shape, bool) if masked else None
    y, (mean, rstd), dparams, dx = forward_and_gradients(
        function, x, params, dy, axis=axis, mask=mask
    )
    assert y.shape == dx.shape == shape
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = tuple(
        1 if i - len(shape) in axes or i in axes else n for i, n in enumerate(shape)
    )
    assert mean.shape == rstd.shape == kept
    # A row without elements is one whose every element is masked.
    np.testing.assert_array_equal(mean, np.zeros(kept))
    np.testing.assert_allclose(rstd, np.full(kept, 1000.0), rtol=1e-6)
    for key, gradient in dparams.items():
        np.testing.assert_array_equal(gradient, np.zeros(params[key].shape))


@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_one_feature_is_its_own_mean(function):
    x, params, dy = draw((5, 1))
    y, (mean, _), dparams, dx = forward_and_gradients(function, x, params, dy)
    if EVERY[function]:
        np.testing.assert_array_equal(mean, x)
        np.testing.assert_array_equal(y, jnp.broadcast_to(params["bias"], x.shape))
        np.testing.assert_array_equal(dx, np.zeros((5, 1)))
        np.testing.assert_array_equal(dparams["scale"], [0])
    else:
        gain = np.sign(np.asarray(x)) * np.asarray(params["scale"])
        gain = gain + np.asarray(params["bias"])
        np.testing.assert_allclose(y, gain, rtol=0, atol=1e-3)  # epsilon's share


@pytest.mark.parametrize("shape", ((7,), (1, 7), (1, 1, 7)), ids=str)
@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_one_row_is_normalized_like_any_other(function, shape):
    x, params, dy = draw((3, 7))
    y, _, _, dx = forward_and_gradients(function, x, params, dy)
    one, _, dparams, done = forward_and_gradients(
        function, x[1].reshape(shape), params, dy[1].reshape(shape)
    )
    np.testing.assert_allclose(one.reshape(7), y[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(done.reshape(7), dx[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dparams["bias"], dy[1])


@pytest.mark.parametrize("function", TWO)
def test_a_scalar_is_refused(function):
    arrays = (jnp.asarray(1.0),) * (2 if function in ADDS else 1)
    with pytest.raises(ValueError, match="at least one axis"):
        function({}, *arrays)


@pytest.mark.parametrize("value", (0.0, 0.1, 1 / 3, 12345.678))
@pytest.mark.usefixtures("implementation")
def test_a_constant_row_gives_the_bias_and_no_gradient_of_scale(value):
    x = jnp.full((3, 1000), value)
    params = {"scale": jnp.full(1000, 2.0), "bias": jnp.linspace(-1.0, 1.0, 1000)}
    y, _, dparams, dx = forward_and_gradients(
        jln.layer_norm, x, params, jnp.ones((3, 1000))
    )
    np.testing.assert_allclose(y, jnp.stack([params["bias"]] * 3), rtol=0, atol=1e-6)
    np.testing.assert_allclose(dparams["scale"], np.zeros(1000), rtol=0, atol=1e-6)
    # dx is rstd = 1000 times the rounding of g - mean(g), which is 0 here.
    np.testing.assert_allclose(dx, np.zeros((3, 1000)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "float64"))
@pytest.mark.parametrize("features", (1, 3, 16, 100, 768, 5000))
def test_a_constant_row_gives_exactly_the_bias(dtype, features):
    """Whatever the value is, so that a row that rounding made constant has no gradient."""
    implementations.needed("native_cpu")
    rng = np.random.default_rng(0)
    values = rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200)
    if dtype == "float16":
        values = rng.normal(size=200) * 10.0 ** rng.integers(-6, 4, 200)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (200, features))
        wide = "float64" if dtype == "float64" else "float32"
        params = {
            k: jnp.asarray(rng.normal(size=features), wide) for k in ("scale", "bias")
        }
        dy = jnp.asarray(rng.normal(size=x.shape), dtype)
        norm = functools.partial(jln.layer_norm, implementation="native_cpu")
        y, vjp = jax.vjp(norm, params, x)
        dparams, _ = vjp(dy)
        bias = jnp.broadcast_to(params["bias"].astype(dtype), x.shape)
    np.testing.assert_array_equal(
        np.asarray(y, np.float64), np.asarray(bias, np.float64)
    )
    np.testing.assert_array_equal(dparams["scale"], np.zeros(features))


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.usefixtures("implementation")
def test_with_epsilon_zero_a_row_of_zeros_is_nan_and_stays_alone(function):
    """The row is 0 / 0, because only epsilon guards against a variance of 0."""
    x, params, dy = draw((3, 8))
    y, (_, rstd), _, dx = forward_and_gradients(
        function, x.at[1].set(0), params, dy, epsilon=0.0
    )
    assert np.isinf(rstd[1]).all()
    assert np.isnan(y[1]).all() and np.isnan(dx[1]).all()
    assert np.isfinite(y[::2]).all() and np.isfinite(dx[::2]).all()


@pytest.mark.parametrize("size", (1e-38, 1e-40, 1e-45))
@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_denormals_are_as_good_as_zeros(function, size):
    """Whether the hardware keeps or flushes them, because epsilon is far larger."""
    x, params, dy = draw((4, 16))
    small = forward_and_gradients(function, x * size, params, dy)
    zeros = forward_and_gradients(function, x * 0, params, dy)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-30),
        small,
        zeros,
    )


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.usefixtures("implementation")
def test_with_epsilon_zero_a_spread_of_1e_17_is_normalized_as_any(function):
    """Below about 1e-19 the squares underflow, and rstd and the row are not finite."""
    x, params, dy = draw((4, 16))
    expected = oracle.norm(
        x * np.float32(1e-17), **params, center=NORMS[function], epsilon=0.0
    )
    y, *_ = forward_and_gradients(
        function, x * np.float32(1e-17), params, dy, epsilon=0.0
    )
    oracle.assert_close(y, expected.y, against=expected.y_size)
    y, (_, rstd), *_ = forward_and_gradients(
        function, x * np.float32(1e-24), params, dy, epsilon=0.0
    )
    assert np.isinf(rstd).all() and not np.isfinite(y).any()


@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_float16_is_right_up_to_its_maximum(function):
    """Statistics are float32, so neither the sum nor the squares overflow."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([6e4, -6e4, 65504, 5.5e4], size=(8, 256)), "float16")
    params = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    dy = jnp.asarray(rng.normal(size=x.shape), "float16")
    y, _, dparams, dx = forward_and_gradients(function, x, params, dy)
    expected = oracle.norm(x, **params, dy=dy, center=EVERY[function])
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=8)
    # dx is about 1e-5, which float16 holds as whole multiples of 6e-8.
    np.testing.assert_allclose(dx, expected.dx, rtol=0, atol=6.1e-8)


def draw_near_the_limit(features, times):
    """`draw`, and `x` with squares that sum to `times**2` float32 maxima in each row.

    The rows of that `x` have mean 0, so their deviations are the elements themselves.
    """
    x, params, dy = draw((4, features))
    large = np.asarray(x, np.float64)
    large -= large.mean(-1, keepdims=True)
    large *= times * np.sqrt(MAX / features) / large.std(-1, keepdims=True)
    return x, jnp.asarray(large, jnp.float32), params, dy


@pytest.mark.parametrize("times", (1e-6, 0.99))
@pytest.mark.parametrize("features", (768, 8192))
@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_a_row_is_normalized_as_any_until_its_sum_of_squares_overflows(
    function, features, times
):
    _, x, params, dy = draw_near_the_limit(features, times)
    y, _, dparams, dx = forward_and_gradients(function, x, params, dy)
    expected = oracle.norm(x, **params, dy=dy, center=EVERY[function])
    oracle.assert_close(y, expected.y, against=expected.y_size)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=4)


@pytest.mark.parametrize("times", (1.01, 1e3, 1e16))
@pytest.mark.parametrize("features", (768, 8192))
@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_where_the_sum_of_squares_overflows_y_is_the_bias_and_dx_is_zero(
    function, features, times
):
    """The variance is infinite, so `rstd` is 0 and the row has no gradient.

    The other rows are untouched. The largest size leaves plain sums finite.
    """
    x, large, params, dy = draw_near_the_limit(features, times)
    clean = forward_and_gradients(function, x, params, dy)
    y, (_, rstd), _, dx = forward_and_gradients(
        function, x.at[1].set(large[1]), params, dy
    )
    np.testing.assert_array_equal(y[1], params["bias"])
    np.testing.assert_array_equal(dx[1], np.zeros(features))
    assert rstd[1] == 0
    np.testing.assert_array_equal(y[::2], clean[0][::2])
    np.testing.assert_array_equal(dx[::2], clean[3][::2])


@pytest.mark.parametrize("value", (1e30, 1e37, -1e38))
@pytest.mark.usefixtures("implementation")
def test_a_constant_row_of_1e38_has_its_mean_and_no_variance(value):
    """If the sum of the row's elements, each divided by N, does not overflow."""
    _, params, dy = draw((2, 4))
    y, (mean, rstd), *_ = forward_and_gradients(
        jln.layer_norm, jnp.full((2, 4), value), params, dy
    )
    np.testing.assert_allclose(mean, np.full((2, 1), value), rtol=1e-6)
    np.testing.assert_allclose(rstd, np.full((2, 1), 1000.0), rtol=1e-6)
    np.testing.assert_allclose(y, jnp.stack([params["bias"]] * 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "row",
    ([MAX] * 768, [MAX, MAX, -MAX, 0], [MAX, -MAX, -MAX, -MAX]),
    ids=("768 times max", "max max -max 0", "max -max -max -max"),
)
@pytest.mark.usefixtures("implementation")
def test_at_the_float32_maximum_a_row_may_be_nan_but_no_other_row_is(row):
    """`x - mean` may overflow, and so may the mean itself, because it is rounded."""
    x, params, dy = draw((3, len(row)))
    spoiled = x.at[1].set(jnp.asarray(row, jnp.float32))
    clean = forward_and_gradients(jln.layer_norm, x, params, dy)
    y, (_, rstd), _, dx = forward_and_gradients(jln.layer_norm, spoiled, params, dy)
    right = len(set(row)) == 1 and np.isclose(rstd[1], 1000)  # if the row is constant
    assert np.isnan(rstd[1]) or rstd[1] == 0 or right
    assert (np.isnan(y[1]) | (y[1] == params["bias"])).all()
    np.testing.assert_array_equal(y[::2], clean[0][::2])
    np.testing.assert_array_equal(dx[::2], clean[3][::2])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("function", TWO)
@pytest.mark.usefixtures("implementation")
def test_nan_and_inf_stay_in_their_row(function, dtype, bad):
    x, params, dy = draw((4, 16), dtype=dtype)
    spoiled = x.at[2, 5].set(bad)
    keep = np.array([0, 1, 3])
    y, clean, _, dx = forward_and_gradients(function, x, params, dy)
    y_bad, statistics, dparams, dx_bad = forward_and_gradients(
        function, spoiled, params, dy
    )
    assert np.isnan(y_bad[2]).any() and np.isnan(dx_bad[2]).any()
    np.testing.assert_array_equal(y_bad[keep], y[keep])
    np.testing.assert_array_equal(dx_bad[keep], dx[keep])
    for bad_statistic, statistic in zip(statistics, clean, strict=True):
        np.testing.assert_array_equal(bad_statistic[keep], statistic[keep])
    assert np.isfinite(dparams["bias"]).all()  # the sum of dy


@pytest.mark.parametrize("function", TWO)
def test_x_may_have_more_than_2_to_the_31_elements(function):
    x = jax.ShapeDtypeStruct((2**21, 2**11), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct(x.shape, jnp.bool_)
    params = jax.eval_shape(lambda: jln.init_params(2**11))
    arrays = (x,) * (2 if function in ADDS else 1)

    def gradients(params, arrays, mask):
        out, vjp = jax.vjp(lambda p, a: function(p, *a, mask=mask), params, arrays)
        return vjp(out)

    for given in (None, mask):
        dparams, (dx, *_) = jax.eval_shape(gradients, params, arrays, given)
        assert dx.shape == x.shape and dparams["scale"].shape == (2**11,)
    jax.jit(gradients).lower(params, arrays, None).compile()


@pytest.mark.parametrize("function", NORMS)
def test_a_row_may_have_more_than_2_to_the_31_elements(function):
    x = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct(x.shape, jnp.bool_)

    def gradients(x, mask):
        norm = functools.partial(function, axis=(0, 1), return_statistics=True)
        (y, statistics), vjp = jax.vjp(lambda x: norm({}, x, mask=mask), x)
        return statistics, vjp((y, statistics))

    for given in (None, mask):
        lowered = jax.jit(gradients).lower(x, given)
        (mean, rstd), (dx,) = lowered.out_info
        assert mean.shape == rstd.shape == (1, 1) and dx.shape == x.shape
        lowered.compile()


@pytest.mark.parametrize("hidden", (0.5, np.nan, np.inf))
@pytest.mark.parametrize("epsilon", (1e-6, 0.0))
@pytest.mark.parametrize("function", TWO)
def test_a_fully_masked_row_is_zero_and_adds_to_no_gradient(function, epsilon, hidden):
    x, params, dy = draw((4, 16))
    spoiled = x.at[1].set(hidden)
    mask = jnp.array([[True], [False], [True], [True]])
    y, (mean, rstd), dparams, dx = forward_and_gradients(
        function, spoiled, params, dy, mask=mask, epsilon=epsilon
    )
    for a in (y[1], dx[1], mean[1]):
        np.testing.assert_array_equal(a, np.zeros_like(a))
    if epsilon:
        np.testing.assert_allclose(rstd[1], [1 / np.sqrt(epsilon)], rtol=1e-6)
    else:
        assert np.isinf(rstd[1])
    without = np.array([0, 2, 3])
    y_left, _, dparams_left, dx_left = forward_and_gradients(
        function, x[without], params, dy[without], epsilon=epsilon
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y[without], y_left)
    close(dx[without], dx_left)
    jax.tree.map(close, dparams, dparams_left)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("function", TWO)
def test_masked_nan_and_inf_leave_the_rest_of_their_row_right(function, bad):
    x, params, dy = draw((4, 16))
    mask = jnp.asarray(np.random.default_rng(1).random((4, 16)) < 0.6)
    zeroed, spoiled = (jnp.where(mask, x, value) for value in (0.0, bad))
    results = [
        forward_and_gradients(function, a, params, dy, mask=mask)
        for a in (zeroed, spoiled)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    expected = oracle.norm(x, **params, dy=dy, center=EVERY[function], mask=mask)
    y, (mean, rstd), dparams, dx = results[1]
    oracle.assert_close(y, expected.y, against=expected.y_size)
    oracle.assert_close(mean, expected.mean, against=expected.mean_size)
    oracle.assert_close(rstd, expected.rstd)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=4)


ROWS = {  # of 512, and by how many standard deviations the guess misses the mean
    "like any": (lambda x: x, 1),
    "first elements apart": (lambda x: np.where(np.arange(512) < 8, x + 1e3, x), 8),
    "first element apart": (lambda x: np.where(np.arange(512) < 1, x + 1e3, x), 3),
    "first elements alike": (lambda x: np.where(np.arange(512) < 8, 2.5, x), 3),
}


@pytest.mark.parametrize("offset", (0.0, 1.0, 1e2, 1e4, 1e6))
@pytest.mark.parametrize("rows", ROWS)
def test_statistics_in_one_pass_are_as_accurate_as_the_guess_is_good(rows, offset):
    """As on TPU. A guess that is k deviations away costs at most a factor 1 + k**2."""
    row, away = ROWS[rows]
    x = row(np.random.default_rng(0).normal(size=(64, 512))) + offset
    x = jnp.asarray(x, jnp.float32)
    spec = _equations.NormSpec(True, (-1,), 1e-6, 0.0, jnp.dtype(jnp.float32))
    out = _equations.forward(
        x, None, None, None, None, spec=spec, with_statistics=True, one_pass=True
    )
    expected = oracle.norm(x)
    size = (1 + away**2) * np.max(np.abs(expected.y), -1, keepdims=True)
    oracle.assert_close(out.y, expected.y, against=size)
    mean, mean_low, rstd = out.statistics
    oracle.assert_close(mean + mean_low, expected.mean, against=expected.mean_size)
    oracle.assert_close(rstd, expected.rstd, against=(1 + away**2) * expected.rstd)


def test_statistics_in_one_pass_are_those_of_all_normalized_axes():
    x = draw((6, 3, 5, 40), seed=3)[0] + 1e3
    for axes in itertools.permutations((-3, -2, -1), 2):
        spec = _equations.NormSpec(True, axes, 1e-6, 0.0, jnp.dtype(jnp.float32))
        out = _equations.forward(
            x, None, None, None, None, spec=spec, with_statistics=True, one_pass=True
        )
        oracle.assert_close(out.y, oracle.norm(x, axis=axes).y)


def test_derivatives_at_a_constant_row_are_exact():
    """There `sum(c * c) == n * mean(c) ** 2 == 0`, a corner if that were a maximum."""
    row, v = jnp.full(4, 3.0), jnp.array([1.0, -2.0, 3.0, -1.0])
    u = v - v.mean()

    def first(t):
        return jln.layer_norm({}, row + t * v, epsilon=1.0)[0]

    third = jax.grad(jax.grad(jax.grad(first)))(0.0)
    np.testing.assert_allclose(third, -3 * u[0] * jnp.mean(u * u), rtol=1e-5)

    def rstd(x):
        options = {"epsilon": 1.0, "return_statistics": True, "custom_vjp": False}
        return jln.layer_norm({}, x, **options)[1].rstd[0]

    centered = np.eye(4) / 4 - 1 / 16  # half of the variance's Hessian
    np.testing.assert_allclose(jax.hessian(rstd)(row), -centered, atol=1e-6)
