"""More transformations, of whole programs: control flow, remat, export, sharding.

They join those of `transform_cases` in its tables.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transform_cases import (
    BOTH,
    DPARAMS,
    DX,
    DY,
    PARAMS,
    STACK,
    WEIGHTS,
    X,
    case,
    draw,
    forward_mode,
    loss_of,
    outside_jit,
    unweighted_loss_of,
)

X_SHARDED = draw(4, *X.shape[1:], seed=11)
DX_SHARDED = draw(4, *X.shape[1:], seed=12)


def on_devices(tree):
    return jax.tree.map(jnp.asarray, tree)


# Control flow.


@case
def scan(norm):
    return lax.scan(lambda x, params: (norm(params, x), x.sum()), jnp.asarray(X), STACK)


def scanned_loss_of(norm, *, body=lambda function: function):
    @body
    def layer(x, params):
        return jnp.tanh(norm(params, x)), None

    def loss(stack, x):
        y, _ = lax.scan(layer, jnp.asarray(x), stack)
        return jnp.sum(y * WEIGHTS)

    return loss


@case
def grad_of_scan(norm):
    return jax.grad(scanned_loss_of(norm), BOTH)(STACK, X)


@case
def grad_of_scan_of_remat(norm):
    return jax.grad(scanned_loss_of(norm, body=jax.checkpoint), BOTH)(STACK, X)


@case
def grad_of_scan_with_constant_params(norm):
    def loss(params, x):
        def layer(x, _):
            return jnp.tanh(norm(params, x)), None

        y, _ = lax.scan(layer, x, None, length=3)
        return jnp.sum(y * WEIGHTS)

    return jax.grad(loss, BOTH)(PARAMS, X)


@case
def hvp_of_scan(norm):
    gradient = jax.grad(scanned_loss_of(norm), BOTH)
    return jax.jvp(gradient, (STACK, X), (STACK, DX))


@forward_mode
def jvp_of_scan(norm):
    return jax.jvp(scanned_loss_of(norm), (STACK, X), (STACK, DX))


@forward_mode
def jvp_of_while(norm):
    def three_times(params, x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(norm(params, carry[1]))

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    return jax.jvp(three_times, (PARAMS, X), (DPARAMS, DX))


def branching_loss_of(norm):
    def loss(params, x):
        return lax.cond(
            x.sum() > 1e9, lambda: x.sum(), lambda: loss_of(norm)(params, x)
        )

    return loss


@case
def grad_of_cond(norm):
    return jax.grad(branching_loss_of(norm), BOTH)(PARAMS, X)


@forward_mode
def jvp_of_cond(norm):
    return jax.jvp(branching_loss_of(norm), (PARAMS, X), (DPARAMS, DX))


# Rematerialization.


def two_norms_of(norm):
    def loss(params, x):
        return jnp.sum(jnp.sin(norm(params, jnp.tanh(norm(params, x)))) * WEIGHTS)

    return loss


def remat_of(norm, policy=None):
    return jax.checkpoint(two_norms_of(norm), policy=policy)


STATISTICS = jax.checkpoint_policies.save_only_these_names("layer_norm_statistics")


@case
def grad_of_remat(norm):
    return jax.grad(remat_of(norm), BOTH)(PARAMS, X)


@case
def grad_of_remat_saving_statistics(norm):
    return jax.grad(remat_of(norm, STATISTICS), BOTH)(PARAMS, X)


@case
def jit_of_grad_of_remat_saving_statistics(norm):
    return jax.jit(jax.grad(remat_of(norm, STATISTICS), BOTH))(PARAMS, X)


@case
def grad_of_remat_saving_dots(norm):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.grad(remat_of(norm, policy), BOTH)(PARAMS, X)


@case
def grad_of_remat_saving_everything(norm):
    policy = jax.checkpoint_policies.everything_saveable
    return jax.grad(remat_of(norm, policy), BOTH)(PARAMS, X)


@case
def hvp_of_remat(norm):
    return jax.jvp(jax.grad(remat_of(norm), BOTH), (PARAMS, X), (DPARAMS, DX))


@case
def vmap_of_grad_of_remat(norm):
    loss = jax.checkpoint(unweighted_loss_of(norm))
    return jax.vmap(jax.grad(loss, BOTH), (None, 0))(PARAMS, X)


@forward_mode
def jvp_of_remat(norm):
    return jax.jvp(remat_of(norm), (PARAMS, X), (DPARAMS, DX))


# Lowering and export.


@outside_jit
@case
def lowered_for_three_platforms(norm):
    gradients = jax.jit(jax.grad(loss_of(norm), BOTH)).trace(PARAMS, X)
    text = gradients.lower(lowering_platforms=("tpu", "cuda", "cpu")).as_text()
    return jnp.zeros(()) if "stablehlo" in text else jnp.ones(())


def through_export(norm, x, platforms):
    exported = export.export(jax.jit(norm), platforms=platforms)(PARAMS, x)
    loaded = export.deserialize(bytearray(exported.serialize(vjp_order=1)))
    y, pullback = jax.vjp(loaded.call, PARAMS, X)
    return y, pullback(jnp.asarray(DY))


@outside_jit
@case
def exported_for_three_platforms(norm):
    return through_export(norm, X, ("cpu", "cuda", "tpu"))


@outside_jit
@case
def exported_with_a_symbolic_batch(norm):
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    return through_export(norm, x, ("cpu", "cuda", "tpu"))


# Sharding: two devices, the batch split between them.


def mesh_of_two(axis_type):
    if jax.device_count() < 2:
        pytest.skip("this needs two devices, and only one is here")
    return jax.make_mesh((2,), ("data",), axis_types=(axis_type,))


def over_two_devices(function, out_specs, **options):
    mesh = mesh_of_two(AxisType.Auto)
    specs = {"in_specs": (P(), P("data")), "out_specs": out_specs}
    return jax.shard_map(function, mesh=mesh, **specs, **options)


@case
def shard_map(norm):
    return over_two_devices(norm, P("data"))(PARAMS, X_SHARDED)


@case
def grad_of_shard_map(norm):
    sharded = over_two_devices(norm, P("data"))
    return jax.grad(unweighted_loss_of(sharded), BOTH)(PARAMS, X_SHARDED)


@case
def grad_of_shard_map_unchecked(norm):
    sharded = over_two_devices(norm, P("data"), check_vma=False)
    return jax.grad(unweighted_loss_of(sharded), BOTH)(PARAMS, X_SHARDED)


@case
def grad_inside_shard_map(norm):
    gradients = jax.grad(unweighted_loss_of(norm), BOTH)
    return over_two_devices(gradients, (P(), P("data")))(PARAMS, X_SHARDED)


@case
def hvp_of_shard_map(norm):
    sharded = over_two_devices(norm, P("data"))
    gradient = jax.grad(unweighted_loss_of(sharded), BOTH)
    return jax.jvp(
        gradient, on_devices((PARAMS, X_SHARDED)), on_devices((DPARAMS, DX_SHARDED))
    )


@case
def grad_of_shard_map_of_vmap(norm):
    sharded = over_two_devices(jax.vmap(norm, (None, 0)), P("data"))
    return jax.grad(unweighted_loss_of(sharded), BOTH)(PARAMS, X_SHARDED)


@forward_mode
def jvp_of_shard_map(norm):
    sharded = over_two_devices(norm, P("data"))
    return jax.jvp(
        sharded, on_devices((PARAMS, X_SHARDED)), on_devices((DPARAMS, DX_SHARDED))
    )


def explicitly_sharded(function, *arguments):
    """`function` of arrays whose types carry a sharding; those of rank 3 are split."""
    mesh = mesh_of_two(AxisType.Explicit)
    with jax.set_mesh(mesh):

        def put(array):
            spec = P("data") if array.ndim == 3 else P()
            return jax.device_put(array, NamedSharding(mesh, spec))

        results = jax.jit(function)(*jax.tree.map(put, arguments))
    for result in jax.tree.leaves(results):
        if result.ndim == 3:
            assert result.sharding.spec[0] == "data"
    return jax.tree.map(np.asarray, results)


@outside_jit
@case
def grad_with_explicit_sharding(norm):
    gradient = jax.value_and_grad(unweighted_loss_of(norm), BOTH)
    return explicitly_sharded(gradient, PARAMS, X_SHARDED)


@outside_jit
@forward_mode
def jvp_with_explicit_sharding(norm):
    def along(*arguments):
        return jax.jvp(norm, arguments[:2], arguments[2:])

    return explicitly_sharded(along, PARAMS, X_SHARDED, DPARAMS, DX_SHARDED)


@outside_jit
@case
def grad_with_automatic_sharding(norm):
    mesh = mesh_of_two(AxisType.Auto)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    x = jax.device_put(X_SHARDED, NamedSharding(mesh, P("data")))
    gradients = jax.jit(jax.grad(unweighted_loss_of(norm), BOTH))
    return jax.tree.map(np.asarray, gradients(jax.tree.map(put, PARAMS), x))


@outside_jit
@case
def grad_under_jax_enable_checks(norm):
    jax.config.update("jax_enable_checks", True)
    try:
        return jax.jit(jax.grad(loss_of(norm), BOTH))(PARAMS, X)
    finally:
        jax.config.update("jax_enable_checks", False)


@outside_jit
@forward_mode
def jvp_under_jax_enable_checks(norm):
    jax.config.update("jax_enable_checks", True)
    try:
        return jax.jvp(norm, (PARAMS, X), (DPARAMS, DX))
    finally:
        jax.config.update("jax_enable_checks", False)
