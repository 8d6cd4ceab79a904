"""What Flax's tests claim of its norms holds for ours and for Flax's, replaced.

The claims are those of `NormalizationTest` in Flax's tests/linen/linen_test.py, and in
tests/nnx/nn of normalization_test.py and linear_test.py (commit 18f8f311).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx
from flax_cases import APIS, assert_equal, draw, for_both

import jax_layernorm as jln

LINEN = {"ours": jln.linen, "replaced": nn}
for_linen = pytest.mark.parametrize("norms", LINEN.values(), ids=LINEN)


@pytest.fixture(autouse=True)
def replacing():
    with jln.linen.replace():
        yield


@for_both
@for_linen
def test_what_a_mask_keeps_is_normalized_whatever_it_leaves_out(norms, name):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 4, 5)) > 0.5
    mask[..., :2] = True
    x = jnp.where(mask, draw(0, 3, 4, 5), jnp.nan)
    y, _ = getattr(norms, name)().init_with_output(jax.random.key(0), x, mask=mask)
    y = np.asarray(y)
    if name == "LayerNorm":
        np.testing.assert_allclose(y.mean(-1, where=mask), 0, atol=1e-4)
    np.testing.assert_allclose((y * y).mean(-1, where=mask), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("axes", "offset"),
    [(-1, 0), (1, 0), ((1, 2), 0), ((0, 1, 2), 0), (-1, 1e6)],
    ids=str,
)
@for_both
@for_linen
def test_without_parameters_it_is_the_formula(norms, name, axes, offset):
    options = {"use_bias": False} if name == "LayerNorm" else {}
    if offset:
        options |= {"use_fast_variance": False}  # Flax's norm needs it at this offset
    norm = getattr(norms, name)(
        use_scale=False, epsilon=1e-5, reduction_axes=axes, **options
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)) + offset, "f4")
    y, variables = norm.init_with_output(jax.random.key(0), x)
    assert not variables and y.dtype == x.dtype
    center = name == "LayerNorm"
    oracle.assert_close(y, oracle.norm(x, axis=axes, epsilon=1e-5, center=center).y)


RANDOM = {
    "scale_init": nn.initializers.uniform(),
    "bias_init": nn.initializers.uniform(),
}
EQUIVALENT = {
    "instance norm, features 1 and 2": (
        {"feature_axes": (1, 2)},
        nn.InstanceNorm(feature_axes=(1, 2)),
    ),
    "instance norm, features last": (
        {"reduction_axes": (1, 2), "feature_axes": -1},
        nn.InstanceNorm(feature_axes=-1),
    ),
    "instance norm, features 1 and 3": (
        {"reduction_axes": -2, "feature_axes": (1, 3), **RANDOM},
        nn.InstanceNorm(feature_axes=(1, -1), **RANDOM),
    ),
    "group norm of one group": (
        {"reduction_axes": (1, 2, 3), **RANDOM},
        nn.GroupNorm(num_groups=1, **RANDOM),
    ),
}


@pytest.mark.parametrize(("options", "other"), EQUIVALENT.values(), ids=EQUIVALENT)
@for_linen
def test_is_another_norm_of_flaxs_over_the_same_axes(norms, options, other):
    norm, x = norms.LayerNorm(**options), draw(0, 2, 3, 4, 5)
    variables = norm.init(jax.random.key(1), x)
    assert_equal(variables, other.init(jax.random.key(1), x))
    np.testing.assert_allclose(
        norm.apply(variables, x), other.apply(variables, x), atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
@for_both
def test_linen_and_nnx_give_the_same_bits(name, masked):
    mask = np.array([True, False, True, False, True]) if masked else None
    x, half = draw(0, 10, 5), (jnp.float32, jnp.float16)
    for dtype, param_dtype, fast in itertools.product(half, half, (True, False)):
        options = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "use_fast_variance": fast,
        }
        norm = getattr(jln.linen, name)(**options)
        y, _ = norm.init_with_output(jax.random.key(0), x, mask=mask)
        for promote in ({}, {"promote_dtype": lambda arrays, **_: arrays}):
            same = getattr(jln.nnx, name)(5, **options, **promote, rngs=nnx.Rngs(0))
            assert_equal(same(x, mask=mask), y)


@for_both
def test_graphdef_does_not_depend_on_the_initializers(name):
    inits = ["scale_init", "bias_init"][: 2 if name == "LayerNorm" else 1]
    zeros, ones = (
        nnx.graphdef(
            getattr(jln.nnx, name)(3, **dict.fromkeys(inits, init), rngs=nnx.Rngs(0))
        )
        for init in (nnx.initializers.zeros, nnx.initializers.ones)
    )
    assert zeros == ones


@for_both
def test_sharding_metadata_reaches_the_parameters(name):
    keys = ["scale", "bias"][: 2 if name == "LayerNorm" else 1]
    metadata = {f"{key}_metadata": {"out_sharding": ("features",)} for key in keys}
    mesh = jax.make_mesh((1,), ("features",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        for norms in APIS["nnx"]:
            norm = getattr(norms, name)(3, **metadata, rngs=nnx.Rngs(0))
            ours = jln.nnx.replace(norm)
            for key in keys:
                assert getattr(ours, key).out_sharding == ("features",)
            assert type(ours) is getattr(jln.nnx, name)
