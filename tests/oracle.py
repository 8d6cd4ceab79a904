"""What is right: NumPy in float64, two passes, no JAX. And how far from it is right."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Expected(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray
    dx: np.ndarray
    dx_size: np.ndarray  # of the terms that dx is the sum of, for each row
    dscale: np.ndarray
    dbias: np.ndarray


def norm(
    x, scale=None, bias=None, dy=None, *, center=True, epsilon=1e-6, scale_offset=0.0
):
    """Forward and backward over the last axis; the gradients are for cotangent `dy`."""
    x, scale, bias, dy = (
        None if a is None else np.asarray(a, np.float64) for a in (x, scale, bias, dy)
    )
    mean = x.mean(-1, keepdims=True) if center else np.zeros((*x.shape[:-1], 1))
    c = x - mean
    if center:
        correction = c.mean(-1, keepdims=True)
        mean, c = mean + correction, c - correction
    rstd = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + epsilon)
    x_hat = c * rstd
    gamma = np.float64(1) if scale is None else scale_offset + scale
    y = x_hat * gamma + (0 if bias is None else bias)
    dy = np.zeros_like(x) if dy is None else dy
    g = dy * gamma
    dx = g - x_hat * (g * x_hat).mean(-1, keepdims=True)
    if center:
        dx = dx - g.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    size = rstd * np.abs(g).max(-1, keepdims=True, initial=0)
    return Expected(
        y, mean, rstd, rstd * dx, size, (dy * x_hat).sum(rows), dy.sum(rows)
    )


def assert_close(actual, expected, *, summed=1, against=None):
    """Within a few roundings of the dtype of `actual`, relative to the largest element.

    A result of order one, rounded once, is off by half a unit of its dtype; statistics
    and sums in float32 or wider add a few units of that dtype. A sum of `summed` terms
    errs, by chance, like its square root. `against` is the magnitude that the errors
    are relative to, one for each row, where it is not that of `expected`.
    """
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    own = float(jnp.finfo(actual.dtype).eps)
    compute = min(own, float(jnp.finfo(jnp.float32).eps))
    size = np.max(np.abs(expected), initial=0) if against is None else against
    tolerance = size * (own / 2 + compute * (4 + 0.5 * np.sqrt(summed)))
    excess = np.abs(actual.astype(np.float64) - expected) / (tolerance + 1e-300)
    assert np.max(excess, initial=0) <= 1, f"{np.max(excess):.3g} times the tolerance"
