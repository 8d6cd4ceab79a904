"""The GPU kernel: CUDA C++ for NVIDIA GPUs, compiled for the problem at lowering.

Why: XLA computes the statistics, `y` and the sums over rows in separate kernels, and
moves about twice the least bytes. `norm.cu` reads each row once, each way. `_compile`
compiles it with NVRTC, for the GPU at hand. `launch.cc` launches the kernel that comes
with the call; building `launch.cc` takes nothing from CUDA.

Numerics: the formulas of `_equations`, in float32. A row's result depends only on that
row and on the number of features. `dscale` and `dbias` are summed in a fixed order,
which depends on the shape and on the number of multiprocessors.

Limits: bfloat16, float16 and float32; one row of parameters; no exported programs. The
threads of a block, or of a cluster from compute capability 9.0 on, must be able to hold
a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_layernorm import _equations
from jax_layernorm._equations import (
    BackwardOutputs,
    ForwardOutputs,
    NormSpec,
    RowStatistics,
)
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels import _library, _rows
from jax_layernorm._kernels._rows import reshaped
from jax_layernorm._kernels.cuda import _compile, _tiles

platforms = ("cuda",)
TYPES = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}

# The parameters of each kernel in norm.cu, without the last, which is a number.
PARAMETERS = {
    "norm_forward": (
        "x", "residual", "scale", "bias", "y", "residual_out", "mean", "mean_low", "rstd",
    ),
    "norm_backward": (
        "x", "scale", "mean", "mean_low", "rstd", "dy", "dresidual_out", "dmean", "drstd",
        "dx", "parts",
    ),
    "norm_sum_parts": ("parts", "dscale", "dbias"),
}  # fmt: skip


# Where a device has timed these kernels, and they were no slower than XLA's, alone and in a
# block: layer norm without a residual on an H200 (benchmarks/results/h200-cuda.json).
TIMED_CAPABILITIES = (90,)
TIMED_DTYPES = ("bfloat16", "float32")
TIMED_FEATURES = (128, 1024)
TIMED_ROWS = 4096  # or more


def not_default(problem: Problem) -> str | None:
    rows = _rows.as_rows(problem)
    read, written = _whole_arrays(problem)
    least, most = TIMED_FEATURES
    if (
        _tiles.gpu().capability in TIMED_CAPABILITIES
        and problem.static["spec"].center
        and not problem.static["spec"].round_before_scale
        and not {"residual", "dresidual_out"} & read.keys()
        and {dtype.name for dtype in (read | written).values()} <= {*TIMED_DTYPES}
        and least <= rows.features <= most
        and rows.rows >= TIMED_ROWS
    ):
        return None
    return (
        "it is the default only for what a GPU has timed: layer norm without a residual"
        " or round_before_scale,"
        f" bfloat16 or float32, {least} to {most} features, at least {TIMED_ROWS} rows,"
        " compute capability 9.0; `python -m jax_layernorm check` tries it on yours"
    )


def forward(problem: Problem) -> Callable[..., ForwardOutputs]:
    rows, tile = _supported(problem)
    matrix, per_row = (rows.rows, rows.features), (rows.rows,)

    def run(
        x: Any,
        residual: Any,
        scale: Any,
        bias: Any,
        mask: None,
        *,
        spec: NormSpec,
        with_statistics: bool,
    ) -> ForwardOutputs:
        del mask
        scale, bias = _parameter(scale), _parameter(bias)
        sum_dtype = _rows.sum_dtype(x, residual)
        rounded_to = _equations.rounding(sum_dtype, scale, bias, spec)
        macros = _macros(
            "FORWARD", rows.features, tile,
            {"X": x, "RESIDUAL": residual, "RESIDUAL_OUT": sum_dtype, "SCALE": scale}
            | {"BIAS": bias, "Y": spec.dtype}
            | {"PRODUCT": rounded_to.product, "SUM": rounded_to.sum},
            CENTER=spec.center, ROUND=spec.round_before_scale,
            HAS_RESIDUAL=residual is not None,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
            HAS_STATISTICS=with_statistics,
            EPSILON=spec.epsilon, SCALE_OFFSET=_equations.scale_offset(scale, spec),
        )  # fmt: skip
        results = {"y": jax.ShapeDtypeStruct(matrix, spec.dtype)}
        if residual is not None:
            results["residual_out"] = jax.ShapeDtypeStruct(matrix, sum_dtype)
        if with_statistics:
            names = RowStatistics._fields if spec.center else ("rstd",)
            results |= dict.fromkeys(names, jax.ShapeDtypeStruct(per_row, jnp.float32))
        operands = {
            "x": x.reshape(matrix),
            "residual": reshaped(residual, matrix),
            "scale": reshaped(scale, (-1,)),
            "bias": reshaped(bias, (-1,)),
        }
        launch = Launch("norm_forward", macros, tile, rows.rows)
        out = call(launch, operands, results)
        statistics = None
        if with_statistics:
            kept = _rows.statistics_shape(x, spec.axes)
            statistics = RowStatistics(
                *(reshaped(out.get(name), kept) for name in RowStatistics._fields)
            )
        residual_out = reshaped(out.get("residual_out"), x.shape)
        return ForwardOutputs(out["y"].reshape(x.shape), residual_out, statistics)

    return run


def backward(problem: Problem) -> Callable[..., BackwardOutputs]:
    rows, tile = _supported(problem)
    matrix, per_row = (rows.rows, rows.features), (rows.rows,)

    def run(
        x: Any,
        scale: Any,
        mask: None,
        statistics: RowStatistics,
        dy: Any,
        dresidual_out: Any,
        dmean: Any,
        drstd: Any,
        *,
        spec: NormSpec,
        with_dx: bool,
        scale_shape: tuple[int, ...] | None,
        bias_shape: tuple[int, ...] | None,
    ) -> BackwardOutputs:
        del mask
        scale = _parameter(scale)
        shapes = {"dscale": scale_shape, "dbias": bias_shape}
        sums = [name for name, shape in shapes.items() if shape is not None]
        wanted = {f"WITH_{name.upper()}": name in sums for name in shapes}
        macros = _macros(
            "BACKWARD", rows.features, tile, {"X": x, "SCALE": scale, "DY": dy},
            CENTER=spec.center, ROUND=spec.round_before_scale,
            HAS_SCALE=scale is not None,
            HAS_DRESIDUAL_OUT=dresidual_out is not None, HAS_DMEAN=dmean is not None,
            HAS_DRSTD=drstd is not None, SCALE_OFFSET=_equations.scale_offset(scale, spec),
            WITH_DX=with_dx, FETCH_FIRST=tile.cluster in _tiles.FETCH_FIRST, **wanted,
        )  # fmt: skip
        results = {}
        if with_dx:
            results["dx"] = jax.ShapeDtypeStruct(matrix, x.dtype)
        if sums:
            parts = (tile.workers, len(sums), rows.features)
            results["parts"] = jax.ShapeDtypeStruct(parts, jnp.float32)
        operands = {
            "x": x.reshape(matrix),
            "scale": reshaped(scale, (-1,)),
            **{
                name: reshaped(statistic, per_row)
                for name, statistic in statistics._asdict().items()
            },
            "dy": dy.reshape(matrix),
            "dresidual_out": reshaped(dresidual_out, matrix),
            "dmean": reshaped(dmean, per_row),
            "drstd": reshaped(drstd, per_row),
        }
        out = call(Launch("norm_backward", macros, tile, rows.rows), operands, results)
        if sums:
            out |= _sum_parts(out["parts"], sums, wanted)
        return BackwardOutputs(
            reshaped(out.get("dx"), x.shape),
            reshaped(out.get("dscale"), scale_shape),
            reshaped(out.get("dbias"), bias_shape),
        )

    return run


def _sum_parts(parts: Any, names: list[str], wanted: dict[str, bool]) -> dict[str, Any]:
    count, _, features = parts.shape
    macros = _spelled("SUM_PARTS", {"FEATURES": features} | wanted)
    blocks = -(-len(names) * features // 32)
    tile = _tiles.Tile(256, 1, 1, 1, 1, blocks, 8 * 32 * 4)
    results = dict.fromkeys(names, jax.ShapeDtypeStruct((features,), jnp.float32))
    return call(
        Launch("norm_sum_parts", macros, tile, count), {"parts": parts}, results
    )


class Launch(NamedTuple):
    """One launch of a kernel of norm.cu; `number` is its last parameter."""

    kernel: str
    macros: tuple[str, ...]
    tile: _tiles.Tile
    number: int


def call(
    launch: Launch, operands: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """The results of a launch, by name. A missing operand is None."""
    operands = {name: a for name, a in operands.items() if a is not None}
    names = [*operands, *results]
    image = _compile.image(launch.macros, _tiles.gpu().capability)
    tile = launch.tile
    out = jax.ffi.ffi_call(_library.CUDA_LAUNCH, list(results.values()))(
        *operands.values(),
        image=image.data,
        digest=image.digest,
        kernel=launch.kernel,
        blocks=np.int64(tile.blocks),
        threads=np.int64(tile.threads * tile.groups),
        shared_bytes=np.int64(tile.shared_bytes),
        number=np.int64(launch.number),
        # Which operand or result each parameter points to; -1 for a null pointer.
        parameters=np.asarray(
            [
                names.index(name) if name in names else -1
                for name in PARAMETERS[launch.kernel]
            ],
            np.int64,
        ),
        sizes=np.asarray(
            [
                a.size * a.dtype.itemsize
                for a in (*operands.values(), *results.values())
            ],
            np.int64,
        ),
    )
    return dict(zip(results, out, strict=True))


def _supported(problem: Problem) -> tuple[_rows.Rows, _tiles.Tile]:
    """The problem as rows, and how they are cut; raises if the kernels cannot run it."""
    _rows.refuse_exported(problem)
    rows = _rows.as_rows(problem)
    _rows.refuse_separate_parameters(rows)
    read, written = _whole_arrays(problem)
    for name, dtype in (read | written).items():
        if dtype.name not in TYPES:
            raise NotImplementedError(
                f"{name} has the dtype {dtype.name}, not one of {', '.join(TYPES)}"
            )
    gpu = _tiles.gpu()
    reason = _unavailable(gpu)
    if reason is not None:
        raise NotImplementedError(reason)
    tile = _tiles.tile(
        "forward" if problem.op == _equations.FORWARD else "backward",
        rows.rows,
        rows.features,
        [dtype.itemsize for dtype in read.values()],
        max(dtype.itemsize for dtype in (read | written).values()),
        gpu,
    )
    if tile is None:
        of = f"a GPU of compute capability {gpu.capability / 10}"
        raise NotImplementedError(
            f"a row has {rows.features} elements, more than the blocks that share it on"
            f" {of if gpu.capability else 'an unknown GPU'} can hold"
        )
    return rows, tile


def _unavailable(gpu: _tiles.Gpu) -> str | None:
    return _compile.unavailable(gpu.capability) or _library.not_loaded()


def _whole_arrays(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dtypes of the arrays with the shape of `x`: those read, and those written."""
    x = problem.operands[0]
    if problem.op == _equations.FORWARD:
        residual = problem.operands[1]
        read = {"x": x, "residual": residual}
        written = {"y": problem.static["spec"].dtype}
        if residual is not None:
            written["the sum"] = _rows.sum_dtype(x, residual)
    else:
        read = {"x": x, "dy": problem.operands[4], "dresidual_out": problem.operands[5]}
        written = {"dx": x.dtype}
    return {name: a.dtype for name, a in read.items() if a is not None}, written


def _macros(
    kernel: str, features: int, tile: _tiles.Tile, arrays: dict[str, Any], **values: Any
) -> tuple[str, ...]:
    """The macros that describe a kernel. A missing array has the type of `x`."""
    shape = {"FEATURES": features} | {
        name.upper(): value
        for name, value in tile._asdict().items()
        if name not in ("blocks", "shared_bytes")
    }
    types = {
        name: TYPES[jnp.dtype(arrays["X"] if a is None else a).name]
        for name, a in arrays.items()
    }
    return _spelled(kernel, shape | types | values)


def _spelled(kernel: str, values: dict[str, Any]) -> tuple[str, ...]:
    def spelled(value: Any) -> str:
        if isinstance(value, bool):
            return str(int(value))
        if not isinstance(value, float):
            return str(value)
        value = float(np.float32(value))
        return f"{value!r}f" if math.isfinite(value) else "(1e38f * 10.0f)"

    macros = (f"JLN_{name}={spelled(value)}" for name, value in values.items())
    return (f"JLN_{kernel}", *macros)


def _parameter(array: Any) -> Any:
    """A scale or bias in a type that the kernels read."""
    if array is None or array.dtype.name in TYPES:
        return array
    return array.astype(jnp.float32)
