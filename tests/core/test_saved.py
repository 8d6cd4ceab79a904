"""What the backward pass keeps alive: the leaves of `jax.vjp`'s function."""

import jax
import jax.numpy as jnp
import pytest

import jax_layernorm as jln

ROWS, FEATURES = 48, 256
ADD = (jln.add_layer_norm, jln.add_rms_norm)
FUNCTIONS = (jln.layer_norm, jln.rms_norm, *ADD)


def saved_bytes(function, params, *arrays):
    _, vjp = jax.vjp(function, params, *arrays)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def a_row(function, width=4):
    """Numbers kept for each row: mean, its low-order word, rstd; rstd alone for RMS."""
    center = function in (jln.layer_norm, jln.add_layer_norm)
    return ROWS * width * (3 if center else 1)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_saved_are_x_scale_and_at_most_12_bytes_a_row(function, dtype):
    x = jnp.ones((ROWS, FEATURES), dtype)
    params = jln.init_params(FEATURES)
    arrays = (x, x) if function in ADD else (x,)  # of an add: the sum, not the summands
    expected = x.nbytes + params["scale"].nbytes + a_row(function)
    assert saved_bytes(function, params, *arrays) == expected
    assert expected <= x.nbytes + params["scale"].nbytes + 12 * ROWS


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_saved_are_at_most_24_bytes_a_row_in_float64(function):
    x = jnp.ones((ROWS, FEATURES), "float64")
    params = jln.init_params(FEATURES, dtype="float64")
    arrays = (x, x) if function in ADD else (x,)
    expected = x.nbytes + params["scale"].nbytes + a_row(function, 8)
    assert saved_bytes(function, params, *arrays) == expected


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bias_is_not_saved(function):
    x = jnp.ones((ROWS, FEATURES))
    arrays = (x, x) if function in ADD else (x,)
    without = saved_bytes(function, {}, *arrays)
    assert saved_bytes(function, {"bias": jnp.ones(FEATURES)}, *arrays) == without
    assert without == x.nbytes + a_row(function)


def test_of_a_wide_residual_stream_the_sum_is_saved_in_its_own_dtype():
    x, stream = jnp.ones((ROWS, FEATURES), "bfloat16"), jnp.ones((ROWS, FEATURES))
    saved = saved_bytes(jln.add_layer_norm, {}, x, stream)
    assert saved == stream.nbytes + a_row(jln.add_layer_norm)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_returned_statistics_are_saved_once(function):
    x = jnp.ones((ROWS, FEATURES))
    arrays = (x, x) if function in ADD else (x,)

    def with_statistics(*args):
        return function(*args, return_statistics=True)

    assert saved_bytes(with_statistics, {}, *arrays) == x.nbytes + a_row(function)


def test_a_remat_policy_can_save_exactly_the_statistics():
    x = jnp.ones((ROWS, FEATURES))
    policy = jax.checkpoint_policies.save_only_these_names("layer_norm_statistics")

    @jax.checkpoint
    def nothing_saved(x):
        return jnp.sin(jln.layer_norm({}, jnp.sin(x)))

    statistics_saved = jax.checkpoint(nothing_saved.__wrapped__, policy=policy)
    before = saved_bytes(nothing_saved, x)
    assert saved_bytes(statistics_saved, x) == before + a_row(jln.layer_norm)
