"""Times on a GPU or TPU, by its clock: ours beside Flax, tokamax and plain custom_vjp.

    ours        jax_layernorm, as it chooses; xla, pallas_tpu: by name
    plain       a custom_vjp as people write it
    flax, tokamax: where installed; tokamax as it chooses, its own kernels on a GPU
    copy        x is copied: what the memory can do

Programs: forward, with what it saves for the backward pass; backward, from what that
saved; joint, both in one; block (`benchmarks.programs`). Parameters are float32.

"device ms" is the median over calls of what `jax.profiler` saw the device do, without the
host; "wall ms" the time of queued calls over their number. Calls take turns with up to
eight sets of inputs, of 256 MiB together at the most, so that large ones are in no cache.
"GB/s" are the least bytes the pass can move over its time. Errors of y, dx, dscale and
dbias against float64 are in units of the last place (`benchmarks.accuracy`). On a CPU,
which has no such clock, there are wall times only: `benchmarks.cpu` is for CPUs.

    python -m benchmarks.run --json run.json
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm as jln
from benchmarks import accuracy, peers, programs, report, shapes

NORMS = ("ours", "xla", "pallas_tpu", "flax", "tokamax", "plain", "copy")
FLOORS = {"forward": 2, "backward": 3, "joint": 4, "block": None}
"""Arrays of the size of x that must cross memory."""
PROGRAMS = ("forward", "backward", "joint", "block")
DEFAULT_SHAPES = ("bert-large", "large", "pairs", "gpt2", "one-token", "uneven")
ROTATED_BYTES = 256 << 20


def norms(names: list[str]) -> dict[str, peers.Norm | None]:
    """Those that are here; None for the copy."""
    found: dict[str, peers.Norm | None] = {}
    for name in names:
        if name == "copy":
            found[name] = None
        elif name in ("ours", "xla", "pallas_tpu"):
            if name == "pallas_tpu" and jax.default_backend() != "tpu":
                print("pallas_tpu left out: it is for TPUs")
                continue
            found[name] = functools.partial(
                jln.layer_norm,
                epsilon=peers.EPSILON,
                implementation=None if name == "ours" else name,
            )
        else:
            found |= peers.available((name,))
    if "tokamax" in found:
        found["tokamax"] = functools.partial(peers.tokamax, implementation=None)
    return found


@functools.lru_cache(1)  # the norms of a table share them
def drawn(shape: shapes.Shape, dtype: Any) -> list[tuple[Any, jax.Array, jax.Array]]:
    """`params, x, dy`, so often that large ones are in no cache."""
    array = shape.rows * shape.features * dtype.itemsize
    sets = max(1, min(8, ROTATED_BYTES // (3 * array)))
    return [accuracy.inputs(shape, 1.0, dtype, seed) for seed in range(sets)]


@functools.lru_cache(1)
def right(shape: shapes.Shape, dtype: Any) -> list[np.ndarray]:
    """What the first of `drawn` should come to."""
    return accuracy.oracle(*drawn(shape, dtype)[0])


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
    norm: peers.Norm,
    shape: shapes.Shape,
    dtype: Any,
    given: tuple[Any, jax.Array, jax.Array],
) -> tuple[Any, ...]:
    """Real ones: a backward pass is given what its own forward pass saved."""
    params, x, dy = given
    if program == "forward":
        return params, x
    if program == "joint":
        return params, x, dy
    if program == "backward":
        forward = programs.forward(norm, shape, dtype).function
        return jax.jit(forward)(params, x)[1], dy
    return params, *block_weights(shape.features, dtype), x, dy


def device_seconds(profile: Any, calls: int) -> float | None:
    """Median seconds of a call on the first device; None where no device has a clock.

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
                f"each of {calls} calls must have left as many events on {plane.name},"
                f" and there are {len(events)}; profile nothing else meanwhile."
            )
        each = len(events) // calls
        of_calls = (events[i : i + each] for i in range(0, len(events), each))
        nanoseconds = [sum(duration for _, duration in call) for call in of_calls]
        return statistics.median(nanoseconds) / 1e9
    return None


def timed(
    function: Callable[..., Any], sets: list[tuple[Any, ...]], calls: int
) -> tuple[float | None, float]:
    """Seconds of a call: the device's, and wall time over queued calls."""

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
    norm: peers.Norm | None,
    program: str,
    shape: shapes.Shape,
    dtype: Any,
    calls: int,
) -> dict[str, Any] | None:
    """None for a copy that is no forward pass."""
    sets = drawn(shape, dtype)
    if norm is None:
        if program != "forward":
            return None
        function: Any = jnp.copy
        given: list[Any] = [(x,) for _, x, _ in sets]
    else:
        function = programs.PROGRAMS[program](norm, shape, dtype).function
        given = [arguments(program, norm, shape, dtype, one) for one in sets]
    jitted = jax.jit(function)
    device, wall = timed(jitted, given, calls)
    floor = FLOORS[program]
    array = sets[0][1].nbytes
    result = {
        "shape": str(shape),
        "dtype": dtype.name,
        "program": program,
        "norm": name,
        "device ms": None if device is None else device * 1e3,
        "wall ms": wall * 1e3,
        "GB/s": floor and floor * array / (wall if device is None else device) / 1e9,
    }
    if program == "joint" and norm is not None:
        out = jitted(*given[0])
        result |= accuracy.of_results(out, right(shape, dtype))
    return result


def main(command_line: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    shapes.add_argument(parser, DEFAULT_SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument("--calls", type=int, default=20, help="that are profiled")
    options = parser.parse_args(command_line)
    where = report.environment()
    report.print_environment(where)
    found = norms(options.norms)
    results = []
    for dtype in map(jnp.dtype, options.dtypes):
        for shape in options.shapes:
            for program in options.programs:
                measured = (
                    measure(name, norm, program, shape, dtype, options.calls)
                    for name, norm in found.items()
                )
                cases = [case for case in measured if case is not None]
                if not cases:  # of the copy alone
                    continue
                results += cases
                clock = "wall ms" if cases[0]["device ms"] is None else "device ms"
                ours = next((c[clock] for c in cases if c["norm"] == "ours"), None)
                header = list(max(cases, key=len))  # the copy has no errors
                report.print_table(
                    (*header, "over ours"),
                    [[*map(c.get, header), ours and c[clock] / ours] for c in cases],
                )
                report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
