"""The XLA implementation: the compiled equations. It runs everything everywhere.

By itself, XLA on CPU and GPU does two things that cost time and memory. It computes the
mean of a row again for every element, in each fusion that uses the mean. And in the
backward pass it sees what the forward pass has computed from the same `x`, and keeps
that in memory instead of `x`. An optimization barrier around the mean prevents the
first, and a barrier around the cotangents prevents the second. Everything that depends
on them stays where it is, and the rest is free to share passes over `x`.

On CPU, a forward pass that saves nothing needs no barrier. XLA makes one fusion of it,
and goes over a row while the row is in the cache. Then the operations on whole rows and
whole arrays are what counts. So sums are divided by N instead of their terms
(`divide_sums`). A row whose plain sum overflows, beyond 1e38 / features, is then NaN.

On GPU, `dscale` and `dbias` are summed in two steps. In a single step, for up to about
4096 rows, XLA uses only a few of the processor's cores for the sums, and first writes
`dy * x_hat` to memory in float32. Sums over parts of the rows share one pass with `dx`.

A TPU program fuses well and has no barrier. It takes the statistics in one pass over
`x`, so it reads `x` no more often than with `E[x^2] - E[x]^2`.
`benchmarks/compile_only.py` counts the bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_layernorm import _equations
from jax_layernorm._kernel_op import PLATFORMS, Problem

platforms = (*PLATFORMS, "")  # "" stands for any other
GPUS = ("cuda", "rocm")
BARRIER_PLATFORMS = ("cpu", *GPUS)
PARTS = 32
"""The rows are split into at least this many parts: work for a whole GPU."""
PART_ROWS = (8, 256)
"""The least and the most rows of a part. XLA sums 512 rows in its usual way again."""


def not_default(problem: Problem) -> str | None:
    del problem
    return None


def forward(problem: Problem) -> Callable[..., _equations.ForwardOutputs]:
    if problem.platform == "cpu" and not problem.static["with_statistics"]:
        return functools.partial(_equations.forward, divide_sums=True)
    if problem.platform in BARRIER_PLATFORMS:
        return functools.partial(_equations.forward, barrier=lax.optimization_barrier)
    if problem.platform == "tpu":
        return functools.partial(_equations.forward, one_pass=True)
    return _equations.forward


def backward(problem: Problem) -> Callable[..., _equations.BackwardOutputs]:
    if problem.platform not in BARRIER_PLATFORMS:
        return _equations.backward
    if problem.platform in GPUS and not problem.partitioned:
        # Parts that straddle devices would have to be exchanged.
        return functools.partial(_backward_behind_a_barrier, sum_rows=sum_in_parts)
    return _backward_behind_a_barrier


def sum_in_parts(x: Any, leading: int) -> Any:
    """The sum over the first axes, in two steps if a power of two divides them."""
    rows = math.prod(x.shape[:leading])
    least, most = PART_ROWS
    part = 0
    if isinstance(rows, int) and rows >= PARTS * least:  # it may be symbolic
        part = math.gcd(rows, min(most, 1 << (rows // PARTS).bit_length() - 1))
    if part < least:
        return jnp.sum(x, range(leading))
    parts = jnp.sum(x.reshape(rows // part, part, *x.shape[leading:]), 1)
    # Without the barrier, XLA would make one sum of the two.
    return jnp.sum(lax.optimization_barrier(parts), 0)


def _backward_behind_a_barrier(
    x: Any, scale: Any, mask: Any, statistics: Any, *cotangents: Any, **static: Any
) -> _equations.BackwardOutputs:
    cotangents = lax.optimization_barrier(cotangents)
    return _equations.backward(x, scale, mask, statistics, *cotangents, **static)
