"""How many bytes compiled programs move, on TPU and CUDA, without the hardware.

Programs: joint, forward and backward in one jit; block, a norm followed by matrix
products; layers, a scanned decoder of 4 layers with two norms each; and the others in
`benchmarks.support.programs`. Parameters are float32.

The table gives bytes per element of x, where each operand and result of a kernel counts
once; these bytes divided by the least that the program could move ("over the floor") and
by Flax's; temporary memory in MiB; and the seconds to lower the program, which includes
compiling our CUDA kernels. Lower is better. The norm "equations" is our XLA
implementation without its barriers, sums in parts and one-pass statistics.

The wheels that this needs are listed in `benchmarks/support/compilers.py`.

    python -m benchmarks.compile_only --platform cuda --programs joint block layers
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.support import compilers

compilers.keep_to_the_host()

import jax.numpy as jnp  # noqa: E402

from benchmarks.support import (  # noqa: E402
    hlo_bytes,
    peers,
    programs,
    report,
    shapes,
)
from jax_layernorm import _equations  # noqa: E402
from jax_layernorm._kernels import KERNELS, xla  # noqa: E402

EQUATIONS = "equations"
NORMS = ("ours", "xla", EQUATIONS, "ours autodiff", "flax")


class Equations:
    """The bare equations as an implementation, without what `xla` adds to them."""

    platforms = xla.platforms
    not_default = staticmethod(xla.not_default)

    def forward(self, problem: Any) -> Any:
        return _equations.forward

    def backward(self, problem: Any) -> Any:
        return _equations.backward


@contextlib.contextmanager
def equations_registered() -> Iterator[None]:
    """Registers `implementation="equations"`, last in the order of preference."""
    KERNELS[EQUATIONS] = Equations()
    try:
        yield
    finally:
        del KERNELS[EQUATIONS]


def measure(
    platform: str, device: Any, program: str, norm: str, shape: shapes.Shape, dtype: Any
) -> dict[str, Any]:
    """Bytes and temporary memory of one program."""
    with equations_registered():
        peer = peers.ours(EQUATIONS) if norm == EQUATIONS else peers.NORMS[norm]
        made = programs.make(program, peer, shape, dtype)
        start = time.perf_counter()
        compilers.lower_for(platform, device, *made)
        lower_seconds = time.perf_counter() - start
        compiled = compilers.compile_for(platform, device, *made)
    hlo = compiled.as_text()
    return {
        "program": program,
        "norm": norm,
        "shape": str(shape),
        "dtype": jnp.dtype(dtype).name,
        "bytes": hlo_bytes.total(hlo, programs.LAYERS),
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "floor arrays": programs.FLOOR_ARRAYS[program],
        "kernels": hlo_bytes.kernels(hlo),
        "lower s": lower_seconds,
    }


def with_ratios(cases: list[dict[str, Any]], shape: shapes.Shape) -> None:
    """Adds bytes an element, over the floor and over Flax's, to one program's cases."""
    flax = next((c["bytes"] for c in cases if c["norm"] == "flax"), None)
    elements = shape.rows * shape.features
    for case in cases:
        case["bytes an element"] = case["bytes"] / elements
        arrays = case["floor arrays"]
        floor = arrays and arrays * elements * jnp.dtype(case["dtype"]).itemsize
        case["over the floor"] = case["bytes"] / floor if floor else None
        case["over flax"] = case["bytes"] / flax if flax else None


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--platform", choices=("tpu", "cuda"), required=True)
    parser.add_argument("--generation", help="TPU v4, v5e, v5p, v6e, v7x; CUDA sm_90a")
    parser.add_argument("--programs", nargs="+", default=["joint", "block"],
                        choices=tuple(programs.PROGRAMS))  # fmt: skip
    peers.add_argument(parser, NORMS, (*peers.JAX_NORMS, EQUATIONS))
    parser.add_argument("--shape", type=shapes.parse, default=shapes.SHAPES["large"])
    shapes.add_dtypes(parser, "bfloat16", "float32")
    parser.add_argument(
        "--kernels", action="store_true", help="also print the bytes of each kernel"
    )
    options = parser.parse_args(arguments)
    platform = options.platform
    reason = compilers.unavailable(platform)
    if reason is not None:
        parser.exit(1, f"{reason}; see benchmarks/support/compilers.py\n")
    default = {"tpu": "v5e", "cuda": "sm_90a"}[platform]
    generation = options.generation or default
    if generation not in compilers.GENERATIONS[platform]:
        parser.error(f"{platform} has {compilers.GENERATIONS[platform]}")

    where = report.environment(f"{platform} {generation}, compiled without a device")
    report.print_environment(where)
    device = compilers.device(platform, generation)
    found = peers.available(set(options.norms) - {EQUATIONS}, platform)
    norms = [name for name in options.norms if name in (*found, EQUATIONS)]
    results = []
    for program in options.programs:
        for dtype in options.dtypes:
            cases = [
                measure(platform, device, program, norm, options.shape, dtype)
                for norm in norms
            ]
            with_ratios(cases, options.shape)
            results += cases
    columns = ("program", "dtype", "norm", "bytes an element", "over the floor",
               "over flax", "temp MiB", "lower s")  # fmt: skip
    print(f"{options.shape}; lower is better")
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
    ours = peers.implementation(platform) if "ours" in norms else None
    report.write_json(options.json, where, results, ours=ours)


if __name__ == "__main__":
    main()
