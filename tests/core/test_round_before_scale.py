"""`round_before_scale`: the bits of models that cast before they multiply by the scale.

The GPU and TPU kernels run the same cases in their own test files.
"""

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounded

import jax_layernorm as jln


@pytest.mark.parametrize("case", rounded.CASES, ids=str)
@pytest.mark.parametrize("name", implementations.NAMES)
def test_each_result_is_rounded_as_jax_would(case, name, quick_compilation):
    implementations.needed(name)
    rounded.check(case, (37, 256), name)


@pytest.mark.parametrize("name", implementations.NAMES)
@pytest.mark.parametrize("features", (1, 7, 1100, 5000))
def test_at_any_number_of_features(features, name, quick_compilation):
    implementations.needed(name)
    x = jax.random.normal(jax.random.key(0), (5, features), "bfloat16")
    params = {"scale": jnp.linspace(-2, 2, features, dtype="bfloat16")}
    options = {"round_before_scale": True, "implementation": name}
    y = jln.rms_norm(params, x, **options)
    want = jln.rms_norm({}, x, implementation=name) * params["scale"]
    np.testing.assert_array_equal(np.asarray(y), np.asarray(want))


@pytest.mark.parametrize("function", (jln.layer_norm, jln.rms_norm))
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_wide_rows_keep_their_bits(function, dtype, x64):
    x = jax.random.normal(jax.random.key(0), (5, 96), dtype)
    params = jln.init_params(96, dtype=dtype)
    y = function(params, x, round_before_scale=True)
    assert (y == function(params, x)).all()


@pytest.mark.parametrize("name", implementations.NAMES)
def test_a_float16_keeps_its_denormal_numbers(name):
    implementations.needed(name)
    x = jnp.array([[1e4, 0.25, 0.125, -0.5]], "float16")
    y = jln.rms_norm({}, x, round_before_scale=True, implementation=name)
    assert (y == jln.rms_norm({}, x, implementation=name)).all()
    assert 0 < float(y[0, 2]) < float(jnp.finfo("float16").tiny)
    tiny = jnp.full((1, 4), 3e-6, "float16")
    _, residual = jln.add_rms_norm({}, tiny, tiny, implementation=name)
    assert (residual == tiny + tiny).all() and (residual > 0).all()


def test_the_equations_alone_give_the_same_in_either_mode():
    x = jax.random.normal(jax.random.key(0), (5, 96), "bfloat16")
    params = {"scale": jnp.linspace(0.5, 2, 96, dtype="bfloat16")}

    def loss(custom_vjp, params, x):
        y = jln.rms_norm(params, x, round_before_scale=True, custom_vjp=custom_vjp)
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(96.0))).sum()

    (want, grads), (got, others) = (
        jax.value_and_grad(loss, (1, 2))(custom_vjp, params, x)
        for custom_vjp in (True, False)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(other, np.float32),
            rtol=0.02,
            atol=0.02,
        )


def test_it_must_be_a_flag():
    with pytest.raises(TypeError, match="round_before_scale must be True or False"):
        jln.rms_norm({}, jnp.ones((2, 3)), round_before_scale="llama")
