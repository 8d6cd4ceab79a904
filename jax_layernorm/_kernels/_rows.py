"""The problem as hand-written kernels see it: a matrix, rows by features.

The normalized axes are the last ones and become `features`; all others become `rows`.
A parameter is one row of features for all rows, or one for each of several equal groups
of consecutive rows: a per-example scale and shift, or the gradients of single examples
that `jax.vmap(jax.grad(...))` asks for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax_layernorm._kernel_op import Problem


class Rows(NamedTuple):
    """Shape of a problem. `*_groups`: groups of rows, None where there is no such array.

    Attributes:
      rows, features: of the matrix.
      scale_groups: of the operand `scale`, forward and backward.
      bias_groups: of the operand `bias`, forward; of the result `dbias`, backward.
      dscale_groups: of the result `dscale`, backward.
    """

    rows: int
    features: int
    scale_groups: int | None
    bias_groups: int | None
    dscale_groups: int | None


def as_rows(problem: Problem) -> Rows | str:
    """The problem as rows of features, or why no kernel can run it; shown to users."""
    if problem.op == "layer_norm_forward":
        x, _, scale, bias, mask = problem.operands
        shapes = [_shape(scale), _shape(bias), None]
    else:
        x, scale, mask = problem.operands[:3]
        static = problem.static
        shapes = [_shape(scale), static["bias_shape"], static["scale_shape"]]
    axes = problem.static["spec"].axes
    if not all(isinstance(n, int) for n in x.shape):
        return f"the shape of x, {x.shape}, is symbolic"
    if problem.partitioned:
        return "XLA partitions the program over several devices, and splits no kernel"
    if mask is not None:
        return "there is a mask"
    if set(axes) != set(range(-len(axes), 0)):
        return f"the normalized axes {axes} are not the last ones"
    if 0 in x.shape:
        return f"x is empty, shape {x.shape}"
    groups = [None if s is None else _groups(s, x.shape, len(axes)) for s in shapes]
    for shape, own in zip(shapes, groups, strict=True):
        if shape is not None and own is None:
            return (
                f"a parameter of shape {shape} is not one row of features for each of"
                f" several equal groups of the rows of x, {x.shape}"
            )
    first = x.ndim - len(axes)
    return Rows(math.prod(x.shape[:first]), math.prod(x.shape[first:]), *groups)


def _shape(operand: Any) -> tuple[int, ...] | None:
    return None if operand is None else operand.shape


def _groups(
    shape: tuple[int, ...], x_shape: tuple[int, ...], normalized: int
) -> int | None:
    """How many runs of consecutive rows have a parameter row of their own, or None."""
    aligned = (1,) * (len(x_shape) - len(shape)) + tuple(shape)
    first = len(x_shape) - normalized
    if aligned[first:] != x_shape[first:]:
        return None
    groups, shared = 1, False
    for n, size in zip(aligned[:first], x_shape[:first], strict=True):
        if n == 1:
            shared = shared or size != 1
        elif shared:
            return None
        else:
            groups *= n
    return groups
