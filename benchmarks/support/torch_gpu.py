"""Layer norms in torch on a GPU, each in a separate process.

"torch" is torch's norm, "torch.compile" is that norm compiled alone, "liger" is the
Triton kernel of liger-kernel, and "quack rms" is the RMS norm of quack-kernels, which has
no layer norm with a bias. Parameters have the dtype of x, because torch's norm takes no
others. torch's profiler gives the times of the kernels.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

MODULES = {
    "torch": "torch",
    "torch.compile": "torch",
    "liger": "liger_kernel",
    "quack rms": "quack",
}
NORMS = tuple(MODULES)
PROGRAMS = ("forward", "backward", "joint")
EPSILON = 1e-6


def measure(
    name: str,
    shapes: Sequence[Any],
    dtypes: Sequence[str],
    calls: int,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """A row of `benchmarks.run`'s table for each shape, dtype and program."""
    from benchmarks.support import programs

    given = json.dumps([name, list(map(tuple, shapes)), list(dtypes), calls, device])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.support.torch_gpu", given],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        floor = programs.FLOOR_ARRAYS[row["program"]]
        seconds = (row["device ms"] or row["wall ms"]) / 1e3
        row["floor arrays"] = floor
        row["GB/s"] = floor * row.pop("bytes") / seconds / 1e9
    return rows


def norm_of(name: str) -> Callable[..., Any]:
    """`(x, scale, bias) -> y`."""
    import torch

    def norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)

    if name == "torch":
        return norm
    if name == "torch.compile":
        # The backward pass is timed alone, from one forward pass.
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
        return torch.compile(norm)
    if name == "liger":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, scale, bias: LigerLayerNormFunction.apply(
            x, scale, bias, EPSILON
        )
    import quack

    return lambda x, scale, bias: quack.rmsnorm(x, scale, eps=EPSILON)


def programs_of(
    norm: Callable[..., Any], x: Any, scale: Any, bias: Any, dy: Any
) -> dict[str, Callable[[], Any]]:
    import torch

    inputs = (x, scale, bias)
    kept = norm(*inputs)

    def backward(y: Any, **options: Any) -> Any:
        return torch.autograd.grad(y, inputs, dy, allow_unused=True, **options)

    return {
        "forward": lambda: norm(*inputs),
        "backward": lambda: backward(kept, retain_graph=True),
        "joint": lambda: backward(norm(*inputs)),
    }


def timed(
    functions: list[Callable[[], Any]], calls: int, device: str
) -> tuple[float | None, float]:
    """Seconds of a call: by the GPU's clock, and wall time over queued calls."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run() -> float:
        start = time.perf_counter()
        for i in range(calls):
            functions[i % len(functions)]()
        wait()
        return (time.perf_counter() - start) / calls

    for function in functions:
        function()
    wall = statistics.median(run() for _ in range(5))
    if device != "cuda":
        return None, wall
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    microseconds = sum(
        event.time_range.elapsed_us()
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return microseconds / 1e6 / calls, wall


def rows_of(
    name: str, shape: Sequence[int], dtype: str, calls: int, device: str
) -> list[dict[str, Any]]:
    import torch

    norm = norm_of(name)
    generator = torch.Generator(device).manual_seed(0)

    kind = getattr(torch, dtype)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(kind)

    array = shape[0] * shape[1] * kind.itemsize
    sets = max(1, min(8, (256 << 20) // (3 * array)))  # so that no cache holds them
    made = [
        programs_of(
            norm,
            draw(*shape).requires_grad_(),
            draw(shape[1]).requires_grad_(),
            draw(shape[1]).requires_grad_(),
            draw(*shape),
        )
        for _ in range(sets)
    ]
    rows = []
    for program in PROGRAMS:
        seconds, wall = timed([one[program] for one in made], calls, device)
        rows.append(
            {"shape": "x".join(map(str, shape)), "dtype": dtype, "program": program}
            | {
                "norm": name,
                "device ms": seconds and seconds * 1e3,
                "wall ms": wall * 1e3,
            }
            | {"bytes": array}
        )
    return rows


def main(given: str) -> None:
    name, shapes, dtypes, calls, device = json.loads(given)
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            rows += rows_of(name, shape, dtype, calls, device)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
