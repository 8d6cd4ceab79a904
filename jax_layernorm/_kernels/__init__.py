"""The registry of implementations, and the choice between them.

To add a kernel: write one module with the members of `Kernel`, and add one line to
`KERNELS`. The order is the order of preference; `xla`, which can run everything,
stays last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jax_layernorm import _equations
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels import xla


class Kernel(Protocol):
    """One implementation of the norm, forward and backward."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot run `problem`, or None; shown to users."""
        ...

    def forward(self, problem: Problem) -> Callable[..., _equations.Forward]:
        """The function that runs `problem`; the signature of `_equations.forward`."""
        ...

    def backward(self, problem: Problem) -> Callable[..., _equations.Backward]:
        """The function that runs `problem`; the signature of `_equations.backward`."""
        ...


KERNELS: dict[str, Kernel] = {
    "xla": xla,
}

PLANNED = ("native_cpu", "pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")
"""Names that the public contract reserves and this version does not provide."""


def select(problem: Problem) -> Callable[..., Any]:
    """The function to run for `problem`, decided while it is lowered.

    Raises:
      NotImplementedError: an implementation was asked for by name and cannot run
        this; the message gives its reason.
    """
    name = problem.static["spec"].implementation
    reason = None
    for candidate in KERNELS if name is None else (name,):
        kernel = KERNELS[candidate]
        reason = kernel.unsupported(problem)
        if reason is None:
            direction = problem.op.removeprefix("layer_norm_")
            return getattr(kernel, direction)(problem)
    raise NotImplementedError(
        f"implementation={name!r} must be able to run the {problem.op} it is asked for;"
        f" got one on platform {problem.platform!r} that it cannot: {reason}. Use"
        " implementation=None to take the best that can."
    )
