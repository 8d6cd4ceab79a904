"""Under every transformation, norms have the values of plain `jax.numpy`."""

import contextlib
import functools

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


# Each variant is a pair: our `norm(params, x)`, with options, and plain jax.numpy's.


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
    y, residual_out, (mean, rstd) = jln.add_layer_norm(
        params,
        x,
        jnp.sin(x),
        axis=(-1, -2),
        mask=MASK,
        return_statistics=True,
        **options,
    )
    return y * jnp.cos(mean) + rstd * residual_out


def plain_all_together(params, x):
    residual_out = jnp.sin(x) + x
    y, mean, rstd = plain_norm(params, residual_out, axes=(-2, -1), mask=MASK)
    return y * jnp.cos(mean) + rstd * residual_out


def adaptive_bfloat16(params, x, **options):
    """bfloat16, with parameters that broadcast against `x`."""
    shape = x.shape  # each example has parameters
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, shape), params)
    return jln.layer_norm(params, x.astype(jnp.bfloat16), dtype="float64", **options)


def plain_adaptive_bfloat16(params, x):
    rounded = x.astype(jnp.bfloat16).astype(x.dtype)
    return plain_norm(params, rounded)[0]


def added_with_statistics(params, x, **options):
    """All that a kernel reads and returns."""
    y, residual_out, (mean, rstd) = jln.add_layer_norm(
        params, x, jnp.sin(x), return_statistics=True, **options
    )
    return y * jnp.cos(mean) + rstd * residual_out


def plain_added_with_statistics(params, x):
    residual_out = jnp.sin(x) + x
    y, mean, rstd = plain_norm(params, residual_out)
    return y * jnp.cos(mean) + rstd * residual_out


VARIANTS = {
    "layer norm": (layer_norm, plain_layer_norm, 1e-9),
    "masked RMS norm": (masked_rms_norm, plain_masked_rms_norm, 1e-9),
    "all together": (all_together, plain_all_together, 1e-9),
    # dx is rounded to bfloat16, and three times in a third derivative.
    "adaptive bfloat16": (adaptive_bfloat16, plain_adaptive_bfloat16, 6e-2),
    "added with statistics": (added_with_statistics, plain_added_with_statistics, 1e-9),
}
FOR_KERNELS = "added with statistics"
"""The variant that all kernels can run; what surrounds them is the same for all."""
IN_TURN = [name for name in VARIANTS if name != FOR_KERNELS]
HIGHER = ("grad_of_grad", "hessian", "hvp_of", "jacrev_of", "jacfwd", "vmap_of_hvp")
"""Cases of higher derivatives, which run the equations and no kernel."""
RUNS = [
    *((name, IN_TURN[i % len(IN_TURN)]) for i, name in enumerate(sorted(CASES))),
    *(
        (name, FOR_KERNELS)
        for name in REVERSE_MODE
        if not any(higher in name for higher in HIGHER)
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
    "jvp_of_shard_map",
)
"""One of each kind of case, which runs outside `jax.jit` too."""
# The cases that a kernel must refuse, and its reasons.
REFUSED = {
    ("native_cpu", "exported_for_three_platforms"): "it supports CPUs only|is exported",
    ("native_cpu", "exported_with_a_symbolic_batch"): "is symbolic|is exported",
    ("native_cpu", "grad_with_automatic_sharding"): "XLA partitions",
    ("native_cpu", "lowered_for_three_platforms"): "it supports CPUs only",
}


def assert_same(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    size = 1 + max(np.max(np.abs(a), initial=0) for a in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


def ways(name, variant):
    """Options under which a case must give the same."""
    if variant == FOR_KERNELS:
        kernels = [each for each in implementations.NAMES if each != "xla"]
        return [
            {"implementation": each}
            for each in kernels
            if implementations.missing(each) is None
        ]
    if name in FORWARD_MODE:
        return [{"custom_vjp": False}]
    # Without `custom_vjp` JAX does reverse mode itself: a third of the cases is enough.
    by_jax = [{"custom_vjp": False}] if REVERSE_MODE.index(name) % 3 == 0 else []
    return [{"implementation": "xla"}, *by_jax]


@contextlib.contextmanager
def strict(name):
    """JAX's checks; the check for leaks takes long, so only every 20th case has it."""
    every_20th = sorted(CASES).index(name) % 20 == 0
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks() if every_20th else contextlib.nullcontext(),
        jax.debug_nans(True),
    ):
        yield


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_every_transformation_gives_the_values_of_plain_jax_numpy(name, variant):
    norm, plain, tolerance = VARIANTS[variant]
    options_of_ways = ways(name, variant)
    if not options_of_ways:
        pytest.skip("no hand-written kernel can run here")
    expected = run(name, plain)
    for options in options_of_ways:
        reason = REFUSED.get((options.get("implementation"), name))
        transformed = functools.partial(run, name, functools.partial(norm, **options))
        if reason is None:
            with strict(name):
                result = transformed()
            assert_same(result, expected, tolerance)
        else:  # a named implementation runs or raises
            with pytest.raises(NotImplementedError, match=reason):
                transformed()


@pytest.mark.parametrize("implementation", (None, "xla"))
@pytest.mark.parametrize("jit", (jax.jit, lambda f: f), ids=("jitted", "eager"))
def test_debug_nans_names_the_pass_that_makes_a_nan(jit, implementation):
    """0 / 0 forward, because the rows are constant, and inf - inf backward."""
    options = {"epsilon": 0.0, "implementation": implementation}
    norm = functools.partial(jln.layer_norm, {}, **options)
    backward = jit(lambda x, dy: jax.vjp(norm, x)[1](dy))
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match="layer_norm_forward"):
            jit(norm)(jnp.ones((3, 8)))
        with pytest.raises(FloatingPointError, match="layer_norm_backward"):
            backward(jnp.array([[1.0, 2.0]]), jnp.array([[jnp.inf, 1.0]]))


@pytest.mark.parametrize("name", OP_BY_OP)
def test_it_gives_the_same_op_by_op(name):
    norm = functools.partial(layer_norm, custom_vjp=name not in FORWARD_MODE)
    assert_same(CASES[name](norm), run(name, plain_layer_norm), 1e-9)


@pytest.mark.parametrize("name", sorted(FORWARD_MODE))
def test_forward_mode_with_the_defaults_raises_rather_than_return_a_number(name):
    with pytest.raises(Exception, match=r"custom_vjp|custom_lin|trace|Tracer") as error:
        run(name, layer_norm)
    assert not isinstance(error.value, AssertionError)


def test_the_matrix_covers_both_modes():
    assert len(REVERSE_MODE) >= 66
    assert len(CASES) >= 89
