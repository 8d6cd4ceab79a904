"""Times of one implementation in two versions of this package, measured in turns.

Use it to compare a change with the commit before it. Each version is installed in an
environment of its own, with the same JAX, and is named by that environment's
interpreter. The processes of the two versions alternate, and each measures medians of all
programs. The table gives medians over the processes. The last line gives the geometric
mean of the ratios, and its least and largest value over the rounds, which show the noise.
Parameters are float32.

    python -m benchmarks.versions OLD/.venv/bin/python NEW/.venv/bin/python
    python -m benchmarks.versions OLD/.venv/bin/python NEW/.venv/bin/python --norms xla
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__" and "--measure" in sys.argv:
    # The package that is installed, not the one beside this file.
    sys.path[0] = os.path.dirname(__file__)
    from support import timing
else:
    from benchmarks.support import report, timing

import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm as jln

SHAPES = ((4096, 768), (512, 1024), (32768, 128), (1000, 1000), (7, 1024), (5, 16384))
DTYPES = ("float32", "bfloat16")


def programs(norm: str, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Functions without arguments, by name."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, *shape)))
    made: dict[str, Callable[[], object]] = {}
    for name, function in (("layer", jln.layer_norm), ("rms", jln.rms_norm)):
        params = jln.init_params(shape[-1], bias=name == "layer")
        run = functools.partial(function, implementation=norm)

        def joint(params: Any, x: Any, dy: Any, run: Any = run) -> Any:
            y, pullback = jax.vjp(run, params, x)
            return y, pullback(dy)

        for program, compiled, arguments in (
            ("inference", jax.jit(run), (params, x)),
            ("joint", jax.jit(joint), (params, x, dy)),
        ):
            made[f"{name} {program}"] = functools.partial(
                lambda f, a: jax.block_until_ready(f(*a)), compiled, arguments
            )
    return made


def measure(norm: str, shapes: list[tuple[int, int]], repetitions: int) -> Any:
    """Median microseconds of each program, with this process's version."""
    found = {}
    for shape in shapes:
        inner = max(1, 300_000 // math.prod(shape))
        for dtype in DTYPES:
            seconds = timing.interleaved(
                programs(norm, shape, dtype), repetitions=repetitions, inner=inner
            )
            for name, value in seconds.items():
                found[f"{shape[0]}x{shape[1]} {dtype} {name}"] = 1e6 * value
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("old", help="the interpreter of the old version")
    parser.add_argument("new", help="the interpreter of the new version")
    parser.add_argument("--norms", default="native_cpu", help="the implementation")
    parser.add_argument("--rounds", type=report.positive, default=8)
    parser.add_argument("--repetitions", type=report.positive, default=21)
    parser.add_argument("--shapes", nargs="+", default=[f"{a}x{b}" for a, b in SHAPES])
    options = parser.parse_args(arguments)
    where = report.environment()
    report.print_environment(where)
    command = [__file__, "--measure", options.norms, str(options.repetitions)]
    times: dict[str, list[Any]] = {"old": [], "new": []}
    for i in range(options.rounds):
        for name in ("old", "new") if i % 2 else ("new", "old"):
            out = subprocess.run(
                [getattr(options, name), *command, *options.shapes],
                check=True, stdout=subprocess.PIPE,
            )  # fmt: skip
            times[name].append(json.loads(out.stdout))
    results, table = [], []
    for program in times["old"][0]:
        old, new = (statistics.median(t[program] for t in times[n]) for n in times)
        results.append({"program": program, "old us": old, "new us": new})
        table.append([program, old, new, f"{new / old:.3f}"])
    report.print_table(("program", "old, us", "new, us", "new / old"), table)
    means = [
        statistics.geometric_mean([new[p] / old[p] for p in old])
        for old, new in zip(times["old"], times["new"], strict=True)
    ]
    mean = statistics.geometric_mean([r["new us"] / r["old us"] for r in results])
    print(f"new / old: {mean:.3f}; by rounds {min(means):.3f} to {max(means):.3f}")
    report.write_json(options.json, where, results, mean=mean, rounds=means)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        norm, repetitions, *shapes = sys.argv[2:]
        pairs = [tuple(map(int, shape.split("x"))) for shape in shapes]
        print(json.dumps(measure(norm, pairs, int(repetitions))))
    else:
        main()
