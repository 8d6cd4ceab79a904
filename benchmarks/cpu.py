"""Times on CPU: ours beside Flax, tokamax, equinox and torch, and beside copying.

    ours      jax_layernorm, as it chooses; xla: its XLA form, by name
    plain     a custom_vjp as people write it
    flax, tokamax, equinox, torch: where installed
    copy      XLA copies x (and dy, or the residual): as many bytes, nothing computed
    floor     XLA reads all the inputs, and writes all the outputs, of the program

Programs: forward; joint, forward and backward in one; add, the norm of a residual sum; add
joint. Parameters are float32. Medians over interleaved repetitions, in ms, each with its
ratio to ours, on so many cores. A pause before each measurement lets torch's threads fall
asleep, which otherwise spin and take the core from who comes next. Errors of y, dx, dscale
and dbias against float64 are in units of the last place (`benchmarks.accuracy`).
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

from benchmarks import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_layernorm as jln  # noqa: E402
from benchmarks import accuracy, peers, report, shapes, timing  # noqa: E402

NORMS = ("ours", "xla", "plain", "flax", "tokamax", "equinox", "torch", "copy", "floor")
PROGRAMS = ("forward", "joint", "add", "add joint")
CPU_SHAPES = (
    "gpt2", "gpt3-6.7b", "bert-large", "pairs", "decode", "one-token", "wide", "uneven",
)  # fmt: skip
PAUSE = 0.004  # seconds; torch's threads spin for about a millisecond


def jax_programs(norm: peers.Norm) -> dict[str, Callable[..., Any]]:
    def add(params: Any, x: Any, residual: Any) -> Any:
        total = residual + x
        return norm(params, total), total

    return programs_of(norm, add)


def programs_of(norm: Any, add: Any) -> dict[str, Callable[..., Any]]:
    def joint(params: Any, x: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(norm, params, x)
        return y, vjp(dy)

    def add_joint(params: Any, x: Any, residual: Any) -> Any:
        # Both summands have the same cotangent, which torch returns twice as one array;
        # XLA would copy it for a second result.
        out, vjp = jax.vjp(add, params, x, residual)
        return out, vjp((residual, x))[:2]

    forward = lambda params, x, dy: norm(params, x)  # noqa: E731
    return dict(zip(PROGRAMS, (forward, joint, add, add_joint), strict=True))


def ours(implementation: str | None) -> dict[str, Callable[..., Any]]:
    options = {"epsilon": peers.EPSILON, "implementation": implementation}
    return programs_of(
        functools.partial(jln.layer_norm, **options),
        functools.partial(jln.add_layer_norm, **options),
    )


def copies() -> dict[str, Callable[..., Any]]:
    copy = jnp.copy

    def joint(params: Any, x: Any, dy: Any) -> Any:
        return copy(x), copy(dy)

    forward = lambda params, x, dy: copy(x)  # noqa: E731
    return dict(zip(PROGRAMS, (forward, joint, joint, joint), strict=True))


def floors() -> dict[str, Callable[..., Any]]:
    def forward(params: Any, x: Any, dy: Any) -> Any:
        return x + (params["scale"] + params["bias"]).astype(x.dtype)

    def joint(params: Any, x: Any, dy: Any) -> Any:
        return forward(params, x, dy) + dy, x - dy, jax.tree.map(jnp.negative, params)

    def add(params: Any, x: Any, residual: Any) -> Any:
        return joint(params, x, residual)[:2]

    def add_joint(params: Any, x: Any, residual: Any) -> Any:
        return *joint(params, x, residual), x + residual

    return dict(zip(PROGRAMS, (forward, joint, add, add_joint), strict=True))


def torch_programs(params: Any, x: Any, dy: Any) -> dict[str, Callable[[], Any]]:
    import torch

    def tensor(array: Any) -> torch.Tensor:
        wide = torch.from_numpy(jax.device_get(array.astype("float32")).copy())
        return wide.to(getattr(torch, array.dtype.name)).requires_grad_()

    given = [tensor(a) for a in (x, params["scale"], params["bias"])]
    other = tensor(dy)
    fixed = other.detach()

    def norm(total: torch.Tensor) -> torch.Tensor:
        shape = total.shape[-1:]
        return torch.nn.functional.layer_norm(total, shape, *given[1:], peers.EPSILON)

    def forward() -> Any:
        with torch.no_grad():
            return norm(given[0])

    def joint() -> Any:
        y = norm(given[0])
        return y, torch.autograd.grad(y, given, fixed)

    def add() -> Any:
        with torch.no_grad():
            total = other + given[0]
            return norm(total), total

    def add_joint() -> Any:
        total = other + given[0]
        y = norm(total)
        cotangents = (fixed, given[0].detach())
        return y, total, torch.autograd.grad((y, total), (*given, other), cotangents)

    return dict(zip(PROGRAMS, (forward, joint, add, add_joint), strict=True))


def available(names: list[str]) -> dict[str, dict[str, Callable[..., Any]] | None]:
    """Programs of each that is installed; None for torch, which needs the arrays."""
    own = {"ours": ours(None), "xla": ours("xla"), "copy": copies(), "floor": floors()}
    found: dict[str, Any] = {}
    for name in names:
        if name in own:
            found[name] = own[name]
        elif name == "torch":
            reason = peers.import_error("torch")
            if reason is None:
                found[name] = None
            else:
                print(f"torch left out: {reason}")
        else:
            for each, norm in peers.available((name,)).items():
                found[each] = jax_programs(norm)
    return found


def measure(
    found: dict[str, Any],
    shape: shapes.Shape,
    dtype: str,
    wanted: list[str],
    rounds: int,
) -> list[dict[str, Any]]:
    params, x, dy = accuracy.inputs(shape, 1.0, jnp.dtype(dtype), 0)
    right = accuracy.oracle(params, x, dy)
    torch = torch_programs(params, x, dy) if "torch" in found else {}
    elements = shape.rows * shape.features
    inner = 20 if elements < 2e5 else 5 if elements < 2e6 else 1
    results = []
    for program in wanted:
        run: dict[str, Callable[[], Any]] = {}
        for name, programs in found.items():
            if programs is None:
                run[name] = torch[program]
            else:
                jitted = jax.jit(programs[program])
                run[name] = functools.partial(
                    lambda f: jax.block_until_ready(f(params, x, dy)), jitted
                )
        seconds = timing.interleaved(
            run, repetitions=rounds, inner=inner, before=lambda: time.sleep(PAUSE)
        )
        for name, value in seconds.items():
            results.append(
                {"shape": str(shape), "dtype": dtype, "program": program, "norm": name}
                | {"ms": value * 1e3, "over ours": value / seconds["ours"]}
                | errors(name, program, run[name], right)
            )
    return results


def errors(name: str, program: str, run: Any, right: Any) -> dict[str, Any]:
    """Of y, dx, dscale, dbias, the largest, in units of the last place."""
    if program != "joint" or name in ("copy", "floor"):
        return {}
    out = run()
    if name == "torch":
        y, (dx, dscale, dbias) = out
        arrays = [
            jnp.asarray(a.detach().float().numpy()) for a in (y, dx, dscale, dbias)
        ]
        kinds = [str(y.dtype).removeprefix("torch.")] * 2 + ["float32"] * 2
    else:
        y, (dparams, dx) = out
        arrays, kinds = [y, dx, dparams["scale"], dparams["bias"]], None
    return accuracy.of_results(arrays, right, kinds)


def in_process(options: Any, threads: int) -> list[dict[str, Any]]:
    if peers.import_error("torch") is None:
        import torch

        torch.set_num_threads(threads)
    found = available(options.norms)
    results = []
    for dtype in options.dtypes:
        table = []
        for shape in options.shapes:
            cases = measure(found, shape, dtype, options.programs, options.repetitions)
            results += [case | {"threads": threads} for case in cases]
            for program in options.programs:
                row = {c["norm"]: c for c in cases if c["program"] == program}
                cells = [f"{c['ms']:.3g} ({c['over ours']:.2f})" for c in row.values()]
                table.append([str(shape), program, *cells])
        print(f"{dtype}, {threads} threads: ms (over ours)")
        report.print_table(("shape", "program", *found), table)
    return results


def print_summary(results: list[dict[str, Any]]) -> None:
    """Geometric means over the shapes, and the worst, of each ratio to ours."""
    groups: dict[Any, list[float]] = {}
    for r in results:
        key = (r["program"], r["dtype"], r["threads"], r["norm"])
        groups.setdefault(key, []).append(r["over ours"])
    table = [
        [*key, math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)]
        for key, ratios in groups.items()
        if key[-1] != "ours"
    ]
    print("Over ours: geometric mean over the shapes, and least")
    report.print_table(("program", "dtype", "threads", "norm", "mean", "least"), table)


def plot(results: list[dict[str, Any]], where: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    joint = [r for r in results if r["program"] == "joint"]
    panels = sorted({(r["dtype"], r["threads"]) for r in joint}, reverse=True)
    names = [n for n in NORMS if n != "ours" and any(r["norm"] == n for r in joint)]
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
    versions = where["versions"]
    figure.suptitle(
        "Forward and backward pass of layer norm on CPU, time relative to jax_layernorm\n"
        f"{where['device']}; jax {versions['jax']}, flax {versions.get('flax')}, torch"
        f" {versions.get('torch')}; {where['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    shapes.add_argument(parser, CPU_SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[os.cpu_count()],
        help="cores to keep to; each number in a process of its own",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="also draw joint's ratios here")
    options = parser.parse_args(arguments)

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
    report.write_json(options.json, where, results)
    if options.plot:
        plot(results, where, options.plot)


def in_children(threads: list[int], arguments: list[str]) -> list[dict[str, Any]]:
    """XLA and torch make as many threads as there are cores when they start."""
    results, all_cores = [], sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for number in threads:
            path = os.path.join(folder, f"{number}.json")
            os.sched_setaffinity(0, all_cores[:number])  # which the child inherits
            command = [sys.executable, "-m", "benchmarks.cpu", *arguments]
            command += ["--threads", str(number), "--json", path, "--plot", ""]
            subprocess.run(command, check=True)
            with open(path) as file:
                results += json.load(file)["results"]
    os.sched_setaffinity(0, all_cores)
    return results


if __name__ == "__main__":
    main()
