"""How much of a problem fits into a TPU's fast memory; needs no Pallas."""

from __future__ import annotations

from collections.abc import Sequence

LANES = 128
MIN_ROWS = 16
"""16, because two rows of bfloat16 share a sublane."""
VMEM_BYTES = 15 << 20
"""For all blocks, out of 16 MiB. Each block has two copies: the kernel computes on one
while the other moves."""
PARAMETER_BYTES = 80
"""For each feature: scale and bias, twice, and eight rows of each gradient."""
WIDEST = 32768


def widest(itemsizes: Sequence[int], backward: bool) -> int:
    """The most features with which a block of `MIN_ROWS` rows fits.

    `itemsizes` are those of the operands and results with whole rows.
    """
    a_column = MIN_ROWS * _element_bytes(itemsizes, backward) + PARAMETER_BYTES
    return min(WIDEST, VMEM_BYTES // a_column // LANES * LANES)


def rows_that_fit(features: int, itemsizes: Sequence[int], backward: bool) -> int:
    """The most rows that a block can have."""
    a_column = VMEM_BYTES // features - PARAMETER_BYTES
    return a_column // _element_bytes(itemsizes, backward)


def _element_bytes(itemsizes: Sequence[int], backward: bool) -> int:
    """Each operand twice; backward, wide rows need two more arrays, of float32."""
    return 2 * sum(itemsizes) + 8 * backward
