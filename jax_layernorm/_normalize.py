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
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jax_layernorm import _batching, _equations, _kernels, _pruning, _sharding
from jax_layernorm._equations import (
    BackwardOutputs,
    ForwardOutputs,
    NormSpec,
    RowStatistics,
)
from jax_layernorm._kernel_op import KernelOp
from jax_layernorm._results import Normalized, Statistics

STATISTICS_NAME = "layer_norm_statistics"
"""The name for `jax.checkpoint_policies.save_only_these_names`."""

forward_op, backward_op = (
    KernelOp(
        name,
        reference,
        _kernels.select,
        check=_kernels.check,
        batch=batch,
        batched_reference=_kernels.batched_reference,
        prune=prune,
        shard=_sharding.shard_of,
    )
    for name, reference, batch, prune in (
        (
            _equations.FORWARD,
            _equations.forward,
            _batching.batch_forward,
            _pruning.prune_forward,
        ),
        (
            _equations.BACKWARD,
            _equations.backward,
            _batching.batch_backward,
            _pruning.prune_backward,
        ),
    )
)


@functools.partial(jax.jit, static_argnames=("spec", "custom_vjp"))
def normalize(spec: NormSpec, *operands: Any, custom_vjp: bool = True) -> Normalized:
    """The norm of `x`, or of `residual + x`.

    This is jitted so that an eager call is one dispatch, and 48 norms of a model are
    traced once. Also, an eager custom_vjp loses the names of mapped axes if `jax.grad`
    is outside `jax.vmap`.

    Args:
      operands: `x`, `residual`, `scale`, `bias` and `mask`, None if left out; the last
        three broadcast against `x`.
      custom_vjp: False lets JAX differentiate the equations, forward or reverse.
    """
    norm = _normalize if custom_vjp else _differentiated_by_jax

    def of_equally_varying(spec: NormSpec, *operands: Any) -> Normalized:
        return norm(spec, *_sharding.equally_varying(operands))

    placed, place_results = _sharding.placed_alike(operands)
    if _sharding.features_are_split(spec, placed[0]):
        return place_results(
            _sharding.on_split_features(of_equally_varying, spec, *placed)
        )
    return place_results(of_equally_varying(spec, *placed))


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
class _Types:
    """`primals` are the shapes and dtypes of x, residual, scale and bias, or None."""

    primals: tuple[Any, ...]
    compute: jnp.dtype  # of the arithmetic


class _Wanted(NamedTuple):
    """Which arguments need gradients."""

    x: bool
    residual: bool
    scale: bool
    bias: bool

    @property
    def dx(self) -> bool:
        return self.x or self.residual

    @property
    def x_hat(self) -> bool:
        return self.dx or self.scale

    def as_array(self) -> Array:
        """These flags as the shape of an array without elements.

        JAX does not let the structure of saved values depend on which gradients are
        wanted, but their shapes may (https://github.com/jax-ml/jax/issues/16614).
        """
        return jnp.zeros((0, *map(int, self)), jnp.bool_)

    @classmethod
    def of_array(cls, array: Array) -> _Wanted:
        return cls(*map(bool, array.shape[1:]))


class _Saved(NamedTuple):
    """Everything that the backward pass keeps alive.

    `x` (the sum, if there is a residual) and the statistics are kept for `dx` and
    `dscale`; `scale` is kept for `dx`. If a value is not needed, an array without
    elements takes its place.
    """

    x: Array
    scale: Array | None
    mask: Array | None
    statistics: RowStatistics
    wanted: Array
    types: _Types


def _forward_rule(
    spec: NormSpec, *primals: CustomVJPPrimal | None
) -> tuple[Normalized, _Saved]:
    operands: list[Any] = [None if p is None else p.value for p in primals]
    x, _, scale, _, mask = operands
    wanted = _Wanted(*(p is not None and p.perturbed for p in primals[:4]))
    with_statistics = wanted.x_hat or spec.return_statistics
    out = _forward(spec, tuple(operands), with_statistics)
    statistics: Any = checkpoint_name(out.statistics, STATISTICS_NAME)
    out = out._replace(statistics=statistics)
    nothing = jnp.zeros(0)
    if not wanted.x_hat:
        no_mean = None if not spec.center else nothing
        statistics = RowStatistics(no_mean, no_mean, nothing)
    normalized = x if out.residual_out is None else out.residual_out
    types = [
        None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in operands[:4]
    ]
    return _public(out, spec), _Saved(
        x=normalized if wanted.x_hat else nothing,
        scale=scale if wanted.dx or scale is None else nothing,
        mask=mask,
        statistics=statistics,
        wanted=wanted.as_array(),
        types=_Types(tuple(types), _equations.compute_dtype(normalized.dtype)),
    )


def _backward_rule(
    spec: NormSpec, saved: _Saved, cotangents: Normalized
) -> tuple[Array | None, ...]:
    wanted = _Wanted.of_array(saved.wanted)
    cotangents = jax.tree.map(_none_if_zero, cotangents)
    dx, dscale, dbias = _gradients(spec, saved, wanted, cotangents)
    gradients = zip(wanted, (dx, dx, dscale, dbias), saved.types.primals, strict=True)
    return (
        *(
            gradient.astype(primal.dtype) if needed and gradient is not None else None
            for needed, gradient, primal in gradients
        ),
        None,
    )


def _none_if_zero(cotangent: Any) -> Array | None:
    return None if type(cotangent) is SymbolicZero else cotangent


def _gradients(
    spec: NormSpec, saved: _Saved, wanted: _Wanted, cotangents: Normalized
) -> BackwardOutputs:
    """The gradients that are wanted; a cotangent that is zero is None."""
    dy, types = cotangents.y, saved.types
    *_, scale, bias = types.primals
    dmean, drstd = cotangents.statistics or (None, None)
    dmean = dmean if spec.center else None
    scale_shape = scale.shape if wanted.scale and dy is not None else None
    bias_shape = bias.shape if wanted.bias and dy is not None else None
    if dy is None and dmean is None and drstd is None:  # the norm is not used
        return BackwardOutputs(cotangents.residual_out, None, None)
    if not wanted.dx and scale_shape is None:
        dbias = None
        if bias_shape is not None:
            dbias = _equations.bias_gradient(dy, saved.mask, bias_shape, types.compute)
        return BackwardOutputs(None, None, dbias)
    for_dx = [saved.scale, cotangents.residual_out, dmean, drstd]
    if not wanted.dx:
        for_dx = [None] * 4
    scale, *others = for_dx
    function: Callable[..., Any] = backward_op
    if _kernels.needs_equations(spec, custom_vjp=True):
        function = _equations.backward
    gradients: Any = function(
        saved.x,
        scale,
        saved.mask,
        saved.statistics,
        jnp.zeros_like(saved.x, spec.dtype) if dy is None else dy,
        *others,
        spec=spec,
        with_dx=wanted.dx,
        scale_shape=scale_shape,
        bias_shape=bias_shape,
    )
    return gradients


_normalize.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _public(out: ForwardOutputs, spec: NormSpec) -> Normalized:
    """What the caller gets; the statistics only if they were asked for."""
    if out.statistics is None or not spec.return_statistics:
        return Normalized(out.y, out.residual_out, None)
    mean, mean_low, rstd = out.statistics
    mean = jnp.zeros_like(rstd) if mean is None or mean_low is None else mean + mean_low
    return Normalized(out.y, out.residual_out, Statistics(mean, rstd))
