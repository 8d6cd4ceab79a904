"""The problem as hand-written kernels see it: a matrix, rows by features.

The normalized axes are the last ones and become `features`; all others become `rows`.
A parameter is one row of features for all rows, or a row of features for each of
several equal groups of consecutive rows. Such groups come from a per-example scale and
shift, or from the gradients of single examples that `jax.vmap(jax.grad(...))` asks for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax_layernorm import _equations
from jax_layernorm._kernel_op import Problem


def not_run_on(hardware: str) -> str:
    """Why a kernel is no default on hardware that it has not run on."""
    return (
        f"it runs only by name, because it has not run on {hardware} yet; `python -m"
        " jax_layernorm check` tries it on yours"
    )


class Rows(NamedTuple):
    """The shape of a problem. `*_groups` counts groups of rows; None without the array.

    Attributes:
      rows, features: the shape of the matrix.
      scale_groups: of the operand `scale`, forward and backward.
      bias_groups: of the operand `bias`, forward; of the result `dbias`, backward.
      dscale_groups: of the result `dscale`, backward.
    """

    rows: int
    features: int
    scale_groups: int | None
    bias_groups: int | None
    dscale_groups: int | None


def as_rows(problem: Problem) -> Rows:
    """The problem as rows of features.

    Raises:
      NotImplementedError: no kernel can run it; users see the reason.
    """
    if problem.op == _equations.FORWARD:
        x, _, scale, bias, mask = problem.operands
        shapes = [_shape(scale), _shape(bias), None]
    else:
        x, scale, mask = problem.operands[:3]
        static = problem.static
        shapes = [_shape(scale), static["bias_shape"], static["scale_shape"]]
    axes = problem.static["spec"].axes
    reason = None
    if not all(isinstance(n, int) for n in x.shape):
        reason = f"the shape of x, {x.shape}, is symbolic"
    elif problem.partitioned:
        reason = "XLA partitions the program over several devices, and splits no kernel"
    elif mask is not None:
        reason = "there is a mask"
    elif set(axes) != set(range(-len(axes), 0)):
        reason = f"the normalized axes {axes} are not the last ones"
    elif 0 in x.shape:
        reason = f"x is empty, shape {x.shape}"
    if reason is not None:
        raise NotImplementedError(reason)
    groups = [None if s is None else _groups(s, x.shape, len(axes)) for s in shapes]
    first = x.ndim - len(axes)
    return Rows(math.prod(x.shape[:first]), math.prod(x.shape[first:]), *groups)


def refuse_exported(problem: Problem) -> None:
    """Raises NotImplementedError for a kernel in a native library."""
    if problem.exported:
        raise NotImplementedError(
            "the program is exported, and a program must not call a native library, which"
            " jax.export allows only with DisabledSafetyCheck.custom_call"
        )


def refuse_separate_parameters(rows: Rows) -> None:
    """Raises NotImplementedError for a kernel that takes one row of parameters."""
    groups = (rows.scale_groups, rows.bias_groups, rows.dscale_groups)
    if any(count not in (None, 1) for count in groups):
        raise NotImplementedError("some rows have separate parameters")


def reshaped(array: Any, shape: Any) -> Any:
    return None if array is None else array.reshape(shape)


def sum_dtype(x: Any, residual: Any) -> Any:
    """The dtype of what is normalized: that of `x`, or of the sum with a residual."""
    if residual is None:
        return x.dtype
    return _equations.promoted_dtype(x.dtype, residual.dtype)


def statistics_shape(x: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the statistics: normalized axes have length 1."""
    return tuple(1 if i - x.ndim in axes else n for i, n in enumerate(x.shape))


def _shape(operand: Any) -> tuple[int, ...] | None:
    return None if operand is None else operand.shape


def _groups(shape: tuple[int, ...], x_shape: tuple[int, ...], normalized: int) -> int:
    """How many groups of consecutive rows have a separate row of parameters."""
    aligned = (1,) * (len(x_shape) - len(shape)) + tuple(shape)
    first = len(x_shape) - normalized
    groups, shared, fits = 1, False, aligned[first:] == x_shape[first:]
    for n, size in zip(aligned[:first], x_shape[:first], strict=True):
        fits = fits and (n == 1 or not shared)
        shared = shared or (n == 1 and size != 1)
        groups *= n
    if not fits:
        raise NotImplementedError(
            f"a parameter of shape {shape} is not one row of features for each of several"
            f" equal groups of the rows of x, {x_shape}"
        )
    return groups
