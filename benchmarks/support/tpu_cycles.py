"""Cycles of TPU kernels, read from the schedule that the compiler makes for them.

A TPU runs instructions as the compiler scheduled them and has no caches. So the cycles
of a kernel, except those in which it waits for memory, are known once it is compiled.
They are compared with the roofline, the time that the kernel's bytes take at the chip's
memory bandwidth. If the ratio is below 1, memory bounds the kernel, not arithmetic.

Call `keep_schedules` before JAX's TPU compiler is first used in the process. When the
compiler writes schedules, it aborts the process on some programs ("Unsupported DMA
direction"). So schedule each kernel alone; for a whole model take `xla_cycles`, the
compiler's estimates for its fusions, and add the cycles of the kernels in the model.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

# Published figures, per device as JAX counts them (v7x: half a chip).
HBM_BYTES_PER_SECOND = {
    "v4": 614e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1638e9, "v7x": 3690e9,
}  # fmt: skip
CYCLES_PER_SECOND = {
    "v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "v7x": 2.2e9,
}  # fmt: skip

_directory: pathlib.Path | None = None


def keep_schedules() -> None:
    """Makes the compiler write its schedules from now on, for `of_kernels`."""
    global _directory
    if _directory is not None:
        return
    _directory = pathlib.Path(tempfile.mkdtemp(prefix="tpu_schedules"))
    flag = f"--xla_jf_dump_static_llo_profile_to={_directory}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flag}"


def of_kernels(build: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """The program that `build` compiles, and the cycles of each of its instructions."""
    assert _directory is not None, "call keep_schedules first"
    shutil.rmtree(_directory, ignore_errors=True)
    _directory.mkdir()
    compiled = build()
    cycles: dict[str, int] = {}
    for path in sorted(_directory.glob("**/*")):
        if path.is_file():
            found = re.findall(
                r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)',
                path.read_text(errors="replace"),
            )
            cycles |= {name: int(n) for name, n in found}
    return compiled, cycles


def xla_cycles(hlo: str) -> dict[str, int]:
    """The compiler's estimate for each of its own fusions, in every computation."""
    found = re.findall(r'%([\w.\-]+) = [^\n]*"estimated_cycles":"(\d+)"', hlo)
    return {name: int(n) for name, n in found}


def roofline(generation: str, nbytes: float) -> float:
    """The cycles in which the chip's memory moves `nbytes`."""
    seconds = nbytes / HBM_BYTES_PER_SECOND[generation]
    return seconds * CYCLES_PER_SECOND[generation]
