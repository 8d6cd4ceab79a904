"""Norms come through every transformation with the values of plain `jax.numpy`."""

import functools
import itertools

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import program_cases  # noqa: F401  adds its cases to the tables
import pytest
from transform_cases import CASES, FEATURES, FORWARD_MODE, run

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

REVERSE_MODE = sorted(set(CASES) - FORWARD_MODE)
MASK = np.arange(FEATURES) % 3 != 1


def plain_norm(params, x, *, axes=(-1,), center=True, mask=None):
    """`y`, mean and rstd, as JAX users write them; JAX differentiates this."""
    take = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    count = jnp.sum(take, axes, keepdims=True)
    kept = jnp.where(take, x, 0)
    mean = jnp.sum(kept, axes, keepdims=True) / count if center else 0.0
    c = jnp.where(take, kept - mean, 0)
    rstd = jax.lax.rsqrt(jnp.sum(c * c, axes, keepdims=True) / count + 1e-6)
    return jnp.where(take, c * rstd * params["scale"] + params["bias"], 0), mean, rstd


# Each variant: `norm(params, x)` of ours, with options, and of plain jax.numpy.


def layer_norm(params, x, **options):
    return jln.layer_norm(params, x, **options)


def plain_layer_norm(params, x):
    return plain_norm(params, x)[0]


def masked_rms_norm(params, x, **options):
    return jln.rms_norm(params, x, mask=MASK, **options)


def plain_masked_rms_norm(params, x):
    return plain_norm(params, x, center=False, mask=MASK)[0]


def all_together(params, x, **options):
    """An added norm over two axes in another order, masked, with its statistics."""
    shape = x.shape[-2:]
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, shape).T, params)
    y, total, (mean, rstd) = jln.add_layer_norm(
        params,
        x,
        jnp.sin(x),
        axis=(-1, -2),
        mask=MASK,
        return_statistics=True,
        **options,
    )
    return y * jnp.cos(mean) + rstd * total


def plain_all_together(params, x):
    total = jnp.sin(x) + x
    y, mean, rstd = plain_norm(params, total, axes=(-2, -1), mask=MASK)
    return y * jnp.cos(mean) + rstd * total


def adaptive_bfloat16(params, x, **options):
    """bfloat16, with parameters that broadcast against `x`."""
    params = jax.tree.map(lambda p: p * jnp.ones_like(x[..., :1]), params)
    return jln.layer_norm(params, x.astype(jnp.bfloat16), dtype="float64", **options)


def plain_adaptive_bfloat16(params, x):
    rounded = x.astype(jnp.bfloat16).astype(x.dtype)
    return plain_norm(params, rounded)[0]


def added_with_statistics(params, x, **options):
    """All that a kernel reads and returns."""
    y, total, (mean, rstd) = jln.add_layer_norm(
        params, x, jnp.sin(x), return_statistics=True, **options
    )
    return y * jnp.cos(mean) + rstd * total


def plain_added_with_statistics(params, x):
    total = jnp.sin(x) + x
    y, mean, rstd = plain_norm(params, total)
    return y * jnp.cos(mean) + rstd * total


VARIANTS = {
    "layer norm": (layer_norm, plain_layer_norm, 1e-9),
    "masked RMS norm": (masked_rms_norm, plain_masked_rms_norm, 1e-9),
    "all together": (all_together, plain_all_together, 1e-9),
    # dx is rounded to bfloat16; in a third derivative, three times over
    "adaptive bfloat16": (adaptive_bfloat16, plain_adaptive_bfloat16, 6e-2),
}
# What surrounds the kernels is the same for all, so one variant is enough for those that
# are hand-written.
FOR_KERNELS = {
    "added with statistics": (added_with_statistics, plain_added_with_statistics, 1e-9),
}


def variants_of(names, *always):
    """Each case with the variants `always`, and with one of the others in turn."""
    others = itertools.cycle(name for name in VARIANTS if name not in always)
    return [(name, variant) for name in names for variant in (*always, next(others))]


RUNS = [
    *(
        (name, variant, "xla")
        for name, variant in variants_of(REVERSE_MODE, "all together")
    ),
    *(
        (name, variant, implementation)
        for name in REVERSE_MODE
        for variant in FOR_KERNELS
        for implementation in implementations.NAMES
        if implementation != "xla"
    ),
]
OP_BY_OP = (
    "vjp",
    "grad_of_x",
    "vmap_of_both",
    "vmap_of_grad",
    "grad_of_scan",
    "grad_of_remat",
    "shard_map",
    "grad_of_shard_map",
    "grad_inside_shard_map",
)
"""One of each kind, that runs outside `jax.jit` too."""
# Where this kernel must say that it cannot run, and why.
REFUSED = {
    ("native_cpu", "exported_for_three_platforms"): "it supports CPUs only|is exported",
    ("native_cpu", "exported_with_a_symbolic_batch"): "is symbolic|is exported",
    ("native_cpu", "grad_with_automatic_sharding"): "XLA partitions",
    ("native_cpu", "lowered_for_three_platforms"): "it supports CPUs only",
}


@functools.cache
def expected(variant, name):
    return run(name, (VARIANTS | FOR_KERNELS)[variant][1])


def assert_same(variant, name, *, run=run, **options):
    norm, _, tolerance = (VARIANTS | FOR_KERNELS)[variant]
    actual = run(name, lambda params, x: norm(params, x, **options))
    right = expected(variant, name)
    assert jax.tree.structure(actual) == jax.tree.structure(right)
    size = 1 + max(np.max(np.abs(a), initial=0) for a in jax.tree.leaves(right))
    for a, b in zip(*map(jax.tree.leaves, (actual, right)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize(("name", "variant", "implementation"), RUNS)
def test_reverse_mode_works(name, variant, implementation):
    # What is named runs or raises; the default is the first of these that can run.
    implementations.needed(implementation)
    reason = REFUSED.get((implementation, name))
    if reason is None:
        assert_same(variant, name, implementation=implementation)
    else:
        with pytest.raises(NotImplementedError, match=reason):
            assert_same(variant, name, implementation=implementation)


@pytest.mark.parametrize(("name", "variant"), variants_of(sorted(CASES)))
def test_everything_works_with_custom_vjp_false(name, variant):
    assert_same(variant, name, custom_vjp=False)


@pytest.mark.parametrize("name", OP_BY_OP)
def test_reverse_mode_works_op_by_op(name):
    assert_same("layer norm", name, run=lambda name, norm: CASES[name](norm))


def test_forward_mode_of_a_shard_map_works_op_by_op():
    assert_same(
        "layer norm",
        "jvp_of_shard_map",
        run=lambda name, norm: CASES[name](norm),
        custom_vjp=False,
    )


@pytest.mark.parametrize("name", sorted(FORWARD_MODE))
def test_forward_mode_with_the_defaults_raises_rather_than_return_a_number(name):
    with pytest.raises(Exception, match=r"custom_vjp|custom_lin|trace|Tracer") as error:
        run(name, layer_norm)
    assert not isinstance(error.value, AssertionError)


def test_the_matrix_covers_both_modes():
    assert len(REVERSE_MODE) >= 66
    assert len(CASES) >= 89
