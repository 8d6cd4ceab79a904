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
from jax_layernorm._kernels._tpu_blocks import LANES, Blocks

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
    cut = _tpu_blocks.blocks(rows, features, itemsizes, STEP)
    count = pl.cdiv(rows, cut.rows)
    shared = cut.shared if with_moments else 1

    def block(i: Any, j: Any) -> tuple[Any, int]:
        k = i * shared + j
        return (k if count % shared == 0 else jnp.minimum(k, count - 1)), 0

    row_spec = pl.BlockSpec((cut.rows, features), block)
    parameter_spec = pl.BlockSpec((1, features), lambda i, j: (0, 0))
    moment_spec = pl.BlockSpec((1, cut.span), lambda i, j: (0, i))
    matrix = functools.partial(jax.ShapeDtypeStruct, x.shape)
    moment: Any = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    low_word = total_dtype == jnp.float32
    moments = Moments(
        moment if spec.center else None,
        moment if spec.center and low_word else None,
        moment,
    )
    moment_specs = jax.tree.map(lambda _: moment_spec, moments)
    y, total, moments = _tpu_blocks.call(
        functools.partial(_forward_kernel, spec=spec, blocks=cut, shared=shared),
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
        scratch=[pltpu.VMEM((cut.span, LANES), jnp.float32)] if with_moments else [],
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
        x = x_ref[rows, :]
        if residual_ref is not None:
            total = residual_ref[rows, :].astype(jnp.float32) + x.astype(jnp.float32)
            x = total.astype(total_ref.dtype)
            total_ref[rows, :] = x
        c, moments = centered(x, spec)
        y = c * moments.rstd
        if gamma is not None:
            y = y * gamma
        if bias_ref is not None:
            y = y + bias_ref[...]
        y_ref[rows, :] = y.astype(y_ref.dtype)
        if moments_ref is not None:
            at = pl.multiple_of(offset + first, blocks.step)
            kept = [m[:, :LANES] for m, ref in zip(moments, moments_ref, strict=True)
                    if m is not None and ref is not None]  # fmt: skip
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


def centered(x: Any, spec: NormSpec) -> tuple[Any, Moments]:
    """The deviations from the mean, in float32, and the moments.

    These are (rows, 1), or have the same in several lanes.
    """
    stored, x = x, x.astype(jnp.float32)
    if not spec.center:
        return x, Moments(None, None, lax.rsqrt(_mean(x * x) + spec.epsilon))
    half = stored.dtype != jnp.float32
    if _tpu_blocks.is_narrow(x.shape[1]):
        rough = _tpu_blocks.mean_by_product(stored)
        if half:  # of so few numbers of 8 bits each, the sum is as good as exact
            c = x - rough
            return c, Moments(rough, None, lax.rsqrt(_mean(c * c) + spec.epsilon))
    else:
        # In half precision any number near the mean will do for a first one, since the
        # second is in float32: the mean of some columns takes fewer operations.
        rough = _mean(x[:, :LANES] if half else x)
    c = x - rough
    correction = _mean(c)
    rstd = lax.rsqrt(_corrected(_mean(c * c), correction) + spec.epsilon)
    mean, mean_low = _equations._two_sum(rough, correction)
    return c - correction, Moments(mean, mean_low, rstd)


def _mean(x: Any) -> Any:
    """Exact where all of a row is one small multiple of a unit in the last place.

    Of a constant row's deviations, that is, so that its `y` is the bias.
    """
    features = x.shape[1]
    total = jnp.sum(x, 1, keepdims=True)
    if features & (features - 1):
        return total / features
    return total * (1 / features)


def _corrected(square: Any, correction: Any) -> Any:
    """The variance, `mean(c * c) - mean(c)**2`; infinite where the squares overflow."""
    largest = jnp.finfo(jnp.float32).max
    less = square - jnp.minimum(correction * correction, largest)
    return jnp.where(less < 0, 0.0, less)  # and NaN stays NaN
