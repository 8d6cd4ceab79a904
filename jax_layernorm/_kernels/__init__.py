"""The registry of implementations, and the choice between them.

To add a kernel: write one module with the members of `Kernel`, and add one line to
`KERNELS`. The order is the order of preference; `xla`, which can run everything,
stays last.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from jax_layernorm import _equations
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels import native_cpu, pallas_tpu, xla


class Kernel(Protocol):
    """One implementation of the norm, forward and backward."""

    @property
    def platforms(self) -> tuple[str, ...]:
        """Those that it may run on."""
        ...

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot run `problem`, or None; shown to users."""
        ...

    def not_default(self, problem: Problem) -> str | None:
        """Why it is not taken unasked for a `problem` that it can run, or None; shown too.

        An implementation is a default only where a benchmark shows that it wins.
        """
        ...

    def forward(self, problem: Problem) -> Callable[..., _equations.Forward]:
        """The function that runs `problem`; the signature of `_equations.forward`."""
        ...

    def backward(self, problem: Problem) -> Callable[..., _equations.Backward]:
        """The function that runs `problem`; the signature of `_equations.backward`."""
        ...


KERNELS: dict[str, Kernel] = {
    "native_cpu": native_cpu,
    "pallas_tpu": pallas_tpu,
    "xla": xla,
}

PLANNED = ("pallas_triton", "pallas_mosaic_gpu")
"""Names that the public contract reserves and this version does not provide."""


class Decision(NamedTuple):
    """One choice: the implementation, and for each why it is not taken, or None."""

    chosen: str | None
    reasons: dict[str, str | None]


_recorded: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Collects the decisions of what is lowered in the block, in this thread."""
    decisions: list[Decision] = []
    token = _recorded.set(decisions)
    try:
        yield decisions
    finally:
        _recorded.reset(token)


def select(problem: Problem) -> Callable[..., Any]:
    """The function to run for `problem`, decided while it is lowered.

    Raises:
      NotImplementedError: an implementation was asked for by name and cannot run
        this; the message gives its reason.
    """
    name = problem.static["spec"].implementation
    reasons = {each: kernel.unsupported(problem) for each, kernel in KERNELS.items()}
    if name is None:
        for each, kernel in KERNELS.items():
            reasons[each] = reasons[each] or kernel.not_default(problem)
    able = [each for each, reason in reasons.items() if reason is None]
    chosen = able[0] if name is None else name if name in able else None
    decisions = _recorded.get()
    if decisions is not None:
        decisions.append(Decision(chosen, reasons))
    if chosen is None:
        raise NotImplementedError(
            _message(
                name, f"{problem.op} on platform {problem.platform!r}", reasons[name]
            )
        )
    return getattr(KERNELS[chosen], problem.op.removeprefix("layer_norm_"))(problem)


def refused(problem: Problem) -> str | None:
    """An error message where the implementation asked for by name can run this nowhere."""
    name = problem.static["spec"].implementation
    if name is None:
        return None
    kernel = KERNELS[name]
    reasons = [
        kernel.unsupported(problem._replace(platform=platform))
        for platform in kernel.platforms
    ]
    return None if None in reasons else _message(name, problem.op, reasons[0])


def _message(name: str | None, what: str, reason: str | None) -> str:
    return (
        f"implementation={name!r} must be able to run the norm it is asked for; got a"
        f" {what} that it cannot: {reason}. Use implementation=None to take the best that"
        " can."
    )
