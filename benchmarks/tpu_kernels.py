"""The TPU kernels or the XLA form, each pass alone; compiled without a TPU.

For each generation, shape, dtype and pass: bytes moved over the floor, temporary memory,
and scheduled cycles over the roofline, the time of the floor's bytes at the chip's
memory bandwidth. Cycles of a kernel are those of the compiler's schedule for it, those
of the XLA form the compiler's own estimates for its fusions: different models, the
second of which counts the wait for memory and the first does not. A schedule counts the
first and the last steps of a kernel, which only move blocks, as if they computed too.
`--marginal` leaves them out: cycles of twice as many rows, less those of these.

Floors, in arrays of the size of x: forward 2, backward 3, with the fused residual add 4
each way. Statistics are an output of the forward pass, as under differentiation.

    python -m benchmarks.tpu_kernels --generations v5e v6e --json tpu.json --plot tpu.png
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from benchmarks import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_layernorm as jln  # noqa: E402
from benchmarks import hlo_bytes, programs, report, shapes, tpu_cycles  # noqa: E402

LARGE = ("8192x4096", "16384x1024", "32768x128", "4096x16384", "8192x5120")
SMALL = ("4097x5120", "3000x128", "40x8192", "8190x1000")
FLOORS = {"forward": 2, "backward": 3, "add forward": 4, "add backward": 4}
IMPLEMENTATIONS = ("pallas_tpu", "xla")


def program(
    name: str, implementation: str, shape: shapes.Shape, dtype: Any
) -> programs.Program:
    """One pass by one implementation."""
    x = programs.abstract(shape, dtype)
    params = programs.params_of(shape.features)
    add = name.startswith("add")
    norm: Any = functools.partial(
        jln.add_layer_norm if add else jln.layer_norm, implementation=implementation
    )
    arguments = (params, x, x) if add else (params, x)
    if name.endswith("forward"):
        return programs.Program(
            functools.partial(norm, return_statistics=True), arguments
        )
    out, pullback = jax.eval_shape(functools.partial(jax.vjp, norm), *arguments)

    def backward(pullback: Any, cotangents: Any) -> Any:
        # Both summands have the same cotangent: one array, and not two to write.
        return pullback(cotangents)[:2]

    return programs.Program(backward, (pullback, out))


def compile_and_count(
    made: programs.Program, device: Any, implementation: str
) -> tuple[Any, int]:
    """The compiled program, and its cycles."""
    build = functools.partial(compilers.compile_for, "tpu", device, *made)
    own = 0
    if implementation == "pallas_tpu":
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
    implementation: str,
    shape: shapes.Shape,
    dtype: Any,
    marginal: bool = False,
) -> dict[str, Any]:
    made = program(name, implementation, shape, dtype)
    compiled, total = compile_and_count(made, device, implementation)
    if marginal:
        twice = program(
            name, implementation, shape._replace(rows=2 * shape.rows), dtype
        )
        total = compile_and_count(twice, device, implementation)[1] - total
    floor = FLOORS[name] * shape.rows * shape.features * jnp.dtype(dtype).itemsize
    return {
        "generation": generation,
        "shape": str(shape),
        "dtype": jnp.dtype(dtype).name,
        "pass": name,
        "implementation": implementation,
        "bytes over floor": hlo_bytes.total(compiled.as_text()) / floor,
        "cycles over roofline": total / tpu_cycles.roofline(generation, floor),
        "temp MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def plot(path: str, results: list[dict[str, Any]]) -> None:
    """Cycles over the roofline of each pass, a panel for each dtype and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r["pass"], r["dtype"]) for r in results))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2.6 * len(panels)), sharex=True, squeeze=False
    )
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        for generation in dict.fromkeys(r["generation"] for r in results):
            own = [r for r in results if (r["pass"], r["dtype"]) == panel
                   and r["generation"] == generation]  # fmt: skip
            ax.plot([r["shape"] for r in own], [r["cycles over roofline"] for r in own],
                    "o", label=generation)  # fmt: skip
        ax.axhline(1, color="grey", linewidth=1)
        ax.set_title(" ".join(panel), loc="left", fontsize=9)
        ax.set_ylim(0, 1.1 * ax.dataLim.y1)
    axes[0, 0].legend(ncols=5, fontsize=8)
    figure.supylabel("scheduled cycles over the memory roofline")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--generations", nargs="+", default=["v5e"],
                        choices=compilers.GENERATIONS["tpu"])  # fmt: skip
    shapes.add_argument(parser, (*LARGE, *SMALL))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--passes", nargs="+", default=list(FLOORS), choices=FLOORS)
    parser.add_argument("--implementation", default="pallas_tpu",
                        choices=IMPLEMENTATIONS)  # fmt: skip
    parser.add_argument("--marginal", action="store_true",
                        help="cycles of as many rows more")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="also plot the cycles")
    options = parser.parse_args(arguments)
    reason = compilers.unavailable("tpu")
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/compilers.py\n")
    if options.implementation == "pallas_tpu":
        tpu_cycles.keep_schedules()
    names = " ".join(options.generations)
    where = report.environment(f"TPU {names}, compiled without a device")
    report.print_environment(where)
    results = []
    for generation in options.generations:
        device = compilers.device("tpu", generation)
        cases = itertools.product(options.shapes, options.dtypes, options.passes)
        for shape, dtype, name in cases:
            results.append(
                measure(
                    generation, device, name, options.implementation, shape, dtype,
                    marginal=options.marginal,
                )
            )  # fmt: skip
            print(*results[-1].values(), flush=True)
    print()
    report.print_table(tuple(results[0]), [tuple(r.values()) for r in results])
    report.write_json(options.json, where, results)
    if options.plot:
        plot(options.plot, results)


if __name__ == "__main__":
    main()
