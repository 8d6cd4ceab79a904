"""The mathematics of layer norm and RMS norm, forward and backward: the only copy.

Plain `jax.numpy` on arrays of any rank. Every other file decides *when* one of
these two functions runs and *what* runs in its place; none repeats a formula.

With N the number of elements along the normalized axes, sums and means running
over them, and gamma = scale_offset + scale:

    layer norm   c = x - mean(x);  c = c - mean(c);  var = mean(c * c)
    RMS norm     c = x;                              var = mean(x * x)

    rstd  = 1 / sqrt(var + epsilon)
    x_hat = c * rstd
    y     = x_hat * gamma + bias

Subtracting the mean a second time is what makes an offset free: the first mean
is wrong by half a unit in its last place, which for mean(x) >> std(x) is much
of the deviation itself, and the second one measures that error exactly where it
can still be represented (Chan, Golub, LeVeque, "Algorithms for Computing the
Sample Variance", 1983, the corrected two-pass algorithm).

For the cotangents dy, dmean and drstd of y, mean and rstd, with g = dy * gamma:

    dbias  = sum of dy over the rows
    dscale = sum of dy * x_hat over the rows
    dx     = rstd * (g - mean(g) - x_hat * (mean(g * x_hat) + rstd * drstd / N))
             + dmean / N

(RMS norm has no mean: no mean(g), no dmean.) The form with x_hat, and not the
rstd**3 that differentiating line by line gives, cannot underflow.

References:
  Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
  Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Shape = tuple[Any, ...]  # of integers, or of symbolic dimensions under `jax.export`


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """What is fixed about a norm before it sees an array; hashable.

    Attributes:
      center: subtract the mean (layer norm) or not (RMS norm).
      axes: the normalized axes, negative, so that they still name the same axes
        when `jax.vmap` puts another one in front.
      epsilon: added to the variance.
      scale_offset: added to `scale`.
      dtype: of `y`.
      return_statistics: the caller wants `mean` and `rstd` as well.
      implementation: a name in `KERNELS`, or None for the best that can run.
    """

    center: bool
    axes: tuple[int, ...]
    epsilon: float
    scale_offset: float
    dtype: jnp.dtype
    return_statistics: bool = False
    implementation: str | None = None


class Moments(NamedTuple):
    """Statistics of each row, normalized axes kept with length 1.

    `mean + mean_low` is the mean to twice the precision of its dtype; both are
    None for RMS norm.
    """

    mean: Float[Array, "*stats"] | None
    mean_low: Float[Array, "*stats"] | None
    rstd: Float[Array, "*stats"]


class Forward(NamedTuple):
    y: Float[Array, "*shape"]
    total: Float[Array, "*shape"] | None
    """`residual + x`, where there is a residual."""
    moments: Moments | None
    """Where they are asked for."""


class Backward(NamedTuple):
    dx: Float[Array, "*shape"]
    dscale: Float[Array, "*params"] | None
    dbias: Float[Array, "*params"] | None


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of statistics and arithmetic: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def forward(
    x: Float[Array, "*shape"],
    residual: Float[Array, "*shape"] | None,
    scale: Float[Array, "*params"] | None,
    bias: Float[Array, "*params"] | None,
    *,
    spec: NormSpec,
    with_moments: bool,
    fence: Callable[[Array], Array] = lambda statistic: statistic,
) -> Forward:
    """The norm of `x`, or of `residual + x`.

    `fence` is put around each statistic: the identity, or
    `lax.optimization_barrier` where the compiler would otherwise compute them
    again for every use (`_kernels/xla.py` says where).
    """
    total = None
    if residual is not None:
        x = total = _add(residual, x)
    compute = compute_dtype(x.dtype)
    c = x.astype(compute)
    mean = mean_low = None
    if spec.center:
        rough_mean = fence(_mean_for_subtraction(c, spec.axes))
        c = c - rough_mean
        correction = fence(_mean_for_subtraction(c, spec.axes))
        c = c - correction
        mean = rough_mean + correction
        mean_low = (rough_mean - mean) + correction
    rstd = fence(lax.rsqrt(_mean(c * c, spec.axes) + spec.epsilon))
    y = c * rstd
    if scale is not None:
        y = y * _gamma(scale, spec, like=y)
    if bias is not None:
        y = y + _broadcastable(bias.astype(compute), y.ndim)
    moments = Moments(mean, mean_low, rstd) if with_moments else None
    return Forward(y.astype(spec.dtype), total, moments)


def backward(
    x: Float[Array, "*shape"],
    scale: Float[Array, "*params"] | None,
    moments: Moments,
    dy: Float[Array, "*shape"],
    dtotal: Float[Array, "*shape"] | None,
    dmean: Float[Array, "*stats"] | None,
    drstd: Float[Array, "*stats"] | None,
    *,
    spec: NormSpec,
    bias_shape: Shape | None,
    fence: Callable[[Array], Array] = lambda statistic: statistic,
) -> Backward:
    """Cotangents of `forward`'s arguments, from what it was given and `moments`.

    With a residual, `x` is the sum, `dtotal` its cotangent, and `dx` the
    cotangent of both summands. `dscale` and `dbias` are left in the dtype they
    are summed in; `bias_shape` is None where there is no bias.
    """
    compute = compute_dtype(x.dtype)
    mean, mean_low, rstd = moments
    c = x.astype(compute)
    if mean is not None and mean_low is not None:
        c = (c - mean) - mean_low
    x_hat = c * rstd
    dy = dy.astype(compute)
    g = dy if scale is None else dy * _gamma(scale, spec, like=dy)

    along_x_hat = fence(_mean(g * x_hat, spec.axes))
    if drstd is not None:
        along_x_hat = along_x_hat + rstd * drstd / _count(x.shape, spec.axes)
    if spec.center:
        g = g - fence(_mean(g, spec.axes))
    dx = rstd * (g - x_hat * along_x_hat)
    if dmean is not None:
        dx = dx + dmean / _count(x.shape, spec.axes)
    if dtotal is not None:
        dx = dx + dtotal.astype(compute)

    dscale = None if scale is None else _sum_to_shape(dy * x_hat, scale.shape)
    dbias = None if bias_shape is None else _sum_to_shape(dy, bias_shape)
    return Backward(dx.astype(x.dtype), dscale, dbias)


def _mean(x: Float[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*stats"]:
    return jnp.sum(x, axes, keepdims=True) / _count(x.shape, axes)


def _mean_for_subtraction(
    x: Float[Array, "*shape"], axes: tuple[int, ...]
) -> Float[Array, "*stats"]:
    """The mean, as the very result of a sum.

    The product of a sum and 1/N would be computed again for each use, and as part of a
    fused multiply-add where it is subtracted: in `x - mean` the mean would then not be
    the one that is saved, and at a large mean the difference of the two matters.
    """
    return jnp.sum(x * (1 / _count(x.shape, axes)), axes, keepdims=True)


def _count(shape: Shape, axes: tuple[int, ...]) -> Any:
    """Elements in a row; 1 for a row of none, whose mean is then 0 and not NaN."""
    return max(math.prod(shape[axis] for axis in axes), 1)


def _add(
    residual: Float[Array, "*shape"], x: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The sum in the promoted dtype, rounded as a stored array would be.

    XLA may keep a float32 intermediate where the program says bfloat16; the
    explicit rounding makes the norm see the same sum that the caller gets.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(residual.dtype, x.dtype)
    compute = compute_dtype(dtype)
    total = residual.astype(compute) + x.astype(compute)
    if dtype != compute:
        info = jnp.finfo(dtype)
        total = lax.reduce_precision(total, info.nexp, info.nmant)
    return total.astype(dtype)


def _gamma(
    scale: Float[Array, "*params"], spec: NormSpec, *, like: Array
) -> Float[Array, "*broadcastable"]:
    gamma = scale.astype(like.dtype)
    if spec.scale_offset:
        gamma = gamma + spec.scale_offset
    return _broadcastable(gamma, like.ndim)


def _broadcastable(param: Array, ndim: int) -> Array:
    """`param` with axes of length 1 in front, up to rank `ndim`."""
    return lax.expand_dims(param, range(ndim - param.ndim))


def _sum_to_shape(x: Float[Array, "*shape"], shape: Shape) -> Array:
    """Sums `x` over the axes along which an array of `shape` was broadcast to it."""
    leading = x.ndim - len(shape)
    kept_as_one = [
        leading + i for i, n in enumerate(shape) if n == 1 and x.shape[leading + i] != 1
    ]
    x = jnp.sum(x, kept_as_one, keepdims=True) if kept_as_one else x
    return jnp.sum(x, range(leading)) if leading else x
