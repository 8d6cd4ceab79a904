"""TPU kernels, in Pallas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jax_layernorm import _equations
from jax_layernorm._equations import Moments
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels._rows import Rows, as_rows

DTYPES = ("bfloat16", "float32")
WIDEST = 32768


def unsupported(problem: Problem) -> str | None:
    if problem.platform != "tpu":
        return "it is for TPUs"
    rows = as_rows(problem)
    if isinstance(rows, str):
        return rows
    spec = problem.static["spec"]
    whole = {"x": problem.operands[0], "y": spec}
    if problem.op == "layer_norm_forward":
        whole["residual"] = problem.operands[1]
    else:
        *_, dtotal, dmean, drstd = problem.operands
        whole["dtotal"] = dtotal
        if dmean is not None or drstd is not None:
            return "the statistics have cotangents"
    for name, array in whole.items():
        if array is not None and array.dtype.name not in DTYPES:
            return f"{name} has the dtype {array.dtype.name}, not bfloat16 or float32"
    if any(groups not in (None, 1) for groups in rows[2:]):
        return "there are parameters of their own for some rows"
    if rows.features > WIDEST:
        return f"a row has {rows.features} elements, more than {WIDEST}"
    return None


def forward(problem: Problem) -> Callable[..., _equations.Forward]:
    rows = _rows(problem)

    def run(
        x: Any,
        residual: Any,
        scale: Any,
        bias: Any,
        mask: None,
        *,
        spec: Any,
        with_moments: bool,
    ) -> _equations.Forward:
        from jax_layernorm._kernels import _tpu_forward  # not before it is needed

        total_dtype = x.dtype
        if residual is not None:
            total_dtype = jnp.promote_types(x.dtype, residual.dtype)
        y, total, moments = _tpu_forward.forward(
            _matrix(x, rows),
            _matrix(residual, rows),
            _parameter(scale, rows),
            _parameter(bias, rows),
            spec=spec,
            total_dtype=total_dtype,
            with_moments=with_moments,
        )
        if moments is not None:
            kept = (*x.shape[: x.ndim - len(spec.axes)], *[1] * len(spec.axes))
            if spec.center and moments.mean_low is None:
                zeros = jnp.zeros_like(moments.rstd)
                moments = moments._replace(mean_low=zeros)
            moments = Moments(*(None if m is None else m.reshape(kept)
                                for m in moments))  # fmt: skip
        total = None if total is None else total.reshape(x.shape)
        return _equations.Forward(y.reshape(x.shape), total, moments)

    return run


def backward(problem: Problem) -> Callable[..., _equations.Backward]:
    rows = _rows(problem)

    def run(
        x: Any,
        scale: Any,
        mask: None,
        moments: Moments,
        dy: Any,
        dtotal: Any,
        dmean: None,
        drstd: None,
        *,
        spec: Any,
        scale_shape: Any,
        bias_shape: Any,
    ) -> _equations.Backward:
        from jax_layernorm._kernels import _tpu_backward  # not before it is needed

        per_row = (1, rows.rows)
        dx, dscale, dbias = _tpu_backward.backward(
            _matrix(x, rows),
            _parameter(scale, rows),
            Moments(*(None if m is None else m.reshape(per_row) for m in moments)),
            _matrix(dy, rows),
            _matrix(dtotal, rows),
            spec=spec,
            with_dscale=scale_shape is not None,
            with_dbias=bias_shape is not None,
        )
        return _equations.Backward(
            dx.reshape(x.shape),
            None if dscale is None else dscale.reshape(scale_shape),
            None if dbias is None else dbias.reshape(bias_shape),
        )

    return run


def _rows(problem: Problem) -> Rows:
    rows = as_rows(problem)
    assert isinstance(rows, Rows), rows
    return rows


def _matrix(array: Any, rows: Rows) -> Any:
    return None if array is None else array.reshape(rows.rows, rows.features)


def _parameter(array: Any, rows: Rows) -> Any:
    """As float32: it is small, and a kernel reads it once."""
    if array is None:
        return None
    return array.reshape(1, rows.features).astype(jnp.float32)
