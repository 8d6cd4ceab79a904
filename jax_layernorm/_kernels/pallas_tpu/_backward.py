"""The backward kernel for TPU: one read of `x` and `dy`, one write of `dx`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_layernorm._equations import NormSpec, RowStatistics
from jax_layernorm._kernels.pallas_tpu import _blocks, _forward
from jax_layernorm._kernels.pallas_tpu._blocks import (
    CORES,
    LANES,
    MIN_ROWS,
    SUBLANES,
    Blocks,
)

STEP = 1 << 17
"""Elements that are computed on at once: fewer than forward, because of more arrays."""
TILE_REGISTERS = 64
"""Registers of float32 that each array has in a tile of a wider row."""
AT_ONCE = 32768
"""If a block has less than 128 rows, the statistics of up to this many rows are all
read at once. A transfer for every few blocks, which each block has to ask for, costs
more cycles than a transfer for all."""


class RowSums(NamedTuple):
    """Scratch of the kernel for wide rows; statistics in every lane."""

    given: RowStatistics
    g: Any
    g_x_hat: Any


def backward(
    x: Any,
    gamma: Any,
    statistics: RowStatistics,
    dy: Any,
    dresidual_out: Any,
    *,
    spec: NormSpec,
    with_dx: bool,
    with_dscale: bool,
    with_dbias: bool,
) -> tuple[Any, Any, Any]:
    """`dx`, and `dscale` and `dbias` as (features,) of float32; None if not wanted."""
    rows, features = x.shape
    given: RowStatistics | None = statistics
    if x.dtype != jnp.float32:  # see the accuracy notes in `pallas_tpu`
        given = statistics._replace(mean_low=None)
    whole = [a.dtype.itemsize for a in (x, dy, dresidual_out, x) if a is not None]
    if _blocks.is_narrow(features):
        given = RowStatistics(
            None, None, statistics.rstd
        )  # deviations are computed again
    cut = _blocks.blocks(rows, features, whole, STEP, backward=True)
    if cut.shared > 1 and rows <= AT_ONCE:
        every = _blocks.round_up(rows, LANES)
        cut = cut._replace(shared=every // cut.rows)
    count = pl.cdiv(rows, cut.rows)
    steps = pl.cdiv(count, min(CORES, count))
    cores = pl.cdiv(count, steps)

    def number(core: Any, step: Any) -> Any:
        k = core * steps + step
        return k if steps * cores == count else jnp.minimum(k, count - 1)

    def statistic_block(core: Any, step: Any) -> tuple[int, Any]:
        return 0, cut.span_of(number(core, step), count)

    row_spec = pl.BlockSpec((cut.rows, features), lambda i, j: (number(i, j), 0))
    statistic_spec = pl.BlockSpec((1, cut.span), statistic_block)
    parameter_spec = pl.BlockSpec((1, features), lambda i, j: (0, 0))
    sum_spec = pl.BlockSpec((1, SUBLANES, features), lambda i, j: (i, 0, 0))
    sums = jax.ShapeDtypeStruct((cores, SUBLANES, features), jnp.float32)
    wide = _blocks.is_wide(features)
    scratch: list[Any] = []
    if wide:
        per_row = pltpu.VMEM((cut.rows, LANES), jnp.float32)
        kept = jax.tree.map(lambda _: per_row, given)
        row = pltpu.VMEM((cut.rows, features), jnp.float32)
        scratch = [RowSums(kept, per_row, per_row), row, row]
    kernel = _wide_kernel if wide else _backward_kernel
    dx, dscale, dbias = _blocks.call(
        functools.partial(
            kernel, spec=spec, blocks=cut, rows=rows, steps=steps, count=count
        ),
        "layer_norm_backward",
        grid=(cores, steps),
        inputs=[
            (x, row_spec),
            (dy, row_spec),
            (dresidual_out, row_spec),
            (given, jax.tree.map(lambda _: statistic_spec, given)),
            (gamma, parameter_spec),
        ],
        outputs=[
            (jax.ShapeDtypeStruct(x.shape, x.dtype) if with_dx else None, row_spec),
            (sums if with_dscale else None, sum_spec),
            (sums if with_dbias else None, sum_spec),
        ],
        scratch=scratch,
        flops_per_element=20,
    )
    return (
        dx,
        None if dscale is None else jnp.sum(dscale, (0, 1)),
        None if dbias is None else jnp.sum(dbias, (0, 1)),
    )


def _in_own_blocks(run: Any, refs: Any, *, steps: int, count: int) -> None:
    """`run(block)` with the sums in `refs` cleared before the first block of a core."""
    step = pl.program_id(1)
    block = pl.program_id(0) * steps + step

    @pl.when(step == 0)
    def _() -> None:
        for ref in jax.tree.leaves(refs):
            ref[...] = jnp.zeros_like(ref)

    if count % steps:  # the last core has fewer
        pl.when(block < count)(lambda: run(block))
    else:
        run(block)


def _exists(block: Any, blocks: Blocks, first: Any, n: int, rows: int) -> Any:
    """Which of the `n` rows of a block from `first` on are rows of the matrix."""
    return lax.broadcasted_iota(jnp.int32, (n, 1), 0) < (
        rows - block * blocks.rows - first
    )


def _backward_kernel(
    x_ref: Any,
    dy_ref: Any,
    dresidual_out_ref: Any,
    statistics_ref: RowStatistics,
    gamma_ref: Any,
    dx_ref: Any,
    dscale_ref: Any,
    dbias_ref: Any,
    *,
    spec: NormSpec,
    blocks: Blocks,
    rows: int,
    steps: int,
    count: int,
) -> None:
    """For rows that fit into registers: computes straight through."""
    features = x_ref.shape[1]
    inv_n = 1 / features
    gamma = None if gamma_ref is None else gamma_ref[...]
    gamma_inv_n = inv_n if gamma is None else gamma * inv_n
    given = jax.tree.leaves(statistics_ref)
    narrow = _blocks.is_narrow(features)
    means_of_g = None
    if narrow and dy_ref.dtype == jnp.bfloat16:
        gamma_inv_n_rows = jnp.broadcast_to(gamma_inv_n, (features, features))
        high = gamma_inv_n_rows.astype(jnp.bfloat16)
        low = (gamma_inv_n_rows - high.astype(jnp.float32)).astype(jnp.bfloat16)
        means_of_g = jnp.concatenate([high, low], 1)

    def run(block: Any) -> None:
        offset = blocks.offset(block)

        def step(first: Any, here: Any) -> None:
            dy = dy_ref[here, :].astype(jnp.float32)
            if narrow:
                x, *_ = _forward.centered(x_ref[here, :], spec)
            else:
                x = x_ref[here, :].astype(jnp.float32)
            of_step = _blocks.Diagonals(offset + first, blocks.step)
            statistics = [of_step.read(ref, features) for ref in given]
            if rows % blocks.rows:
                # Rows past the end may hold anything, NaN too: select, do not multiply.
                exists = _exists(block, blocks, first, blocks.step, rows)
                x, dy, *statistics = (
                    jnp.where(exists, a, 0.0) for a in (x, dy, *statistics)
                )
            *means, rstd = statistics
            for mean in means:  # the high word, the low word
                x = x - mean
            x_hat = x * rstd
            dy_x_hat = dy * x_hat
            along_scale = dy_x_hat
            if spec.round_before_scale:
                along_scale = dy * _blocks.rounded(x_hat, x_ref.dtype)
            for ref, terms in ((dscale_ref, along_scale), (dbias_ref, dy)):
                if ref is not None:
                    groups = terms.reshape(-1, SUBLANES, features)
                    ref[0] += jnp.sum(groups, 0)
            if dx_ref is None:
                return
            g = dy if gamma is None else dy * gamma
            # `inv_n` is a factor of gamma here, which saves a multiplication.
            dx = g - x_hat * jnp.sum(dy_x_hat * gamma_inv_n, 1, keepdims=True)
            if spec.center and means_of_g is not None:
                dx = dx - _blocks.product(
                    jnp.concatenate([dy_ref[here, :]] * 2, 1),
                    means_of_g,
                    transposed=True,
                )
            elif spec.center:
                dx = dx - jnp.sum(g, 1, keepdims=True) * inv_n
            dx = dx * rstd
            if dresidual_out_ref is not None:
                dx = dx + dresidual_out_ref[here, :].astype(jnp.float32)
            dx_ref[here, :] = dx.astype(dx_ref.dtype)

        _blocks.in_steps(blocks, step)

    _in_own_blocks(run, (dscale_ref, dbias_ref), steps=steps, count=count)


def _wide_kernel(
    x_ref: Any,
    dy_ref: Any,
    dresidual_out_ref: Any,
    statistics_ref: RowStatistics,
    gamma_ref: Any,
    dx_ref: Any,
    dscale_ref: Any,
    dbias_ref: Any,
    sums_ref: RowSums,
    g_ref: Any,
    x_hat_ref: Any,
    *,
    spec: NormSpec,
    blocks: Blocks,
    rows: int,
    steps: int,
    count: int,
) -> None:
    """For wider rows: two passes over tiles of columns, which keep `g` and `x_hat`."""
    inv_n = 1 / x_ref.shape[1]
    tiles = _blocks.tiles(blocks, x_ref.shape[1], TILE_REGISTERS)
    *means, rstd_ref = jax.tree.leaves(sums_ref.given)

    def run(block: Any) -> None:
        offset = blocks.offset(block)
        for first in range(0, blocks.rows, LANES):
            here = _blocks.Diagonals(offset + first, min(blocks.rows, LANES))
            for ref, kept_ref in zip(
                jax.tree.leaves(statistics_ref),
                jax.tree.leaves(sums_ref.given),
                strict=True,
            ):
                kept_ref[pl.ds(first, here.rows), :] = here.read(ref, LANES)
        for ref in (sums_ref.g, sums_ref.g_x_hat):
            ref[...] = jnp.zeros_like(ref)

        def first_pass(row: Any, column: Any) -> None:
            dscale = dbias = jnp.zeros((SUBLANES, tiles.columns), jnp.float32)
            gamma = None
            if gamma_ref is not None:
                gamma = tiles.parameter(gamma_ref, column)
            for q in range(0, tiles.rows, SUBLANES):
                here = pl.ds(row + q, SUBLANES)
                x_hat = tiles.load(x_ref, row + q, column)
                dy = tiles.load(dy_ref, row + q, column)
                for ref in means:
                    x_hat = x_hat - tiles.spread(ref[here, :])
                x_hat = x_hat * tiles.spread(rstd_ref[here, :])
                if rows % blocks.rows:
                    # Rows past the end may hold anything, even NaN.
                    exists = _exists(block, blocks, row + q, SUBLANES, rows)
                    x_hat, dy = (jnp.where(exists, a, 0.0) for a in (x_hat, dy))
                g, g_x_hat = dy, dy * x_hat
                if spec.round_before_scale:
                    dscale = dscale + dy * _blocks.rounded(x_hat, x_ref.dtype)
                else:
                    dscale = dscale + g_x_hat
                dbias = dbias + dy
                if dx_ref is None:
                    continue
                if gamma is not None:
                    g, g_x_hat = g * gamma, g_x_hat * gamma
                tiles.store(x_hat_ref, row + q, column, x_hat)
                tiles.store(g_ref, row + q, column, g)
                if spec.center:
                    sums_ref.g[here, :] += tiles.gather(g)
                sums_ref.g_x_hat[here, :] += tiles.gather(g_x_hat)
            for ref, sums in ((dscale_ref, dscale), (dbias_ref, dbias)):
                if ref is not None:
                    ref[0, :, pl.ds(column, tiles.columns)] += sums

        tiles.each(first_pass)
        if dx_ref is None:
            return
        for ref in (sums_ref.g, sums_ref.g_x_hat):
            for first in range(0, blocks.rows, MIN_ROWS):
                here = pl.ds(first, MIN_ROWS)
                mean = jnp.sum(ref[here, :], 1, keepdims=True) * inv_n
                ref[here, :] = jnp.broadcast_to(mean, (MIN_ROWS, LANES))

        def second_pass(row: Any, column: Any) -> None:
            for q in range(0, tiles.rows, SUBLANES):
                here = pl.ds(row + q, SUBLANES)
                dx = tiles.load(g_ref, row + q, column)
                x_hat = tiles.load(x_hat_ref, row + q, column)
                if spec.center:
                    dx = dx - tiles.spread(sums_ref.g[here, :])
                dx = dx - x_hat * tiles.spread(sums_ref.g_x_hat[here, :])
                dx = dx * tiles.spread(rstd_ref[here, :])
                if dresidual_out_ref is not None:
                    dx = dx + tiles.load(dresidual_out_ref, row + q, column)
                tiles.store(dx_ref, row + q, column, dx)

        tiles.each(second_pass)

    _in_own_blocks(run, (dscale_ref, dbias_ref), steps=steps, count=count)
