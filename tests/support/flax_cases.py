"""What the tests of the Flax modules share: dtypes, data, comparisons."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx

import jax_layernorm as jln

ROWS, FEATURES = 12, 48
SHAPE = (ROWS, FEATURES)
NAMES = ("LayerNorm", "RMSNorm")
EXTRA = {
    "scale_offset": 0.0,
    "round_before_scale": False,
    "implementation": None,
    "custom_vjp": True,
}
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
PARAM_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)
RESULT_DTYPES = (None, jnp.bfloat16, jnp.float32, jnp.float64)
INTEGERS = (jnp.int32, jnp.uint8, jnp.int64, jnp.bool_)
PARAMS_AND_RESULTS = (  # dtypes of the parameters, and `dtype`
    *itertools.product((jnp.bfloat16, jnp.float32), (None, jnp.bfloat16, jnp.float32)),
    (jnp.float64, None),
    (jnp.float32, jnp.float64),
)
SUMS = (  # dtypes of x and the residual, and `dtype`
    (jnp.float32, jnp.float32, None),
    (jnp.bfloat16, jnp.bfloat16, None),
    (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.float32, jnp.float16, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16, jnp.float64),
    (jnp.float32, jnp.float32, jnp.float64),
    (jnp.float64, jnp.float64, None),
)
AXES = {  # reduction_axes and feature_axes, for x of rank 3
    "first": (0, 0),
    "middle": (1, 1),
    "two": ((1, 2), (1, 2)),
    "two, two features": ((-1, -2), (1, 2)),
    "all": ((0, 1, 2), -1),
    "features elsewhere": (-1, 1),
    "features within": ((1, 2), -1),
}
APIS = {"linen": (jln.linen, linen), "nnx": (jln.nnx, nnx)}
for_both = pytest.mark.parametrize("name", NAMES)


def draw(seed, *shape, dtype=jnp.float32):
    """Standard normal, each row of mean 0 before it is rounded to `dtype`."""
    a = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(a - a.mean(-1, keepdims=True), dtype)


def draw_params(name, dtype=jnp.float32):
    params = {"scale": 1 + draw(1, FEATURES) / 2, "bias": draw(2, FEATURES)}
    keys = params if name == "LayerNorm" else ["scale"]
    return {key: params[key].astype(dtype) for key in keys}


def forward_and_gradients(norm, params, x):
    """`(y, dparams, dx), dy`, with a random `dy`."""
    y, vjp = jax.vjp(norm, params, x)
    dy = draw(3, *y.shape, dtype=y.dtype)
    return (y, *vjp(dy)), dy


def assert_right(name, results, dy, params, x, **options):
    """Against the oracle, every result to the rounding of its own dtype."""
    y, grads, dx = results
    expected = oracle.norm(x, **params, dy=dy, center=name == "LayerNorm", **options)
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    wide = jnp.float64 in (x.dtype, y.dtype)
    for key, grad in grads.items():
        summed_in = grad if wide or grad.dtype != jnp.float64 else np.float32(grad)
        oracle.assert_close(summed_in, getattr(expected, f"d{key}"), summed=ROWS)


def assert_agree(ours, flaxs, *rounded_to):
    """Same trees, shapes and dtypes; values equal to the roundings of both sides.

    Each side may be off by what `oracle.assert_close` allows, about 8 units of float32,
    and may round to `rounded_to` on the way (half a unit each). The limit is larger,
    because a model of a few layers may be off by as much again in each layer.
    """
    eps = sum(float(jnp.finfo(t).eps) for t in rounded_to)
    assert dtypes(ours) == dtypes(flaxs)

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        limit = eps + 64 * float(jnp.finfo(jnp.float32).eps)
        assert np.abs(a - b).max() <= limit * np.abs(b).max()

    jax.tree.map(check, ours, flaxs)


def assert_equal(tree, other):
    assert dtypes(tree) == dtypes(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def dtypes(tree):
    return jax.tree.map(lambda a: a.dtype, tree)


def as_function(norms, name, **options):
    """A norm of linen or NNX as a function of its parameters and `x`."""
    kind = getattr(norms, name)
    if issubclass(kind, linen.Module):
        norm = kind(**options)
        return lambda params, x, **call: norm.apply({"params": params}, x, **call)
    structure = nnx.graphdef(kind(FEATURES, **options, rngs=nnx.Rngs(0)))

    def function(params, x, **call):
        state = nnx.State({key: nnx.Param(value) for key, value in params.items()})
        return nnx.merge(structure, state)(x, **call)

    return function


def as_functions(api, name, **options):
    """Our norm and Flax's as functions."""
    return (as_function(norms, name, **options) for norms in APIS[api])


def for_all(test):
    """Runs `test` for both norms of linen and of NNX."""
    return pytest.mark.parametrize("api", APIS)(for_both(test))
