"""XLA: the equations themselves, compiled. Runs everything everywhere.

Left alone, XLA on CPU and GPU computes the mean of a row again in each fusion that
uses it, for every element; and it sees in the backward pass what the forward pass has
computed from the same `x`, and keeps that in memory in place of `x`. An optimization
barrier around the mean ends the one, one around the cotangents the other: all that
depends on them stays where it is, and the rest is free to share passes over `x`. A TPU
program fuses well and has no barrier; there the statistics are taken in one pass over
`x`, so that no program reads it more often than with `E[x^2] - E[x]^2`.
`benchmarks/compile_only.py` counts the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import lax

from jax_layernorm import _equations
from jax_layernorm._kernel_op import PLATFORMS, Problem

platforms = PLATFORMS
FENCED_PLATFORMS = ("cpu", "cuda", "rocm")


def unsupported(problem: Problem) -> str | None:
    del problem
    return None


def not_default(problem: Problem) -> str | None:
    del problem
    return None


def forward(problem: Problem) -> Callable[..., _equations.Forward]:
    if problem.platform in FENCED_PLATFORMS:
        return functools.partial(_equations.forward, fence=lax.optimization_barrier)
    if problem.platform == "tpu":
        return functools.partial(_equations.forward, one_pass=True)
    return _equations.forward


def backward(problem: Problem) -> Callable[..., _equations.Backward]:
    if problem.platform not in FENCED_PLATFORMS:
        return _equations.backward
    return _backward_of_fenced_cotangents


def _backward_of_fenced_cotangents(
    x: Any, scale: Any, mask: Any, moments: Any, *cotangents: Any, **static: Any
) -> _equations.Backward:
    cotangents = lax.optimization_barrier(cotangents)
    return _equations.backward(x, scale, mask, moments, *cotangents, **static)
