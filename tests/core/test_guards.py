"""Single lines that keep rare inputs right: each test fails without such a line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_layernorm as jln

FUNCTIONS = (jln.layer_norm, jln.rms_norm)
BY_XLA = {"implementation": "xla"}


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_cotangent_that_overflows_with_the_squares_gives_0_and_not_nan(
    function, implementation
):
    """Rstd is 0 if the squares overflow, and sum(g * x) is infinite."""
    x = draw(3, 8).at[1].mul(1e30)
    dy = draw(3, 8, seed=1).at[1].mul(1e20)

    @jax.jit
    def run(x, dy):
        norm = functools.partial(function, implementation=implementation)
        y, pullback = jax.vjp(norm, {"scale": jnp.ones(8)}, x)
        return y, *pullback(dy)

    y, dparams, dx = run(x, dy)
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(dx[1], 0)
    assert np.isfinite(dparams["scale"]).all() and np.isfinite(dx).all()


@pytest.mark.parametrize("key", ("scale", "bias"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_nan_parameter_where_the_mask_is_false_is_not_seen(function, key):
    x, dy, mask = draw(3, 8), draw(3, 8, seed=1), jnp.arange(8) != 2
    params = {"scale": draw(8, seed=2), "bias": draw(8, seed=3)}

    @jax.jit
    def run(params, x, dy):
        y, pullback = jax.vjp(functools.partial(function, mask=mask), params, x)
        return y, *pullback(dy)

    expected = run(params, x, dy)
    params[key] = params[key].at[2].set(jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, run(params, x, dy), expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_the_sum_is_rounded_if_only_the_norm_of_it_is_used(dtype, implementation):
    x, residual = draw(64, 32, dtype=dtype), draw(64, 32, dtype=dtype, seed=1)
    named = {"implementation": implementation}
    y = jax.jit(lambda x, r: jln.add_layer_norm({}, x, r, **named)[0])(x, residual)
    stored = jnp.asarray(x + residual)
    np.testing.assert_array_equal(y, jax.jit(
        lambda x: jln.layer_norm({}, x, **named)
    )(stored))  # fmt: skip


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("custom_vjp", (True, False))
def test_the_mean_that_is_returned_is_the_sum_of_its_two_words(
    custom_vjp, implementation
):
    """Its high word alone is wrong by a unit in its last place in many rows."""
    x = draw(256, 768) + 1e6 * (1 + draw(256, 1, seed=1) ** 2)
    named = {"implementation": implementation} if custom_vjp else {}
    norm = functools.partial(
        jln.layer_norm, {}, return_statistics=True, custom_vjp=custom_vjp, **named
    )
    _, (mean, _) = jax.jit(norm)(x)
    right = np.mean(np.asarray(x, np.float64), -1, keepdims=True)
    assert np.max(np.abs(mean - right) / np.spacing(right.astype("float32"))) < 0.51


@pytest.mark.parametrize("platform", ("cpu", "cuda", "rocm", "tpu"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_programs_of_cpus_and_gpus_have_their_barriers(function, platform):
    """One around the mean, one around the cotangents; `xla.py` says why.

    On CPU, a mean that is not saved has no barrier.
    """
    x = jax.ShapeDtypeStruct((6, 8), "float32")

    def lowered(function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    norm = functools.partial(function, {}, **BY_XLA)
    saving = functools.partial(norm, return_statistics=True)
    barriers = {"cpu": 1, "cuda": 1, "rocm": 1, "tpu": 0}[platform]
    of_the_mean = barriers * (function is jln.layer_norm)
    assert lowered(saving, x).count("optimization_barrier") == of_the_mean
    in_inference = lowered(norm, x).count("optimization_barrier")
    assert in_inference == (0 if platform == "cpu" else of_the_mean)

    def both(x, dy):
        return jax.vjp(norm, x)[1](dy)

    of_cotangents = lowered(both, x, x).count("optimization_barrier")
    assert of_cotangents == of_the_mean + barriers
