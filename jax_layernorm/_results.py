"""What the functions return."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array


class Statistics(NamedTuple):
    """`mean` and `rstd` of each row, normalized axes kept with length 1.

    They are float32, or float64 if the normalized array is. `mean` is 0 for RMS norm.
    """

    mean: Array
    rstd: Array


class Normalized(NamedTuple):
    """What a norm returns; a part that was not asked for is None."""

    y: Array
    residual_out: Array | None
    statistics: Statistics | None
