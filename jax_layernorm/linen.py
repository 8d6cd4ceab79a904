"""Flax linen modules: Flax's own norms, computed by `jax_layernorm`.

Swapping the import is the whole migration: constructor arguments, defaults, the
parameter tree and the dtype rules are Flax's, by inheritance.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import apply_norm, feature_shape


class LayerNorm(nn.LayerNorm):
    """Layer normalization, as `flax.linen.LayerNorm`; a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    Takes the arguments of `flax.linen.LayerNorm`, keeps the same parameters under the
    same names, and returns the same dtype. `use_fast_variance` and
    `force_float32_reductions` have no effect: statistics are always taken in float32 or
    wider, by a formula that is right where the fast one is not. `axis_index_groups` is
    refused. What `mask` leaves out is 0 in the output, where Flax normalizes it too.
    The parameters' axes are in the order of `feature_axes`, which Flax sorts.

    Attributes:
      scale_offset: added to `scale` in float32.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode (`jvp`,
        `jacfwd`, `linearize`).

    Raises:
      TypeError, ValueError, NotImplementedError: as `jax_layernorm.layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> norm = jln.linen.LayerNorm()
      >>> x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> print(norm.apply(variables, x))
      [[-1.069 -0.535  0.     1.604]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    scale_offset: float = 0.0
    implementation: Implementation | None = None
    custom_vjp: bool = True

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual, center=True)


class RMSNorm(nn.RMSNorm):
    """RMS normalization, as `flax.linen.RMSNorm`, with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    Everything said of `LayerNorm` holds.

    Attributes:
      scale_offset: added to `scale` in float32; 1.0, with `scale_init=zeros`, is the
        norm of Gemma.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode.

    Raises:
      TypeError, ValueError, NotImplementedError: as `jax_layernorm.layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> norm = jln.linen.RMSNorm()
      >>> x = jnp.array([[3.0, 4.0]])
      >>> print(norm.apply(norm.init(jax.random.key(0), x), x))
      [[0.849 1.131]]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    scale_offset: float = 0.0
    implementation: Implementation | None = None
    custom_vjp: bool = True

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual, center=False)


def _call(
    module: LayerNorm | RMSNorm,
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    *,
    center: bool,
) -> Array | tuple[Array, Array]:
    x = jnp.asarray(x)
    shape = feature_shape(x, module.feature_axes)
    params: dict[str, Array | None] = {}
    if module.use_scale:
        params["scale"] = module.param(
            "scale", module.scale_init, shape, module.param_dtype
        )
    if isinstance(module, LayerNorm) and module.use_bias:
        params["bias"] = module.param(
            "bias", module.bias_init, shape, module.param_dtype
        )
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
