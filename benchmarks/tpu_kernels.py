"""How close each pass of the TPU kernels comes to the memory limit, without a TPU.

For each generation, shape, dtype and pass the table gives three numbers, and lower is
better: the bytes moved, divided by the floor (`FLOOR_ARRAYS` in
`benchmarks.support.programs`); the cycles, divided by the roofline, which is the time
that the floor's bytes take at the chip's memory bandwidth; and the temporary memory. The
forward pass also returns the statistics, as it does under differentiation.

The cycles of a kernel are those of the compiler's schedule, which leaves out the wait
for memory. The cycles of `--norm xla` are the compiler's estimates for its fusions,
which include that wait, so the two cannot be compared. A schedule counts the first and
the last steps of a kernel, which only move blocks, as if they computed too. `--marginal`
leaves them out: it gives the cycles of twice as many rows minus those of the shape.

    python -m benchmarks.tpu_kernels --generations v5e v6e --json tpu.json --plot tpu.png
"""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.support import compilers

compilers.keep_to_the_host()

from benchmarks.support import report, shapes, tpu_cycles, tpu_passes  # noqa: E402

LARGE = ("8192x4096", "16384x1024", "32768x128", "4096x16384", "8192x5120")
SMALL = ("4097x5120", "3000x128", "40x8192", "8190x1000")


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
    shapes.add_dtypes(parser, "bfloat16", "float32")
    parser.add_argument("--passes", nargs="+", default=tpu_passes.PASSES,
                        choices=tpu_passes.PASSES)  # fmt: skip
    # One norm per run, because the compiler can abort when it writes the schedules of
    # XLA's programs.
    parser.add_argument("--norm", default="pallas_tpu", choices=("pallas_tpu", "xla"))
    parser.add_argument("--marginal", action="store_true",
                        help="cycles without the first and last steps")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="also plot the cycles")
    options = parser.parse_args(arguments)
    reason = compilers.unavailable("tpu")
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/support/compilers.py\n")
    if options.norm == "pallas_tpu":
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
                tpu_passes.measure(
                    generation, device, name, options.norm, shape, dtype,
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
