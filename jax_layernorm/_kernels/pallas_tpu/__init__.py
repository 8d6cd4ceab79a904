"""TPU kernels, in Pallas: each array crosses memory once, each way.

Why: alone, 8192x4096 in bfloat16, Flax's norm moves 1.5 times the least bytes forward and
3.7 times backward on a TPU v5e, and the XLA form 1.5 times forward. Here a block of
whole rows is in fast memory while its statistics are taken and used: forward reads x
and writes y, backward reads x and dy and writes dx, with a residual one array more each
way. Moments are (1, rows) in memory, since (rows, 1) would be padded to 128 lanes.
`python -m benchmarks.tpu_kernels` counts bytes and scheduled cycles.

Numerics: float32, the corrected two-pass formula of `_equations`. Of bfloat16 the low
word of the mean is not read backward: what bfloat16 can hold of a deviation is larger.
`dscale` and `dbias` are summed in a fixed order.

Limits: bfloat16 and float32; rows of which `MIN_ROWS` fit into fast memory; one row of
parameters, so that the backward pass under `jax.vmap`, where each example has gradients
of its own, is the XLA form's. A row whose plain sum overflows, beyond 1e38 / features,
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_layernorm import _equations
from jax_layernorm._equations import Moments
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels._rows import Rows, as_rows

platforms = ("tpu",)
DTYPES = ("bfloat16", "float32")
LANES = 128
MIN_ROWS = 16
"""Two rows of bfloat16 share a sublane."""
VMEM_BYTES = 15 << 20
"""For all blocks, each twice (one is computed on while the other moves): of 16 MiB."""
PARAMETER_BYTES = 80
"""For each feature: scale and bias, twice, and eight rows of the gradient of each."""
WIDEST = 32768
MEASURED = range(768, 8192 + 1)
"""Features with which decoders gain over the XLA form: `benchmarks/tpu_layers.py`."""


def unsupported(problem: Problem) -> str | None:
    if problem.platform != "tpu":
        return "it is for TPUs"
    rows = as_rows(problem)
    if isinstance(rows, str):
        return rows
    spec = problem.static["spec"]
    x = problem.operands[0]
    whole: dict[str, Any] = {"x": x}
    if problem.op == "layer_norm_forward":
        whole |= {"y": spec, "residual": problem.operands[1]}
    else:
        *_, dy, dtotal, dmean, drstd = problem.operands
        if dmean is not None or drstd is not None:
            return "the statistics have cotangents"
        whole |= {"dy": dy, "dtotal": dtotal, "dx": x}
    whole = {name: array for name, array in whole.items() if array is not None}
    for name, array in whole.items():
        if array.dtype.name not in DTYPES:
            return f"{name} has the dtype {array.dtype.name}, not bfloat16 or float32"
    if any(groups not in (None, 1) for groups in rows[2:]):
        return "there are parameters of their own for some rows"
    itemsizes = [array.dtype.itemsize for array in whole.values()]
    if "residual" in whole:
        itemsizes.append(max(itemsizes))  # that of the sum
    a_column = MIN_ROWS * _element_bytes(itemsizes, "dx" in whole) + PARAMETER_BYTES
    widest = min(WIDEST, VMEM_BYTES // a_column // LANES * LANES)
    if rows.features > widest:
        return (
            f"a row has {rows.features} elements, more than the {widest} of which blocks"
            " fit into fast memory"
        )
    return None


def rows_that_fit(features: int, itemsizes: Sequence[int], backward: bool) -> int:
    """Of a block, into fast memory."""
    a_column = VMEM_BYTES // features - PARAMETER_BYTES
    return a_column // _element_bytes(itemsizes, backward)


def _element_bytes(itemsizes: Sequence[int], backward: bool) -> int:
    """Each operand twice; backward, of wide rows, two arrays of float32 besides."""
    return 2 * sum(itemsizes) + 8 * backward


def not_default(problem: Problem) -> str | None:
    features = _rows(problem).features
    if features % LANES == 0 and features in MEASURED:
        return None
    return (
        f"by its name only: it is measured in decoders of {MEASURED.start} to"
        f" {MEASURED.stop - 1} features, multiples of {LANES}, and here are {features}"
    )


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
        from jax_layernorm._kernels.pallas_tpu import _forward  # not before it is needed

        total_dtype = x.dtype
        if residual is not None:
            total_dtype = jnp.promote_types(x.dtype, residual.dtype)
        y, total, moments = _forward.forward(
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
            moments = jax.tree.map(lambda m: m.reshape(kept), moments)
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
        from jax_layernorm._kernels.pallas_tpu import _backward  # not before it is needed

        per_row = (1, rows.rows)
        dx, dscale, dbias = _backward.backward(
            _matrix(x, rows),
            _parameter(scale, rows),
            jax.tree.map(lambda m: m.reshape(per_row), moments),
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
