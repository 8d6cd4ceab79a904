"""Device-memory traffic of compiled programs on TPU and CUDA, without the hardware.

joint    forward and backward in one jit
block    out = h + relu(norm(h) @ W1) @ W2, and the gradients of all of it
layers   a scanned decoder of 4 layers, two norms each

by ours as the package lowers it by itself, ours in the form for XLA, the bare equations
("plain"), autodiff of them, and Flax's linen.LayerNorm; parameters float32. The table
gives bytes, each operand and result of a kernel counted once, an element of x; temporary
memory in MiB; and the ratio of bytes to Flax's. The floor of joint is x, y, x, dy and dx,
each once: 5 arrays. Which wheels this needs: `benchmarks/compilers.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from benchmarks import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_layernorm as jln  # noqa: E402
from benchmarks import hlo_bytes, peers, programs, report, shapes  # noqa: E402
from jax_layernorm import _equations  # noqa: E402
from jax_layernorm._kernels import xla  # noqa: E402

NORMS = ("ours", "xla", "plain", "autodiff", "flax")
JOINT_FLOOR = 5  # arrays: x, y, x, dy, dx


@contextlib.contextmanager
def without_barriers() -> Iterator[None]:
    """The package's XLA form as the bare equations."""
    kept = xla.forward, xla.backward
    xla.forward = lambda problem: _equations.forward
    xla.backward = lambda problem: _equations.backward
    jax.clear_caches()
    try:
        yield
    finally:
        xla.forward, xla.backward = kept
        jax.clear_caches()


def norm_called(name: str) -> peers.Norm:
    if name in ("xla", "plain", "pallas_tpu"):
        implementation = "xla" if name == "plain" else name
        return functools.partial(
            jln.layer_norm, epsilon=peers.EPSILON, implementation=implementation
        )
    return {
        "ours": peers.ours,
        "autodiff": peers.ours_autodiff,
        "flax": peers.flax,
        "tokamax": peers.tokamax,
    }[name]


def measure(
    platform: str, device: Any, program: str, norm: str, shape: shapes.Shape, dtype: Any
) -> dict[str, Any]:
    """Bytes and temporary memory of one program."""
    made = programs.PROGRAMS[program](norm_called(norm), shape, dtype)
    with without_barriers() if norm == "plain" else contextlib.nullcontext():
        compiled = compilers.compile_for(platform, device, *made)
    hlo = compiled.as_text()
    return {
        "program": program,
        "norm": norm,
        "shape": str(shape),
        "dtype": jnp.dtype(dtype).name,
        "bytes": hlo_bytes.total(hlo, programs.LAYERS),
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": hlo_bytes.kernels(hlo),
    }


def with_ratios(cases: list[dict[str, Any]], shape: shapes.Shape) -> None:
    """Adds bytes an element, over the floor and over Flax's, to one program's cases."""
    flax = next((c["bytes"] for c in cases if c["norm"] == "flax"), None)
    elements = shape.rows * shape.features
    for case in cases:
        case["bytes an element"] = case["bytes"] / elements
        if case["program"] == "joint":
            floor = JOINT_FLOOR * elements * jnp.dtype(case["dtype"]).itemsize
            case["over the floor"] = case["bytes"] / floor
        case["over flax"] = case["bytes"] / flax if flax else None


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--platform", choices=("tpu", "cuda"), required=True)
    parser.add_argument("--generation", help="TPU v4, v5e, v5p, v6e, v7x; CUDA sm_90a")
    parser.add_argument("--programs", nargs="+", default=["joint", "block"],
                        choices=tuple(programs.PROGRAMS))  # fmt: skip
    parser.add_argument(
        "--norms", nargs="+", default=NORMS, choices=(*NORMS, "tokamax", "pallas_tpu")
    )
    parser.add_argument("--shape", type=shapes.parse, default=shapes.SHAPES["large"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--kernels", action="store_true", help="and bytes of each kernel"
    )
    options = parser.parse_args(arguments)
    platform = options.platform
    reason = compilers.unavailable(platform)
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/compilers.py\n")
    default = {"tpu": "v5e", "cuda": "sm_90a"}[platform]
    generation = options.generation or default
    if generation not in compilers.GENERATIONS[platform]:
        parser.error(f"{platform} has {compilers.GENERATIONS[platform]}")

    where = report.environment(f"{platform} {generation}, compiled without a device")
    report.print_environment(where)
    device = compilers.device(platform, generation)
    results = []
    for program in options.programs:
        for dtype in options.dtypes:
            cases = [
                measure(platform, device, program, norm, options.shape, dtype)
                for norm in options.norms
            ]
            with_ratios(cases, options.shape)
            results += cases
    columns = ("program", "dtype", "norm", "bytes an element", "over the floor",
               "over flax", "temp MiB")  # fmt: skip
    print(f"{options.shape}")
    report.print_table(
        columns,
        [[{**c, "temp MiB": c["temp"] / 2**20}.get(key) for key in columns]
         for c in results],
    )  # fmt: skip
    if options.kernels:
        for case in results:
            print(case["program"], case["dtype"], case["norm"])
            for name, nbytes in case["kernels"]:
                print(f"  {nbytes / (options.shape.rows * options.shape.features):8.3f}"
                      f"  {name}")  # fmt: skip
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
