"""The TPU kernels, in Pallas: each array crosses memory once, each way.

Why: for 8192x4096 in bfloat16 on a TPU v5e, a Flax norm by itself moves 1.5 times the
least bytes forward and 3.7 times the least bytes backward. The XLA implementation moves
1.5 times the least bytes forward. Here, a block of whole rows stays in fast memory
while its statistics are taken and used. Forward reads x and writes y. Backward reads x
and dy, and writes dx. With a residual, forward also reads the residual and writes the
sum, and backward also reads the sum's cotangent. RowStatistics are (1, rows) in memory,
because (rows, 1) would be padded to 128 lanes. `python -m benchmarks.tpu_kernels`
counts bytes and scheduled cycles.

Numerics: float32, with the corrected two-pass formula of `_equations`. For bfloat16,
the backward pass ignores the mean's low word; it is below bfloat16 resolution.
`dscale` and `dbias` are summed in a fixed order.

Limits: bfloat16 and float32; `_limits.MIN_ROWS` rows must fit into fast memory; one row
of parameters. If `jax.vmap` asks for separate parameter gradients for each example, XLA
runs the backward pass. A row whose plain sum overflows, beyond 1e38 / features,
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_layernorm import _equations
from jax_layernorm._equations import RowStatistics
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels._rows import (
    Rows,
    as_rows,
    not_run_on,
    refuse_separate_parameters,
    reshaped,
    statistics_shape,
    sum_dtype,
)
from jax_layernorm._kernels.pallas_tpu import _limits

platforms = ("tpu",)
DTYPES = ("bfloat16", "float32")


def not_default(problem: Problem) -> str | None:
    del problem
    return not_run_on("a TPU")


def forward(problem: Problem) -> Callable[..., _equations.ForwardOutputs]:
    rows = _supported_rows(problem)

    def run(
        x: Any,
        residual: Any,
        scale: Any,
        bias: Any,
        mask: None,
        *,
        spec: Any,
        with_statistics: bool,
    ) -> _equations.ForwardOutputs:
        from jax_layernorm._kernels.pallas_tpu import (
            _forward,
        )  # not before it is needed

        normalized = sum_dtype(x, residual)
        y, residual_out, statistics = _forward.forward(
            reshaped(x, rows[:2]),
            reshaped(residual, rows[:2]),
            _gamma(scale, spec, rows),
            None if bias is None else bias.astype(jnp.float32).reshape(1, -1),
            spec=spec,
            rounding=_equations.rounding(normalized, scale, bias, spec),
            residual_out_dtype=normalized,
            with_statistics=with_statistics,
        )
        if statistics is not None:
            kept = statistics_shape(x, spec.axes)
            if spec.center and statistics.mean_low is None:
                zeros = jnp.zeros_like(statistics.rstd)
                statistics = statistics._replace(mean_low=zeros)
            statistics = jax.tree.map(lambda m: m.reshape(kept), statistics)
        return _equations.ForwardOutputs(
            y.reshape(x.shape), reshaped(residual_out, x.shape), statistics
        )

    return run


def backward(problem: Problem) -> Callable[..., _equations.BackwardOutputs]:
    rows = _supported_rows(problem)

    def run(
        x: Any,
        scale: Any,
        mask: None,
        statistics: RowStatistics,
        dy: Any,
        dresidual_out: Any,
        dmean: None,
        drstd: None,
        *,
        spec: Any,
        with_dx: bool,
        scale_shape: Any,
        bias_shape: Any,
    ) -> _equations.BackwardOutputs:
        from jax_layernorm._kernels.pallas_tpu import (
            _backward,
        )  # not before it is needed

        per_row = (1, rows.rows)
        dx, dscale, dbias = _backward.backward(
            reshaped(x, rows[:2]),
            _gamma(scale, spec, rows),
            jax.tree.map(lambda m: m.reshape(per_row), statistics),
            reshaped(dy, rows[:2]),
            reshaped(dresidual_out, rows[:2]),
            spec=spec,
            with_dx=with_dx,
            with_dscale=scale_shape is not None,
            with_dbias=bias_shape is not None,
        )
        return _equations.BackwardOutputs(
            reshaped(dx, x.shape),
            reshaped(dscale, scale_shape),
            reshaped(dbias, bias_shape),
        )

    return run


def _supported_rows(problem: Problem) -> Rows:
    """The problem as rows; raises if the kernels cannot run it."""
    rows = as_rows(problem)
    whole = _whole_arrays(problem)
    for name, array in whole.items():
        if array.dtype.name not in DTYPES:
            raise NotImplementedError(
                f"{name} has the dtype {array.dtype.name}, not bfloat16 or float32"
            )
    refuse_separate_parameters(rows)
    itemsizes = [array.dtype.itemsize for array in whole.values()]
    if "residual" in whole:
        itemsizes.append(max(itemsizes))  # the sum's
    widest = _limits.widest(itemsizes, problem.op == _equations.BACKWARD)
    if rows.features > widest:
        raise NotImplementedError(
            f"a row has {rows.features} elements, and blocks of more than {widest} do not"
            " fit into fast memory"
        )
    return rows


def _whole_arrays(problem: Problem) -> dict[str, Any]:
    """The operands and results with the shape of `x`, by name; only dtypes matter."""
    x = problem.operands[0]
    if problem.op == _equations.FORWARD:
        whole = {"x": x, "y": problem.static["spec"], "residual": problem.operands[1]}
    else:
        *_, dy, dresidual_out, dmean, drstd = problem.operands
        if dmean is not None or drstd is not None:
            raise NotImplementedError("the statistics have cotangents")
        whole = {"x": x, "dy": dy, "dresidual_out": dresidual_out, "dx": x}
    return {name: array for name, array in whole.items() if array is not None}


def _gamma(scale: Any, spec: Any, rows: Rows) -> Any:
    """`scale_offset + scale` in float32: it is small, and a kernel reads it once."""
    if scale is None:
        return None
    scale = scale.reshape(1, rows.features)
    return _equations.gamma(scale, spec, jnp.dtype(jnp.float32), 2)
