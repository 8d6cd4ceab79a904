"""The CPU kernel, in C++, called through XLA's foreign function interface (FFI).

Why: XLA computes a norm on CPU in several loops with intermediates in memory, and
chooses the threads itself. `ffi.cc` reads each row from memory once each way, in the
processor's widest vectors, on the threads of XLA's pool.

Numerics: the formulas of `_equations`. Statistics and sums are in float32 (float64 for
float64). Sums are several partial sums in a fixed order. The results do not depend on
the number of threads. They may differ by roundings between kinds of processors.

Limits: those of `_rows.as_rows`; no exported programs, because XLA does not know such a
call there.
"""

from __future__ import annotations

import platform as host
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_layernorm import _equations
from jax_layernorm._equations import (
    BackwardOutputs,
    ForwardOutputs,
    NormSpec,
    RowStatistics,
)
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels import _library, _rows

platforms = ("cpu",)
MEASURED = ("x86_64", "AMD64")
"""The machines on which benchmarks have shown that it wins."""


def not_default(problem: Problem) -> str | None:
    del problem
    machine = host.machine()
    return None if machine in MEASURED else _rows.not_run_on(machine or "this machine")


def forward(problem: Problem) -> Callable[..., ForwardOutputs]:
    rows = _supported_rows(problem)
    matrix, stats = (rows.rows, rows.features), (rows.rows,)

    def run(
        x: Any,
        residual: Any,
        scale: Any,
        bias: Any,
        mask: None,
        *,
        spec: NormSpec,
        with_statistics: bool,
    ) -> ForwardOutputs:
        del mask
        normalized = _rows.sum_dtype(x, residual)
        compute = _equations.compute_dtype(normalized)
        rounded_to = _equations.rounding(normalized, scale, bias, spec)
        numbers = with_statistics * (3 if spec.center else 1)
        results = [
            jax.ShapeDtypeStruct(matrix, spec.dtype),
            *[jax.ShapeDtypeStruct(matrix, normalized)] * (residual is not None),
            *[jax.ShapeDtypeStruct(stats, compute)] * numbers,
        ]
        operands = [
            x.reshape(matrix),
            *_each(residual, matrix),
            *_each(scale, (-1, rows.features)),
            *_each(bias, (-1, rows.features)),
        ]
        y, *rest = jax.ffi.ffi_call(_library.CPU_FORWARD, results)(
            *operands,
            has_residual=residual is not None,
            has_scale=scale is not None,
            has_bias=bias is not None,
            with_statistics=with_statistics,
            center=spec.center,
            round_before_scale=spec.round_before_scale,
            round_product=rounded_to.product == normalized,
            round_sum=rounded_to.sum == normalized,
            epsilon=np.float64(spec.epsilon),
            scale_offset=np.float64(_equations.scale_offset(scale, spec)),
        )
        residual_out = None if residual is None else rest.pop(0).reshape(x.shape)
        statistics = None
        if with_statistics:
            kept = _rows.statistics_shape(x, spec.axes)
            *mean, rstd = (statistic.reshape(kept) for statistic in rest)
            high, low = mean if spec.center else (None, None)
            statistics = RowStatistics(high, low, rstd)
        return ForwardOutputs(y.reshape(x.shape), residual_out, statistics)

    return run


def backward(problem: Problem) -> Callable[..., BackwardOutputs]:
    rows = _supported_rows(problem)
    matrix, stats = (rows.rows, rows.features), (rows.rows,)

    def run(
        x: Any,
        scale: Any,
        mask: None,
        statistics: RowStatistics,
        dy: Any,
        dresidual_out: Any,
        dmean: Any,
        drstd: Any,
        *,
        spec: NormSpec,
        with_dx: bool,
        scale_shape: tuple[int, ...] | None,
        bias_shape: tuple[int, ...] | None,
    ) -> BackwardOutputs:
        del mask
        compute = _equations.compute_dtype(x.dtype)
        gradients = [
            None
            if groups is None
            else jax.ShapeDtypeStruct((groups, rows.features), compute)
            for groups in (rows.dscale_groups, rows.bias_groups)
        ]
        operands = [
            x.reshape(matrix),
            *_each(scale, (-1, rows.features)),
            *(
                statistic.reshape(stats)
                for statistic in statistics
                if statistic is not None
            ),
            dy.reshape(matrix),
            *_each(dresidual_out, matrix),
            *_each(dmean, stats),
            *_each(drstd, stats),
        ]
        results = [jax.ShapeDtypeStruct(matrix, x.dtype)] * with_dx
        results += [g for g in gradients if g is not None]
        computed = jax.ffi.ffi_call(_library.CPU_BACKWARD, results)(
            *operands,
            has_scale=scale is not None,
            has_dresidual_out=dresidual_out is not None,
            has_dmean=dmean is not None,
            has_drstd=drstd is not None,
            with_dx=with_dx,
            with_dscale=scale_shape is not None,
            with_dbias=bias_shape is not None,
            center=spec.center,
            round_before_scale=spec.round_before_scale,
            scale_offset=np.float64(_equations.scale_offset(scale, spec)),
        )
        shapes = (x.shape if with_dx else None, scale_shape, bias_shape)
        left = iter(computed)
        return BackwardOutputs(
            *(None if shape is None else next(left).reshape(shape) for shape in shapes)
        )

    return run


def _supported_rows(problem: Problem) -> _rows.Rows:
    """The problem as rows; raises if the kernel cannot run it."""
    _rows.refuse_exported(problem)
    rows = _rows.as_rows(problem)
    reason = _library.not_loaded()
    if reason is not None:
        raise NotImplementedError(reason)
    return rows


def _each(operand: Any, shape: tuple[int, ...]) -> list[Any]:
    """`operand` in `shape`, as a list; an empty list without an operand."""
    return [] if operand is None else [operand.reshape(shape)]
