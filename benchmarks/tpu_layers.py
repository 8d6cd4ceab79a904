"""What a decoder costs on a TPU with each norm: cycles, bytes, memory; without a TPU.

    layer     one pre-norm layer, attention and relu, and all its gradients
    scanned   four of them in a scan
    remat     the same, with each layer computed again in the backward pass
    block     `h + relu(norm(h) @ W1) @ W2` and its gradients; it has no second norm

`--norms` takes two more names. "fused add" is our kernels with the residual sum before a
layer's second norm fused in (the sum before the first norm belongs to another layer).
"none" is a model without norms, the best that a norm could reach. Attention is JAX's
flash attention kernels, or XLA's. Parameters of norms are float32.

Cycles are the compiler's estimates for its fusions, where loops count as often as they
run, plus those of each kernel's schedule. Our kernels count at least the time that their
bytes take, and attention counts only the blocks that are not above the diagonal. Ratios
are to Flax's norm, if it was measured and its program fits into the chip's memory; lower
is better.

    python -m benchmarks.tpu_layers --generations v5e --json layers.json
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import re
from typing import Any

from benchmarks.support import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks.support import (  # noqa: E402
    hlo_bytes,
    peers,
    programs,
    report,
    shapes,
    tpu_cycles,
    tpu_passes,
)

DTYPE = jnp.bfloat16
SCHEDULED = (2, 8)
"""Sequences and heads whose attention is scheduled; cycles grow in proportion to both."""
PROGRAMS = ("layer", "scanned", "remat", "block")
ATTENTION = {"flash": programs.flash_attention, "xla": programs.xla_attention}
NORMS = ("flax", "xla", "pallas_tpu", "fused add", "none")


def norm_called(name: str) -> tuple[peers.Norm, peers.AddNorm | None]:
    """The norm, and that of a residual sum if the sum is fused into it."""
    if name == "none":
        return lambda params, x: x, None
    if name == "fused add":
        return peers.NORMS["pallas_tpu"][:2]
    return peers.NORMS[name].norm, None


def schedules(generation: str, shape: shapes.Shape) -> dict[str, float]:
    """Cycles of each kernel, compiled alone. Runs in its own process: see `tpu_cycles`."""
    tpu_cycles.keep_schedules()
    device = compilers.device("tpu", generation)
    found = {}
    for name in tpu_passes.PASSES:
        measured = tpu_passes.measure(
            generation, device, name, "pallas_tpu", shape, DTYPE
        )
        array = shape.rows * shape.features * jnp.dtype(DTYPE).itemsize
        slowest = max(measured["cycles over roofline"], measured["bytes over floor"])
        found[name] = slowest * tpu_cycles.roofline(
            generation, array * programs.FLOOR_ARRAYS[name]
        )
    batch, length, heads = programs.heads_of(shape)
    q = programs.abstract((*SCHEDULED, length, programs.HEAD), DTYPE)

    def attention(q: Any, k: Any, v: Any, dmixed: Any) -> Any:
        mixed, pullback = jax.vjp(programs.flash_by_head, q, k, v)
        return mixed, pullback(dmixed)

    made = programs.Program(attention, (q,) * 4)
    build = functools.partial(compilers.compile_for, "tpu", device, *made)
    compiled, cycles = tpu_cycles.of_kernels(build)
    blocks = -(-length // programs.FLASH_BLOCK)
    run = (blocks + 1) / (2 * blocks)  # blocks above the diagonal are skipped
    run *= batch * heads / math.prod(SCHEDULED)
    for line in compiled.as_text().splitlines():
        kernel = kernel_of(line, 0)
        if kernel is not None:
            found[kernel] = run * cycles[line.split()[0].removeprefix("%")]
    return found


def kernel_of(line: str, elements: int) -> str | None:
    """The key in `schedules` of the kernel that an instruction calls, or None."""
    if 'custom_call_target="tpu_custom_call"' not in line:
        return None
    name = line.removeprefix("ROOT ").split()[0]
    ours = re.match("%layer_norm_(forward|backward)", name)
    if ours:
        sums = "add " if whole_arrays(line, elements) == 4 else ""
        return sums + ours.group(1)
    flash = re.search("flash_mha_bwd_(dkv|dq)|flash_attention", name)
    assert flash is not None, name
    return f"attention {flash.group(1) or 'forward'}"


def cycles_of(hlo: str, kernels: dict[str, float], elements: int) -> float:
    """Cycles of one run of the whole program."""
    computations = hlo_bytes.computations(hlo)

    def of(name: str) -> float:
        total = 0.0
        for line in computations[name]:
            body = re.search(r" while\(.*body=%([\w.\-]+)", line)
            kernel = kernel_of(line.strip(), elements)
            if body:
                trips = hlo_bytes.loop_trips(line, programs.LAYERS)
                total += of(body.group(1)) * trips
            elif kernel is not None:
                total += kernels[kernel]
            else:
                total += sum(tpu_cycles.xla_cycles(line).values())
        return total

    return of("ENTRY")


def whole_arrays(line: str, elements: int) -> int:
    """Operands and results of a kernel that are of the size of x."""
    results = line.partition(" custom-call(")[0]
    operands = re.findall(r"operand_layout_constraints=\{(.*?\})\}", line)
    found = re.findall(r"\w+\[([\d,]+)\]", " ".join([results, *operands]))
    return sum(math.prod(map(int, dims.split(","))) == elements for dims in found)


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--generations", nargs="+", default=["v5e"],
                        choices=compilers.GENERATIONS["tpu"])  # fmt: skip
    parser.add_argument("--shape", type=shapes.parse, default=shapes.parse("8192x2048"))
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--attention", nargs="+", default=list(ATTENTION),
                        choices=ATTENTION)  # fmt: skip
    peers.add_argument(parser, NORMS, (*peers.JAX_NORMS, "fused add", "none"))
    options = parser.parse_args(arguments)
    reason = compilers.unavailable("tpu")
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/support/compilers.py\n")
    names = " ".join(options.generations)
    where = report.environment(f"TPU {names}, compiled without a device")
    report.print_environment(where)
    shape = options.shape
    found = peers.available(options.norms, "tpu")
    norms = [n for n in options.norms if n in (*found, "fused add", "none")]
    results = []
    # First, and in a process that ends, because only one process at a time can hold the
    # compiler.
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as pool:
        cycles = list(pool.map(schedules, options.generations, itertools.repeat(shape)))
    kernels = dict(zip(options.generations, cycles, strict=True))
    cases = [
        (generation, name, attention)
        for generation in options.generations
        for name in options.programs
        for attention in ([None] if name == "block" else options.attention)
    ]
    for generation, name, attention in cases:
        device = compilers.device("tpu", generation)
        flax: dict[str, float] = {}
        for norm in norms:
            function, fused = norm_called(norm)
            if attention is None:
                if fused is not None:
                    continue
                made = programs.block(function, shape, DTYPE)
            else:
                made = programs.decoder(
                    function, fused, shape, DTYPE,
                    layers=None if name == "layer" else programs.LAYERS,
                    remat=name == "remat",
                    attention=ATTENTION[attention],
                )  # fmt: skip
            try:
                compiled = compilers.compile_for("tpu", device, *made)
            except jax.errors.JaxRuntimeError as error:
                if "Ran out of memory on HBM" not in str(error):
                    raise
                print(generation, shape, name, attention, norm, "does not fit")
                continue
            hlo = compiled.as_text()
            elements = shape.rows * shape.features
            measured = {
                "cycles": cycles_of(hlo, kernels[generation], elements),
                "bytes": hlo_bytes.total(hlo, programs.LAYERS),
                "temp": compiled.memory_analysis().temp_size_in_bytes,
            }
            if norm == "flax":
                flax = measured
            ratios = {
                # A small program can have no temporary memory.
                f"{k} over flax": v / flax[k] if flax and flax[k] else None
                for k, v in measured.items()
            }
            results.append({"generation": generation, "shape": str(shape),
                            "program": name, "attention": attention, "norm": norm,
                            **measured, **ratios})  # fmt: skip
            print(*results[-1].values(), flush=True)
            report.write_json(options.json, where, results)
    print()
    if results:
        report.print_table(tuple(results[0]), [tuple(r.values()) for r in results])


if __name__ == "__main__":
    main()
