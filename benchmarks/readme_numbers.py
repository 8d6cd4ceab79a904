"""The numbers in README.md, made from `benchmarks/results`.

README.md holds each text below between comments that do not show when it is rendered,
`<!-- NAME -->` and `<!-- /NAME -->`. A test fails if README.md and the results differ.

    python -m benchmarks.readme_numbers             print the texts
    python -m benchmarks.readme_numbers --write     write them into README.md, and draw
                                                    results/readme.png
    python -m benchmarks.readme_numbers --memory    count again what norms keep for the
                                                    backward pass: results/memory.json
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from benchmarks.support import report, shapes

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PICTURE = RESULTS / "readme.png"
PACKAGES = ("flax", "tokamax", "equinox", "torch")
"""The norms of other packages."""


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def over_ours(recorded: dict[str, Any], time: str) -> list[dict[str, Any]]:
    """The results, each with "ratio": its time over that of ours in the same case."""

    def case(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["shape"], r["dtype"], r["program"], r.get("threads")

    results = recorded["results"]
    ours = {case(r): r[time] for r in results if r["norm"] == "ours"}
    return [r | {"ratio": r[time] / ours[case(r)]} for r in results if case(r) in ours]


def ratios(results: list[dict[str, Any]], norm: str, program: str) -> list[float]:
    found = [r for r in results if (r["norm"], r["program"]) == (norm, program)]
    return [r["ratio"] for r in found]


def span(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def where(recorded: dict[str, Any], *packages: str) -> str:
    found = {name: v.partition("+")[0] for name, v in recorded["versions"].items()}
    versions = ", ".join(f"{name} {found[name]}" for name in ("jax", *packages))
    return f"{recorded['device']}; {versions}; {recorded['date']}"


def bullet(text: str, environment: str, command: str) -> str:
    return f"- {text}\n  {environment}: `python -m benchmarks.{command}`"


def numbers() -> str:
    """Three bullets: time on a CPU, time on a GPU, memory."""
    recorded = load("cpu-benchmark")
    results = over_ours(recorded, "ms")
    flax, torch = (ratios(results, norm, "joint") for norm in ("flax", "torch"))
    cpu = bullet(
        f"**CPU:** Flax's norm takes **{span(flax)} times** as long as this norm, and"
        f" torch's norm takes {span(torch)} times as long\n  (CPU kernel, forward and"
        f" backward pass, {len(flax)} cases; higher is better for this norm).",
        where(recorded, "flax", "torch"),
        "cpu --threads 1 2 --repetitions 11",
    )

    recorded = load("h100")
    results = over_ours(recorded, "device ms")
    flax, tokamax = (ratios(results, norm, "joint") for norm in ("flax", "tokamax"))
    gpu = bullet(
        f"**GPU:** Flax's norm takes **{span(flax)} times** as long as this norm, and"
        f" tokamax's norm takes {span(tokamax)} times as\n  long (XLA implementation,"
        f" forward and backward pass, {len(flax)} cases; higher is better for this norm).",
        where(recorded, "flax", "tokamax"),
        "run --shapes gpt2 bert-large pairs large uneven",
    )

    recorded = load("memory")
    kept = {r["norm"]: r["bytes an element"] for r in recorded["results"]}
    memory = bullet(
        f"**Memory:** This norm keeps **{kept['ours']:.3g} bytes** for each element of"
        f" a bfloat16 `x` until the backward pass, and Flax's norm\n  keeps"
        f" {kept['flax']:.3g} (lower is better).",
        where(recorded, "flax"),
        "readme_numbers --memory",
    )
    return f"\n{cpu}\n{gpu}\n{memory}\n"


def cpu_limit() -> str:
    others = [r for r in over_ours(load("cpu-benchmark"), "ms")]
    others = [r for r in others if r["norm"] in PACKAGES]
    cases = {(r["shape"], r["dtype"], r["program"], r["threads"]) for r in others}
    faster = [r["ratio"] for r in others if r["ratio"] < 1]
    return f"{len(faster)} of {len(cases)} cases, by {1 - min(faster):.0%} at most"


def gpu_limit() -> str:
    results = over_ours(load("h100"), "device ms")
    forward = ratios(results, "tokamax", "forward")
    faster = [ratio for ratio in forward if ratio < 1]
    return f"{span(faster)} of our time in {len(faster)} of {len(forward)} cases"


TEXTS = {"numbers": numbers, "cpu limit": cpu_limit, "gpu limit": gpu_limit}


def filled(page: str) -> str:
    """The page, with each text between its two comments."""
    for name, text in TEXTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = f"{re.escape(start)}.*?{re.escape(end)}"
        block = f"{start}{text()}{end}"
        page, count = re.subn(pattern, lambda _, b=block: b, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"README.md needs {start} and {end} once; it has them {count} times."
            )
    return page


def memory() -> list[dict[str, Any]]:
    """Bytes that the backward pass of each norm carries, for each element of `x`."""
    import flax.linen
    import jax
    import jax.numpy as jnp

    import jax_layernorm

    shape = shapes.parse("gpt2")
    x = jnp.ones(shape, jnp.bfloat16)
    norms = {"ours": jax_layernorm.linen.LayerNorm(), "flax": flax.linen.LayerNorm()}
    results = []
    for name, norm in norms.items():
        variables = norm.init(jax.random.key(0), x)
        _, backward = jax.vjp(jax.jit(norm.apply), variables, x)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
        results.append(
            {"shape": str(shape), "dtype": "bfloat16", "norm": name}
            | {"bytes an element": kept / x.size}
        )
    return results


def draw(path: pathlib.Path) -> None:
    """Times of the forward and backward pass on two threads, over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recorded = load("cpu-benchmark")
    joint = [r for r in over_ours(recorded, "ms") if r["program"] == "joint"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        chosen = [r for r in joint if r["dtype"] == dtype and r["threads"] == 2]
        for at, (norm, label) in enumerate((("flax", "Flax"), ("torch", "torch"))):
            ratio = {r["shape"]: r["ratio"] for r in chosen if r["norm"] == norm}
            places = [i + 0.4 * (at - 0.5) for i in range(len(ratio))]
            axis.bar(places, ratio.values(), 0.4, label=label, color=f"C{2 * at}")
            axis.set_xticks(range(len(ratio)), ratio, fontsize=7, rotation=30)
        axis.axhline(1, color="black", linewidth=1, label="jax_layernorm")
        axis.set_title(f"{dtype}, 2 threads", fontsize=9)
    axes[0].set_ylabel("time over ours", fontsize=9)
    axes[0].legend(fontsize=8)
    figure.suptitle(
        "Forward and backward pass on a CPU (higher: slower than jax_layernorm)\n"
        + where(recorded, "flax", "torch"),
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, json=False)
    parser.add_argument("--write", action="store_true", help="write README.md")
    parser.add_argument("--memory", action="store_true", help="count the memory again")
    options = parser.parse_args(arguments)
    if options.memory:
        found = memory()
        report.write_json(str(RESULTS / "memory.json"), report.environment(), found)
    for name, text in TEXTS.items():
        print(f"{name}: {text()}")
    if options.write:
        README.write_text(filled(README.read_text()))
        draw(PICTURE)


if __name__ == "__main__":
    main()
