"""Flax NNX modules: Flax's own norms, computed by `jax_layernorm`.

Swapping the import is the whole migration: constructor arguments, defaults, the
parameters and the dtype rules are Flax's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Initializer, PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import Axes, apply_norm


class LayerNorm(nnx.LayerNorm):
    """Layer normalization, as `flax.nnx.LayerNorm`, with a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    Takes the arguments of `flax.nnx.LayerNorm`, keeps the same parameters under the
    same names, and returns the same dtype. `use_fast_variance` has no effect:
    statistics are always taken in float32 or wider, by a formula that is right where
    the fast one is not, and from `x` as given, where Flax rounds it to `dtype` first.
    `axis_index_groups` is refused. What `mask` leaves out is 0 in the output, where Flax
    normalizes it too.

    Args:
      num_features: the length of the last axis of `x`.
      scale_offset: added to `scale` in float32.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode (`jvp`,
        `jacfwd`, `linearize`).
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
      >>> print(norm(jnp.array([[1.0, 2.0, 3.0, 6.0]])))
      [[-1.069 -0.535  0.     1.604]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_offset: float = 0.0,
        implementation: Implementation | None = None,
        custom_vjp: bool = True,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.scale_offset = scale_offset
        self.implementation = implementation
        self.custom_vjp = custom_vjp

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        params = {"scale": _value(self.scale), "bias": _value(self.bias)}
        return _call(self, params, x, mask, residual, center=True)


class RMSNorm(nnx.RMSNorm):
    """RMS normalization, as `flax.nnx.RMSNorm`, with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    Everything said of `LayerNorm` holds.

    Args:
      num_features: the length of the last axis of `x`.
      scale_offset: added to `scale` in float32; 1.0, with `scale_init=zeros`, is the
        norm of Gemma.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode.
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

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_offset: float = 0.0,
        implementation: Implementation | None = None,
        custom_vjp: bool = True,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self.scale_offset = scale_offset
        self.implementation = implementation
        self.custom_vjp = custom_vjp

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        params = {"scale": _value(self.scale)}
        return _call(self, params, x, mask, residual, center=False)


def _value(param: nnx.Param[Array] | None) -> Array | None:
    return None if param is None else param[...]


def _call(
    module: LayerNorm | RMSNorm,
    params: dict[str, Array | None],
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    *,
    center: bool,
) -> Array | tuple[Array, Array]:
    if module.promote_dtype is not dtypes.promote_dtype:
        x, *promoted = module.promote_dtype((x, *params.values()), dtype=module.dtype)
        params = dict(zip(params, promoted, strict=True))
    return apply_norm(
        params,
        x,
        mask,
        residual,
        center=center,
        dtype=module.dtype,
        reduction_axes=module.reduction_axes,
        feature_axes=module.feature_axes,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        epsilon=module.epsilon,
        scale_offset=module.scale_offset,
        custom_vjp=module.custom_vjp,
        implementation=module.implementation,
    )
