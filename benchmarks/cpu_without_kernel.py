"""Times of the XLA implementation on a CPU beside Flax's norm, where no kernel runs.

No kernel runs without a C++ compiler ("last axis", "residual"), over other axes, with a
mask, and if XLA partitions the program ("sharded", over 2 devices along the batch).
Inference is the forward pass alone; joint is forward and backward in one program.
Parameters are float32. The table gives medians over interleaved repetitions; lower is
better.

    python -m benchmarks.cpu_without_kernel
    taskset -c 0 python -m benchmarks.cpu_without_kernel    # on one core
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln
from benchmarks.support import report, shapes, timing


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int = -1
    masked: bool = False
    residual: bool = False
    sharded: bool = False


CASES = {
    "last axis, 1000x1000": Case((1000, 1000)),
    "last axis, 4096x768": Case((4096, 768)),
    "last axis, 32768x128": Case((32768, 128)),
    "residual, 1000x1000": Case((1000, 1000), residual=True),
    "residual, 4096x768": Case((4096, 768), residual=True),
    "axis 1 of 4x96x56x56": Case((4, 96, 56, 56), axis=1),
    "mask, 4096x768": Case((4096, 768), masked=True),
    "sharded, 4096x768": Case((4096, 768), sharded=True),
}
PROGRAMS = ("inference", "joint")
NORMS = ("xla", "flax", "flax two-pass")
Norm = Callable[..., Any]


def norms(case: Case, dtype: Any) -> dict[str, Norm]:
    """Each takes `(params, x, residual, mask)`, of which the last two may be None."""

    def ours(params: Any, x: Any, residual: Any, mask: Any) -> Any:
        options = {"axis": case.axis, "mask": mask, "implementation": "xla"}
        if residual is None:
            return jln.layer_norm(params, x, **options)
        return jln.add_layer_norm(params, x, residual, **options)

    def flax(params: Any, x: Any, residual: Any, mask: Any, **options: Any) -> Any:
        norm = linen.LayerNorm(
            reduction_axes=case.axis, feature_axes=case.axis, dtype=dtype, **options
        )
        total = x if residual is None else residual + x
        y = norm.apply({"params": params}, total, mask=mask)
        return y if residual is None else (y, total)

    two_pass = functools.partial(flax, use_fast_variance=False)
    return dict(zip(NORMS, (ours, flax, two_pass), strict=True))


def with_gradients(norm: Norm, params: Any, x: Any, residual: Any, mask: Any) -> Any:
    masked = functools.partial(norm, mask=mask)
    y, pullback = jax.vjp(masked, params, x, residual)
    return y, pullback(y)


def measure(
    case: Case, dtype: str, program: str, wanted: list[str], repetitions: int
) -> dict[str, float]:
    """Median milliseconds of each norm."""
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, *case.shape)))
    mask = jnp.asarray(rng.random(case.shape) < 0.8) if case.masked else None
    if case.sharded:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
    params = jln.init_params(case.shape[case.axis])
    arguments = (params, x, residual if case.residual else None, mask)
    programs = {
        name: jax.jit(
            norm if program == "inference" else functools.partial(with_gradients, norm)
        )
        for name, norm in norms(case, jnp.dtype(dtype)).items()
        if name in wanted
    }
    calls = {
        name: lambda f=f: jax.block_until_ready(f(*arguments))
        for name, f in programs.items()
    }
    seconds = timing.interleaved(calls, repetitions=repetitions, inner=3)
    return {name: 1e3 * value for name, value in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    shapes.add_dtypes(parser, "float32", "bfloat16")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--repetitions", type=report.positive, default=15)
    options = parser.parse_args(arguments)
    if jax.config.jax_num_cpu_devices < 2:
        jax.config.update("jax_num_cpu_devices", 2)
    where = report.environment()
    report.print_environment(where)
    results = []
    for program, dtype in itertools.product(options.programs, options.dtypes):
        table = []
        for name in options.cases:
            ms = measure(
                CASES[name], dtype, program, options.norms, options.repetitions
            )
            results.append({"case": name, "dtype": dtype, "program": program, "ms": ms})
            first, *others = ms.values()
            table.append([name, f"{first:.3g}", *(f"{o / first:.2f}" for o in others)])
        print(
            f"{program}, {dtype}: ms of {options.norms[0]}, and the others' over that"
        )
        report.print_table(("case", *options.norms), table)
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
