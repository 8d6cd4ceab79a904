"""What `linen.replace` leaves to Flax, and which arguments it must read as Flax does."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_cases import FEATURES, SHAPE, assert_equal, draw
from flax_models import Twice, X, assert_close, count_ops
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_calls_with_a_mask_stay_flaxs(name):
    model = Twice(getattr(nn, name)())
    mask = np.random.default_rng(1).random(SHAPE) > 0.3
    variables = model.init(jax.random.key(0), X)
    want = model.apply(variables, X, mask=mask)
    with jln.linen.replace() as report:
        assert_equal(model.apply(variables, X, mask=mask), want)
        assert not report.replaced
        assert report.left["norm"].startswith("called with a mask")
        model.apply(variables, X, mask=None)
    assert report.replaced == {"norm": name} and "norm" in report.left


class Overrides(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * x


class CallsSuper(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class OnlyFields(nn.RMSNorm):
    epsilon: float = 0.25


def test_subclasses_keep_what_they_override():
    for norm, ours in (
        (Overrides(), 0),
        (CallsSuper(), 1),
        (OnlyFields(), 1),
        (nn.remat(nn.LayerNorm)(), 1),
        (nn.jit(nn.LayerNorm)(), 1),
        (jln.linen.LayerNorm(), 1),
    ):
        variables = norm.init(jax.random.key(0), X)
        want = norm.apply(variables, X)
        with jln.linen.replace():
            assert_close(norm.apply(variables, X), want)
            assert count_ops(norm.apply, variables, X) == (ours, 0)


def test_our_own_modules_keep_their_masks_and_fields():
    norm = jln.linen.LayerNorm(scale_offset=1.0)
    variables = norm.init(jax.random.key(0), X)
    want = norm.apply(variables, X, X > 0, residual=X)
    with jln.linen.replace() as report:
        assert_equal(norm.apply(variables, X, X > 0, residual=X), want)
    assert not report.replaced and not report.left


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (nn.LayerNorm(), X * (1 + 1j)),
        (nn.RMSNorm(dtype=jnp.complex64), X),
        (nn.RMSNorm(param_dtype=jnp.complex64), X),
        (nn.LayerNorm(dtype=jnp.float64), X),  # is float32 while x64 is off
        (nn.LayerNorm(epsilon=jnp.float32(1e-5)), X),
        (nn.LayerNorm(reduction_axes=()), X),
    ],
    ids=("complex x", "complex y", "complex scale", "float64", "epsilon", "no axes"),
)
def test_what_our_functions_refuse_stays_flaxs(norm, x):
    variables = norm.init(jax.random.key(0), x)
    want = norm.apply(variables, x)
    with jln.linen.replace() as report:
        assert_equal(norm.apply(variables, x), want)
    assert not report.replaced and report.left


def test_axis_index_groups_stay_flaxs():
    groups = {"axis_name": "i", "axis_index_groups": [[0, 1], [2, 3]]}
    norm = nn.LayerNorm(**groups, use_scale=False, use_bias=False)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    run = jax.jit(
        jax.shard_map(
            partial(norm.apply, {}),
            mesh=mesh,
            in_specs=P("i"),
            out_specs=P("i"),
            check_vma=False,
        )
    )
    want = run(X)
    with jln.linen.replace() as report:
        assert_equal(run(X), want)
    assert report.left == {"LayerNorm": "axis_index_groups is given"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(force_float32_reductions=False, param_dtype=jnp.bfloat16),
        nn.LayerNorm(reduction_axes=(-1, 1), feature_axes=[-1]),
        nn.RMSNorm(dtype=jnp.float16, axis_name="parts"),
    ],
    ids=("param_dtype governs", "repeated axes", "mapped"),
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_dtypes_and_axes_are_read_as_flax_reads_them(norm, dtype):
    x = (8 * X).astype(dtype)
    params = {"scale": 1 + draw(1, FEATURES) / 2, "bias": draw(2, FEATURES)}
    if isinstance(norm, nn.RMSNorm):
        del params["bias"]

    def run():
        apply = jax.vmap(partial(norm.apply, {"params": params}), axis_name="parts")
        return apply(x[:, None])

    want = run()
    with jln.linen.replace() as report:
        got = run()
    assert report.replaced and not report.left
    assert got.dtype == want.dtype
    eps = float(jnp.finfo(jnp.bfloat16).eps)  # Flax may have reduced in it
    np.testing.assert_allclose(*(np.float32(y) for y in (got, want)), 8 * eps, 8 * eps)


def test_wrong_arguments_are_a_type_error_as_in_flax():
    norm = nn.LayerNorm(use_bias=False, use_scale=False)
    with jln.linen.replace():
        for args, kwargs in (((X, X > 0), {}), ((), {}), ((X,), {"no": 1})):
            with pytest.raises(TypeError, match="__call__"):
                norm.apply({}, *args, **kwargs)
