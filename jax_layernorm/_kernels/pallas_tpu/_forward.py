"""The forward kernel for TPU: one read of `x`, one write of `y`."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_layernorm import _equations
from jax_layernorm._equations import NormSpec, Rounding, RowStatistics
from jax_layernorm._kernels.pallas_tpu import _blocks
from jax_layernorm._kernels.pallas_tpu._blocks import (
    LANES,
    MIN_ROWS,
    SUBLANES,
    Blocks,
    Diagonals,
)

STEP = 1 << 18
"""Elements that are computed on at once."""
TILE_REGISTERS = 256
"""Float32 registers that a tile of a wider row has. No value stays in its register."""


class RowSums(NamedTuple):
    """Scratch of the kernel for wide rows; statistics in every lane."""

    mean: Any
    correction: Any
    rstd: Any


def forward(
    x: Any,
    residual: Any,
    gamma: Any,
    bias: Any,
    *,
    spec: NormSpec,
    rounding: Rounding,
    residual_out_dtype: Any,
    with_statistics: bool,
) -> tuple[Any, Any, RowStatistics | None]:
    """`y`, `residual_out` and the statistics, (1, rows) each, for matrices."""
    rows, features = x.shape
    whole = [(x.dtype, x), (spec.dtype, x)]
    if residual is not None:
        whole += [(residual.dtype, x), (residual_out_dtype, x)]
    itemsizes = [jnp.dtype(dtype).itemsize for dtype, _ in whole]
    cut = _blocks.blocks(rows, features, itemsizes, STEP, backward=False)
    count = pl.cdiv(rows, cut.rows)
    shared = min(cut.shared, count) if with_statistics else 1

    def block(i: Any, j: Any) -> tuple[Any, int]:
        k = i * shared + j
        return (k if count % shared == 0 else jnp.minimum(k, count - 1)), 0

    row_spec = pl.BlockSpec((cut.rows, features), block)
    parameter_spec = pl.BlockSpec((1, features), lambda i, j: (0, 0))
    statistic_spec = pl.BlockSpec((1, cut.span), lambda i, j: (0, i))
    matrix = functools.partial(jax.ShapeDtypeStruct, x.shape)
    statistic: Any = jax.ShapeDtypeStruct((1, rows), jnp.float32)
    low_word = residual_out_dtype == jnp.float32
    statistics = RowStatistics(
        statistic if spec.center else None,
        statistic if spec.center and low_word else None,
        statistic,
    )
    diagonal = pltpu.VMEM((cut.span // LANES * SUBLANES, LANES), jnp.float32)
    statistic_specs = jax.tree.map(lambda _: statistic_spec, statistics)
    wide = _blocks.is_wide(features)
    scratch: list[Any] = [None]
    if with_statistics:
        scratch = [jax.tree.map(lambda _: diagonal, statistics)]
    if wide:
        scratch.append(RowSums(*[pltpu.VMEM((cut.rows, LANES), jnp.float32)] * 3))
    kernel = _wide_kernel if wide else _forward_kernel
    y, residual_out, statistics = _blocks.call(
        functools.partial(
            kernel, spec=spec, rounding=rounding, blocks=cut, shared=shared
        ),
        "layer_norm_forward",
        grid=(pl.cdiv(count, shared), shared),
        inputs=[
            (x, row_spec),
            (residual, row_spec),
            (gamma, parameter_spec),
            (bias, parameter_spec),
        ],
        outputs=[
            (matrix(spec.dtype), row_spec),
            (None if residual is None else matrix(residual_out_dtype), row_spec),
            (statistics, statistic_specs) if with_statistics else (None, None),
        ],
        scratch=scratch,
        flops_per_element=8,
    )
    return y, residual_out, statistics


def _forward_kernel(
    x_ref: Any,
    residual_ref: Any,
    gamma_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    residual_out_ref: Any,
    statistics_ref: Any,
    diagonals_ref: Any,
    *,
    spec: NormSpec,
    rounding: Rounding,
    blocks: Blocks,
    shared: int,
) -> None:
    norm = math.sqrt(x_ref.shape[1])
    gamma = None if gamma_ref is None else gamma_ref[...]
    beta = None if bias_ref is None else bias_ref[...]
    rounds = _rounds(rounding)
    if gamma is not None and not rounds:
        gamma = gamma * norm
    narrow = _blocks.is_narrow(x_ref.shape[1])
    rough = narrow and y_ref.dtype == jnp.bfloat16 and not rounds
    rsqrt = _rsqrt_for_half if rough else lax.rsqrt
    offset = pl.program_id(1) * blocks.rows if shared > 1 else 0

    def step(first: Any, rows: Any) -> None:
        x = x_ref[rows, :]
        if residual_ref is not None:
            residual_out = residual_ref[rows, :].astype(jnp.float32) + x.astype(
                jnp.float32
            )
            x = residual_out.astype(residual_out_ref.dtype)
            residual_out_ref[rows, :] = x
        c, squares, means = centered(x, spec)
        r = rsqrt(squares)
        if rounds:
            y = _rounded_after_each(c * (r * norm), gamma, beta, rounding)
        else:
            y = c * (r * norm) if gamma is None else c * r * gamma
            y = y if beta is None else y + beta
        y_ref[rows, :] = y.astype(y_ref.dtype)
        if statistics_ref is not None:
            diagonals = Diagonals(offset + first, blocks.step)
            statistics = _statistics(means, squares, norm, diagonals)
            if spec.center and not means:
                statistics = statistics._replace(mean=_blocks.mean_as_diagonals(x))
            _store(statistics, diagonals, diagonals_ref)

    _blocks.in_steps(blocks, step)
    _write(diagonals_ref, statistics_ref, shared)


def _store(
    statistics: RowStatistics, diagonals: Diagonals, refs: RowStatistics
) -> None:
    for statistic, ref in zip(statistics, refs, strict=True):
        if ref is not None:
            diagonals.store(statistic, ref)


def _write(diagonals_ref: Any, statistics_ref: Any, shared: int) -> None:
    if statistics_ref is None:
        return

    def write() -> None:
        jax.tree.map(_blocks.write_statistics, diagonals_ref, statistics_ref)

    if shared > 1:
        pl.when(pl.program_id(1) == shared - 1)(write)
    else:
        write()


def _wide_kernel(
    x_ref: Any,
    residual_ref: Any,
    gamma_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    residual_out_ref: Any,
    statistics_ref: Any,
    diagonals_ref: Any,
    sums_ref: RowSums,
    *,
    spec: NormSpec,
    rounding: Rounding,
    blocks: Blocks,
    shared: int,
) -> None:
    """For rows that do not fit into registers: passes over tiles of columns."""
    tiles = _blocks.tiles(blocks, x_ref.shape[1], TILE_REGISTERS)
    features = x_ref.shape[1]
    norm = math.sqrt(features)
    stored_ref = x_ref if residual_ref is None else residual_out_ref
    for ref in sums_ref:
        ref[...] = jnp.zeros_like(ref)

    def in_every_lane(column: Any) -> Any:
        return jnp.broadcast_to(column, (column.shape[0], LANES))

    def load(row: Any, column: Any) -> Any:
        if residual_ref is None:
            return tiles.load(x_ref, row, column)
        residual_out = tiles.load(residual_ref, row, column) + tiles.load(
            x_ref, row, column
        )
        tiles.store(residual_out_ref, row, column, residual_out)
        return residual_out.astype(residual_out_ref.dtype).astype(jnp.float32)

    def load_again(row: Any, column: Any) -> Any:
        return tiles.load(stored_ref, row, column)

    exact_mean = spec.center and stored_ref.dtype == jnp.float32
    first_load = load_again if exact_mean else load

    def mean_pass(row: Any, column: Any) -> None:
        for q in range(0, tiles.rows, SUBLANES):
            here = pl.ds(row + q, SUBLANES)
            sums_ref.mean[here, :] += tiles.gather(load(row + q, column))

    def square_pass(row: Any, column: Any) -> None:
        for q in range(0, tiles.rows, SUBLANES):
            here = pl.ds(row + q, SUBLANES)
            c = first_load(row + q, column)
            if spec.center:
                c = c - tiles.spread(sums_ref.mean[here, :])
                sums_ref.correction[here, :] += tiles.gather(c)
            sums_ref.rstd[here, :] += tiles.gather(c * c)

    def write_pass(row: Any, column: Any) -> None:
        gamma = beta = None
        if gamma_ref is not None:
            gamma = tiles.parameter(gamma_ref, column)
        if bias_ref is not None:
            beta = tiles.parameter(bias_ref, column)
        for q in range(0, tiles.rows, SUBLANES):
            here = pl.ds(row + q, SUBLANES)
            y = load_again(row + q, column)
            if spec.center:
                y = y - tiles.spread(sums_ref.mean[here, :])
                if exact_mean:
                    y = y - tiles.spread(sums_ref.correction[here, :])
            y = y * tiles.spread(sums_ref.rstd[here, :])
            if _rounds(rounding):
                y = _rounded_after_each(y, gamma, beta, rounding)
            else:
                y = y if gamma is None else y * gamma
                y = y if beta is None else y + beta
            tiles.store(y_ref, row + q, column, y)

    if exact_mean:
        tiles.each(mean_pass)
    for first in range(0, blocks.rows if spec.center else 0, MIN_ROWS):
        here = pl.ds(first, MIN_ROWS)
        if exact_mean:
            mean = _mean_of_sum(_sum(sums_ref.mean[here, :]), features)
        else:  # any number near the mean will do, see `centered`
            some = x_ref[here, :LANES].astype(jnp.float32)
            if residual_ref is not None:
                some = some + residual_ref[here, :LANES].astype(jnp.float32)
            mean = _mean(some)
        sums_ref.mean[here, :] = in_every_lane(mean)
    tiles.each(square_pass)
    offset = pl.program_id(1) * blocks.rows if shared > 1 else 0
    for first in range(0, blocks.rows, LANES):
        n = min(blocks.rows, LANES)
        here = pl.ds(first, n)
        summed, means = None, ()
        if spec.center:
            summed = _sum(sums_ref.correction[here, :])
            rough = sums_ref.mean[here, :]
            correction = in_every_lane(_mean_of_sum(summed, features))
            means = rough, correction
            if exact_mean:
                sums_ref.correction[here, :] = correction
            else:
                sums_ref.mean[here, :] = rough + correction
        squares = _sum(sums_ref.rstd[here, :])
        squares = _around_the_mean(squares, summed, features, spec)
        sums_ref.rstd[here, :] = in_every_lane(lax.rsqrt(squares) * norm)
        if statistics_ref is not None:
            diagonals = Diagonals(offset + first, n)
            statistics = _statistics(means, squares, norm, diagonals)
            _store(statistics, diagonals, diagonals_ref)
    tiles.each(write_pass)
    _write(diagonals_ref, statistics_ref, shared)


def _rounds(rounding: Rounding) -> bool:
    return rounding.x_hat == jnp.bfloat16


def _rounded_after_each(x_hat: Any, gamma: Any, beta: Any, rounding: Rounding) -> Any:
    """`x_hat * gamma + beta` with the roundings of `round_before_scale`."""
    y = _blocks.rounded(x_hat, rounding.x_hat)
    if gamma is not None:
        y = _blocks.rounded(y * gamma, rounding.product)
    return y if beta is None else _blocks.rounded(y + beta, rounding.sum)


def centered(x: Any, spec: NormSpec) -> tuple[Any, Any, tuple[Any, ...]]:
    """`x - mean` in float32; `features / rstd**2`; the terms whose sum is the mean.

    The terms are empty if no row's mean was computed. `features` is left to a factor
    that is there anyway. That saves a multiplication, which matters if a row is a
    register or two.
    """
    features = x.shape[1]
    stored, x = x, x.astype(jnp.float32)
    if not spec.center:
        return x, _around_the_mean(_sum(x * x), None, features, spec), ()
    half = stored.dtype != jnp.float32
    if _blocks.is_narrow(features):
        if half and features == LANES:
            c = _blocks.centered_by_product(stored)
            return c, _around_the_mean(_sum(c * c), None, features, spec), ()
        rough = _blocks.mean_by_product(stored)
        if half:  # so few numbers of 8 bits have a sum that is as good as exact
            c = x - rough
            squares = _around_the_mean(_sum(c * c), None, features, spec)
            return c, squares, (rough,)
    else:
        # In half precision, any number near the mean will do as the first mean, because
        # the second is in float32. The mean of some columns takes fewer operations.
        rough = _mean(x[:, :LANES] if half else x)
    c = x - rough
    summed = _sum(c)
    correction = _mean_of_sum(summed, features)
    squares = _around_the_mean(_sum(c * c), summed, features, spec)
    return c - correction, squares, (rough, correction)


def _statistics(
    means: Any, squares: Any, norm: float, diagonals: Diagonals
) -> RowStatistics:
    """The statistics as diagonals; the mean in two words, if it is a sum of two."""
    words: list[Any] = [diagonals.gather(mean) for mean in means]
    if len(words) == 2:
        words = list(_equations._two_sum(*words))
    mean, mean_low = (words + [None, None])[:2]
    return RowStatistics(mean, mean_low, lax.rsqrt(diagonals.gather(squares)) * norm)


def _sum(x: Any) -> Any:
    return jnp.sum(x, 1, keepdims=True)


def _mean(x: Any) -> Any:
    return _mean_of_sum(_sum(x), x.shape[1])


def _mean_of_sum(summed: Any, features: int) -> Any:
    """The mean, `summed / features`.

    It is exact if all elements of a row are the same small multiple of a unit in the
    last place. The deviations of a constant row are, so that its `y` is the bias.
    """
    if features & (features - 1):
        return summed / features
    return summed * (1 / features)


def _around_the_mean(squares: Any, summed: Any, features: int, spec: NormSpec) -> Any:
    """`features / rstd**2`, from the sums of `c * c` and of `c` (None if that is 0).

    It is infinite if the squares overflow.
    """
    if summed is not None:
        largest = jnp.finfo(jnp.float32).max
        summed = summed * (1 / math.sqrt(features))
        less = squares - jnp.minimum(summed * summed, largest)
        squares = jnp.where(less < 0, 0.0, less)  # and NaN stays NaN
    return squares + spec.epsilon * features


def _rsqrt_for_half(squares: Any) -> Any:
    """`rsqrt`, to about 1e-5, for `y` in bfloat16.

    Some chips take one operation for a first guess at `rsqrt` and nine to refine it.
    Here, all chips take two operations and two multiplications.
    """
    return lax.exp2(lax.log(squares) * (-0.5 / math.log(2)))
