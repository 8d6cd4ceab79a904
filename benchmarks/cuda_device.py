"""Is the CUDA kernel right on this GPU, how fast is it, and are its tiles the best?

All stages run in this order, unless some are named. Each prints its results as it goes:

  smoke     launches small norms, forward and backward
  values    every shape, both dtypes, every norm: errors in units in the last place
            against float64 NumPy, and whether a second run gives the same bits
  times     `benchmarks.run` with XLA, Flax, tokamax, torch and a copy; FILE.times.json
  graph     smoke in a CUDA graph, in a separate process
  sanitize  smoke under compute-sanitizer's racecheck and memcheck, in a separate process
  sweep     forward and backward with other tiles than those that _tiles.py chooses

A stage that has no time left stops, and says so. All stages together take about 10
minutes on an H100:

    python -m benchmarks.cuda_device --json cuda_device.jsonl
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some, too

import jax
import jax.numpy as jnp

from benchmarks import run
from benchmarks.support import report, shapes
from jax_layernorm import _check
from jax_layernorm._kernels.cuda import _tiles

STAGES = ("smoke", "values", "times", "graph", "sanitize", "sweep")
SHAPES = (
    "16384x4096", "4096x768", "32768x128", "8192x1024", "2048x16384", "8192x5120",
    "4096x8192", "512x65536", "32769x1000", "8192x64", "20000x100",
)  # fmt: skip
TIMED = 5
"""The first of these, with every peer."""
PEERS = (
    "xla", "cuda", "flax", "tokamax", "copy", "torch", "torch.compile", "liger",
    "quack rms",
)  # fmt: skip
CHECKED_ELEMENTS = 4 << 20
"""At the most: NumPy in float64 takes its time."""
SMOKE = ("1000x1024", "300x16384", "70x33")
TILES = {  # elements a thread, threads of a block, stages
    "forward": ((16, 768, 3), (8, 1024, 3), (16, 512, 3), (32, 512, 2), (8, 512, 4)),
    "backward": ((8, 1024, 3), (8, 768, 3), (16, 512, 3), (8, 1024, 2), (8, 512, 4)),
}
GRAPH_FLAGS = (
    "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+CUSTOM_CALL"
)

Say = Callable[..., None]


def checked(shape: shapes.Shape, dtype: str, norm: str) -> dict[str, Any]:
    """Errors of one problem, and whether a second run gives the same bits."""
    problem = _check.draw(norm, tuple(shape), dtype)
    arguments = jax.device_put((problem.params, problem.arrays, problem.cotangents))
    start = time.perf_counter()
    function = _check.program(_check.candidates(norm)["cuda"])
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    out, again = compiled(*arguments), compiled(*arguments)
    same = all(
        a.tobytes() == b.tobytes()
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(again), strict=True)
    )
    errors = _check.errors_of(out, problem)
    return {
        "shape": str(shape),
        "dtype": dtype,
        "norm": norm,
        "compile s": seconds,
        **errors._asdict(),
        "right": not errors.too_large(shape.rows),
        "same bits": same,
    }


def smoke(say: Say, options: Any) -> None:
    say(gpu=_tiles.gpu()._asdict())
    for shape in map(shapes.parse, SMOKE):
        say(**checked(shape, "bfloat16", "layer_norm"))


def in_time(problems: Iterable[Any], say: Say, options: Any) -> Iterator[Any]:
    """The problems, until no time is left."""
    for problem in problems:
        if time.monotonic() > options.end:
            say(stopped="no time is left", at=str(problem))
            return
        yield problem


def values(say: Say, options: Any) -> None:
    problems = itertools.product(options.shapes, options.dtypes, _check.NORMS)
    for shape, dtype, norm in in_time(problems, say, options):
        rows = min(shape.rows, CHECKED_ELEMENTS // shape.features)
        say(**checked(shape._replace(rows=rows), dtype, norm))


def times(say: Say, options: Any) -> None:
    path = f"{options.json or 'cuda_device.jsonl'}.times.json"
    given = {"--shapes": map(str, options.shapes[:TIMED]), "--norms": options.norms}
    given |= {"--dtypes": options.dtypes[:1], "--calls": [str(options.calls)]}
    arguments = [word for name, words in given.items() for word in (name, *words)]
    run.main([*arguments, "--json", path])
    say(written=path)


@contextlib.contextmanager
def tiles(direction: str, per_thread: int, threads: int, stages: int) -> Iterator[None]:
    kept = _tiles.BLOCKS, _tiles.STAGES
    block = _tiles.Block(per_thread, threads, threads)
    _tiles.BLOCKS = kept[0] | {direction: (block,)}
    _tiles.STAGES = stages
    jax.clear_caches()
    try:
        yield
    finally:
        _tiles.BLOCKS, _tiles.STAGES = kept
        jax.clear_caches()


def sweep(say: Say, options: Any) -> None:
    for shape, dtype in itertools.product(options.shapes[:6], options.dtypes[:1]):
        for direction, choices in TILES.items():
            for choice in choices:
                names = dict(
                    zip(("per thread", "threads", "stages"), choice, strict=True)
                )
                with tiles(direction, *choice):
                    measured = run.measure(
                        "cuda", direction, shape, jnp.dtype(dtype), options.calls
                    )
                say(**names, **(measured or {}))


def in_a_process(say: Say, *command: str, **environment: str) -> None:
    """Runs smoke by `command`; prints its last lines if it fails."""
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.cuda_device", "smoke"],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    failed = done.returncode != 0 or '"right": false' in text
    say(command=command, returncode=done.returncode, right=not failed)
    if failed:
        print(text[-4000:])


def graph(say: Say, options: Any) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPH_FLAGS}"
    in_a_process(say, XLA_FLAGS=flags)


def sanitize(say: Say, options: Any) -> None:
    for tool in ("racecheck", "memcheck"):
        in_a_process(say, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


def main(command_line: list[str] | None = None) -> int:
    """0, or 1 if a value is wrong."""
    parser = report.parser(__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    shapes.add_argument(parser, SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--norms", nargs="+", default=PEERS, help="norms for times")
    parser.add_argument("--calls", type=int, default=20, help="calls to profile")
    parser.add_argument("--seconds", type=float, default=560, help="time limit")
    options = parser.parse_args(command_line)
    stages = options.stages or STAGES
    if unknown := set(stages) - set(STAGES):
        parser.error(f"a stage is one of {', '.join(STAGES)}; got {', '.join(unknown)}")
    options.end = time.monotonic() + options.seconds
    where = report.environment()
    report.print_environment(where)
    wrong = False

    def say(**line: Any) -> None:
        nonlocal wrong
        wrong = wrong or line.get("right") is False or line.get("same bits") is False
        text = json.dumps({"stage": stage, **line})
        print(text, flush=True)
        if options.json is not None:
            with open(options.json, "a") as file:
                file.write(text + "\n")

    stage = "environment"
    say(**where)
    for stage in stages:
        globals()[stage](say, options)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
