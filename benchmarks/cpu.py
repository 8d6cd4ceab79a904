"""Times on CPU of ours, of other norms, and of programs that only move the same bytes.

    ours        as the package lowers it
    ours xla    implementation="xla"
    custom_vjp  the textbook formulas with a hand-written backward pass, in jax.numpy
    flax        linen.LayerNorm
    tokamax     its XLA form, which is the one for CPUs
    equinox     nn.LayerNorm under vmap
    torch       nn.functional.layer_norm and autograd
    copy        a jitted program that reads the arrays of the norm and writes as many, with
                next to no arithmetic: what JAX's dispatch and the memory alone cost

forward is y alone; joint is forward and backward in one program; add is joint for
residual + x and its norm. Parameters are float32. Every case runs interleaved: in each
round one measurement of each, after a pause in which the others' threads go to sleep.
Medians in ms; then each over ours, so more than 1 is slower than ours. Errors are the
largest in y, dx, dscale and dbias, each in units of float32's (bfloat16's, for y and dx of
bfloat16) eps at the largest right value, against float64.

Torch and XLA take as many threads as there are cores; --threads 1 keeps all to one core.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import compilers


def _keep_to_cores() -> None:
    """Before JAX and torch start their threads."""
    if "--threads" in sys.argv:
        threads = int(sys.argv[sys.argv.index("--threads") + 1])
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)


_keep_to_cores()
compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_layernorm as jln  # noqa: E402
from benchmarks import accuracy, peers, report, shapes, timing  # noqa: E402

NORMS = ("ours", "ours xla", "custom_vjp", "flax", "tokamax", "equinox")
ALL = (*NORMS, "torch", "copy")
DEFAULT_SHAPES = (
    "gpt2", "gpt3-6.7b", "bert-large", "pairs", "decode", "one-token", "wide", "ragged",
)  # fmt: skip
PROGRAMS = ("forward", "joint", "add")
PAUSE = 0.004  # the threads of torch go on spinning for about so long


def added(name: str, norm: peers.Norm, params: Any, x: Any, residual: Any) -> Any:
    """The norm of a sum, and the sum."""
    if name.startswith("ours"):
        named = {"implementation": "xla"} if name == "ours xla" else {}
        return jln.add_layer_norm(params, x, residual, epsilon=peers.EPSILON, **named)
    total = residual + x
    return norm(params, total), total


def of_jax(program: str, name: str, norm: peers.Norm) -> Callable[..., Any]:
    """To be jitted: `(params, x, dy) -> ...`; `dy` is residual and cotangents alike."""
    if program == "forward":
        return lambda params, x, dy: norm(params, x)
    if program == "joint":
        return peers.forward_backward(norm)

    def run(params: Any, x: Any, dy: Any) -> Any:
        out, vjp = jax.vjp(functools.partial(added, name, norm), params, x, dy)
        dparams, dx, _ = vjp((dy, dy))
        return *out, dx, dparams

    return run


def copy(program: str) -> Callable[..., Any]:
    def run(params: Any, x: Any, dy: Any) -> Any:
        one = jnp.ones((), x.dtype)
        if program == "forward":
            return x + one, params
        if program == "joint":
            return x + one, x + dy, jax.tree.map(lambda p: p + 1, params)
        return x + one, x + dy, x - dy, jax.tree.map(lambda p: p + 1, params)

    return run


def of_torch(program: str, params: Any, x: Any, dy: Any) -> Callable[[], Any]:
    import torch

    def tensor(array: Any) -> torch.Tensor:
        wide = torch.from_numpy(np.array(array, np.float32))
        return wide.to(getattr(torch, array.dtype.name)).requires_grad_()

    a, scale, bias = tensor(x), tensor(params["scale"]), tensor(params["bias"])
    given, residual = tensor(dy).detach(), tensor(dy)

    def norm(x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[-1],)
        return torch.nn.functional.layer_norm(x, shape, scale, bias, peers.EPSILON)

    def forward() -> Any:
        with torch.no_grad():
            return norm(a)

    def joint() -> Any:
        y = norm(a)
        return y, torch.autograd.grad(y, (a, scale, bias), given)

    def add() -> Any:
        total = residual + a
        y = norm(total)
        inputs = (a, residual, scale, bias)
        return y, total, torch.autograd.grad((y, total), inputs, (given, given))

    return {"forward": forward, "joint": joint, "add": add}[program]


def errors(outputs: Any, params: Any, x: Any, dy: Any) -> list[float]:
    """Of a joint program: y, dx, dscale, dbias."""
    found = []
    for actual, right in zip(outputs, accuracy.oracle(params, x, dy), strict=True):
        eps = float(jnp.finfo(actual.dtype).eps)
        largest = np.max(np.abs(right))
        difference = np.max(np.abs(np.asarray(actual, np.float64) - right))
        found.append(float(difference / (eps * largest)))
    return found


def measure(
    program: str, shape: shapes.Shape, dtype: str, norms: Mapping[str, peers.Norm],
    *, torch: bool, seconds: float, clock: Callable[[], float],
) -> list[dict[str, Any]]:  # fmt: skip
    params, x, dy = accuracy.inputs(shape, 1.0, jnp.dtype(dtype), 0)
    functions: dict[str, Callable[[], Any]] = {}
    wrong: dict[str, list[float]] = {}
    made = {name: of_jax(program, name, norm) for name, norm in norms.items()}
    for name, function in {**made, "copy": copy(program)}.items():
        run = jax.jit(function)
        if program == "joint" and name != "copy":
            wrong[name] = errors(run(params, x, dy), params, x, dy)
        functions[name] = functools.partial(
            lambda run: jax.block_until_ready(run(params, x, dy)), run
        )
    if torch:
        functions["torch"] = of_torch(program, params, x, dy)

    start = time.perf_counter()
    for function in functions.values():
        function()
        function()
    once = (time.perf_counter() - start) / 2
    inner = 20 if once < 0.02 else 1
    repetitions = int(
        min(101, max(7, seconds / (once * inner + PAUSE * len(functions))))
    )
    medians = timing.interleaved(
        functions,
        repetitions=repetitions,
        inner=inner,
        before=lambda: time.sleep(PAUSE),
        clock=clock,
    )
    case = {"shape": str(shape), "dtype": dtype, "program": program}
    return [
        {
            **case,
            "norm": name,
            "ms": value * 1e3,
            "over ours": value / medians["ours"],
            "errors": wrong.get(name),
        }
        for name, value in medians.items()
    ]


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def summary(results: list[dict[str, Any]], names: list[str]) -> list[list[Any]]:
    """Over the shapes: the mean ratio to ours, and the least."""
    rows = []
    for program in PROGRAMS:
        for dtype in dict.fromkeys(r["dtype"] for r in results):
            cells = []
            for name in names:
                ratios = [
                    r["over ours"]
                    for r in results
                    if (r["program"], r["dtype"], r["norm"]) == (program, dtype, name)
                ]
                if ratios:
                    cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})")
            if cells:
                rows.append([program, dtype, *cells])
    return rows


def plot(path: str, where: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """How many times as long as ours each takes, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    names = [n for n in dict.fromkeys(r["norm"] for r in results) if n != "ours"]
    figure, axes = pyplot.subplots(
        len(dtypes), figsize=(11, 3.4 * len(dtypes)), squeeze=False
    )
    for ax, dtype in zip(axes[:, 0], dtypes, strict=True):
        joint = [r for r in results if r["program"] == "joint" and r["dtype"] == dtype]
        labels = list(dict.fromkeys(r["shape"] for r in joint))
        for i, name in enumerate(names):
            ratios = [r["over ours"] for r in joint if r["norm"] == name]
            at = np.arange(len(ratios)) + (i + 0.5) / (len(names) + 1) - 0.5
            ax.bar(at, np.array(ratios) - 1, 1 / (len(names) + 1), bottom=1, label=name)
        ax.set_yscale("log")
        ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
        ax.set_yticks(ticks, list(map(str, ticks)))
        ax.axhline(1, color="black", linewidth=1)
        ax.set_xticks(range(len(labels)), labels)
        ax.set_ylabel("time over ours")
        ax.set_title(f"forward and backward, {dtype}", loc="left")
    axes[0, 0].legend(ncols=len(names), fontsize="small")
    jax_version = where["versions"]["jax"]
    figure.suptitle(
        f"{where['device']}, {where['threads']} threads, jax {jax_version},"
        f" {where['date']}",
        fontsize="small",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=shapes.parse, metavar="ROWSxFEATURES",
        default=list(map(shapes.parse, DEFAULT_SHAPES)),
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--norms", nargs="+", default=ALL, choices=ALL)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each case, all norms together"
    )
    parser.add_argument("--threads", type=int, help="cores to keep to; all if left out")
    parser.add_argument("--plot", metavar="FILE", help="also draw the ratios")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of all threads together, for a machine that others use too",
    )
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter

    threads = len(os.sched_getaffinity(0))
    where = report.environment() | {"threads": threads}
    report.print_environment(where)
    chosen = tuple(n for n in NORMS if n in options.norms or n == "ours")
    norms = peers.available(chosen)
    with_torch = "torch" in options.norms
    if with_torch:
        reason = peers.import_error("torch")
        if reason is None:
            import torch

            torch.set_num_threads(threads)
        else:
            print(f"torch left out: {reason}")
            with_torch = False
    names = [*norms, "copy", *["torch"] * with_torch]

    results, table, wrong = [], [], []
    for dtype in options.dtypes:
        for shape in options.shapes:
            for program in options.programs:
                cases = measure(
                    program, shape, dtype, norms,
                    torch=with_torch, seconds=options.seconds, clock=clock,
                )  # fmt: skip
                results += cases
                cells = [f"{c['ms']:.3g} ({c['over ours']:.2f})" for c in cases]
                table.append([str(shape), dtype, program, *cells])
                for c in cases:
                    if c["errors"]:
                        wrong.append([str(shape), dtype, c["norm"], *c["errors"]])
    print(f"{threads} threads: ms (over ours)")
    report.print_table(("shape", "dtype", "program", *names), table)
    print("geometric mean over the shapes of the time over ours (and the least)")
    report.print_table(("program", "dtype", *names), summary(results, names))
    print("largest errors, in eps of the result at its largest value")
    report.print_table(("shape", "dtype", "norm", *accuracy.RESULTS), wrong)
    report.write_json(options.json, where, results)
    if options.plot:
        plot(options.plot, where, results)


if __name__ == "__main__":
    main()
