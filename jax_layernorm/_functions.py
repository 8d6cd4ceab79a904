"""The public functions: check the arguments, build the `NormSpec`, call `normalize`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_layernorm import _arguments
from jax_layernorm._arguments import Implementation
from jax_layernorm._equations import NormSpec
from jax_layernorm._normalize import normalize
from jax_layernorm._results import Statistics

Params = Mapping[str, ArrayLike | None]


class Options(TypedDict, total=False):
    """The four functions' keyword arguments, except `return_statistics`."""

    axis: int | tuple[int, ...]
    epsilon: float
    scale_offset: float
    dtype: DTypeLike | None
    mask: ArrayLike | None
    axis_name: str | tuple[str, ...] | None
    round_before_scale: bool
    custom_vjp: bool
    implementation: Implementation | None


class Overrides(NamedTuple):
    """Arguments for calls that leave them at their defaults."""

    implementation: Implementation | None
    custom_vjp: bool


overriding = jax.make_user_context(None)
"""Holds `Overrides` while a `replace` lets a model's own norm be computed."""


@overload
def layer_norm(
    params: Params,
    x: ArrayLike,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[Options],
) -> Array: ...
@overload
def layer_norm(
    params: Params,
    x: ArrayLike,
    *,
    return_statistics: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Statistics]: ...
def layer_norm(
    params: Params,
    x: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    return_statistics: bool = False,
    round_before_scale: bool = False,
    custom_vjp: bool = True,
    implementation: Implementation | None = None,
) -> Any:
    """Layer normalization over `axis`, with a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    Statistics and arithmetic are in float32 (float64 for float64 `x`). The statistics
    come from a compensated two-pass formula, so a large offset that all elements of a
    row share costs no accuracy. If the sum of squared deviations overflows (in float32,
    with a standard deviation above 1.8e19 / sqrt(features)), rstd is 0 and `y` is the
    bias. NaN and inf affect only the row that they are in. Elements above
    1e38 / features may make a row NaN.

    Args:
      params: a mapping with optional `scale` and `bias`, of any floating dtype. A
        parameter that is missing or None is left out. Without a scale the factor is 1
        and `scale_offset` has no effect. A parameter with as many axes as are
        normalized must have their shape, in the order of `axis`. Any other parameter
        must have the rank of `x` and broadcast against it. For example, a scale and
        shift for each example (adaptive layer norm) have shape `(batch, 1, features)`,
        and so do their gradients.
      x: any shape except a scalar's, in bfloat16, float16, float32 or float64. (As
        everywhere in JAX, a float64 NumPy array becomes float32 unless x64 is enabled.)
      axis: the normalized axis or axes, in any order; negative axes are allowed.
      epsilon: added to the variance; a static number. The default is Flax's; torch's
        is 1e-5.
      scale_offset: added to `scale` in float32; a static number. 1.0 gives the
        zero-centered gain of Gemma.
      dtype: the dtype of `y`. None keeps `x.dtype`, even if the parameters are wider.
      mask: booleans that broadcast against `x`. Elements whose mask is False are
        ignored, even if they are NaN: the statistics leave them out, and their `y` and
        gradient are 0. A row without a True has mean 0 and rstd 1 / sqrt(epsilon).
      axis_name: the mapped axis or axes (of `jax.vmap` or `jax.shard_map`) over which
        the normalized axes are split. The statistics are combined across them.
      return_statistics: also return `Statistics(mean, rstd)`, which are differentiable.
      round_before_scale: round `x_hat`, which is `(x - mean) * rstd`, to `x.dtype`, and
        compute `x_hat * (scale_offset + scale) + bias` from it as JAX would, rounding
        each result to its promoted dtype. That gives the bits of Llama, and of other
        models that cast before the scale, in bfloat16 and float16. The default rounds
        once, at the end.
      custom_vjp: use the hand-written backward pass. False lets JAX differentiate the
        same equations. Forward mode needs that (`jvp`, `jacfwd`, `linearize`, `jet`);
        in reverse mode it costs more memory.
      implementation: None picks the best implementation that can run, when the program
        is lowered for its platform. A named implementation raises if it cannot run.

    Returns:
      `y`, with the shape of `x`; with `return_statistics`, `(y, Statistics)`.

    Raises:
      TypeError: an argument is of the wrong kind or dtype.
      ValueError: an argument's value or shape does not fit; the message says how.
      NotImplementedError: this version, or the named implementation, cannot do what the
        arguments ask for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> x = jnp.array([[1.0, 2.0, 3.0, 6.0], [10.0, 10.0, 10.0, 14.0]])
      >>> params = jln.init_params(4)
      >>> print(jln.layer_norm(params, x).round(3))
      [[-1.069 -0.535  0.     1.604]
       [-0.577 -0.577 -0.577  1.732]]
      >>> grads = jax.grad(lambda p: jln.layer_norm(p, x)[:, 3].sum())(params)
      >>> print(grads["scale"].round(3), grads["bias"])
      [0.    0.    0.    3.336] [0. 0. 0. 2.]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    options = {
        "axis": axis,
        "epsilon": epsilon,
        "scale_offset": scale_offset,
        "dtype": dtype,
        "mask": mask,
        "axis_name": axis_name,
        "return_statistics": return_statistics,
        "round_before_scale": round_before_scale,
        "custom_vjp": custom_vjp,
        "implementation": implementation,
    }
    return _norm("layer_norm", (params, x), options, center=True)


_KEYWORDS = [
    parameter
    for parameter in inspect.signature(layer_norm).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
]
_DEFAULTS = {parameter.name: parameter.default for parameter in _KEYWORDS}


def _with_the_keywords_of_layer_norm(function: Any) -> Any:
    """Makes `help` and `inspect.signature` show the keywords of `layer_norm`."""
    signature = inspect.signature(function)
    arrays = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*arrays, *_KEYWORDS])
    return function


@overload
def rms_norm(
    params: Params,
    x: ArrayLike,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[Options],
) -> Array: ...
@overload
def rms_norm(
    params: Params,
    x: ArrayLike,
    *,
    return_statistics: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Statistics]: ...
@_with_the_keywords_of_layer_norm
def rms_norm(
    params: Params,
    x: ArrayLike,
    **options: Any,
) -> Any:
    """RMS normalization over `axis`: layer norm that does not subtract the mean.

        y = x * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    Args:
      params: as for `layer_norm`.
      x: any shape except a scalar's, in bfloat16, float16, float32 or float64.
      axis, epsilon, ...: all keyword arguments of `layer_norm`.

    Returns:
      `y`, with the shape of `x`; with `return_statistics`, `(y, Statistics)`, where
      `mean` is 0.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> params = jln.init_params(2, bias=False)
      >>> print(jln.rms_norm(params, jnp.array([3.0, 4.0])))
      [0.849 1.131]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return _norm("rms_norm", (params, x), options, center=False)


@overload
def add_layer_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...
@overload
def add_layer_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    *,
    return_statistics: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array, Statistics]: ...
@_with_the_keywords_of_layer_norm
def add_layer_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    **options: Any,
) -> Any:
    """Adds a residual and applies layer norm to the sum, in one pass each way.

        residual_out = residual + x
        y = layer_norm(params, residual_out)

    The norm reads the sum as it is returned, so `y` is bit for bit equal to
    `layer_norm(params, residual_out, dtype=x.dtype)`.

    Args:
      params: as for `layer_norm`.
      x: the output of a block.
      residual: the stream that `x` is added to, with the shape of `x` and any floating
        dtype.
      axis, epsilon, ...: all keyword arguments of `layer_norm`.

    Returns:
      `(y, residual_out)`; with `return_statistics`, `(y, residual_out, Statistics)`.
      `residual_out` has the promoted dtype of `x` and `residual`, so a float32 stream
      stays float32. `y` has `dtype`, or the dtype of `x`.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> x, stream = jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 6.0]])
      >>> y, stream = jln.add_layer_norm(jln.init_params(2), x, stream)
      >>> print(y.round(3), stream)
      [[-1.  1.]] [[3. 5.]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    return _norm("add_layer_norm", (params, x, residual), options, center=True)


@overload
def add_rms_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    *,
    return_statistics: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...
@overload
def add_rms_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    *,
    return_statistics: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array, Statistics]: ...
@_with_the_keywords_of_layer_norm
def add_rms_norm(
    params: Params,
    x: ArrayLike,
    residual: ArrayLike,
    **options: Any,
) -> Any:
    """Adds a residual and applies RMS norm to the sum, in one pass each way.

        residual_out = residual + x
        y = rms_norm(params, residual_out)

    Args:
      params: as for `layer_norm`.
      x: the output of a block.
      residual: the stream that `x` is added to, with the shape of `x` and any floating
        dtype.
      axis, epsilon, ...: all keyword arguments of `layer_norm`.

    Returns:
      `(y, residual_out)`; with `return_statistics`, `(y, residual_out, Statistics)`.
      The dtypes are as in `add_layer_norm`.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> x, stream = jnp.array([[1.0, -2.0]]), jnp.array([[2.0, 6.0]])
      >>> y, stream = jln.add_rms_norm(jln.init_params(2, bias=False), x, stream)
      >>> print(y, stream)
      [[0.849 1.131]] [[3. 4.]]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return _norm("add_rms_norm", (params, x, residual), options, center=False)


def _norm(
    name: str, arrays: tuple[Any, ...], options: dict[str, Any], *, center: bool
) -> Any:
    """Checks the arguments of the function `name`, and calls `normalize`."""
    unknown = [key for key in options if key not in _DEFAULTS]
    if unknown:
        fix = "Write epsilon." if unknown[0] == "eps" else "Check the spelling."
        raise TypeError(
            f"{name}() takes the keyword arguments {', '.join(_DEFAULTS)}; got"
            f" {unknown[0]!r}. {fix}"
        )
    given = _DEFAULTS | options
    custom_vjp = _arguments.check_flag("custom_vjp", given["custom_vjp"])
    overrides: Overrides | None = overriding.value
    if overrides is not None:
        custom_vjp = custom_vjp and overrides.custom_vjp
        if given["implementation"] is None:
            given["implementation"] = overrides.implementation
    params, x, *added = arrays
    x = _arguments.check_x(x)
    residual = _arguments.check_residual(added[0], x) if added else None
    axes = _arguments.check_axis(given["axis"], x.ndim)
    scale, bias = _arguments.check_params(params, x, axes)
    rounds = _arguments.check_flag("round_before_scale", given["round_before_scale"])
    spec = NormSpec(
        center=center,
        axes=axes,
        epsilon=_arguments.check_epsilon(given["epsilon"]),
        scale_offset=_arguments.check_scale_offset(
            given["scale_offset"], scale, rounds=rounds
        ),
        dtype=_arguments.check_dtype(given["dtype"], x),
        axis_names=_arguments.check_axis_name(given["axis_name"]),
        round_before_scale=rounds,
        return_statistics=_arguments.check_flag(
            "return_statistics", given["return_statistics"]
        ),
        implementation=_arguments.check_implementation(
            given["implementation"], custom_vjp=custom_vjp
        ),
    )
    mask = _arguments.check_mask(given["mask"], x)
    operands = (x, residual, scale, bias, mask)
    out = normalize(spec, *operands, custom_vjp=custom_vjp)
    wanted = tuple(part for part in out if part is not None)
    return wanted if len(wanted) > 1 else out.y


def init_params(
    features: int | tuple[int, ...],
    *,
    dtype: DTypeLike = jnp.float32,
    scale: bool = True,
    bias: bool = True,
) -> dict[str, Array]:
    """Initial parameters of a norm: a scale of ones and a bias of zeros.

    Flax's norms store the same tree. With `scale_offset=1.0`, start from a scale of
    zeros instead.

    Args:
      features: the length of the normalized axis, or a tuple of lengths for several
        axes.
      dtype: the dtype of the parameters.
      scale: whether to make `scale`.
      bias: whether to make `bias`.

    Returns:
      A dict with `scale` and `bias`, each of shape `(features,)` or `features`.

    Raises:
      TypeError: `features` is not an integer or a tuple of integers, or `dtype` is not
        a floating dtype.
      ValueError: a length is negative, or `dtype` is float64 without x64.

    Example:
      >>> import jax_layernorm as jln
      >>> jln.init_params(3, bias=False)
      {'scale': Array([1., 1., 1.], dtype=float32)}
    """
    shape = _arguments.check_features(features)
    dtype = _arguments.check_param_dtype(dtype)
    params = {}
    if _arguments.check_flag("scale", scale):
        params["scale"] = jnp.ones(shape, dtype)
    if _arguments.check_flag("bias", bias):
        params["bias"] = jnp.zeros(shape, dtype)
    return params
