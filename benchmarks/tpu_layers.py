"""A decoder with each norm, on a TPU: cycles, bytes and memory; compiled without a TPU.

    layer     one pre-norm layer, attention and relu, and all its gradients
    scanned   four of them in a scan
    remat     the same, each layer computed again in the backward pass
    block     `h + relu(norm(h) @ W1) @ W2` and its gradients, which has no second norm

with Flax's norm, ours in XLA's form, our kernels, and these with the residual sum before
a layer's second norm fused in (the one before its first is another layer's). Cycles are
the compiler's own estimates for its fusions, loops as often as they run, and for a
kernel of ours those of its schedule, but no fewer than its bytes take. Parameters of
norms are float32. Ratios are to Flax.

    python -m benchmarks.tpu_layers --generations v5e --json layers.json
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import compilers

compilers.keep_to_the_host()

import jax.numpy as jnp  # noqa: E402

import jax_layernorm as jln  # noqa: E402
from benchmarks import (  # noqa: E402
    hlo_bytes,
    peers,
    programs,
    report,
    shapes,
    tpu_cycles,
)
from benchmarks.tpu_kernels import FLOORS  # noqa: E402

PROGRAMS = ("layer", "scanned", "remat", "block")
NORMS = ("flax", "xla", "pallas_tpu", "fused add")


def norm_called(name: str) -> tuple[peers.Norm, Any]:
    """The norm, and that of a residual sum or None."""
    if name == "flax":
        return peers.flax, None
    options = {
        "epsilon": peers.EPSILON,
        "implementation": "xla" if name == "xla" else "pallas_tpu",
    }
    add = functools.partial(jln.add_layer_norm, **options)
    fused = add if name == "fused add" else None
    return functools.partial(jln.layer_norm, **options), fused


def kernel_cycles(generation: str, shape: shapes.Shape) -> dict[str, float]:
    """Of each of our kernels, alone; in a process of its own (see `tpu_cycles`)."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.tpu_kernels", "--json", file.name]
            + ["--generations", generation, "--shapes", str(shape)]
            + ["--dtypes", "bfloat16"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        measured = json.load(file)["results"]
    found = {}
    for kernel in measured:
        array = shape.rows * shape.features * jnp.dtype(jnp.bfloat16).itemsize
        floor = tpu_cycles.roofline(generation, array * FLOORS[kernel["pass"]])
        slowest = max(kernel["cycles over roofline"], kernel["bytes over floor"])
        found[kernel["pass"]] = slowest * floor
    return found


def cycles_of(hlo: str, kernels: dict[str, float], elements: int) -> float:
    """Of a run of the whole program."""
    computations = hlo_bytes.computations(hlo)

    def of(name: str) -> float:
        total = 0.0
        for line in computations[name]:
            body = re.search(r" while\(.*body=%([\w.\-]+)", line)
            estimate = tpu_cycles.xla_cycles(line)
            ours = re.search(r"%layer_norm_(forward|backward)[\w.\-]* = ", line)
            if body:
                trips = hlo_bytes.loop_trips(line, programs.LAYERS)
                total += of(body.group(1)) * trips
            elif ours:
                kernel = ours.group(1)
                sums = "add " if whole_arrays(line, elements) == 4 else ""
                total += kernels[sums + kernel]
            else:
                total += sum(estimate.values())
        return total

    return of("ENTRY")


def whole_arrays(line: str, elements: int) -> int:
    """Operands and results of a kernel that are of the size of x."""
    text = re.split(r"custom_call_target|, metadata", line)[0]
    found = re.findall(r"\w+\[([\d,]+)\]", text)
    return sum(math.prod(map(int, dims.split(","))) == elements for dims in found)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--generations", nargs="+", default=["v5e"],
                        choices=compilers.GENERATIONS["tpu"])  # fmt: skip
    parser.add_argument("--shape", type=shapes.parse, default=shapes.parse("8192x2048"))
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    options = parser.parse_args(arguments)
    reason = compilers.unavailable("tpu")
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/compilers.py\n")
    names = " ".join(options.generations)
    where = report.environment(f"TPU {names}, compiled without a device")
    report.print_environment(where)
    dtype, shape = jnp.bfloat16, options.shape
    results = []
    # All of them first: one process at a time can hold the compiler.
    kernels = {g: kernel_cycles(g, shape) for g in options.generations}
    for generation in options.generations:
        device = compilers.device("tpu", generation)
        for name in options.programs:
            flax: dict[str, float] = {}
            for norm in options.norms:
                norms = norm_called(norm)
                if name == "block":
                    if norms[1] is not None:
                        continue
                    made = programs.block(norms[0], shape, dtype)
                else:
                    made = programs.decoder(
                        *norms, shape, dtype,
                        layers=None if name == "layer" else programs.LAYERS,
                        remat=name == "remat",
                    )  # fmt: skip
                compiled = compilers.compile_for("tpu", device, *made)
                hlo = compiled.as_text()
                measured = {
                    "cycles": cycles_of(
                        hlo, kernels[generation], shape.rows * shape.features
                    ),
                    "bytes": hlo_bytes.total(hlo, programs.LAYERS),
                    "temp": compiled.memory_analysis().temp_size_in_bytes,
                }
                flax = flax or measured
                ratios = {f"{k} over flax": v / flax[k] for k, v in measured.items()}
                results.append({"generation": generation, "program": name,
                                "norm": norm, **measured, **ratios})  # fmt: skip
                print(*results[-1].values(), flush=True)
    print(f"\n{shape}, bfloat16")
    report.print_table(tuple(results[0]), [tuple(r.values()) for r in results])
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
