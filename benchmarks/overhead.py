"""What the Python around a norm costs, ours beside Flax's linen.LayerNorm.

lower   trace and lower 48 norms under value_and_grad, from empty caches: Flax's
        modules, our function, and our linen module
eager   one call outside jit, `jln.layer_norm(params, x)` and `module.apply(v, x)`
import  `import jax_layernorm` over `import jax`, in fresh processes

Targets: lowering at most a quarter of Flax's time, an eager call at most a twentieth.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_layernorm as jln
from benchmarks import report, timing

TARGETS = {"lower": 1 / 4, "eager": 1 / 20}


def lowering(norms: int, x: jax.Array) -> dict[str, Callable[[], object]]:
    """Functions that lower `norms` norms, each time as one JAX has not seen."""
    params = [jln.init_params(x.shape[-1]) for _ in range(norms)]
    named = {f"LayerNorm_{i}": p for i, p in enumerate(params)}

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(norms):
                x = nn.LayerNorm()(x)
            return x

    class OursLinen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(norms):
                x = jln.linen.LayerNorm()(x)
            return x

    def ours(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            x = jln.layer_norm(p, x)
        return x.sum()

    def module(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda params, x: model.apply({"params": params}, x).sum()

    def lower(function: Callable[..., Any], params: Any) -> Callable[[], object]:
        def run() -> object:
            fresh = jax.value_and_grad(lambda p, x: function(p, x))
            return jax.jit(fresh).lower(params, x)

        return run

    return {
        "flax": lower(module(Flax()), named),
        "ours": lower(ours, params),
        "ours linen": lower(module(OursLinen()), named),
    }


def eager(x: jax.Array) -> dict[str, Callable[[], object]]:
    params = jln.init_params(x.shape[-1])
    flax, ours = nn.LayerNorm(), jln.linen.LayerNorm()
    return {
        "flax": lambda: flax.apply({"params": params}, x).block_until_ready(),
        "ours": lambda: jln.layer_norm(params, x).block_until_ready(),
        "ours linen": lambda: ours.apply({"params": params}, x).block_until_ready(),
    }


def importing(repetitions: int) -> dict[str, float]:
    """Median seconds of a fresh process that imports jax, and of ours after it."""
    program = (
        "import time; a = time.perf_counter(); import jax, jax.numpy;"
        " b = time.perf_counter(); import jax_layernorm;"
        " print(b - a, time.perf_counter() - b)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    samples = [
        tuple(
            map(
                float,
                subprocess.run(
                    [sys.executable, "-c", program],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=env,
                ).stdout.split(),
            )
        )
        for _ in range(repetitions)
    ]
    jax_alone, ours = zip(*samples, strict=True)
    return {"jax": statistics.median(jax_alone), "ours": statistics.median(ours)}


def profile(function: Callable[[], object], lines: int, repetitions: int) -> None:
    import cProfile
    import pstats

    function()
    profiler = cProfile.Profile()
    for _ in range(repetitions):
        jax.clear_caches()
        profiler.enable()
        function()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--norms", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument(
        "--profile", metavar="NAME", help="cProfile of one lowering: flax, ours, ..."
    )
    options = parser.parse_args(arguments)
    x = jnp.ones((options.batch, options.features))
    if options.profile:
        profile(lowering(options.norms, x)[options.profile], 60, 3)
        return

    where = report.environment()
    report.print_environment(where)
    start = time.perf_counter()
    measured = {
        "lower": timing.interleaved(
            lowering(options.norms, x),
            repetitions=options.repetitions,
            before=jax.clear_caches,
        ),
        "eager": timing.interleaved(
            eager(x), repetitions=options.repetitions * 5, inner=20
        ),
    }
    imported = importing(options.repetitions)
    results = []
    for what, seconds in measured.items():
        for name, value in seconds.items():
            ratio = value / seconds["flax"]
            target = TARGETS[what] if name == "ours" else None
            results.append(
                {
                    "what": what,
                    "which": name,
                    "ms": value * 1e3,
                    "over flax": ratio,
                    "target": target,
                    "met": None if target is None else ratio <= target,
                }
            )
    for name, value in imported.items():
        results.append({"what": "import", "which": name, "ms": value * 1e3})
    columns = ("what", "which", "ms", "over flax", "target", "met")
    report.print_table(columns, [[row.get(c) for c in columns] for row in results])
    print(f"{time.perf_counter() - start:.0f} s")
    report.write_json(options.json, where, results, norms=options.norms)


if __name__ == "__main__":
    main()
