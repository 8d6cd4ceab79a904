"""`normalize`: the literal `jax.custom_vjp`, and what it saves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_layernorm import _batching, _equations, _sharding
from jax_layernorm._equations import Moments, NormSpec
from jax_layernorm._kernel_op import kernel_op
from jax_layernorm._kernels import refused, select
from jax_layernorm._results import Normalized, Statistics

forward_op = kernel_op(
    "layer_norm_forward",
    _equations.forward,
    select,
    refused=refused,
    fold=_batching.fold_forward,
    share=_sharding.share_of_each_device,
)
backward_op = kernel_op(
    "layer_norm_backward",
    _equations.backward,
    select,
    refused=refused,
    fold=_batching.fold_backward,
    share=_sharding.share_of_each_device,
)


@functools.partial(jax.jit, static_argnames=("spec", "custom_vjp"))
def normalize(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    *,
    custom_vjp: bool = True,
) -> Normalized:
    """The norm of `x`, or of `residual + x`; the rest broadcasts against `x`.

    Jitted, so that an eager call is one dispatch and 48 norms of a model are traced
    once, and because an eager custom_vjp loses the names of mapped axes where `jax.grad`
    is outside `jax.vmap`. Without `custom_vjp` JAX differentiates the equations, forward
    or reverse.
    """
    run = functools.partial(_run, custom_vjp=custom_vjp)
    return _sharding.over_split_rows(run, spec, x, residual, scale, bias, mask)


def _run(spec: NormSpec, *given: Array | None, custom_vjp: bool) -> Normalized:
    operands = _sharding.equally_varying(given)
    if custom_vjp:
        return _normalize(spec, *operands)
    out = _equations.forward(*operands, spec=spec, with_moments=spec.return_statistics)
    return _public(out)


def _ops(spec: NormSpec) -> tuple[Any, Any]:
    """What runs forward and backward.

    Where the normalized axes are split over a mapped axis, the equations themselves: a
    kernel op holds no collective, since its batching rule would run outside the axis.
    """
    if spec.axis_names:
        if spec.implementation not in (None, "xla"):
            raise NotImplementedError(
                "implementation must be None or 'xla' where the normalized axes are split"
                f" over mapped axes or devices; got {spec.implementation!r}, and"
                f" {spec.axis_names}. Use implementation=None."
            )
        return _equations.forward, _equations.backward
    return forward_op, backward_op


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> Normalized:
    run, _ = _ops(spec)
    out = run(
        x, residual, scale, bias, mask, spec=spec, with_moments=spec.return_statistics
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
    mask: Array | None
    moments: Moments
    like: _Like


def _forward_rule(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> tuple[Normalized, _Saved]:
    run, _ = _ops(spec)
    out = run(x, residual, scale, bias, mask, spec=spec, with_moments=True)
    moments = checkpoint_name(out.moments, "layer_norm_statistics")
    like = _Like(
        x.dtype,
        None if residual is None else residual.dtype,
        None if bias is None else (bias.shape, bias.dtype),
    )
    normalized = x if out.total is None else out.total
    saved = _Saved(normalized, scale, mask, moments, like)
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
    _, run = _ops(spec)
    dx, dscale, dbias = run(
        saved.x,
        saved.scale,
        saved.mask,
        saved.moments,
        cotangents.y,
        cotangents.total,
        dmean if spec.center else None,
        drstd,
        spec=spec,
        scale_shape=None if saved.scale is None else saved.scale.shape,
        bias_shape=None if like.bias is None else like.bias[0],
    )
    return (
        dx.astype(like.x),
        None if like.residual is None else dx.astype(like.residual),
        None if saved.scale is None else dscale.astype(saved.scale.dtype),
        None if like.bias is None else dbias.astype(like.bias[1]),
        None,
    )


_normalize.defvjp(_forward_rule, _backward_rule)


def _public(out: _equations.Forward) -> Normalized:
    if out.moments is None:
        return Normalized(out.y, out.total, None)
    mean, mean_low, rstd = out.moments
    mean = jnp.zeros_like(rstd) if mean is None or mean_low is None else mean + mean_low
    return Normalized(out.y, out.total, Statistics(mean, rstd))
