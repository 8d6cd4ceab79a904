"""The correct results, in float64 NumPy, two passes, no JAX; and all tolerances."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Expected(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray
    dx: np.ndarray
    dx_size: np.ndarray  # the size, for each row, of the terms that add up to dx
    dscale: np.ndarray
    dbias: np.ndarray
    y_size: np.ndarray  # the same for y and the three below
    mean_size: np.ndarray
    dscale_size: np.ndarray
    dbias_size: np.ndarray


def norm(
    x,
    scale=None,
    bias=None,
    dy=None,
    *,
    axis=-1,
    center=True,
    epsilon=1e-6,
    scale_offset=0.0,
    mask=None,
    dmean=None,
    drstd=None,
):
    """Forward and backward; the gradients are for cotangents `dy`, `dmean`, `drstd`.

    If `x` is float64, it computes in long double. Parameters have the normalized shape,
    in the order of `axis`, or the rank of `x`. Their gradients have the same shape.
    """
    double = np.asarray(x).dtype in (np.float64, np.longdouble)
    wide = np.longdouble if double else np.float64
    eps = np.finfo(np.float64 if double else np.float32).eps
    x = np.asarray(x, wide)
    axes = axis if isinstance(axis, tuple) else (axis,)
    full = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    n = np.maximum(np.sum(full, axes, keepdims=True), 1)

    def array(a, shape):
        return np.zeros(shape, wide) if a is None else np.asarray(a, wide)

    def keep(a):
        return np.where(full, a, 0)

    def average(a):
        return np.sum(a, axes, keepdims=True) / n

    def largest(a):
        return np.max(np.abs(a), axes, keepdims=True, initial=0)

    normalized = tuple(x.shape[a] for a in axes)
    scale_shape = normalized if scale is None else np.shape(scale)
    bias_shape = normalized if bias is None else np.shape(bias)
    gamma = 1 if scale is None else scale_offset + np.asarray(scale, wide)
    gamma = _placed(np.broadcast_to(gamma, scale_shape), x.ndim, axes)
    beta = _placed(array(bias, bias_shape), x.ndim, axes)

    x = keep(x)
    mean = average(x) if center else np.zeros_like(average(x))
    c = keep(x - mean)
    if center:
        correction = average(c)
        mean, c = mean + correction, keep(c - correction)
    with np.errstate(divide="ignore"):  # epsilon = 0
        rstd = 1 / np.sqrt(average(c * c) + epsilon)
        x_hat = keep(c * np.where(np.isinf(rstd), 0, rstd))
    y = keep(x_hat * gamma + beta)

    dy = keep(array(dy, x.shape))
    dmean, drstd = array(dmean, n.shape), array(drstd, n.shape)
    g = dy * gamma
    dx = g - x_hat * (average(g * x_hat) + rstd * drstd / n)
    if center:
        dx = dx - average(g) + dmean / (n * rstd)
    dx = keep(rstd * dx)

    # How well the statistics' dtype can hold x_hat: the mean is subtracted in two steps,
    # and each leaves an error of eps times its input.
    lost = rstd * eps * largest(x) if center else 0
    x_hat_size = largest(x_hat) + lost
    along_x_hat = np.abs(average(g * x_hat)) + rstd * np.abs(drstd) / n
    terms = largest(g) + x_hat_size * along_x_hat
    if center:
        terms = terms + np.abs(average(g)) + np.abs(dmean) / (n * rstd)
    dx_size = rstd * terms * (1 + lost)
    return Expected(
        y,
        mean,
        rstd,
        dx,
        dx_size,
        _gathered(dy * x_hat, scale_shape, axes),
        _gathered(dy, bias_shape, axes),
        x_hat_size * np.abs(gamma) + np.abs(beta) + np.zeros_like(x),
        np.abs(mean) + largest(c),
        _gathered(np.abs(dy) * x_hat_size, scale_shape, axes),
        _gathered(np.abs(dy), bias_shape, axes),
    )


def _placed(param, ndim, axes):
    """A parameter with its axes where they are in an array of rank `ndim`."""
    if param.ndim == ndim != len(axes):
        return param
    param = param.reshape(param.shape + (1,) * (ndim - len(axes)))
    return np.moveaxis(param, range(len(axes)), axes)


def _gathered(full, shape, axes):
    """The gradient of a parameter of `shape`: the transpose of `_placed`."""
    if full.ndim == len(shape) != len(axes):
        ones = tuple(i for i, length in enumerate(shape) if length == 1)
        return full.sum(ones, keepdims=True)
    return np.moveaxis(full, axes, range(-len(axes), 0)).sum(
        tuple(range(full.ndim - len(axes)))
    )


def assert_close(actual, expected, *, summed=1, against=None, computed_in=None):
    """Within a few roundings of the dtype of `actual`, relative to the largest element.

    A result of order one, rounded once, is off by half a unit of its dtype; statistics
    and sums in float32 or wider add a few units of that dtype. The random error of a sum
    of `summed` terms grows like the square root of `summed`.

    Args:
      against: the magnitude, one for each row, that errors are relative to; None for
        the magnitude of `expected`.
      computed_in: the dtype of the arithmetic, if `actual` may be wider than it.
    """
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    own = float(jnp.finfo(actual.dtype).eps)
    compute = min(own, float(jnp.finfo(jnp.float32).eps))
    if computed_in is not None:
        compute = float(jnp.finfo(computed_in).eps)
    # The oracle rounds too, which counts if it is no wider than `actual`.
    oracle = float(np.finfo(expected.dtype).eps)
    size = np.max(np.abs(expected), initial=0) if against is None else against
    unit = own / 2 + compute * (4 + 0.5 * np.sqrt(summed)) + 8 * oracle
    # A float16 below 6e-5 is a multiple of its smallest subnormal.
    least = float(jnp.finfo(actual.dtype).smallest_subnormal) + 1e-300
    excess = np.abs(actual.astype(expected.dtype) - expected) / (size * unit + least)
    assert np.max(excess, initial=0) <= 1, f"{np.max(excess):.3g} times the tolerance"


def assert_right(out, params, x, dy, dresidual_out=None, **options):
    """`out` is `y`, the parameters' gradients and `dx`, computed in float32."""
    y, dparams, dx = out
    expected = norm(x, params.get("scale"), params.get("bias"), dy, **options)
    assert y.dtype == dy.dtype and dx.dtype == x.dtype
    assert_close(y, expected.y, against=expected.y_size, computed_in="float32")
    right, size = expected.dx, expected.dx_size
    if dresidual_out is not None:
        right = right + np.asarray(dresidual_out, np.float64)
        size = size + np.max(np.abs(right), -1, keepdims=True)
    assert_close(dx, right, against=size)
    rows = x.size // x.shape[-1]
    for name in params:
        assert_close(
            dparams[name],
            getattr(expected, f"d{name}"),
            summed=rows,
            against=getattr(expected, f"d{name}_size"),
        )
