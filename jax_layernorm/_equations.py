"""The mathematics of layer norm and RMS norm, forward and backward: the only copy.

Plain `jax.numpy` on arrays of any rank. Every other file decides *when* one of
these two functions runs and *what* runs in its place; none repeats a formula.

N is the number of elements along the normalized axes, sums and means run over them, and
gamma = scale_offset + scale:

    layer norm   m = mean(x);  c = x - m;  d = mean(c);  c = c - d;  var = mean(c * c)
    RMS norm     c = x;                                              var = mean(x * x)

    rstd  = 1 / sqrt(var + epsilon)
    x_hat = c * rstd
    y     = x_hat * gamma + bias

The second subtraction is why a large offset costs no accuracy. m is wrong by about a
unit in its last place. If mean(x) >> std(x), that is much of the deviation itself. d
measures that error exactly where it can still be represented (Chan, Golub, LeVeque,
"Algorithms for Computing the Sample Variance", 1983, the corrected two-pass algorithm).
Both are kept: m + d is the mean in two words.

d costs no separate pass over x, because the sums that need it are taken before it is
known:

    N * var        = sum(c * c) - N * d * d            over c before it is corrected
    sum(g * x_hat) = rstd * (sum(g * c) - d * sum(g))

d is about as large as the rounding error of m. So the subtracted term is no larger than
what is left, unless the whole row is constant to the last bits.

With the same two lines, m need not be the mean ("shifted data" in the same article).
That helps if a pass over x to find the mean costs more than it is worth. Then m is the
mean of the row's first elements, or 0, whichever has the smaller sum(c * c); both sums
are taken in one pass. The rounding error of var grows by 1 + (mean - m)**2 / var. So it
is as good as with the mean itself unless the first elements are outliers, and never
worse than with E[x^2] - E[x]^2. m + d is kept, in two words as before.

Elements that a mask leaves out are 0 in c, x_hat, y and every sum, and N does not count
them.

With `round_before_scale`, x_hat is rounded to x's dtype, scale_offset to the scale's, and
gamma, the product and the sum are each rounded as JAX's dtype promotion would round
them. The backward pass takes dscale from the rounded x_hat, and a rounding has the
derivative 1.

For the cotangents dy, dmean and drstd of y, mean and rstd, with g = dy * gamma:

    dbias  = sum of dy over the rows
    dscale = sum of dy * x_hat over the rows
    dx     = rstd * (g - mean(g) - x_hat * (mean(g * x_hat) + rstd * drstd / N))
             + dmean / N

RMS norm has no mean, so it has no mean(g) and no dmean. Differentiating line by line
would give a factor rstd**3, which can underflow. The form with x_hat cannot.

If the normalized axes are split over devices, or over a mapped axis, the parts have
N_i, mean_i and S_i = sum(c * c). They merge without ever forming a sum of large numbers
(Chan, Golub, LeVeque, eq. 2.1, for many parts):

    mean = sum(N_i * mean_i) / N;   S = sum(S_i + N_i * (mean_i - mean)**2)

References:
  Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
  Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
  Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
  Variances", 1979.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

Barrier = Callable[["Array"], "Array"]
SumRows = Callable[["Array", int], "Array"]
"""Sums an array over the given number of leading axes."""
GUESS_FROM = 8  # elements whose mean is a guess at the mean of the row
FORWARD, BACKWARD = "layer_norm_forward", "layer_norm_backward"
"""The names of the ops for these two functions; jaxprs and profiles show them."""
Shape = tuple[Any, ...]  # of integers, or of symbolic dimensions under `jax.export`


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """What is known about a norm before it sees an array; hashable.

    Attributes:
      center: subtract the mean (layer norm) or not (RMS norm).
      axes: the normalized axes, negative, so that they still name the same axes
        when `jax.vmap` puts another one in front.
      epsilon: added to the variance.
      scale_offset: added to `scale`.
      dtype: the dtype of `y`.
      axis_names: mapped axes over which the normalized axes are split.
      round_before_scale: round `x_hat` to the dtype of `x`, then each result after it.
      return_statistics: whether the caller wants `mean` and `rstd` as well.
      implementation: a name in `KERNELS`, or None for the best that can run.
    """

    center: bool
    axes: tuple[int, ...]
    epsilon: float
    scale_offset: float
    dtype: jnp.dtype
    axis_names: tuple[str, ...] = ()
    round_before_scale: bool = False
    return_statistics: bool = False
    implementation: str | None = None


class RowStatistics(NamedTuple):
    """Statistics of each row, normalized axes kept with length 1.

    `mean + mean_low` is the mean to about twice the precision of its dtype; both are
    None for RMS norm.
    """

    mean: Float[Array, "*stats"] | None
    mean_low: Float[Array, "*stats"] | None
    rstd: Float[Array, "*stats"]


class ForwardOutputs(NamedTuple):
    y: Float[Array, "*shape"]
    residual_out: Float[Array, "*shape"] | None
    """`residual + x`; None without a residual."""
    statistics: RowStatistics | None
    """None if they are not asked for."""


class BackwardOutputs(NamedTuple):
    """Cotangents; None if they are not wanted."""

    dx: Float[Array, "*shape"] | None
    dscale: Float[Array, ...] | None
    dbias: Float[Array, ...] | None


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of statistics and arithmetic: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def forward(
    x: Float[Array, "*shape"],
    residual: Float[Array, "*shape"] | None,
    scale: Float[Array, ...] | None,
    bias: Float[Array, ...] | None,
    mask: Bool[Array, ...] | None,
    *,
    spec: NormSpec,
    with_statistics: bool,
    barrier: Barrier = lambda mean: mean,
    one_pass: bool = False,
    divide_sums: bool = False,
) -> ForwardOutputs:
    """The norm of `x`, or of `residual + x`.

    `scale`, `bias` and `mask` broadcast against `x`. `barrier` is applied to the first
    mean. It is the identity, or `lax.optimization_barrier` if the compiler would
    otherwise compute the mean again for every use (`_kernels/xla.py` says when). With
    `one_pass` and without a mask, a guess replaces the first mean. With `divide_sums`,
    the sums are divided by N instead of their terms; `_mean_for_subtraction` says why
    the terms are the default.
    """
    residual_out = None
    if residual is not None:
        x = residual_out = _add(residual, x)
    compute = compute_dtype(x.dtype)
    keep = _keep(mask, x.ndim)
    count = _count(x, mask, spec.axes)

    c = keep(x.astype(compute))
    mean = mean_low = None
    if not spec.center:
        square = jnp.sum(c * c, spec.axes, keepdims=True)
    else:
        if one_pass and isinstance(count, int) and count > 0:
            mean, mean_low, square = _in_one_pass(x, count, spec.axes)
            c = c - mean
        else:
            if divide_sums:
                mean = _mean_of_sum(c, count, spec.axes)
                c = keep(c - mean)
                mean_low = _mean_of_sum(c, count, spec.axes)
                square = jnp.sum(c * c, spec.axes, keepdims=True)
            else:
                mean = barrier(_mean_for_subtraction(c, count, spec.axes))
                c = keep(c - mean)
                mean_low, square = _mean_and_square(c, count, spec.axes)
            square = _without_mean(square, mean_low, count)
        c = c - mean_low
    if spec.axis_names:
        mean, mean_low, shift, variance = _merge(
            mean, mean_low, square, count, spec.axis_names
        )
        c = c if shift is None else c + shift
    else:
        variance = square * (1 / _at_least_one(count))
    rstd = lax.rsqrt(variance + spec.epsilon)
    y = c * rstd
    rounded_to = rounding(x.dtype, scale, bias, spec)
    y = _rounded(y, rounded_to.x_hat)
    if scale is not None:
        y = _rounded(y * gamma(scale, spec, y.dtype, y.ndim), rounded_to.product)
    if bias is not None:
        y = _rounded(y + _broadcastable(bias.astype(compute), y.ndim), rounded_to.sum)
    statistics = RowStatistics(mean, mean_low, rstd) if with_statistics else None
    return ForwardOutputs(keep(y).astype(spec.dtype), residual_out, statistics)


def backward(
    x: Float[Array, "*shape"],
    scale: Float[Array, ...] | None,
    mask: Bool[Array, ...] | None,
    statistics: RowStatistics,
    dy: Float[Array, "*shape"],
    dresidual_out: Float[Array, "*shape"] | None,
    dmean: Float[Array, "*stats"] | None,
    drstd: Float[Array, "*stats"] | None,
    *,
    spec: NormSpec,
    with_dx: bool,
    scale_shape: Shape | None,
    bias_shape: Shape | None,
    sum_rows: SumRows = lambda x, leading: jnp.sum(x, range(leading)),
) -> BackwardOutputs:
    """Cotangents of `forward`'s arguments, from those arguments and `statistics`.

    With a residual, `x` is the sum, `dresidual_out` is the cotangent of the sum, and
    `dx` is the cotangent of both summands. `scale` matters only for `dx`. `dscale` and
    `dbias` have the given shapes; a shape of None means that the gradient is not
    wanted. They stay in the dtype in which they are summed. `sum_rows` takes these
    sums: it is `jnp.sum`, or a function that suits a compiler better.
    """
    compute = compute_dtype(x.dtype)
    keep = _keep(mask, x.ndim)
    mean, mean_low, rstd = statistics
    c = x.astype(compute)
    c = keep(c if mean is None else c - mean)
    dy = keep(dy.astype(compute))
    x_hat = keep((c if mean_low is None else keep(c - mean_low)) * rstd)

    dx = None
    if with_dx:
        g = dy if scale is None else keep(dy * gamma(scale, spec, compute, dy.ndim))
        count = _count(x, mask, spec.axes)
        dx = keep(_dx(g, c, x_hat, mean_low, rstd, dmean, drstd, count, spec))
        if dresidual_out is not None:
            dx = dx + dresidual_out.astype(compute)
        dx = dx.astype(x.dtype)
    dscale = dbias = None
    if scale_shape is not None:
        if spec.round_before_scale:
            x_hat = _rounded(x_hat, x.dtype)
        dscale = _sum_to_shape(dy * x_hat, scale_shape, sum_rows)
    if bias_shape is not None:
        dbias = _sum_to_shape(dy, bias_shape, sum_rows)
    return BackwardOutputs(dx, dscale, dbias)


def _dx(
    g: Float[Array, "*shape"],
    c: Float[Array, "*shape"],
    x_hat: Float[Array, "*shape"],
    mean_low: Float[Array, "*stats"] | None,
    rstd: Float[Array, "*stats"],
    dmean: Float[Array, "*stats"] | None,
    drstd: Float[Array, "*stats"] | None,
    count: Any,
    spec: NormSpec,
) -> Float[Array, "*shape"]:
    """The cotangent of `x`; `c` is `x - mean`, without the low-order word."""
    # Everything that needs a sum over a row, or over the devices that share the row.
    sums = {}
    along_c = jnp.sum(g * c, spec.axes, keepdims=True)
    if mean_low is not None:
        sums["g"] = jnp.sum(g, spec.axes, keepdims=True)
        along_c = along_c - mean_low * sums["g"]
    # rstd is 0 if c * c has overflowed, and then g * c may have overflowed too.
    sums["g * x_hat"] = jnp.where(rstd == 0, rstd, rstd * along_c)
    if drstd is not None:
        sums["drstd"] = drstd
    if dmean is not None:
        sums["dmean"] = dmean
    if spec.axis_names:
        sums["count"] = count
        sums = _psum(sums, rstd, spec.axis_names)
        count = sums["count"]
    inv_n = 1 / _at_least_one(count)

    along_x_hat = sums["g * x_hat"]
    if drstd is not None:
        along_x_hat = along_x_hat + rstd * sums["drstd"]
    dx = g - x_hat * (along_x_hat * inv_n)
    if mean_low is not None:
        dx = dx - sums["g"] * inv_n
    dx = rstd * dx
    return dx if dmean is None else dx + sums["dmean"] * inv_n


def bias_gradient(
    dy: Float[Array, "*shape"],
    mask: Bool[Array, ...] | None,
    bias_shape: Shape,
    compute: jnp.dtype,
) -> Array:
    """`dbias` alone, which needs neither `x` nor the statistics."""
    dy = _keep(mask, dy.ndim)(dy.astype(compute))
    return _sum_to_shape(dy, bias_shape, lambda x, leading: jnp.sum(x, range(leading)))


def _keep(mask: Bool[Array, ...] | None, ndim: int) -> Callable[[Array], Array]:
    """A function that sets what `mask` leaves out to 0, even NaN and inf."""
    if mask is None:
        return lambda x: x
    full = _broadcastable(mask, ndim)
    return lambda x: jnp.where(full, x, 0)


def _count(x: Array, mask: Bool[Array, ...] | None, axes: tuple[int, ...]) -> Any:
    """How many elements of a row take part: a number, or an array with a mask."""
    dtype = compute_dtype(x.dtype)
    if mask is None:
        return math.prod(x.shape[axis] for axis in axes)
    full = _broadcastable(mask, x.ndim)
    repeats = math.prod(x.shape[axis] for axis in axes if full.shape[axis] == 1)
    return jnp.sum(full, axes, keepdims=True, dtype=dtype) * _at_least_one(repeats)


def _mean_for_subtraction(
    x: Float[Array, "*shape"], count: Any, axes: tuple[int, ...]
) -> Float[Array, "*stats"]:
    """The mean, computed so that it is itself the result of a sum.

    XLA turns a sum divided by N into a product with 1/N, and computes that product
    again for each use. In `x - mean` it would become part of a fused multiply-add, so
    the subtracted mean would not be the mean that is saved. If the mean is large, that
    difference matters.
    """
    return jnp.sum(x * (1 / _at_least_one(count)), axes, keepdims=True)


def _mean_of_sum(
    x: Float[Array, "*shape"], count: Any, axes: tuple[int, ...]
) -> Float[Array, "*stats"]:
    """The mean, faster on CPU; only if it is not saved, and |x| < 1e38 / N."""
    return jnp.sum(x, axes, keepdims=True) * (1 / _at_least_one(count))


def _mean_and_square(
    c: Float[Array, "*shape"], count: Any, axes: tuple[int, ...]
) -> tuple[Float[Array, "*stats"], Float[Array, "*stats"]]:
    """Mean and sum of squares."""
    # This is twice half the mean, which has the same bits. If two sums shared a factor
    # 1/N, XLA on CPU would keep that factor in memory, once for each element of x.
    mean = 2 * _mean_for_subtraction(c, 2 * _at_least_one(count), axes)
    return mean, jnp.sum(c * c, axes, keepdims=True)


def _in_one_pass(
    x: Float[Array, "*shape"], count: int, axes: tuple[int, ...]
) -> tuple[Float[Array, "*stats"], Float[Array, "*stats"], Float[Array, "*stats"]]:
    """The mean in two words, and sum((x - mean)**2), by way of a guess at the mean."""
    long = max(axes, key=lambda axis: x.shape[axis])
    few = x
    for axis in axes:
        most = GUESS_FROM if axis == long else 1
        few = lax.slice_in_dim(few, 0, min(most, x.shape[axis]), axis=axis)
    compute = compute_dtype(x.dtype)
    guess = _mean_for_subtraction(few.astype(compute), few.shape[long], axes)
    x = x.astype(compute)
    low, square = _mean_and_square(x - guess, count, axes)
    mean, square_about_0 = _mean_and_square(x, count, axes)
    nearer = square < square_about_0  # False if both have overflowed
    square = jnp.where(nearer, square, square_about_0)
    square = _without_mean(square, jnp.where(nearer, low, mean), count)
    high, low = _two_sum(guess, low)
    return jnp.where(nearer, high, mean), jnp.where(nearer, low, 0), square


def _without_mean(
    square: Float[Array, "*stats"], mean: Float[Array, "*stats"], count: Any
) -> Float[Array, "*stats"]:
    """sum((c - mean)**2), given sum(c * c) and the mean of c."""
    # The limit is finite, because inf - inf would be NaN. These are arrays, not
    # scalars, because jet's rule for min expects operands of one shape.
    most = jnp.full_like(square, float(jnp.finfo(square.dtype).max))
    excess = jnp.minimum(_at_least_one(count) * mean * mean, most)
    # Not max: in a constant row both are 0, and max would pass half of a derivative on.
    return jnp.where(square < excess, jnp.zeros_like(square), square - excess)


def _at_least_one(count: Any) -> Any:
    """`count`, but at least 1, so that the mean of nothing is 0 and not NaN."""
    if isinstance(count, jax.Array):
        return jnp.maximum(count, 1)
    # A float, because JAX turns a Python integer into an int32, which ends at 2**31.
    return float(max(count, 1)) if isinstance(count, int) else max(count, 1)


def _two_sum(large: Array, small: Array) -> tuple[Array, Array]:
    """`large + small`, rounded, and what the rounding lost (Dekker, 1971)."""
    high = large + small
    return high, (large - high) + small


def _merge(
    mean: Float[Array, "*stats"] | None,
    mean_low: Float[Array, "*stats"] | None,
    square: Float[Array, "*stats"],
    count: Any,
    axis_names: tuple[str, ...],
) -> tuple[Array | None, Array | None, Array | None, Array]:
    """Merges the statistics of the parts into those of whole rows, in one collective.

    Returns the mean in two words, how far the mean of this part lies above it, and the
    variance. Without a mean (RMS norm) the first three are None.
    """
    counted = isinstance(count, jax.Array)
    own = [square]
    if mean is not None and mean_low is not None:
        own += [mean, mean_low]
    if counted:
        own.append(count + jnp.zeros_like(square))
    # The parts get an axis that grows, because a reshape would lose how explicit mesh axes
    # split the rows. A sum with zeros, unlike broadcast_to, keeps it too.
    parts = jnp.stack(own)[None]
    for name in reversed(axis_names):
        parts = lax.all_gather(parts, name, tiled=True)
    squares = parts[:, 0]
    counts = parts[:, -1] if counted else jnp.full_like(squares, _at_least_one(count))
    n = _at_least_one(jnp.sum(counts, 0))
    if mean is None or mean_low is None:
        return None, None, None, _mapped(jnp.sum(squares, 0) / n, axis_names)
    # Take means relative to the mean of one part. The differences are exact if the
    # means are close; if they are not close, the variance is large.
    first = parts[0, 1]
    if counted:  # a part without elements has no mean
        first = jnp.max(jnp.where(counts > 0, parts[:, 1], -jnp.inf), 0)
        first = jnp.where(jnp.max(counts, 0) > 0, first, 0)
    offsets = (parts[:, 1] - first[None]) + parts[:, 2]
    offset = jnp.sum(counts * offsets, 0) / n
    squares = squares + counts * (offsets - offset[None]) ** 2
    shift = ((mean - first) + mean_low) - offset
    variance = jnp.sum(squares, 0) / n
    high, low = (_mapped(a, axis_names) for a in _two_sum(first, offset))
    return high, low, shift, _mapped(variance, axis_names)


def _mapped(statistic: Array, axis_names: tuple[str, ...]) -> Array:
    """`statistic`, as a value that may differ between the members of the mapped axes.

    If `jax.vmap` knows that an output is the same for all members, its cotangent is
    already the sum of their cotangents, and `backward` would sum it again.
    """
    index = sum(lax.axis_index(name) for name in axis_names)
    return jnp.where(index < 0, jnp.zeros_like(statistic), statistic)


def _psum(
    sums: dict[str, Any], like: Array, axis_names: tuple[str, ...]
) -> dict[str, Array]:
    """Sums each value over the devices too, in one collective."""
    zeros = jnp.zeros_like(like)
    stacked = jnp.stack([zeros + jnp.asarray(a, like.dtype) for a in sums.values()])
    return dict(zip(sums, lax.psum(stacked, axis_names), strict=True))


def _add(
    residual: Float[Array, "*shape"], x: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The sum in the promoted dtype, rounded as a stored array would be.

    XLA may keep a float32 intermediate where the program says bfloat16; the
    explicit rounding makes the norm see the same sum that the caller gets.
    """
    dtype = promoted_dtype(residual.dtype, x.dtype)
    compute = compute_dtype(dtype)
    residual_out = residual.astype(compute) + x.astype(compute)
    return _rounded(residual_out, dtype).astype(dtype)


def promoted_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype in which JAX adds or multiplies, also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


class Rounding(NamedTuple):
    """The dtypes to which `x_hat` and the results after it are rounded.

    A dtype that is as wide as that of the arithmetic leaves a result as it is.
    """

    x_hat: jnp.dtype
    product: jnp.dtype
    sum: jnp.dtype


def rounding(
    dtype: jnp.dtype,
    scale: Float[Array, ...] | None,
    bias: Float[Array, ...] | None,
    spec: NormSpec,
) -> Rounding:
    """Where `round_before_scale` rounds; no kernel decides it again.

    `dtype` is that of what is normalized.
    """
    if not spec.round_before_scale:
        compute = compute_dtype(dtype)
        return Rounding(compute, compute, compute)
    product = dtype if scale is None else promoted_dtype(dtype, scale.dtype)
    summed = product if bias is None else promoted_dtype(product, bias.dtype)
    return Rounding(dtype, product, summed)


def _rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """`x`, rounded to `dtype`, in its own dtype; XLA may drop a cast there and back."""
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return rounded
    # Denormal numbers of `dtype`, which `reduce_precision` would make 0.
    denormal = x.astype(dtype).astype(x.dtype)
    return jnp.where(jnp.abs(x) < float(info.tiny), denormal, rounded)


def gamma(
    scale: Float[Array, ...], spec: NormSpec, dtype: jnp.dtype, ndim: int
) -> Float[Array, ...]:
    """`scale_offset + scale` in `dtype`, with axes of length 1 in front, up to `ndim`."""
    factor = scale.astype(dtype)
    if spec.scale_offset:
        factor = factor + scale_offset(scale, spec)
        if spec.round_before_scale:
            factor = _rounded(factor, scale.dtype)
    return _broadcastable(factor, ndim)


def scale_offset(scale: Any, spec: NormSpec) -> float:
    """What is added to `scale`."""
    if scale is not None and spec.round_before_scale:
        return float(np.asarray(spec.scale_offset, scale.dtype))
    return spec.scale_offset


def _broadcastable(param: Array, ndim: int) -> Array:
    """`param` with axes of length 1 in front, up to rank `ndim`."""
    return lax.expand_dims(param, range(ndim - param.ndim))


def _sum_to_shape(x: Float[Array, "*shape"], shape: Shape, sum_rows: SumRows) -> Array:
    """Sums `x` over the axes along which an array of `shape` was broadcast to it."""
    leading = x.ndim - len(shape)
    kept_as_one = [
        leading + i for i, n in enumerate(shape) if n == 1 and x.shape[leading + i] != 1
    ]
    x = jnp.sum(x, kept_as_one, keepdims=True) if kept_as_one else x
    return sum_rows(x, leading) if leading else x
