"""Leaves out what an op need not compute if a program does not use all its results.

`jax.jit` asks for this when it lowers a program. For example, an optimizer that freezes
some parameters does not use their gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jax_layernorm import _equations
from jax_layernorm._kernel_op import Pruned

_BACKWARD = [*inspect.signature(_equations.backward).parameters]
FOR_DX_ALONE = tuple(map(_BACKWARD.index, ("scale", "dresidual_out", "dmean", "drstd")))
"""Operands of the backward op that only `dx` needs."""


def prune_forward(static: dict[str, Any], used: Sequence[bool]) -> Pruned:
    """`used` are `y`, the sum if there is a residual, and the statistics."""
    statistics = static["with_statistics"] * (3 if static["spec"].center else 1)
    if statistics and not any(used[-statistics:]):
        kept = [True] * (len(used) - statistics) + [False] * statistics
        return Pruned(static | {"with_statistics": False}, (), kept)
    return Pruned(static, (), [True] * len(used))


def prune_backward(static: dict[str, Any], used: Sequence[bool]) -> Pruned:
    """`used` are those of `dx`, `dscale` and `dbias` that the op computes."""
    names = ("with_dx", "scale_shape", "bias_shape")
    computed = [name for name in names if static[name] not in (False, None)]
    unused = [name for name, use in zip(computed, used, strict=True) if not use]
    nothing = {name: False if name == "with_dx" else None for name in unused}
    unneeded = FOR_DX_ALONE if "with_dx" in unused else ()
    return Pruned(static | nothing, unneeded, used)
