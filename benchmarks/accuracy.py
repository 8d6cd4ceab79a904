"""How accurate each layer norm is, in units in the last place, at growing offsets.

Each norm runs forward and backward in one jitted program, on random rows whose mean is
`offset` to `2 * offset` times their spread. The results y, dx, dscale and dbias are
compared with NumPy in float64 (`benchmarks.support.errors`), or in long double for
float64 rows. Parameters are float32, or float64 for float64 rows.

Each cell of the table is `maximum / 99th percentile`, the worst over the shapes and
seeds; lower is better. Two things are checked. Ours is never more than half a unit worse
than the best peer. In float32 at offsets of 1e2 and more, ours is strictly the best in y,
dx and dscale (dbias is only a sum of dy).

    python -m benchmarks.accuracy --dtypes float32 --offsets 0 1e4
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.support import peers, programs, report, shapes, torch_peer
from benchmarks.support.errors import RESULTS, Errors, inputs, oracle, ulp_errors

NORMS = ("ours", "flax", "flax two-pass", "tokamax", "torch")
OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 1e6)
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHAPES = ("256x768", "512x128", "64x4096")
SLACK = 0.5


def worst(all_errors: list[Errors]) -> Errors:
    return Errors(*map(max, zip(*all_errors, strict=True)))


@contextlib.contextmanager
def wide_enough(dtype: str) -> Iterator[None]:
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def runners(names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Forward and backward pass of each norm that can run here."""
    return {
        name: torch_peer.forward_backward
        if peer.norm is None
        else jax.jit(programs.forward_backward(peer.norm))
        for name, peer in peers.available(names).items()
    }


def measure(
    run: dict[str, Any],
    dtype: str,
    offset: float,
    which: list[shapes.Shape],
    seeds: int,
) -> dict[str, dict[str, Errors]]:
    """Errors by result, then by norm."""
    collected: dict[str, dict[str, list[Errors]]] = {r: {} for r in RESULTS}
    for shape in which:
        for seed in range(seeds):
            params, x, dy = inputs(shape, offset, jnp.dtype(dtype), seed)
            right = oracle(params, x, dy)
            kinds = (x.dtype, x.dtype, params["scale"].dtype, params["bias"].dtype)
            for name, function in run.items():
                actual = function(params, x, dy)
                for result, a, r, kind in zip(
                    RESULTS, actual, right, kinds, strict=True
                ):
                    errors = ulp_errors(a, r, kind)
                    collected[result].setdefault(name, []).append(errors)
    return {
        result: {name: worst(errors) for name, errors in by_name.items()}
        for result, by_name in collected.items()
    }


def verdict(dtype: str, offset: float, result: str, errors: dict[str, Errors]) -> str:
    """The check that does not hold, or ''."""
    others = {name: e.max for name, e in errors.items() if name not in peers.OURS}
    if "ours" not in errors or not others:
        return ""
    if not math.isfinite(errors["ours"].max):
        return "not finite"
    best = min(others, key=others.__getitem__)
    excess = errors["ours"].max - others[best]
    if excess > SLACK:
        return f"{excess:.2g} worse than {best}"
    strict = dtype == "float32" and offset >= 1e2 and result != "dbias"
    return f"not better than {best}" if strict and excess >= 0 else ""


def _cell(errors: Errors) -> str:
    return f"{errors.max:.3g} / {errors.p99:.3g}"


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if a check does not hold."""
    parser = report.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--offsets", nargs="+", type=float, default=OFFSETS)
    shapes.add_argument(parser, DEFAULT_SHAPES)
    peers.add_argument(parser, NORMS, peers.NORMS)
    parser.add_argument("--seeds", type=report.positive, default=2)
    options = parser.parse_args(arguments)

    where = report.environment()
    report.print_environment(where)
    run = runners(options.norms)
    results, failures = [], []
    for dtype in options.dtypes:
        table = []
        with wide_enough(dtype):
            one = functools.partial(measure, run, dtype)
            for offset in options.offsets:
                by_result = one(offset, options.shapes, options.seeds)
                for result, errors in by_result.items():
                    failed = verdict(dtype, offset, result, errors)
                    if failed:
                        failures.append(f"{dtype} {offset:g} {result}: {failed}")
                    cells = [_cell(errors[name]) for name in run]
                    table.append([f"{offset:g}", result, *cells, failed])
                    results.append(
                        {"dtype": dtype, "offset": offset, "result": result}
                        | {name: e._asdict() for name, e in errors.items()}
                        | {"failed": failed}
                    )
        print(f"{dtype}, ulps: max / 99th percentile; lower is better")
        report.print_table(("offset", "result", *run, ""), table)
    if set(run) <= {*peers.OURS} or "ours" not in run:
        print("Nothing was checked, which takes ours and another norm.")
    else:
        print("\n".join(failures) if failures else "Both checks hold.")
    report.write_json(
        options.json, where, results, shapes=list(map(str, options.shapes)),
        ours=peers.implementation() if "ours" in run else None,
    )  # fmt: skip
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
