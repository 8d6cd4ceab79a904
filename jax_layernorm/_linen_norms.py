"""Linen's norms: the modules, and how a module of Flax or ours is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import Axes, apply_norm, feature_shape


class LayerNorm(nn.LayerNorm):
    """Layer normalization: `flax.linen.LayerNorm` with a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    It takes the arguments of `flax.linen.LayerNorm`, keeps the same parameters under
    the same names, and returns the same dtype.

    A few details differ. `use_fast_variance` changes no number, because statistics are
    always in float32 or wider, by a formula that is right even where the fast formula
    is not. `force_float32_reductions=False` only rounds the parameters to
    `param_dtype`, as in Flax. `axis_index_groups` raises. Elements that `mask` leaves
    out are 0 in the output, while Flax normalizes them too. The parameters' axes are in
    the order of `feature_axes`, while Flax sorts them.

    Attributes:
      scale_offset: added to `scale` in float32.
      round_before_scale: round `x_hat` to the dtype of `x`, as `layer_norm` does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that
        (`jvp`, `jacfwd`, `linearize`).

    Raises:
      TypeError, ValueError, NotImplementedError: as `jax_layernorm.layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> norm = jln.linen.LayerNorm()
      >>> x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> print(norm.apply(variables, x).round(3))
      [[-1.069 -0.535  0.     1.604]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    scale_offset: float = 0.0
    round_before_scale: bool = False
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
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


class RMSNorm(nn.RMSNorm):
    """RMS normalization: `flax.linen.RMSNorm` with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    The notes on `LayerNorm` apply here too.

    Attributes:
      scale_offset: added to `scale` in float32; 1.0 with `scale_init=zeros` gives the
        norm of Gemma.
      round_before_scale: round `x_hat` to the dtype of `x`, as Llama does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that.

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
    round_before_scale: bool = False
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
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


# Pickles name the public module, so that they load however the private ones change.
LayerNorm.__module__ = RMSNorm.__module__ = "jax_layernorm.linen"


def _call(
    module: LayerNorm | RMSNorm,
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
) -> Array | tuple[Array, Array]:
    return compute(
        module,
        x,
        mask,
        residual,
        reduction_axes=module.reduction_axes,
        feature_axes=module.feature_axes,
        scale_offset=module.scale_offset,
        round_before_scale=module.round_before_scale,
        implementation=module.implementation,
        custom_vjp=module.custom_vjp,
    )


def compute(
    module: nn.LayerNorm | nn.RMSNorm,
    x: ArrayLike,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    *,
    reduction_axes: Axes,
    feature_axes: Axes,
    scale_offset: float = 0.0,
    round_before_scale: bool = False,
    implementation: Implementation | None = None,
    custom_vjp: bool,
) -> Array | tuple[Array, Array]:
    """Computes the norm of `module`, Flax's or ours, with the module's parameters."""
    x = jnp.asarray(x)
    shape = list(feature_shape(x, feature_axes))  # initializers get a list from Flax
    params: dict[str, Array | None] = {}
    for name in _param_names(module):
        init = getattr(module, f"{name}_init")
        param = module.param(name, init, shape, module.param_dtype)
        if not module.force_float32_reductions:  # this affects the dtype of y
            param = param.astype(module.param_dtype)
        params[name] = param
    return apply_norm(
        params,
        x,
        mask,
        residual,
        center=isinstance(module, nn.LayerNorm),
        dtype=module.dtype,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        epsilon=module.epsilon,
        scale_offset=scale_offset,
        round_before_scale=round_before_scale,
        custom_vjp=custom_vjp,
        implementation=implementation,
    )


def param_dtypes(module: nn.LayerNorm | nn.RMSNorm) -> Iterator[Any]:
    """The dtypes of the parameters that exist, and of those about to be created."""
    for name in _param_names(module):
        if module.has_variable("params", name):
            boxed = module.get_variable("params", name)
            yield from (jnp.result_type(a) for a in jax.tree.leaves(boxed))
        else:
            yield module.param_dtype


def _param_names(module: nn.LayerNorm | nn.RMSNorm) -> Iterator[str]:
    if module.use_scale:
        yield "scale"
    if isinstance(module, nn.LayerNorm) and module.use_bias:
        yield "bias"
