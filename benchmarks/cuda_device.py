"""Is the CUDA kernel right on this GPU, how fast is it, and are its tiles the best?

All stages run in this order, unless some are named. Each prints its results as it goes:

  smoke     launches small norms, forward and backward
  values    every shape, dtype and norm, also with round_before_scale: errors in units in
            the last place against float64 NumPy, and whether a second run gives the same
            bits
  skew      norms whose rows need clusters, with random pauses where blocks meet; the bits
            must be those without pauses
  times     `benchmarks.run` for each of the tables below; FILE.TABLE.json
  graph     smoke in a CUDA graph, in a separate process
  sanitize  smoke under compute-sanitizer's racecheck and memcheck, in separate processes
            of at most 100 s each
  sweep     forward and backward with other tiles than those that _tiles.py chooses, and
            with rows fetched first and last

Tables: main and float32 have the large passes; adds and rms the residual sum and RMS norm;
wide has rows that need clusters; few has few rows, as in inference; peers has tokamax,
torch, torch.compile, Liger and quack.

A stage that has no time left (`--seconds`) stops, and says so.

    python -m benchmarks.cuda_device --json cuda_device.jsonl
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some, too

import jax
import jax.numpy as jnp

from benchmarks import run
from benchmarks.support import report, shapes
from jax_layernorm import _check
from jax_layernorm._kernels.cuda import _compile, _tiles

STAGES = ("smoke", "values", "skew", "times", "graph", "sanitize", "sweep")
SHAPES = (
    "16384x4096", "4096x768", "32768x128", "8192x1024", "2048x16384", "8192x5120",
    "4096x8192", "512x65536", "32769x1000", "8192x64", "20000x100", "30x40000",
    "1x65536",
)  # fmt: skip
LARGE = ("16384x4096", "4096x768", "32768x128", "8192x1024", "2048x16384")
TABLES = {  # arguments of benchmarks.run
    "main": {"norms": ("xla", "cuda", "flax", "copy"), "shapes": LARGE},
    "wide": {
        "norms": ("xla", "cuda", "copy"),
        "shapes": ("4096x16384", "512x65536", "1024x40960"),
        "programs": ("forward", "backward", "joint"),
    },
    "adds": {
        "norms": ("xla", "cuda"),
        "shapes": LARGE,
        "programs": ("add", "add backward", "add joint"),
    },
    "rms": {
        "rms": (),
        "norms": ("xla", "cuda", "flax", "tokamax"),
        "shapes": LARGE[:4],
    },
    "float32": {
        "norms": ("xla", "cuda", "copy"),
        "shapes": ("16384x4096", "8192x1024", "4096x768", "2048x16384"),
        "dtypes": ("float32",),
        "programs": ("forward", "backward", "joint"),
    },
    "few": {
        "norms": ("xla", "cuda"),
        "shapes": ("1x4096", "64x4096", "512x4096", "64x768", "1000x1000"),
        "programs": ("inference", "block inference", "joint"),
    },
    "peers": {
        "norms": ("tokamax", "torch", "torch.compile", "liger", "quack rms"),
        "shapes": LARGE,
        "programs": ("forward", "backward", "joint"),
    },
}
CHECKED_ELEMENTS = 1 << 20
"""At the most: NumPy in float64 takes its time."""
SMOKE = ("1000x1024", "300x16384", "40x65536", "70x33")
SKEWED = ("700x20000", "100x40000", "40x65536")
PAUSE = """{
  uint32 now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  asm volatile("nanosleep.u32 %0;" :: "r"(now * 2654435761u >> 21));
}
"""
"""Up to 2 microseconds of sleep, by the last bits of the clock."""
EXPECT, WAIT = "if (t == 0) expect(", "wait_for(arrived, turn >> 1 & 1);"
SKEWS = {  # text of row.cuh, and what takes its place
    "warps come late": (EXPECT, PAUSE + EXPECT),
    "the expectation comes late": (EXPECT, f"if (t == 0) {PAUSE} {EXPECT}"),
    "sums are read late": (WAIT, WAIT + PAUSE),
}
TILES = {  # elements a thread, threads of a block, stages
    "forward": ((16, 768, 3), (8, 1024, 3), (16, 512, 3), (32, 512, 2), (8, 512, 4)),
    "backward": ((8, 1024, 3), (8, 768, 3), (16, 512, 3), (16, 512, 4), (8, 512, 4)),
}
LONGEST = 100
"""Seconds for a process."""
GRAPH_FLAGS = (
    "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+CUSTOM_CALL"
)

Say = Callable[..., None]


def compiled(norm: str, arguments: Any, **options: Any) -> Callable[[], Any]:
    """Runs the CUDA kernels on these arrays, forward and backward."""
    function = functools.partial(_check.candidates(norm)["cuda"], **options)
    program = _check.program(function).lower(*arguments).compile()
    return functools.partial(program, *arguments)


def bits_of(out: Any) -> bytes:
    return b"".join(a.tobytes() for a in jax.tree.leaves(out))


def checked(
    shape: shapes.Shape, dtype: str, norm: str, **options: Any
) -> dict[str, Any]:
    """Errors of one problem, and whether a second run gives the same bits."""
    problem = _check.draw(norm, tuple(shape), dtype)
    arguments = jax.device_put((problem.params, problem.arrays, problem.cotangents))
    start = time.perf_counter()
    run_once = compiled(norm, arguments, **options)
    seconds = time.perf_counter() - start
    out, again = run_once(), run_once()
    same = bits_of(out) == bits_of(again)
    errors = _check.errors_of(out, problem)
    if options.get(
        "round_before_scale"
    ):  # the oracle takes dscale from x_hat unrounded
        errors = errors._replace(sums=0.0)
    return {
        "shape": str(shape),
        "dtype": dtype,
        "norm": norm,
        **options,
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
    problems = itertools.product(
        options.shapes, options.dtypes, _check.NORMS, (False, True)
    )
    for shape, dtype, norm, rounds in in_time(problems, say, options):
        rows = min(shape.rows, CHECKED_ELEMENTS // shape.features)
        more = {"round_before_scale": True} if rounds else {}
        if rounds and dtype == "float32":  # where it changes nothing
            continue
        say(**checked(shape._replace(rows=rows), dtype, norm, **more))


@contextlib.contextmanager
def source_with(old: str, new: str) -> Iterator[None]:
    """Kernels from a source in which `new` takes the place of `old`."""
    kept = _compile.FOLDER
    with tempfile.TemporaryDirectory() as folder:
        for name in (*_compile.HEADERS, _compile.SOURCE):
            shutil.copy(kept / name, folder)
        header = pathlib.Path(folder) / "row.cuh"
        text = header.read_text()
        if text.count(old) != 1:
            raise ValueError(f"row.cuh must have {old!r} once; it has not")
        header.write_text(text.replace(old, new))
        _compile.FOLDER = pathlib.Path(folder)
        _compile.image.cache_clear()
        jax.clear_caches()
        try:
            yield
        finally:
            _compile.FOLDER = kept
            _compile.image.cache_clear()
            jax.clear_caches()


def skew(say: Say, options: Any, repetitions: int = 20) -> None:
    problems = itertools.product(map(shapes.parse, SKEWED), ("layer_norm", "rms_norm"))
    for shape, norm in in_time(problems, say, options):
        problem = _check.draw(norm, tuple(shape), "bfloat16")
        arguments = jax.device_put((problem.params, problem.arrays, problem.cotangents))

        def bits(norm: str = norm, arguments: Any = arguments) -> set[bytes]:
            """Those of every repetition."""
            run_once = compiled(norm, arguments)
            return {bits_of(run_once()) for _ in range(repetitions)}

        right = bits()
        for name, (old, new) in SKEWS.items():
            with source_with(old, new):
                same = bits() == right and len(right) == 1
            say(shape=str(shape), norm=norm, skew=name, **{"same bits": same})


def times(say: Say, options: Any) -> None:
    for name in in_time(options.tables, say, options):
        path = f"{options.json or 'cuda_device.jsonl'}.{name}.json"
        table = {"dtypes": ("bfloat16",)} | TABLES[name]
        words = [w for key, given in table.items() for w in (f"--{key}", *given)]
        run.main([*words, "--calls", str(options.calls), "--json", path])
        say(written=path)


@contextlib.contextmanager
def tiles(
    direction: str, per_thread: int, threads: int, stages: int, fetch_first: bool
) -> Iterator[None]:
    kept = _tiles.BLOCKS, _tiles.STAGES, _tiles.FETCH_FIRST
    block = _tiles.Block(per_thread, threads, threads)
    _tiles.BLOCKS = kept[0] | {direction: (block,)}
    _tiles.STAGES = stages
    _tiles.FETCH_FIRST = _tiles.CLUSTERS if fetch_first else ()
    jax.clear_caches()
    try:
        yield
    finally:
        _tiles.BLOCKS, _tiles.STAGES, _tiles.FETCH_FIRST = kept
        jax.clear_caches()


def sweep(say: Say, options: Any) -> None:
    """The backward pass first, because it has more to choose."""
    problems = itertools.product(
        ("backward", "forward"), options.shapes[:6], options.dtypes[:1], (True, False)
    )
    for direction, shape, dtype, fetch_first in in_time(problems, say, options):
        if direction == "forward" and fetch_first:  # it always fetches first
            continue
        for choice in TILES[direction]:
            names = dict(zip(("per thread", "threads", "stages"), choice, strict=True))
            with tiles(direction, *choice, fetch_first):
                measured = run.measure(
                    "cuda", direction, shape, jnp.dtype(dtype), options.calls
                )
            say(**names, **{"fetch first": fetch_first}, **(measured or {}))


def in_a_process(say: Say, *command: str, **environment: str) -> None:
    """Runs smoke by `command`; prints its last lines if it fails."""
    try:
        done = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.cuda_device", "smoke"],
            env=os.environ | environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        say(command=command, stopped=f"it takes more than {LONGEST} s")
        print((late.stdout or b"").decode(errors="replace")[-4000:])
        return
    failed = done.returncode != 0 or '"right": false' in done.stdout
    say(command=command, returncode=done.returncode, right=not failed)
    if failed:
        print(done.stdout[-4000:])


def graph(say: Say, options: Any) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPH_FLAGS}"
    in_a_process(say, XLA_FLAGS=flags)


def sanitize(say: Say, options: Any) -> None:
    for tool in in_time(("racecheck", "memcheck"), say, options):
        in_a_process(say, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


def main(command_line: list[str] | None = None) -> int:
    """0, or 1 if a value is wrong."""
    parser = report.parser(__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    shapes.add_argument(parser, SHAPES)
    shapes.add_dtypes(parser, "bfloat16", "float32")
    parser.add_argument("--tables", nargs="+", default=[*TABLES], choices=[*TABLES])
    parser.add_argument(
        "--calls", type=report.positive, default=20, help="calls to profile"
    )
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
