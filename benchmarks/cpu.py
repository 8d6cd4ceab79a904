"""Times of layer norms on a CPU: ours, those of other packages, and copying.

Programs, defined in `benchmarks.support.programs`: inference, the forward pass alone;
joint, forward and backward in one; add, the norm of a residual sum; add joint. `--norms`
takes two more names that are not norms: "copy" copies the inputs and computes nothing,
"floor" reads the same inputs as the norm and writes the same outputs. Parameters are
float32.

The table gives medians over interleaved repetitions in ms, and in parentheses how many
times as long as ours; lower is better. A pause before each measurement lets torch's
threads fall asleep; otherwise they would spin and take cores from the next norm. The
JSON also has the errors of joint in units in the last place
(`benchmarks.support.errors`).

    python -m benchmarks.cpu --shapes gpt2 --threads 1 2
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.support import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks.support import (  # noqa: E402
    errors,
    peers,
    programs,
    report,
    shapes,
    timing,
    torch_peer,
)
from benchmarks.support.baselines import BASELINES  # noqa: E402

NORMS = (
    "ours", "xla", "plain", "flax", "tokamax", "equinox", "torch", *BASELINES,
)  # fmt: skip
PROGRAMS = ("inference", "joint", "add", "add joint")
CPU_SHAPES = (
    "gpt2", "gpt3-6.7b", "bert-large", "pairs", "decode", "one-token", "wide", "uneven",
)  # fmt: skip
PAUSE = 0.004  # seconds; torch's threads spin for about a millisecond


def runners(
    names: list[str], program: str, shape: shapes.Shape, given: tuple[Any, ...]
) -> dict[str, Callable[[], Any]]:
    """One program of each norm and baseline, over these `params, x, dy`."""
    found: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name == "torch":
            found[name] = torch_peer.programs(*given)[program]
            continue
        if name in BASELINES:
            function = BASELINES[name][program]
        else:
            made = programs.make(program, peers.NORMS[name], shape, given[1].dtype)
            function = made.function
        arrays = given[:2] if program == "inference" else given
        found[name] = functools.partial(
            lambda f, arrays: jax.block_until_ready(f(*arrays)),
            jax.jit(function), arrays,
        )  # fmt: skip
    return found


def measure(
    names: list[str], shape: shapes.Shape, dtype: str, wanted: list[str], rounds: int
) -> list[dict[str, Any]]:
    given = errors.inputs(shape, 1.0, jnp.dtype(dtype), 0)
    right = errors.oracle(*given)
    elements = shape.rows * shape.features
    inner = 20 if elements < 2e5 else 5 if elements < 2e6 else 1
    results = []
    for program in wanted:
        run = runners(names, program, shape, given)
        seconds = timing.interleaved(
            run, repetitions=rounds, inner=inner, before=lambda: time.sleep(PAUSE)
        )
        ours = seconds.get("ours")
        for name, value in seconds.items():
            results.append(
                {"shape": str(shape), "dtype": dtype, "program": program, "norm": name}
                | {"ms": value * 1e3, "over ours": value / ours if ours else None}
                | errors_of(name, program, run[name], given, right)
            )
    return results


def errors_of(
    name: str, program: str, run: Callable[[], Any], given: Any, right: Any
) -> dict[str, Any]:
    """The largest errors of y, dx, dscale and dbias, in units in the last place."""
    if program != "joint" or name in BASELINES:
        return {}
    out = run()
    params, x, _ = given
    kinds = (x.dtype, x.dtype, params["scale"].dtype, params["bias"].dtype)
    arrays = torch_peer.as_arrays(out) if name == "torch" else out
    return errors.of_results(arrays, right, kinds)


def in_process(options: Any, threads: int) -> list[dict[str, Any]]:
    found = peers.available(options.norms, "cpu")
    names = [name for name in options.norms if name in (*found, *BASELINES)]
    if "torch" in names:
        import torch

        torch.set_num_threads(threads)
    results = []
    for dtype in options.dtypes:
        table = []
        for shape in options.shapes:
            cases = measure(names, shape, dtype, options.programs, options.repetitions)
            results += [case | {"threads": threads} for case in cases]
            for program in options.programs:
                row = {c["norm"]: c for c in cases if c["program"] == program}
                table.append([str(shape), program, *map(_cell, row.values())])
        print(f"{dtype}, {threads} threads: ms (over ours); lower is better")
        report.print_table(("shape", "program", *names), table)
    return results


def _cell(case: dict[str, Any]) -> str:
    ratio = case["over ours"]
    return f"{case['ms']:.3g}" + ("" if ratio is None else f" ({ratio:.2f})")


def print_summary(results: list[dict[str, Any]]) -> None:
    """Geometric means over the shapes, and the least, of each ratio to ours."""
    groups: dict[Any, list[float]] = {}
    for r in results:
        if r["over ours"] is None:
            continue
        key = (r["program"], r["dtype"], r["threads"], r["norm"])
        groups.setdefault(key, []).append(r["over ours"])
    table = [
        [*key, math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)]
        for key, ratios in groups.items()
        if key[-1] != "ours"
    ]
    print("Over ours: geometric mean over the shapes, and least; lower is better")
    report.print_table(("program", "dtype", "threads", "norm", "mean", "least"), table)


def plot(results: list[dict[str, Any]], where: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    joint = [r for r in results if r["program"] == "joint"]
    panels = sorted({(r["dtype"], r["threads"]) for r in joint}, reverse=True)
    names = [n for n in dict.fromkeys(r["norm"] for r in joint) if n != "ours"]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 2.6 * len(panels)), sharex=True, squeeze=False
    )
    for axis, (dtype, threads) in zip(axes[:, 0], panels, strict=True):
        own = [r for r in joint if (r["dtype"], r["threads"]) == (dtype, threads)]
        labels = list(dict.fromkeys(r["shape"] for r in own))
        for i, name in enumerate(names):
            ratio = {r["shape"]: r["over ours"] for r in own if r["norm"] == name}
            at = [k + 0.8 * (i / len(names) - 0.5) for k in range(len(labels))]
            heights = [ratio[label] for label in labels]
            axis.bar(at, heights, 0.8 / len(names), label=name, align="edge")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylim(0.25, 70)
        axis.set_yticks(
            [0.5, 1, 2, 5, 10, 20, 50], ["½", "1", "2", "5", "10", "20", "50"]
        )
        axis.set_ylabel("time, ours = 1")
        axis.set_title(f"{dtype}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        axis.set_xticks(range(len(labels)), labels)
    axes[0, 0].legend(ncol=len(names), fontsize=8, loc="upper right")
    of = where["versions"]
    versions = ", ".join(f"{n} {of[n]}" for n in ("jax", "flax", "torch") if n in of)
    figure.suptitle(
        "Forward and backward pass of layer norm on CPU, time relative to jax_layernorm;"
        f" lower is better\n{where['device']}; {versions}; {where['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    shapes.add_argument(parser, CPU_SHAPES)
    shapes.add_dtypes(parser, "float32", "bfloat16")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    peers.add_argument(parser, NORMS, (*peers.NORMS, *BASELINES))
    parser.add_argument("--repetitions", type=report.positive, default=11)
    parser.add_argument(
        "--threads", nargs="+", type=report.positive, default=[os.cpu_count()],
        help="cores to use; each number runs in a separate process",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="also draw joint's ratios here")
    options = parser.parse_args(arguments)
    if options.plot and not ("ours" in options.norms and "joint" in options.programs):
        parser.error("--plot draws joint over ours, so it needs both")

    where = report.environment()
    if len(options.threads) == 1:
        report.print_environment(where)
        allowed = len(os.sched_getaffinity(0))
        if options.threads != [allowed]:
            parser.error(
                f"--threads {options.threads[0]}, but {allowed} cores are allowed"
            )
        results = in_process(options, allowed)
    else:
        results = in_children(options.threads, arguments or sys.argv[1:])
    print_summary(results)
    ours = peers.implementation("cpu") if "ours" in options.norms else None
    report.write_json(options.json, where, results, ours=ours)
    if options.plot:
        plot(results, where, options.plot)


def in_children(threads: list[int], arguments: list[str]) -> list[dict[str, Any]]:
    """In one process each, because XLA and torch start a thread for each core."""
    results, all_cores = [], sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for number in threads:
            path = os.path.join(folder, f"{number}.json")
            os.sched_setaffinity(0, all_cores[:number])  # the child inherits them
            command = [sys.executable, "-m", "benchmarks.cpu", *arguments]
            command += ["--threads", str(number), "--json", path, "--plot", ""]
            done = subprocess.run(command, check=False)
            if done.returncode != 0:
                sys.exit(done.returncode)  # it has said why
            with open(path) as file:
                results += json.load(file)["results"]
    os.sched_setaffinity(0, all_cores)
    return results


if __name__ == "__main__":
    main()
