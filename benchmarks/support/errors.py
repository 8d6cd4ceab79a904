"""Errors of a layer norm in units in the last place, against NumPy in float64.

An error is divided by the unit in the last place of the largest correct value in its row,
in the dtype of the result. For the parameters' gradients it is the largest value of all.
(If it were the unit of the value itself, an element that happens to be near zero would
count as wrong by thousands of units.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.support import peers, shapes

RESULTS = ("y", "dx", "dscale", "dbias")


class Errors(NamedTuple):
    """In units in the last place."""

    max: float
    p99: float
    median: float


def inputs(
    shape: shapes.Shape, offset: float, dtype: Any, seed: int
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """`params, x, dy`.

    Rows of `x` have spread 1 and a mean of `offset` to `2 * offset`, both times 2**-6 if
    that overflows the dtype. Parameters are float32, or float64 for float64 `x`.
    """
    rng = np.random.default_rng(seed)
    spread = 2.0**-6 if 4 * offset > float(jnp.finfo(dtype).max) else 1.0
    wide = jnp.promote_types(dtype, jnp.float32)
    mean = offset * (1 + rng.random((shape.rows, 1)))
    x = spread * (mean + rng.standard_normal(shape))
    params = {
        "scale": jnp.asarray(1 + 0.3 * rng.standard_normal(shape.features), wide),
        "bias": jnp.asarray(0.3 * rng.standard_normal(shape.features), wide),
    }
    return params, jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal(shape), dtype)


def oracle(params: Any, x: jax.Array, dy: jax.Array) -> list[np.ndarray]:
    """The correct `RESULTS`, in two passes; in long double for float64 `x`."""
    wide = np.longdouble if x.dtype == jnp.float64 else np.float64
    x, dy, scale, bias = (
        np.asarray(a).astype(np.float64).astype(wide)
        for a in (x, dy, params["scale"], params["bias"])
    )
    c = x - x.mean(-1, keepdims=True)
    c = c - c.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + wide(peers.EPSILON))
    x_hat = c * rstd
    g = dy * scale
    dx = g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True)
    return [x_hat * scale + bias, rstd * dx, (dy * x_hat).sum(0), dy.sum(0)]


def ulp_errors(actual: Any, right: np.ndarray, dtype: Any) -> Errors:
    """`dtype` is that of the result, whose last place is the unit."""
    info = jnp.finfo(dtype)
    largest = np.max(np.abs(right), axis=-1, keepdims=True)
    _, exponent = np.frexp(np.maximum(largest, float(info.tiny)))
    unit = np.ldexp(np.ones_like(right[..., :1]), exponent - 1 - info.nmant)
    error = np.abs(np.asarray(actual).astype(right.dtype) - right) / unit
    error = np.where(np.isnan(error), np.inf, error).astype(np.float64)
    # "higher", because interpolating gives NaN if an error is inf.
    p99 = np.quantile(error, 0.99, method="higher")
    return Errors(float(error.max()), float(p99), float(np.median(error)))


def of_results(
    results: Sequence[Any], right: list[np.ndarray], kinds: Sequence[Any] | None = None
) -> dict[str, float]:
    """The largest error of each of `RESULTS`.

    Args:
      kinds: the dtypes whose last places are the units; None for those of `results`.
    """
    kinds = [a.dtype for a in results] if kinds is None else kinds
    return {
        f"error of {name}": ulp_errors(a, r, kind).max
        for name, a, r, kind in zip(RESULTS, results, right, kinds, strict=True)
    }
