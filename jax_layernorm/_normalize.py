"""`normalize`: the literal `jax.custom_vjp`, and what it saves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jax_layernorm import _equations
from jax_layernorm._equations import Moments, NormSpec
from jax_layernorm._kernel_op import kernel_op
from jax_layernorm._kernels import select

forward_op = kernel_op("layer_norm_forward", _equations.forward, select)
backward_op = kernel_op("layer_norm_backward", _equations.backward, select)


class Statistics(NamedTuple):
    """`mean` and `rstd` of each row, normalized axes kept with length 1.

    float32, or float64 where the normalized array is; `mean` is 0 for RMS norm.
    """

    mean: Array
    rstd: Array


class Normalized(NamedTuple):
    """What a norm returns; None where it was not asked for."""

    y: Array
    total: Array | None
    statistics: Statistics | None


@functools.partial(jax.jit, static_argnames=("spec", "custom_vjp"))
def normalize(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    *,
    custom_vjp: bool = True,
) -> Normalized:
    """The norm of `x`, or of `residual + x`.

    Jitted, so that an eager call is one dispatch and 48 norms of a model are traced
    once. Without `custom_vjp` JAX differentiates the equations, forward or reverse.
    """
    operands = _equally_varying(x, residual, scale, bias)
    if custom_vjp:
        return _normalize(spec, *operands)
    out = _equations.forward(*operands, spec=spec, with_moments=spec.return_statistics)
    return _public(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> Normalized:
    out = forward_op(
        x, residual, scale, bias, spec=spec, with_moments=spec.return_statistics
    )
    return _public(out)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    """Shapes and dtypes of arguments that the backward pass needs nothing else of."""

    x: jnp.dtype
    residual: jnp.dtype | None
    bias: tuple[tuple[int, ...], jnp.dtype] | None


class _Saved(NamedTuple):
    """What the backward pass keeps alive: this, and nothing else."""

    x: Array  # or the sum, where there is a residual
    scale: Array | None
    moments: Moments
    like: _Like


def _forward_rule(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Normalized, _Saved]:
    out = forward_op(x, residual, scale, bias, spec=spec, with_moments=True)
    moments = checkpoint_name(out.moments, "layer_norm_statistics")
    like = _Like(
        x.dtype,
        None if residual is None else residual.dtype,
        None if bias is None else (bias.shape, bias.dtype),
    )
    saved = _Saved(x if out.total is None else out.total, scale, moments, like)
    if not spec.return_statistics:
        out = out._replace(moments=None)
    return _public(out), saved


def _backward_rule(
    spec: NormSpec, saved: _Saved, cotangents: Normalized
) -> tuple[Array | None, ...]:
    like = saved.like
    dmean = drstd = None
    if cotangents.statistics is not None:
        dmean, drstd = cotangents.statistics
    dx, dscale, dbias = backward_op(
        saved.x,
        saved.scale,
        saved.moments,
        cotangents.y,
        cotangents.total,
        dmean if spec.center else None,
        drstd,
        spec=spec,
        bias_shape=None if like.bias is None else like.bias[0],
    )
    return (
        dx.astype(like.x),
        None if like.residual is None else dx.astype(like.residual),
        None if saved.scale is None else dscale.astype(saved.scale.dtype),
        None if like.bias is None else dbias.astype(like.bias[1]),
    )


_normalize.defvjp(_forward_rule, _backward_rule)


def _public(out: _equations.Forward) -> Normalized:
    if out.moments is None:
        return Normalized(out.y, out.total, None)
    rstd = out.moments.rstd
    mean = jnp.zeros_like(rstd) if out.moments.mean is None else out.moments.mean
    return Normalized(out.y, out.total, Statistics(mean, rstd))


def _equally_varying(*operands: Array | None) -> list[Any]:
    """Operands made to vary over the same manual mesh axes.

    Inside `shard_map(check_vma=True)` a custom_vjp rule must return a cotangent that
    varies over just the axes its primal does. Casting a replicated parameter to the
    axes of `x` beforehand puts the sum over them where it belongs: into the
    transpose of the cast.
    """
    varying = [
        frozenset() if operand is None else jax.typeof(operand).manual_axis_type.varying
        for operand in operands
    ]
    everywhere = frozenset().union(*varying)
    return [
        operand
        if operand is None or axes == everywhere
        else lax.pcast(operand, tuple(sorted(everywhere - axes)), to="varying")
        for operand, axes in zip(operands, varying, strict=True)
    ]
