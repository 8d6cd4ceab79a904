"""Times on CPU: ours, Flax's linen.LayerNorm, and two other forms of ours.

    ours      as the package lowers it
    plain     without XLA barriers
    autodiff  custom_vjp=False
    flax      linen.LayerNorm

joint is forward and backward in one jit; forward and backward are the two as separate
programs; block is out = h + relu(norm(h) @ W1) @ W2 and all its gradients. Medians over
interleaved repetitions, in ms, each with its ratio to Flax's. Parameters are float32.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import programs, report, shapes, timing  # noqa: E402
from benchmarks.compile_only import NORMS, norm_called, without_barriers  # noqa: E402

DEFAULT_SHAPES = ("gpt2", "gpt3-6.7b", "bert-large", "pairs", "decode")
DEFAULT_PROGRAMS = ("joint", "forward", "backward", "block")
BLOCK_ROWS = 1024  # more would time the matrix products


def arrays(abstract: Any, seed: int = 0) -> Any:
    """Random arrays of small numbers, in the place of shapes and dtypes."""
    rng = np.random.default_rng(seed)

    def fill(a: Any) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype)

    return jax.tree.map(fill, abstract)


def compiled(program: str, norm: str, shape: shapes.Shape, dtype: Any) -> Any:
    """The program, compiled, and its abstract arguments."""
    with without_barriers() if norm == "plain" else contextlib.nullcontext():
        made = programs.PROGRAMS[program](norm_called(norm), shape, dtype)
        return jax.jit(made.function).lower(*made.arguments).compile(), made.arguments


def measure(
    program: str,
    norms: list[str],
    shape: shapes.Shape,
    dtype: str,
    *,
    repetitions: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    functions: dict[str, Callable[[], object]] = {}
    for norm in norms:
        run, abstract = compiled(program, norm, shape, dtype)
        given = arrays(abstract)
        functions[norm] = functools.partial(
            lambda run, given: jax.block_until_ready(run(*given)), run, given
        )
    seconds = timing.interleaved(functions, repetitions=repetitions, clock=clock)
    return [
        {
            "shape": str(shape),
            "dtype": dtype,
            "program": program,
            "norm": norm,
            "ms": value * 1e3,
            "over flax": value / seconds["flax"] if "flax" in seconds else None,
        }
        for norm, value in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=shapes.parse, metavar="ROWSxFEATURES",
        default=list(map(shapes.parse, DEFAULT_SHAPES)),
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--programs", nargs="+", default=DEFAULT_PROGRAMS, choices=DEFAULT_PROGRAMS
    )
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of all threads together, for a machine that others use too",
    )
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter

    where = report.environment()
    report.print_environment(where)
    results, table = [], []
    for dtype in options.dtypes:
        for shape in options.shapes:
            for program in options.programs:
                own = shape
                if program == "block":
                    own = shape._replace(rows=min(shape.rows, BLOCK_ROWS))
                cases = measure(
                    program,
                    options.norms,
                    own,
                    dtype,
                    repetitions=options.repetitions,
                    clock=clock,
                )
                results += cases
                cells = [
                    f"{c['ms']:.3g} ({c['over flax'] or float('nan'):.2f})"
                    for c in cases
                ]
                table.append([str(own), dtype, program, *cells])
    print(f"{'CPU time of all threads,' if options.cpu_time else ''} ms (over Flax's)")
    report.print_table(("shape", "dtype", "program", *options.norms), table)
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
