"""What the Python around a norm costs, ours and Flax's linen.LayerNorm, on any device.

lower   trace and lower 48 norms under value_and_grad, from empty caches
eager   one call outside jit
import  `import jax_layernorm` after `import jax`, in fresh processes

A norm is called as a function, `norm(params, x)`. If it has a Flax module, it is also
called by `module.apply`, as "NAME linen". Flax's norms are modules only. The table gives
medians in ms, and how many times as long as Flax's; lower is better. The target is that
lowering ours takes at most a quarter of Flax's time, and an eager call a twentieth.

    python -m benchmarks.overhead --count 12
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_layernorm as jln
from benchmarks.support import peers, report, timing

NORMS = ("flax", "ours")
TARGETS = {"lower": 1 / 4, "eager": 1 / 20}


def by_calls(found: Mapping[str, peers.Peer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Functions and constructors of Flax modules, each by the name of its results."""
    functions, modules = {}, {}
    for name, peer in found.items():
        if name.startswith("flax"):
            modules[name] = peer.linen
            continue
        functions[name] = peer.norm
        if peer.linen is not None:
            modules[f"{name} linen"] = peer.linen
    return functions, modules


def lowering(
    found: Mapping[str, peers.Peer], count: int, x: jax.Array
) -> dict[str, Callable[[], object]]:
    """Functions that lower `count` norms, each time norms that JAX has not seen."""
    params = [jln.init_params(x.shape[-1]) for _ in range(count)]
    named = {f"LayerNorm_{i}": p for i, p in enumerate(params)}

    class Stack(nn.Module):
        norm: Callable[..., nn.Module]

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(count):
                x = self.norm()(x)
            return x

    def stacked(norm: peers.Norm) -> Callable[[Any, jax.Array], jax.Array]:
        def run(params: Any, x: jax.Array) -> jax.Array:
            for p in params:
                x = norm(p, x)
            return x.sum()

        return run

    def module(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda params, x: model.apply({"params": params}, x).sum()

    def lower(function: Callable[..., Any], params: Any) -> Callable[[], object]:
        def run() -> object:
            fresh = jax.value_and_grad(lambda p, x: function(p, x))
            return jax.jit(fresh).lower(params, x)

        return run

    functions, modules = by_calls(found)
    return {
        name: lower(module(Stack(norm)), named) for name, norm in modules.items()
    } | {name: lower(stacked(norm), params) for name, norm in functions.items()}


def eager(
    found: Mapping[str, peers.Peer], x: jax.Array
) -> dict[str, Callable[[], object]]:
    params = jln.init_params(x.shape[-1])

    def function(norm: peers.Norm) -> Callable[[], object]:
        return lambda: norm(params, x).block_until_ready()

    def module(norm: nn.Module) -> Callable[[], object]:
        return lambda: norm.apply({"params": params}, x).block_until_ready()

    functions, modules = by_calls(found)
    return {name: module(make()) for name, make in modules.items()} | {
        name: function(norm) for name, norm in functions.items()
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
    peers.add_argument(parser, NORMS, peers.JAX_NORMS)
    parser.add_argument(
        "--count", type=report.positive, default=48, help="norms lowered together"
    )
    parser.add_argument("--repetitions", type=report.positive, default=9)
    parser.add_argument("--batch", type=report.positive, default=8)
    parser.add_argument("--features", type=report.positive, default=128)
    parser.add_argument(
        "--profile", metavar="NAME", help="only profile the lowering of flax, ours, ..."
    )
    options = parser.parse_args(arguments)
    x = jnp.ones((options.batch, options.features))
    found = peers.available(options.norms)
    if options.profile:
        lowered = lowering(found, options.count, x)
        if options.profile not in lowered:
            parser.error(f"--profile must be one of {', '.join(lowered)}")
        profile(lowered[options.profile], 60, 3)
        return

    where = report.environment()
    report.print_environment(where)
    start = time.perf_counter()
    measured = {
        "lower": timing.interleaved(
            lowering(found, options.count, x),
            repetitions=options.repetitions,
            before=jax.clear_caches,
        ),
        "eager": timing.interleaved(
            eager(found, x), repetitions=options.repetitions * 5, inner=20
        ),
    }
    imported = importing(options.repetitions)
    results = []
    for what, seconds in measured.items():
        for name, value in seconds.items():
            ratio = value / seconds["flax"] if "flax" in seconds else None
            target = TARGETS[what] if name == "ours" and ratio else None
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
    report.write_json(options.json, where, results, count=options.count)


if __name__ == "__main__":
    main()
