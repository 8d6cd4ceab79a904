"""One pass of our norm for a TPU: the program, its bytes and its scheduled cycles."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from benchmarks.support import (
    compilers,
    hlo_bytes,
    peers,
    programs,
    shapes,
    tpu_cycles,
)

PASSES = ("forward", "backward", "add forward", "add backward")


def program(name: str, norm: str, shape: shapes.Shape, dtype: Any) -> programs.Program:
    """One of `PASSES` of one of `peers.OURS`; forward also returns the statistics."""
    peer = peers.OURS[norm]
    if name.endswith("backward"):
        return programs.make(name, peer, shape, dtype)
    kind = "add" if name.startswith("add") else "inference"
    function, arguments = programs.make(kind, peer, shape, dtype)
    return programs.Program(
        functools.partial(function, return_statistics=True), arguments
    )


def compile_and_count(
    made: programs.Program, device: Any, norm: str
) -> tuple[Any, int]:
    """The compiled program, and its cycles: of the kernels, and of XLA's fusions."""
    build = functools.partial(compilers.compile_for, "tpu", device, *made)
    own = 0
    if norm == "pallas_tpu":
        compiled, cycles = tpu_cycles.of_kernels(build)
        own = sum(n for op, n in cycles.items() if op.startswith("layer_norm"))
    else:
        compiled = build()
    fusions = tpu_cycles.xla_cycles(compiled.as_text())
    return compiled, own + sum(n for op, n in fusions.items() if "layer_norm" not in op)


def measure(
    generation: str,
    device: Any,
    name: str,
    norm: str,
    shape: shapes.Shape,
    dtype: Any,
    marginal: bool = False,
) -> dict[str, Any]:
    """Bytes, cycles and temporary memory of one pass.

    Args:
      marginal: whether to count the cycles of twice as many rows, less those of `shape`.
    """
    made = program(name, norm, shape, dtype)
    compiled, total = compile_and_count(made, device, norm)
    if marginal:
        twice = program(name, norm, shape._replace(rows=2 * shape.rows), dtype)
        total = compile_and_count(twice, device, norm)[1] - total
    floor = (
        programs.FLOOR_ARRAYS[name]
        * shape.rows
        * shape.features
        * jnp.dtype(dtype).itemsize
    )
    return {
        "generation": generation,
        "shape": str(shape),
        "dtype": jnp.dtype(dtype).name,
        "pass": name,
        "norm": norm,
        "bytes over floor": hlo_bytes.total(compiled.as_text()) / floor,
        "cycles over roofline": total / tpu_cycles.roofline(generation, floor),
        "temp MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
