"""The forward kernel for TPU: one read of `x`, one write of `y`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_layernorm import _equations
from jax_layernorm._equations import Moments, NormSpec
from jax_layernorm._kernels import _tpu_blocks
from jax_layernorm._kernels._tpu_blocks import LANES, SHORT, Blocks

STEP = 1 << 18
"""Elements that are computed on at once."""


def forward(
    x: Any,
    residual: Any,
    scale: Any,
    bias: Any,
    *,
    spec: NormSpec,
    total_dtype: Any,
    with_moments: bool,
) -> tuple[Any, Any, Moments | None]:
    """`y`, `total` and, as (1, rows) each, the moments, of matrices."""
    rows, features = x.shape
    whole = [(x.dtype, x), (spec.dtype, x)]
    if residual is not None:
        whole += [(residual.dtype, x), (total_dtype, x)]
    itemsizes = [jnp.dtype(dtype).itemsize for dtype, _ in whole]
    short = features <= SHORT
    cut = (
        _tpu_blocks.short_blocks(rows, features, itemsizes)
        if short
        else _tpu_blocks.blocks(rows, features, itemsizes, STEP)
    )
    count = pl.cdiv(rows, cut.rows)
    shared = cut.shared if with_moments else 1

    def block(i: Any, j: Any) -> tuple[Any, int]:
        k = i * shared + j
        return (k if count % shared == 0 else jnp.minimum(k, count - 1)), 0

    row_spec = pl.BlockSpec((cut.rows, features), block)
    parameter_spec = pl.BlockSpec((1, features), lambda i, j: (0, 0))
    moment_spec = pl.BlockSpec((1, cut.span), lambda i, j: (0, i))
    matrix = functools.partial(jax.ShapeDtypeStruct, x.shape)
    moment = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    low_word = total_dtype == jnp.float32
    moments = Moments(
        moment if spec.center else None,
        moment if spec.center and low_word else None,
        moment,
    )
    moment_specs = Moments(*(None if m is None else moment_spec for m in moments))
    y, total, moments = _tpu_blocks.call(
        functools.partial(_short_kernel, spec=spec, blocks=cut)
        if short
        else functools.partial(_forward_kernel, spec=spec, blocks=cut, shared=shared),
        "layer_norm_forward",
        grid=(pl.cdiv(count, shared), shared),
        inputs=[
            (x, row_spec),
            (residual, row_spec),
            (scale, parameter_spec),
            (bias, parameter_spec),
        ],
        outputs=[
            (matrix(spec.dtype), row_spec),
            (None if residual is None else matrix(total_dtype), row_spec),
            (moments, moment_specs) if with_moments else (None, None),
        ],
        scratch=[pltpu.VMEM((cut.span, LANES), jnp.float32)]
        if with_moments and not short
        else [],
        flops_per_element=8,
    )
    return y, total, moments


def _forward_kernel(
    x_ref: Any,
    residual_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    total_ref: Any,
    moments_ref: Any,
    columns_ref: Any = None,
    *,
    spec: NormSpec,
    blocks: Blocks,
    shared: int,
) -> None:
    gamma = None if scale_ref is None else scale_ref[...] + spec.scale_offset
    offset = pl.program_id(1) * blocks.rows if shared > 1 else 0

    def step(first: Any, rows: Any) -> None:
        x = x_ref[rows, :].astype(jnp.float32)
        dtype = x_ref.dtype
        if residual_ref is not None:
            total = (residual_ref[rows, :].astype(jnp.float32) + x).astype(
                total_ref.dtype
            )
            total_ref[rows, :] = total
            x, dtype = total.astype(jnp.float32), total_ref.dtype
        c, moments = _centered(x, dtype, spec)
        y = c * moments.rstd
        if gamma is not None:
            y = y * gamma
        if bias_ref is not None:
            y = y + bias_ref[...]
        y_ref[rows, :] = y.astype(y_ref.dtype)
        if moments_ref is not None:
            at = pl.multiple_of(offset + first, blocks.step)
            kept = [m for m, ref in zip(moments, moments_ref, strict=True)
                    if ref is not None]  # fmt: skip
            columns_ref[pl.ds(at, blocks.step), :] = _tpu_blocks.lanes(
                kept, blocks.step
            )

    _tpu_blocks.in_steps(blocks, step)
    if moments_ref is not None:
        write = functools.partial(
            _tpu_blocks.write_statistics, columns_ref, jax.tree.leaves(moments_ref)
        )
        if shared > 1:
            pl.when(pl.program_id(1) == shared - 1)(write)
        else:
            write()


def _short_kernel(
    x_ref: Any,
    residual_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    total_ref: Any,
    moments_ref: Any,
    *,
    spec: NormSpec,
    blocks: Blocks,
) -> None:
    """Short rows: turned, features down the sublanes and a row in each lane.

    A sum along lanes costs several operations a register, and of a short row each
    register needs them; a sum along sublanes is an addition of registers. Statistics
    are then as they go to memory.
    """
    gamma = None if scale_ref is None else scale_ref[...] + spec.scale_offset

    def step(first: Any, rows: Any) -> None:
        x = x_ref[rows, :].astype(jnp.float32)
        dtype = x_ref.dtype
        if residual_ref is not None:
            total = (residual_ref[rows, :].astype(jnp.float32) + x).astype(
                total_ref.dtype
            )
            total_ref[rows, :] = total
            x, dtype = total.astype(jnp.float32), total_ref.dtype
        c, moments = _centered(jnp.transpose(x), dtype, spec, axis=0)
        y = jnp.transpose(c * moments.rstd)
        if gamma is not None:
            y = y * gamma
        if bias_ref is not None:
            y = y + bias_ref[...]
        y_ref[rows, :] = y.astype(y_ref.dtype)
        if moments_ref is not None:
            for ref, moment in zip(moments_ref, moments, strict=True):
                if ref is not None:
                    ref[:, rows] = moment

    _tpu_blocks.in_steps(blocks, step)


def _centered(
    x: Any, dtype: Any, spec: NormSpec, *, axis: int = 1
) -> tuple[Any, Moments]:
    """The deviations from the mean along `axis`, and the moments, that axis kept."""
    features = x.shape[axis]

    def mean_of(a: Any) -> Any:
        return jnp.sum(a, axis, keepdims=True) * (1 / a.shape[axis])

    if not spec.center:
        rstd = lax.rsqrt(mean_of(x * x) + spec.epsilon)
        return x, Moments(None, None, rstd)
    if dtype != jnp.float32 and axis == 1 and features > LANES:
        rough = mean_of(x[:, :LANES])
    else:
        rough = mean_of(x)
    c = x - rough
    square = mean_of(c * c)
    if dtype != jnp.float32 and features <= LANES * 2 and features & (features - 1) == 0:
        return c, Moments(rough, None, lax.rsqrt(square + spec.epsilon))
    correction = mean_of(c)
    rstd = lax.rsqrt(corrected(square, correction) + spec.epsilon)
    mean, mean_low = _equations._two_sum(rough, correction)
    return c - correction, Moments(mean, mean_low, rstd)


def corrected(square: Any, correction: Any) -> Any:
    """The variance, `mean(c * c) - mean(c)**2`; infinite where the squares overflow."""
    largest = jnp.finfo(jnp.float32).max
    return jnp.maximum(square - jnp.minimum(correction * correction, largest), 0.0)
