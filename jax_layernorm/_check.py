"""`python -m jax_layernorm check`: is every implementation right and fast on this device?

Each implementation that can run here computes the four norms, forward and backward in
one program. Its results are compared with float64 NumPy, and its time with that of a
copy of as many bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import math
import platform as host
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm
from jax_layernorm import _functions, _kernels

SHAPES = (
    (4096, 768),
    (2048, 4096),
    (16384, 128),
    (256, 16384),
    (1000, 1000),
    (16, 8192),
)
DTYPES = ("bfloat16", "float32")
NORMS = {
    "layer_norm": _functions.layer_norm,
    "rms_norm": _functions.rms_norm,
    "add_layer_norm": _functions.add_layer_norm,
    "add_rms_norm": _functions.add_rms_norm,
}
ACCELERATOR_ROWS = 8
"""The factor for the rows on a GPU or TPU: its cache would hold the smaller arrays."""
ULPS = 8
"""The largest error of y or dx that is not wrong: a few roundings of float32."""
COMPARED = 1 << 21
"""How many elements of y, of dx and of the columns of dscale and dbias are compared with
NumPy, which takes its time. All others must be finite."""
SECONDS = 0.05
"""How long the calls of each program are timed, at least."""


class Problem(NamedTuple):
    """One case: host arrays, all of them random."""

    norm: str
    params: dict[str, np.ndarray]
    arrays: tuple[np.ndarray, ...]  # x, or x and residual
    cotangents: tuple[np.ndarray, ...]  # dy, or dy and dresidual_out

    @property
    def adds(self) -> bool:
        return len(self.arrays) == 2

    @property
    def moved_bytes(self) -> int:
        """The fewest bytes: each pass reads and writes the whole arrays once."""
        return (8 if self.adds else 5) * self.arrays[0].nbytes


class Errors(NamedTuple):
    """The largest errors, in units in the last place; NaN if a result has a NaN."""

    y: float
    dx: float
    sums: float  # dscale and dbias

    def too_large(self, rows: int) -> bool:
        """The error of a sum of n terms grows, by chance, like the square root of n."""
        limits = (ULPS, ULPS, ULPS + math.sqrt(rows))
        return not all(e <= limit for e, limit in zip(self, limits, strict=True))


class Row(NamedTuple):
    """One line of the table: one implementation of one problem."""

    shape: tuple[int, int]
    dtype: str
    norm: str
    implementation: str
    is_default: bool
    errors: Errors
    seconds: float
    copy_seconds: float

    @property
    def is_wrong(self) -> bool:
        """Flax's errors are shown but not judged."""
        return self.implementation != "Flax" and self.errors.too_large(self.shape[0])

    def __str__(self) -> str:
        rows, features = self.shape
        return (
            f"{f'{rows}x{features}':<12}{self.dtype:<10}{self.norm:<16}"
            f"{self.implementation:<12}{self.errors.y:>9.3g}{self.errors.dx:>9.3g}"
            f"{self.errors.sums:>9.3g}{self.seconds * 1e6:>10.0f}"
            f"{self.copy_seconds / self.seconds:>8.2f}{'  WRONG' * self.is_wrong}"
        )


HEADER = (
    f"{'':<50}{'error, ulp':^26}\n{'shape':<12}{'dtype':<10}{'norm':<16}"
    f"{'by':<12}{'y':>9}{'dx':>9}{'sums':>9}{'us':>10}{'of copy':>8}"
)


def draw(norm: str, shape: tuple[int, int], dtype: str) -> Problem:
    """Rows of mean 3 and standard deviation 1."""
    rng = np.random.default_rng(0)
    rows, features = shape

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    params = {"scale": 1 + 0.3 * normal(features)}
    if "layer" in norm:
        params["bias"] = 0.3 * normal(features)
    count = 2 if norm.startswith("add_") else 1
    arrays = [(normal(rows, features) + 3 / count).astype(dtype) for _ in range(count)]
    cotangents = [normal(rows, features).astype(dtype) for _ in range(count)]
    return Problem(norm, params, tuple(arrays), tuple(cotangents))


def program(norm: Callable[..., Any]) -> Any:
    """`(params, arrays, cotangents) -> (y, what was normalized), dparams, dx`, jitted."""

    def run(params: Any, arrays: Any, cotangents: Any) -> Any:
        out, pullback = jax.vjp(norm, params, *arrays)
        adds = len(arrays) == 2
        dparams, dx, *_ = pullback(cotangents if adds else cotangents[0])
        return out if adds else (out, arrays[0]), dparams, dx

    return jax.jit(run)


def platforms() -> tuple[str, ...]:
    """The names that lowering may use for this device's platform."""
    backend = jax.default_backend()
    return ("cuda", "rocm") if backend == "gpu" else (backend,)


def candidates(norm: str) -> dict[str, Callable[..., Any]]:
    """The implementations of this device's platform, and Flax's norm if installed."""
    found: dict[str, Callable[..., Any]] = {
        name: functools.partial(NORMS[norm], implementation=name)
        for name, kernel in _kernels.KERNELS.items()
        if set(platforms()) & set(kernel.platforms)
    }
    if importlib.util.find_spec("flax") is None:
        return found

    def flaxs(params: Any, x: Any, residual: Any = None) -> Any:
        import flax.linen as nn

        summed = x if residual is None else residual + x
        module = nn.LayerNorm if "layer" in norm else nn.RMSNorm
        y = module(dtype=x.dtype).apply({"params": params}, summed)
        return y if residual is None else (y, summed)

    return found | {"Flax": flaxs}


class Expected(NamedTuple):
    """What NumPy computes in float64, at some rows and some columns."""

    rows: np.ndarray
    columns: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    dx_size: np.ndarray
    """What cancels in `dx`, at the most: with few features `dx` itself is much smaller."""
    dscale: np.ndarray
    dbias: np.ndarray


def oracle(problem: Problem, normalized: np.ndarray) -> Expected:
    """The norm and its gradients in two passes; `normalized` is x or the stored sum."""
    count, features = normalized.shape
    rows, columns = (
        np.unique(np.linspace(0, n - 1, max(64, COMPARED // other), dtype=int))
        for n, other in ((count, features), (features, count))
    )
    x = normalized.astype(np.float32)
    mean = np.zeros((count, 1))
    if "layer" in problem.norm:
        mean = x.mean(1, dtype=np.float64, keepdims=True)
    rstd = np.array(
        [1 / np.sqrt(np.mean(np.square(row - m)) + 1e-6) for row, m in zip(
            x.astype(np.float64), mean, strict=True)]
    )[:, None]  # fmt: skip
    dy = problem.cotangents[0]

    def at(index: Any) -> tuple[np.ndarray, np.ndarray]:
        row = index[0]
        x_hat = (x[index].astype(np.float64) - mean[row]) * rstd[row]
        return x_hat, dy[index].astype(np.float64)

    x_hat, some_dy = at((rows, slice(None)))
    y = x_hat * problem.params["scale"] + problem.params.get("bias", 0)
    g = some_dy * problem.params["scale"]
    dx = g - x_hat * np.mean(g * x_hat, 1, keepdims=True)
    if "layer" in problem.norm:
        dx = dx - np.mean(g, 1, keepdims=True)
    dx, size = dx * rstd[rows], np.abs(g * rstd[rows])
    if problem.adds:
        dresidual_out = problem.cotangents[1][rows].astype(np.float64)
        dx, size = dx + dresidual_out, size + np.abs(dresidual_out)
    x_hat, some_dy = at((slice(None), columns))
    sums = (some_dy * x_hat).sum(0), some_dy.sum(0)
    return Expected(rows, columns, y, dx, size, *sums)


def ulps(actual: Any, expected: np.ndarray, size: Any = None) -> float:
    """The largest error, in units in the last place of the largest value of the row.

    That is the largest of `size`, or else of `expected`.
    """
    eps = float(jnp.finfo(actual.dtype).eps)
    values = expected if size is None else size
    largest = np.max(np.abs(values), -1, keepdims=True)
    unit = eps * 2.0 ** np.floor(np.log2(largest))
    return float(np.max(np.abs(np.asarray(actual, np.float64) - expected) / unit))


def errors_of(out: Any, problem: Problem) -> Errors:
    (y, normalized), dparams, dx = jax.device_get(out)
    right = oracle(problem, normalized)
    sums = [
        ulps(gradient[right.columns], getattr(right, f"d{name}"))
        for name, gradient in dparams.items()
    ]
    largest = float(np.max(sums))  # NaN if any of them is
    of_y = ulps(y[right.rows], right.y)
    of_dx = ulps(dx[right.rows], right.dx, right.dx_size)
    if not all(np.isfinite(a).all() for a in (y, dx, *dparams.values())):
        of_y = of_dx = math.nan
    return Errors(of_y, of_dx, largest)


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """The median time of a call; a few calls are queued at a time."""
    jax.block_until_ready(function(*arguments))
    calls, times, start = 1, [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < SECONDS:
        before = time.perf_counter()
        out = [function(*arguments) for _ in range(calls)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - before) / calls)
        calls = max(1, min(20, int(1e-3 / times[-1])))
    return statistics.median(times)


def copy_seconds_of(problem: Problem) -> float:
    """The time of a copy that moves as many bytes: it reads half, and writes half."""
    half = jnp.zeros(problem.moved_bytes // 8, jnp.float32)
    return seconds_of(jax.jit(jnp.copy), half)


def measure(problem: Problem, reasons: dict[str, str]) -> list[Row]:
    """A row for each implementation; `reasons` collects why some cannot run, or fail.

    One that fails has errors of NaN, so it is wrong.
    """
    arguments = jax.device_put((problem.params, problem.arrays, problem.cotangents))
    copy_seconds = copy_seconds_of(problem)
    x = problem.arrays[0]
    case = (x.shape, x.dtype.name, problem.norm)
    failed = (Errors(math.nan, math.nan, math.nan), math.nan)
    rows = []
    with _kernels.record_decisions() as decisions:
        try:
            program(NORMS[problem.norm]).lower(*arguments)
        except Exception as failure:
            reasons["the default"] = _text(failure)
            rows.append(Row(*case, "the default", True, *failed, copy_seconds))
    defaults = {decision.chosen for decision in decisions}
    for name, norm in candidates(problem.norm).items():
        function = program(norm)
        try:
            errors = errors_of(function(*arguments), problem)
            seconds = seconds_of(function, *arguments)
        except NotImplementedError as reason:
            reasons[name] = str(reason)
            continue
        except Exception as failure:  # of a compiler, a launch or a package
            errors, seconds = failed
            reasons[name] = _text(failure)
        is_default = defaults == {name}
        rows.append(Row(*case, name, is_default, errors, seconds, copy_seconds))
    return rows


def _text(failure: Exception) -> str:
    first = str(failure).partition("\n")[0]
    return f"it fails with {type(failure).__name__}: {first}"


def verdict(tables: list[list[Row]]) -> str:
    """What to use, in one sentence, from the rows of each problem."""
    speed = {
        name: [
            next(r.seconds for r in rows if r.implementation == "xla") / row.seconds
            for rows in tables
            for row in rows
            if row.implementation == name
        ]
        for name in _kernels.KERNELS
        if name != "xla"
    }
    means = {
        name: math.exp(statistics.fmean(map(math.log, ratios)))
        for name, ratios in speed.items()
        if ratios
    }
    if not means:
        return "Use the default: XLA's implementation is the only one that runs here."
    best = max(means, key=lambda name: means[name])
    cases = [row for rows in tables for row in rows]
    if means[best] < 1:
        what = _to_use("xla", cases)
        return f"Use {what}: {best} takes {1 / means[best]:.2f} times as long as XLA's."
    return (
        f"Use {_to_use(best, cases)}: {best} is right in all {len(speed[best])} cases, and"
        f" {means[best]:.2f} times as fast as XLA's implementation (geometric mean)."
    )


def _to_use(name: str, cases: list[Row]) -> str:
    by_default = [row.is_default for row in cases if row.implementation == name]
    if all(by_default):
        return "the default"
    in_some = f", the default in {sum(by_default)} of {len(by_default)} cases"
    return f"implementation={name!r}{in_some if any(by_default) else ''}"


def print_environment() -> None:
    """Prints versions and devices."""
    print(f"Python {host.python_version()} on {host.platform()}")
    print(f"jax_layernorm {jax_layernorm.__version__}")
    for package in ("jax", "jaxlib", "flax", "libtpu"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    devices = jax.devices()
    print(f"{len(devices)} {devices[0].platform} device(s): {devices[0].device_kind}")


def check(
    shapes: Sequence[tuple[int, int]] | None = None, dtypes: Sequence[str] = DTYPES
) -> int:
    """Prints the table and the verdict; returns 1 if anything is wrong, else 0."""
    print_environment()
    if shapes is None:
        factor = 1 if jax.default_backend() == "cpu" else ACCELERATOR_ROWS
        shapes = [(factor * rows, features) for rows, features in SHAPES]
    print(
        "\nForward and backward in one program, parameters float32. Errors in units in\n"
        "the last place (lower is better), against float64 NumPy; microseconds, the\n"
        "median of queued calls; and the bandwidth of a copy that it reaches (higher is\n"
        f"better).\n\n{HEADER}"
    )
    tables: list[list[Row]] = []
    reasons: dict[str, str] = {}
    for (rows, features), dtype, norm in itertools.product(shapes, dtypes, NORMS):
        tables.append(measure(draw(norm, (rows, features), dtype), reasons))
        print(*tables[-1], sep="\n", flush=True)
    for name, reason in reasons.items():
        print(f"\n{name} was left out of some: {reason}")
    wrong = [row for table in tables for row in table if row.is_wrong]
    if wrong:
        names = ", ".join(sorted({row.implementation for row in wrong}))
        print(f"\nWrong: {names}, in {len(wrong)} cases. Please report this table.")
        return 1
    print(f"\n{verdict(tables)}")
    return 0
