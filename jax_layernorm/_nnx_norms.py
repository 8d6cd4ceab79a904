"""NNX's norms: the modules, which are also the classes of replaced norms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import ArrayLike

from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import apply_norm, flax_axes, why_left_to_flax


def _with_the_arguments_of(flaxs: type) -> Callable[[Any], Any]:
    """Shows Flax's arguments, then ours, in `help` and `inspect.signature`."""

    def show(init: Any) -> Any:
        theirs = inspect.signature(flaxs.__init__).parameters.values()
        ours = inspect.signature(init)
        added = [p for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = ours.replace(parameters=[*theirs, *added])
        return init

    return show


class LayerNorm(nnx.LayerNorm):
    """Layer normalization: `flax.nnx.LayerNorm` with a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    It takes the arguments of `flax.nnx.LayerNorm`, keeps the same parameters under the
    same names, and returns the same dtype.

    A few details differ. `use_fast_variance` has no effect, because statistics are
    always in float32 or wider, by a formula that is right even where the fast formula
    is not. They are computed from `x` as given, while Flax rounds `x` to `dtype` first.
    `axis_index_groups` raises. Elements that `mask` leaves out are 0 in the output,
    while Flax normalizes them too.

    Several `feature_axes` are read in the order of `x`, as in Flax.

    Args:
      num_features: the length of the last axis of `x`.
      scale_offset: added to `scale` in float32.
      round_before_scale: round `x_hat` to the dtype of `x`, as `layer_norm` does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that
        (`jvp`, `jacfwd`, `linearize`).
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
        reduction_axes, feature_axes, axis_name, axis_index_groups, use_fast_variance,
        promote_dtype, rngs, bias_metadata, scale_metadata: as in `flax.nnx.LayerNorm`.

    Raises:
      TypeError, ValueError, NotImplementedError: when called, as
        `jax_layernorm.layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_layernorm as jln
      >>> norm = jln.nnx.LayerNorm(4, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[1.0, 2.0, 3.0, 6.0]])).round(3))
      [[-1.069 -0.535  0.     1.604]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    _replaced = False

    @_with_the_arguments_of(nnx.LayerNorm)
    def __init__(
        self,
        num_features: int,
        *,
        scale_offset: float = 0.0,
        round_before_scale: bool = False,
        implementation: Implementation | None = None,
        custom_vjp: bool = True,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.scale_offset = scale_offset
        self.round_before_scale = round_before_scale
        self.implementation = implementation
        self.custom_vjp = custom_vjp

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, nnx.LayerNorm, ("scale", "bias"), x, mask, residual)


class RMSNorm(nnx.RMSNorm):
    """RMS normalization: `flax.nnx.RMSNorm` with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    The notes on `LayerNorm` apply here too.

    Args:
      num_features: the length of the last axis of `x`.
      scale_offset: added to `scale` in float32; 1.0 with `scale_init=zeros` gives the
        norm of Gemma.
      round_before_scale: round `x_hat` to the dtype of `x`, as Llama does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that.
      epsilon, dtype, param_dtype, use_scale, scale_init, reduction_axes, feature_axes,
        axis_name, axis_index_groups, use_fast_variance, promote_dtype, rngs,
        scale_metadata: as in `flax.nnx.RMSNorm`.

    Raises:
      TypeError, ValueError, NotImplementedError: when called, as
        `jax_layernorm.layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_layernorm as jln
      >>> norm = jln.nnx.RMSNorm(2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[3.0, 4.0]])))
      [[0.849 1.131]]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    _replaced = False

    @_with_the_arguments_of(nnx.RMSNorm)
    def __init__(
        self,
        num_features: int,
        *,
        scale_offset: float = 0.0,
        round_before_scale: bool = False,
        implementation: Implementation | None = None,
        custom_vjp: bool = True,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.scale_offset = scale_offset
        self.round_before_scale = round_before_scale
        self.implementation = implementation
        self.custom_vjp = custom_vjp

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, nnx.RMSNorm, ("scale",), x, mask, residual)


# Pickles name the public module, so that they load however the private ones change.
LayerNorm.__module__ = RMSNorm.__module__ = "jax_layernorm.nnx"


def _call(
    module: LayerNorm | RMSNorm,
    flaxs: Any,
    names: tuple[str, ...],
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
) -> Array | tuple[Array, Array]:
    stored = {name: getattr(module, name) for name in names}
    params = {name: None if p is None else p[...] for name, p in stored.items()}
    reduction_axes, feature_axes = module.reduction_axes, module.feature_axes
    if module._replaced and residual is None:
        dtypes_of_params = [p.dtype for p in params.values() if p is not None]
        if why_left_to_flax(module, x, mask, dtypes_of_params):
            return flaxs.__call__(module, x, mask=mask)
        reduction_axes = flax_axes(reduction_axes, jnp.ndim(x))
        feature_axes = flax_axes(feature_axes, jnp.ndim(x))
    if module.promote_dtype is not dtypes.promote_dtype:
        x, *promoted = module.promote_dtype((x, *params.values()), dtype=module.dtype)
        params = dict(zip(params, promoted, strict=True))
    return apply_norm(
        params,
        x,
        mask,
        residual,
        center=flaxs is nnx.LayerNorm,
        dtype=module.dtype,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        epsilon=module.epsilon,
        scale_offset=module.scale_offset,
        round_before_scale=module.round_before_scale,
        custom_vjp=module.custom_vjp,
        implementation=module.implementation,
    )
