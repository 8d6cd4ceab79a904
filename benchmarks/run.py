"""Times of layer norms on a GPU or TPU by its own clock, ours beside others'.

Programs, defined in `benchmarks.support.programs`: forward, including what it saves for
the backward pass; backward, from what forward saved; joint, both in one; block; and by
name inference and those with a residual sum. "copy" copies x, which shows how fast the
memory is. Parameters are float32, except torch's, which have the dtype of x. With `--rms`
the norms are RMS norms.

"device ms" is the median over calls of the time in which `jax.profiler` saw the device
work, so the host does not count; "wall ms" is the time of queued calls divided by their
number. Calls take turns with up to eight sets of inputs, at most 256 MiB together, so
that large inputs are in no cache. "first call s" is mostly tracing, lowering and
compiling. "floor arrays" is how many arrays of the size of x the program must at least
read or write, and "GB/s" is their bytes divided by its time (higher is better). Errors of
y, dx, dscale and dbias are in units in the last place (`benchmarks.support.errors`). On a
CPU only wall times are measured, because a CPU has no clock of its own; use
`benchmarks.cpu` for CPUs.

    python -m benchmarks.run --json run.json
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.support import errors, peers, programs, report, shapes, torch_gpu

NORMS = ("ours", "xla", "cuda", "pallas_tpu", "flax", "tokamax", "plain", "copy")
PROGRAMS = ("forward", "backward", "joint", "block")
MORE_PROGRAMS = ("inference", "block inference", "add", "add backward", "add joint")
DEFAULT_SHAPES = ("bert-large", "large", "pairs", "gpt2", "one-token", "uneven")
ROTATED_BYTES = 256 << 20


@functools.lru_cache(1)  # the norms of a table share them
def drawn(shape: shapes.Shape, dtype: Any) -> list[tuple[Any, jax.Array, jax.Array]]:
    """Sets of `params, x, dy`, enough of them to keep large ones out of caches."""
    array = shape.rows * shape.features * dtype.itemsize
    sets = max(1, min(8, ROTATED_BYTES // (3 * array)))
    return [errors.inputs(shape, 1.0, dtype, seed) for seed in range(sets)]


@functools.lru_cache(1)
def right(shape: shapes.Shape, dtype: Any) -> list[np.ndarray]:
    """The correct results for the first set of `drawn`."""
    return errors.oracle(*drawn(shape, dtype)[0])


@functools.lru_cache(1)
def block_weights(features: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    wide = programs.WIDEN * features
    first, second = (
        jnp.asarray(rng.standard_normal(size) / np.sqrt(size[0]), dtype)
        for size in ((features, wide), (wide, features))
    )
    return first, second


def arguments(
    program: str,
    peer: peers.Peer,
    shape: shapes.Shape,
    dtype: Any,
    given: tuple[Any, jax.Array, jax.Array],
) -> tuple[Any, ...]:
    """Arrays for a program; a backward pass gets what its own forward pass saved."""
    params, x, dy = given
    if program in ("forward", "inference"):
        return params, x
    if program in ("joint", "add", "add joint"):  # dy is the residual, too
        return given
    if program == "backward":
        return jax.jit(functools.partial(jax.vjp, peer.norm))(params, x)[1], dy
    if program == "add backward":
        vjp = jax.jit(functools.partial(jax.vjp, peer.add))(params, x, dy)[1]
        return vjp, (dy, x)
    weights = block_weights(shape.features, dtype)
    return params, *weights, x, *((dy,) if program == "block" else ())


def device_seconds(profile: Any, calls: int) -> float | None:
    """Median seconds of a call on the first device; None if no device has a clock.

    Args:
      profile: a `jax.profiler.ProfileData` of `calls` calls of one program.
    """
    for plane in profile.planes:
        if plane.name == "/device:TPU:0":
            wanted = "XLA Modules"
        elif plane.name == "/device:GPU:0":
            wanted = "Stream"
        else:
            continue
        events = sorted(
            (event.start_ns, event.duration_ns)
            for line in plane.lines
            if line.name.startswith(wanted)
            for event in line.events
        )
        if not events or len(events) % calls:
            raise ValueError(
                f"each of {calls} calls must leave the same number of events on"
                f" {plane.name}; got {len(events)} events. Profile nothing else"
                " meanwhile."
            )
        each = len(events) // calls
        of_calls = (events[i : i + each] for i in range(0, len(events), each))
        nanoseconds = [sum(duration for _, duration in call) for call in of_calls]
        return statistics.median(nanoseconds) / 1e9
    return None


def timed(
    function: Callable[..., Any], sets: list[tuple[Any, ...]], calls: int
) -> tuple[float | None, float]:
    """Seconds of a call: by the device's clock, and wall time over queued calls."""

    def run() -> float:
        start = time.perf_counter()
        out = [function(*sets[i % len(sets)]) for i in range(calls)]
        jax.block_until_ready(out[-1])
        return (time.perf_counter() - start) / calls

    jax.block_until_ready(function(*sets[0]))
    wall = statistics.median(run() for _ in range(5))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        return device_seconds(profile, calls), wall


def measure(
    name: str,
    program: str,
    shape: shapes.Shape,
    dtype: Any,
    calls: int,
    *,
    rms: bool = False,
) -> dict[str, Any] | None:
    """One row of the table; None for a copy in a program other than forward."""
    sets = drawn(shape, dtype)
    if rms:
        sets = [({"scale": params["scale"]}, x, dy) for params, x, dy in sets]
    if name == "copy":
        if program != "forward":
            return None
        function: Any = jnp.copy
        given: list[Any] = [(x,) for _, x, _ in sets]
    else:
        peer = (peers.RMS_NORMS if rms else peers.NORMS)[name]
        function = programs.make(program, peer, shape, dtype).function
        given = [arguments(program, peer, shape, dtype, one) for one in sets]
    jitted = jax.jit(function)
    start = time.perf_counter()
    out = jax.block_until_ready(jitted(*given[0]))
    first_seconds = time.perf_counter() - start
    device, wall = timed(jitted, given, calls)
    floor = programs.FLOOR_ARRAYS[program]
    array = sets[0][1].nbytes
    result = {
        "shape": str(shape),
        "dtype": dtype.name,
        "program": program,
        "norm": f"{name} rms" if rms else name,
        "device ms": None if device is None else device * 1e3,
        "wall ms": wall * 1e3,
        "first call s": first_seconds,
        "floor arrays": floor,
        "GB/s": floor and floor * array / (wall if device is None else device) / 1e9,
    }
    if program == "joint" and not rms:
        result |= errors.of_results(out, right(shape, dtype))
    return result


def measure_torch(options: Any) -> list[dict[str, Any]]:
    """The rows of the norms in torch, which need a GPU; prints why one is left out."""
    rows = []
    for name in options.norms:
        if name not in torch_gpu.NORMS:
            continue
        reason = peers.import_error(torch_gpu.MODULES[name])
        if jax.default_backend() != "gpu":
            reason = "it is measured on GPUs; benchmarks.cpu measures torch on a CPU"
        if reason is None:
            rows += torch_gpu.measure(
                name, options.shapes, options.dtypes, options.calls
            )
        else:
            print(f"{name} left out: {reason}")
    return rows


def parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    shapes.add_argument(made, DEFAULT_SHAPES)
    shapes.add_dtypes(made, "bfloat16", "float32")
    made.add_argument(
        "--programs", nargs="+", default=PROGRAMS, choices=(*PROGRAMS, *MORE_PROGRAMS)
    )
    made.add_argument("--rms", action="store_true", help="RMS norms")
    known = dict.fromkeys((*peers.JAX_NORMS, "copy", *torch_gpu.NORMS))
    peers.add_argument(made, NORMS, known)
    made.add_argument(
        "--calls", type=report.positive, default=20, help="calls to profile"
    )
    return made


def main(command_line: list[str] | None = None) -> None:
    options = parser().parse_args(command_line)
    where = report.environment()
    report.print_environment(where)
    of_jax = set(options.norms) - set(torch_gpu.NORMS)
    found = peers.available(of_jax & set(peers.RMS_NORMS) if options.rms else of_jax)
    names = [name for name in options.norms if name in (*found, "copy")]
    of_torch = measure_torch(options)
    implementation = peers.implementation() if "ours" in names else None
    results = []
    for dtype in map(jnp.dtype, options.dtypes):
        for shape in options.shapes:
            for program in options.programs:
                measured = (
                    measure(name, program, shape, dtype, options.calls, rms=options.rms)
                    for name in names
                )
                cases = [case for case in measured if case is not None]
                place = (str(shape), dtype.name, program)
                cases += [
                    row
                    for row in of_torch
                    if (row["shape"], row["dtype"], row["program"]) == place
                ]
                if not cases:  # of the copy alone
                    continue
                results += cases
                clock = "wall ms" if cases[0]["device ms"] is None else "device ms"
                ours = next(
                    (c[clock] for c in cases if c["norm"].split()[0] == "ours"), None
                )
                header = list(max(cases, key=len))  # the copy has no errors
                print("GB/s: higher is better; all else: lower is better")
                report.print_table(
                    (*header, "over ours"),
                    [[*map(c.get, header), ours and c[clock] / ours] for c in cases],
                )
                report.write_json(options.json, where, results, ours=implementation)
    if not results:
        sys.exit("nothing was measured: no norm named can run here")


if __name__ == "__main__":
    main()
