"""The benchmarks in a short form, one after another, in a few minutes.

    cpu                norms on this CPU, beside those of other packages
    accuracy           their errors, so that accuracy stands beside speed
    decoder_step       a training step of the example: time and memory
    compile_only_tpu   bytes that programs move on a TPU, without one
    compile_only_cuda  the same on a CUDA GPU
    run                norms on a GPU or TPU, if JAX's default device is one

Each part runs the command of that name with few problems. If a part cannot run here, it
is left out and the reason is printed. Each part writes PART.json into the folder, and
cpu draws cpu.png. The summary has geometric means of times over the shapes, and the
largest errors over the offsets; lower is better in all of its rows. Not all parts
measure all norms.

    python -m benchmarks
    python -m benchmarks --parts cpu accuracy
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.support import compilers, peers, report

NORMS = ("ours", "ours fused", "xla", "flax", "flax two-pass", "torch")
"""The columns of the summary, where they were measured."""


class Part(NamedTuple):
    """One command, and its rows of the summary."""

    command: str
    short: str
    """Its arguments."""
    tiny: str
    """Arguments for the tests of this file."""
    by: tuple[str, ...]
    """Results that share these are one row."""
    values: dict[str, str]
    """Names in the results, and their units; each name is a row."""
    combine: Callable[[Any], float] = statistics.geometric_mean


PARTS = {
    "cpu": Part(
        "cpu",
        "--shapes gpt2 pairs decode uneven --programs inference joint --repetitions 7",
        "--shapes 8x128 --programs joint --dtypes float32 --repetitions 1",
        ("program", "dtype", "threads"), {"ms": "ms"},
    ),
    "accuracy": Part(
        "accuracy",
        "--dtypes float32 bfloat16 --offsets 0 1 1e2 1e4 1e6 --seeds 1",
        "--dtypes float32 --offsets 0 1 --shapes 8x128 --seeds 1",
        ("result", "dtype"), {"max": "ulps"}, max,
    ),
    "decoder_step": Part(
        "decoder_step",
        "--widths 128 --repetitions 15",
        "--widths 16 --layers 1 --repetitions 1",
        ("width",), {"ms": "ms", "temp MiB": "temp MiB"},
    ),
    "compile_only_tpu": Part(
        "compile_only",
        "--platform tpu --norms ours xla flax --dtypes bfloat16",
        "--platform tpu --norms ours flax --dtypes float32 --shape 8x128",
        ("program", "dtype"), {"bytes an element": "bytes/element"},
    ),
    "compile_only_cuda": Part(
        "compile_only",
        "--platform cuda --norms ours xla cuda flax --dtypes bfloat16",
        "--platform cuda --norms ours flax --dtypes float32 --shape 8x128",
        ("program", "dtype"), {"bytes an element": "bytes/element"},
    ),
    "run": Part(
        "run",
        "--shapes bert-large large --programs forward backward joint",
        "--shapes 8x128 --programs joint --dtypes float32 --calls 2",
        ("program", "dtype"), {"device ms": "ms"},
    ),
}  # fmt: skip


def left_out(name: str) -> str | None:
    """Why this part cannot run here, or None."""
    if name == "cpu" and not hasattr(os, "sched_getaffinity"):
        return "it chooses the cores it runs on, which needs Linux"
    if name.startswith("compile_only"):
        return compilers.unavailable(name.removeprefix("compile_only_"))
    if name == "run" and default_backend() == "cpu":
        return "JAX's default device is a CPU"
    return None


def default_backend() -> str:
    """JAX's; another process looks it up, because this one would hold the device."""
    program = "import jax; print(jax.default_backend())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def arguments_of(name: str, out: pathlib.Path, *, tiny: bool) -> list[str]:
    part = PARTS[name]
    arguments = (part.tiny if tiny else part.short).split()
    arguments += ["--json", str(out / f"{name}.json")]
    if name == "cpu":
        cores = len(os.sched_getaffinity(0))
        threads = {cores} if tiny else {1, cores}
        arguments += ["--threads", *map(str, sorted(threads))]
        arguments += ["--plot", str(out / "cpu.png")]
    return arguments


def run(name: str, out: pathlib.Path, *, tiny: bool) -> dict[str, Any]:
    """What the part wrote; ends the program if it failed."""
    module = f"benchmarks.{PARTS[name].command}"
    arguments = arguments_of(name, out, tiny=tiny)
    print(f"== {name}: python -m {module} {' '.join(arguments)}\n", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed with exit code {done.returncode}; see above.")
    print(f"\n{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return json.loads((out / f"{name}.json").read_text())


def measured(part: Part, results: list[Any]) -> Iterator[tuple[Any, str, float]]:
    """The row, the norm and the value of each result that has one."""
    for result in results:
        for name, unit in part.values.items():
            row = (*(result[key] for key in part.by), unit)
            if "norm" in result:
                found = {result["norm"]: result[name]}
            else:  # of `accuracy`, with all norms
                found = {norm: result[norm][name] for norm in NORMS if norm in result}
            for norm, value in found.items():
                if value is not None:
                    yield row, norm, value


def summary(written: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Rows of part, what was measured, unit, norms, what "ours" is, and device."""
    table = []
    for name, made in written.items():
        part = PARTS[name]
        groups: dict[Any, dict[str, list[float]]] = {}
        for row, norm, value in measured(part, made["results"]):
            groups.setdefault(row, {}).setdefault(norm, []).append(value)
        for (*keys, unit), norms in groups.items():
            what = ", ".join(
                key if isinstance(key, str) else f"{key} {of}"
                for key, of in zip(keys, part.by, strict=True)
            )
            cells = [
                f"{part.combine(norms[n]):.3g}" if n in norms else None for n in NORMS
            ]
            table.append([name, what, unit, *cells, made["ours"], made["device"]])
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, json=False)
    parser.add_argument("--out", type=pathlib.Path, default="build/bench")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--tiny", action="store_true", help="only test that it runs")
    peers.add_allow_xla(parser)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    written, missing = {}, {}
    for name in options.parts:
        reason = left_out(name)
        if reason is None:
            written[name] = run(name, options.out, tiny=options.tiny)
        else:
            print(f"== {name} left out: {reason}\n", flush=True)
            missing[name] = reason
    print(f"== Summary of {time.perf_counter() - start:.0f} s; lower is better\n")
    for name, reason in missing.items():
        print(f"{name} left out: {reason}")
    if written:
        first = next(iter(written.values()))
        report.print_environment(first | {"device": "Devices: the last column"})
        header = ("part", "measured", "unit", *NORMS, "ours is", "device")
        report.print_table(header, summary(written))
    print(f"JSON and plots: {options.out}")


if __name__ == "__main__":
    main()
