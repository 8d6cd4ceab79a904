"""`normalize`: the literal `jax.custom_vjp`, and what it saves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jax_layernorm import _batching, _equations, _kernels, _sharding
from jax_layernorm._equations import ForwardOutputs, NormSpec, RowStatistics
from jax_layernorm._kernel_op import KernelOp
from jax_layernorm._results import Normalized, Statistics

STATISTICS_NAME = "layer_norm_statistics"
"""For `jax.checkpoint_policies.save_only_these_names`."""

forward_op, backward_op = (
    KernelOp(
        name,
        reference,
        _kernels.select,
        check=_kernels.check,
        batch=batch,
        batched_reference=_kernels.batched_reference,
        shard=_sharding.shard_of,
    )
    for name, reference, batch in (
        (_equations.FORWARD, _equations.forward, _batching.batch_forward),
        (_equations.BACKWARD, _equations.backward, _batching.batch_backward),
    )
)


@functools.partial(jax.jit, static_argnames=("spec", "custom_vjp", "record"))
def normalize(
    spec: NormSpec,
    *operands: Any,
    custom_vjp: bool = True,
    record: _kernels.Record | None = None,
) -> Normalized:
    """The norm of `x`, or of `residual + x`.

    Jitted, so that an eager call is one dispatch and 48 norms of a model are traced
    once, and because an eager custom_vjp loses the names of mapped axes if `jax.grad`
    is outside `jax.vmap`.

    Args:
      operands: `x`, `residual`, `scale`, `bias` and `mask`, None if left out; the last
        three broadcast against `x`.
      custom_vjp: False lets JAX differentiate the equations, forward or reverse.
      record: `_kernels.current_record()`, so that what is recorded is traced anew.
    """
    del record
    norm = _normalize if custom_vjp else _differentiated_by_jax

    def of_equally_varying(spec: NormSpec, *operands: Any) -> Normalized:
        return norm(spec, *_sharding.equally_varying(operands))

    if _sharding.features_are_split(spec, operands[0]):
        return _sharding.on_split_features(of_equally_varying, spec, *operands)
    return of_equally_varying(spec, *operands)


def _differentiated_by_jax(spec: NormSpec, *operands: Any) -> Normalized:
    return _public(
        _forward(spec, operands, spec.return_statistics, custom_vjp=False), spec
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> Normalized:
    operands = (x, residual, scale, bias, mask)
    return _public(_forward(spec, operands, spec.return_statistics), spec)


def _forward(
    spec: NormSpec,
    operands: tuple[Any, ...],
    with_statistics: bool,
    *,
    custom_vjp: bool = True,
) -> ForwardOutputs:
    function: Callable[..., Any] = forward_op
    if _kernels.needs_equations(spec, custom_vjp=custom_vjp):
        function = _equations.forward
    return function(*operands, spec=spec, with_statistics=with_statistics)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    """Shapes and dtypes of arguments that the backward pass needs nothing else of."""

    x: jnp.dtype
    residual: jnp.dtype | None
    bias: tuple[tuple[int, ...], jnp.dtype] | None


class _Saved(NamedTuple):
    """What the backward pass keeps alive: this, and nothing else."""

    x: Array  # or the sum, if there is a residual
    scale: Array | None
    mask: Array | None
    statistics: RowStatistics
    like: _Like


def _forward_rule(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> tuple[Normalized, _Saved]:
    out = _forward(spec, (x, residual, scale, bias, mask), with_statistics=True)
    statistics: Any = checkpoint_name(out.statistics, STATISTICS_NAME)
    out = out._replace(statistics=statistics)
    like = _Like(
        x.dtype,
        None if residual is None else residual.dtype,
        None if bias is None else (bias.shape, bias.dtype),
    )
    normalized = x if out.residual_out is None else out.residual_out
    return _public(out, spec), _Saved(normalized, scale, mask, statistics, like)


def _backward_rule(
    spec: NormSpec, saved: _Saved, cotangents: Normalized
) -> tuple[Array | None, ...]:
    like = saved.like
    dmean, drstd = cotangents.statistics or (None, None)
    function: Callable[..., Any] = backward_op
    if _kernels.needs_equations(spec, custom_vjp=True):
        function = _equations.backward
    gradients: Any = function(
        saved.x,
        saved.scale,
        saved.mask,
        saved.statistics,
        cotangents.y,
        cotangents.residual_out,
        dmean if spec.center else None,
        drstd,
        spec=spec,
        scale_shape=None if saved.scale is None else saved.scale.shape,
        bias_shape=None if like.bias is None else like.bias[0],
    )
    dx, dscale, dbias = gradients
    return (
        dx.astype(like.x),
        None if like.residual is None else dx.astype(like.residual),
        None if saved.scale is None else dscale.astype(saved.scale.dtype),
        None if like.bias is None else dbias.astype(like.bias[1]),
        None,
    )


_normalize.defvjp(_forward_rule, _backward_rule)


def _public(out: ForwardOutputs, spec: NormSpec) -> Normalized:
    """What the caller gets; the statistics only if they were asked for."""
    if out.statistics is None or not spec.return_statistics:
        return Normalized(out.y, out.residual_out, None)
    mean, mean_low, rstd = out.statistics
    mean = jnp.zeros_like(rstd) if mean is None or mean_low is None else mean + mean_low
    return Normalized(out.y, out.residual_out, Statistics(mean, rstd))
