"""XLA: the equations themselves, compiled. Runs everything everywhere.

Left alone, XLA on CPU and GPU sees in the backward pass what the forward pass has
computed from the same `x`, merges the two, and fuses a row's statistics into each
of their uses, which computes them again for every element. Optimization barriers
around the statistics, and around what the backward pass is given, keep them apart.
A TPU program fuses well and is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax import lax

from jax_layernorm import _equations
from jax_layernorm._kernel_op import Problem

FENCED_PLATFORMS = ("cpu", "cuda", "rocm")


def unsupported(problem: Problem) -> str | None:
    del problem
    return None


def not_default(problem: Problem) -> str | None:
    del problem
    return None


def forward(problem: Problem) -> Callable[..., _equations.Forward]:
    if problem.platform not in FENCED_PLATFORMS:
        return _equations.forward
    return functools.partial(_equations.forward, fence=lax.optimization_barrier)


def backward(problem: Problem) -> Callable[..., _equations.Backward]:
    if problem.platform not in FENCED_PLATFORMS:
        return _equations.backward
    fence = lax.optimization_barrier
    return lambda *operands, **static: _equations.backward(
        *fence(operands), fence=fence, **static
    )
