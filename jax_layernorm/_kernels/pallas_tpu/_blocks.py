"""What the TPU kernels share: blocks of rows, statistics of rows, tiles of columns.

A register holds 8 rows by 128 columns of float32, and there are 64 registers. The rules
below are the same for all chips. They rest on figures from the compiler's schedules
(`benchmarks/support/tpu_cycles.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_layernorm._kernels.pallas_tpu._limits import LANES, MIN_ROWS, rows_that_fit

SUBLANES = 8
CORES = 2
"""Parts of the backward pass that may run side by side: some chips have two cores."""
BLOCK_BYTES = (4 << 20) // 3
"""Of one operand: long enough for full bandwidth, short enough to overlap."""
UNROLL = 4
"""The most steps of a block that are unrolled, one after the other."""
NARROW = 256
"""Up to this many features, a sum along the lanes, for each few registers, costs too
much. Matrix products are then faster than such sums, and taking the deviations again is
faster than reading a mean."""
WIDEST_IN_REGISTERS = 2048
"""Up to this many features, a row is kept in registers; longer rows go in tiles."""


class Blocks(NamedTuple):
    """How a matrix is cut into blocks of rows.

    Attributes:
      rows: the rows of a block.
      step: rows that are computed on at once; divides `rows`.
      unroll: how many steps are unrolled, one after the other.
      shared: how many consecutive blocks have their statistics read or written at once.
        They have 128 rows or more, which fill a register row. 1 if a block has that
        many.
      full: the rows that a block has if the matrix has enough rows.
    """

    rows: int
    step: int
    unroll: int
    shared: int
    full: int

    @property
    def span(self) -> int:
        """Rows whose statistics are read or written at once."""
        return self.rows * self.shared

    def span_of(self, block: Any, count: int) -> Any:
        """The number of the span that one of `count` blocks lies in."""
        if count <= self.shared:
            return 0
        return block if self.shared == 1 else lax.div(block, jnp.int32(self.shared))

    def offset(self, block: Any) -> Any:
        """The first row of a block within its span."""
        if self.shared == 1:
            return 0
        return lax.rem(block, jnp.int32(self.shared)) * self.rows


def blocks(
    rows: int, features: int, itemsizes: Sequence[int], step: int, backward: bool
) -> Blocks:
    """Blocks of about `BLOCK_BYTES` per operand, which divide `rows` if possible.

    Args:
      itemsizes: the item sizes of the operands and results with whole rows.
      step: the most elements to compute on at once.
    """
    width = round_up(features, LANES)
    fit = min(
        BLOCK_BYTES // (width * max(itemsizes)),
        rows_that_fit(width, itemsizes, backward),
    )
    block = full = power_of_two(max(MIN_ROWS, fit))
    while block > LANES and pl.cdiv(rows, block) < 2 * CORES:
        block //= 2  # at least two blocks a core, so that transfers overlap with work
    least = LANES if is_narrow(features) else MIN_ROWS
    block = max(least, min(block, power_of_two(2 * rows - 1)))
    while block > LANES and rows % block and rows % LANES == 0:
        block //= 2
    at_once = power_of_two(min(block, max(MIN_ROWS, step // width)))
    written_out = min(UNROLL, block // at_once) if at_once * width <= 1 << 18 else 1
    return Blocks(block, at_once, written_out, max(1, LANES // block), full)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The largest power of two that is not above `n`."""
    return 1 << (n.bit_length() - 1)


def is_narrow(features: int) -> bool:
    return features <= NARROW and features % LANES == 0


def is_wide(features: int) -> bool:
    return features > WIDEST_IN_REGISTERS and features % LANES == 0


def mean_by_product(values: Any) -> Any:
    """The mean of each row, in every lane of the row: `values @ full(1 / features)`.

    The matrix unit multiplies bfloat16 and adds in float32. Values in float32 are split
    into two words, 16 bits in all; the rest is left out.
    """
    features = values.shape[1]
    if values.dtype == jnp.float32:
        bits = lax.bitcast_convert_type(values, jnp.int32) & ~0xFFFF
        high = lax.bitcast_convert_type(bits, jnp.float32)
        values = jnp.concatenate([high, values - high], 1)
    inv_n = jnp.full((values.shape[1], features), 1 / features, values.dtype)
    return product(values, inv_n)


def centered_by_product(values: Any) -> Any:
    """The deviations from the mean of each row, in float32: `values @ (1 - 1/features)`.

    For values in bfloat16, which represents 1 - 1/128 exactly.
    """
    features = values.shape[1]
    row = lax.broadcasted_iota(jnp.int32, (features, features), 0)
    column = lax.broadcasted_iota(jnp.int32, (features, features), 1)
    shares = jnp.where(row == column, 1 - 1 / features, -1 / features)
    return product(values, shares.astype(values.dtype))


def mean_as_diagonals(values: Any) -> Any:
    """The means of bfloat16 rows, a multiple of 128: `values @ full`, transposed."""
    rows, features = values.shape
    inv_n = jnp.full((SUBLANES, features), 1 / features, values.dtype)
    along = product(inv_n, values, transposed=True)
    return jnp.concatenate([along[:, k : k + LANES] for k in range(0, rows, LANES)], 0)


def product(a: Any, b: Any, transposed: bool = False) -> Any:
    """`a @ b`, or `a @ b.T`, in one pass of the matrix unit: bfloat16, added in float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def rounded(x: Any, dtype: Any) -> Any:
    """`x` rounded to bfloat16, in float32; any other `dtype` leaves it as it is.

    To nearest, ties to even, in integers, because a compiler may drop a cast there and
    back.
    """
    if dtype != jnp.bfloat16:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return jnp.where(x == x, lax.bitcast_convert_type(bits, jnp.float32), x)


def in_steps(blocks: Blocks, body: Callable[[Any, Any], None]) -> None:
    """`body(first_row, rows)` for each step of a block."""

    def run(i: Any, _: None) -> None:
        first = pl.multiple_of(i * blocks.step, blocks.step)
        body(first, pl.ds(first, blocks.step))

    if blocks.rows == blocks.step:
        body(0, pl.ds(0, blocks.step))
    else:
        lax.fori_loop(0, blocks.rows // blocks.step, run, None, unroll=blocks.unroll)


# In memory, statistics are arrays (1, rows), because an array (rows, 1) would be padded
# to 128 lanes. Sums along the lanes have the rows down the sublanes, with the same
# value in all lanes: a register for 8 rows. To be computed on many at once, and to be
# written, each row keeps one lane: of 128 rows, row r is in sublane r % 8 and lane r.
# The other numbers of such a diagonal mean nothing.


class Diagonals:
    """The places of `rows` rows that begin at row `first` of a span."""

    def __init__(self, first: Any, rows: int):
        self.rows = rows
        self._register = lax.shift_right_logical(
            jnp.int32(first), jnp.int32(LANES.bit_length() - 1)
        )
        within = 0 if rows >= LANES else jnp.int32(first) & (LANES - 1)
        lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        self._lane = lane - within
        self._row = self._lane - lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

    def gather(self, values: Any) -> Any:
        """Turns (rows, lanes), equal in all lanes, into a diagonal per 128 rows."""
        values = jnp.broadcast_to(values[:, :LANES], (self.rows, LANES))
        diagonals = []
        for chunk in range(0, self.rows, LANES):
            diagonal = values[chunk : chunk + SUBLANES]
            for row in range(SUBLANES, min(self.rows, LANES), SUBLANES):
                eight = values[chunk + row : chunk + row + SUBLANES]
                diagonal = jnp.where(self._row == row, eight, diagonal)
            diagonals.append(diagonal)
        return jnp.concatenate(diagonals, 0)

    def read(self, ref: Any, lanes: int) -> Any:
        """Reads these rows of (1, rows of a span), down the sublanes, in all lanes."""
        columns = []
        for k in range(0, self.rows, LANES):
            start = pl.multiple_of((self._register + k // LANES) * LANES, LANES)
            diagonal = jnp.broadcast_to(ref[:, pl.ds(start, LANES)], (SUBLANES, LANES))
            for row in range(0, min(self.rows, LANES), SUBLANES):
                mine = jnp.where(self._row == row, diagonal, 0.0)
                column = jnp.sum(mine, 1, keepdims=True)
                columns.append(jnp.broadcast_to(column, (SUBLANES, lanes)))
        return jnp.concatenate(columns, 0)

    def store(self, diagonals: Any, ref: Any) -> None:
        """Stores diagonals in the diagonals of a span."""
        start = pl.multiple_of(self._register * SUBLANES, SUBLANES)
        here = pl.ds(start, diagonals.shape[0])
        if self.rows < LANES:
            mine = (self._lane >= 0) & (self._lane < self.rows)
            diagonals = jnp.where(mine, diagonals, ref[here, :])
        ref[here, :] = diagonals


def write_statistics(diagonals_ref: Any, ref: Any) -> None:
    """Writes the diagonals of a span as (1, rows)."""
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    mine = (lane & (SUBLANES - 1)) == sublane
    for k in range(ref.shape[1] // LANES):
        diagonal = diagonals_ref[pl.ds(k * SUBLANES, SUBLANES), :]
        ref[:, pl.ds(k * LANES, LANES)] = jnp.sum(
            jnp.where(mine, diagonal, 0.0), 0, keepdims=True
        )


class Tiles(NamedTuple):
    """A block cut into tiles, for rows that do not fit into registers.

    Loops over tiles keep the compiler from holding a whole row from one pass to the
    next, because it would spill the row.
    """

    rows: int
    columns: int
    block_rows: int
    features: int

    def each(self, body: Callable[[Any, Any], None]) -> None:
        """`body(first_row, first_column)` for each tile, row by row."""
        down, across = self.block_rows // self.rows, self.features // self.columns

        def run(i: Any, _: None) -> None:
            # One loop, not two: the compiler's schedule shows the length of one loop.
            row: Any = 0 if down == 1 else lax.div(i, jnp.int32(across)) * self.rows
            column: Any = (
                0 if across == 1 else lax.rem(i, jnp.int32(across)) * self.columns
            )
            body(
                pl.multiple_of(row, self.rows) if down > 1 else 0,
                pl.multiple_of(column, self.columns) if across > 1 else 0,
            )

        lax.fori_loop(0, down * across, run, None)

    def load(self, ref: Any, row: Any, column: Any) -> Any:
        """Eight rows of a tile, in float32."""
        here = ref[pl.ds(row, SUBLANES), pl.ds(column, self.columns)]
        return here.astype(jnp.float32)

    def store(self, ref: Any, row: Any, column: Any, values: Any) -> None:
        at = (pl.ds(row, SUBLANES), pl.ds(column, self.columns))
        ref[at] = values.astype(ref.dtype)

    def parameter(self, ref: Any, column: Any) -> Any:
        """A parameter (1, features), for eight rows."""
        row = ref[:, pl.ds(column, self.columns)]
        return jnp.broadcast_to(row, (SUBLANES, self.columns))

    def spread(self, statistics: Any) -> Any:
        """(8, 128), the same in all lanes, over the columns of a tile."""
        return jnp.concatenate([statistics] * (self.columns // LANES), 1)

    def gather(self, values: Any) -> Any:
        """Sums over the columns of a tile, still one for each of 128 lanes."""
        parts = [values[:, k : k + LANES] for k in range(0, self.columns, LANES)]
        while len(parts) > 1:
            pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[2 * len(pairs) :]
        return parts[0]


def tiles(blocks: Blocks, features: int, registers: int) -> Tiles:
    """Tiles of about `registers` registers, an even number across if `features` allows.

    A register of bfloat16 holds 8 rows by 256 columns. The columns are those of a full
    block, because they determine the order of a row's sums, which must not depend on
    the number of rows.
    """
    across = features // LANES
    most = min(across, max(2, registers * SUBLANES // min(blocks.full, LANES)))
    fitting = [n for n in range(1, most + 1) if across % n == 0]
    even = [n for n in fitting if n % 2 == 0]
    columns = LANES * (even or fitting)[-1]
    return Tiles(min(blocks.rows, LANES), columns, blocks.rows, features)


def call(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, int],
    inputs: Sequence[tuple[Any, Any]],
    outputs: Sequence[tuple[Any, Any]],
    scratch: Sequence[Any],
    flops_per_element: int,
) -> Any:
    """Runs `kernel`; operands that are None reach it as None.

    The first grid dimension may be divided among the cores of a chip.
    """
    operands = [operand for operand, _ in inputs]
    shapes = [shape for shape, _ in outputs]
    moved = jax.tree.leaves([operands, shapes])
    # Inside shard_map, results vary over the mesh axes that the operands vary over.
    varying = jax.typeof(operands[0]).manual_axis_type
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varying),
        shapes,
    )
    elements = math.prod(operands[0].shape)
    run = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[spec if a is not None else None for a, spec in inputs],
        out_specs=[spec if a is not None else None for a, spec in outputs],
        out_shape=shapes,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops_per_element * elements,
            transcendentals=operands[0].shape[0],
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in moved),
        ),
    )
    with jax.enable_x64(False):  # x64 integers have 64 bits, which TPUs lack
        return run(*operands)
