"""The norm comes through every transformation with the values of plain `jax.numpy`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import program_cases  # noqa: F401  adds its cases to the tables
import pytest
from transform_cases import CASES, FORWARD_MODE

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

REVERSE_MODE = sorted(set(CASES) - FORWARD_MODE)


def plain_norm(params, x):
    c = x - jnp.mean(x, -1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(c * c, -1, keepdims=True) + 1e-6)
    return c * rstd * params["scale"] + params["bias"]


@functools.cache
def expected(name):
    return CASES[name](plain_norm)


def assert_same(name, norm):
    actual = CASES[name](norm)
    assert jax.tree.structure(actual) == jax.tree.structure(expected(name))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected(name))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REVERSE_MODE)
def test_reverse_mode_works_with_the_defaults(name):
    assert_same(name, lambda params, x: jln.layer_norm(params, x))


@pytest.mark.parametrize("name", sorted(CASES))
def test_everything_works_with_custom_vjp_false(name):
    assert_same(name, lambda params, x: jln.layer_norm(params, x, custom_vjp=False))


@pytest.mark.parametrize("name", sorted(FORWARD_MODE))
def test_forward_mode_with_the_defaults_raises_rather_than_return_a_number(name):
    with pytest.raises(Exception, match=r"custom_vjp|custom_lin|trace|Tracer") as error:
        CASES[name](lambda params, x: jln.layer_norm(params, x))
    assert not isinstance(error.value, AssertionError)


def test_the_matrix_covers_both_modes():
    assert len(REVERSE_MODE) >= 66
    assert len(CASES) >= 89
