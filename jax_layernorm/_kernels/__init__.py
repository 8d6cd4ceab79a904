"""The registry of implementations, and the choice between them.

To add a kernel: write one module with the members of `Kernel`, and add one line to
`KERNELS`. The order is the order of preference; `xla`, which can run everything,
stays last.

Every choice is made here. `needs_equations` chooses between a kernel op and the bare
equations, while a norm is traced. `select` chooses between the kernels, at lowering.
`explain` reports what they recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from jax_layernorm import _equations
from jax_layernorm._equations import NormSpec
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels import cuda, native_cpu, pallas_tpu, xla


class Kernel(Protocol):
    """One implementation of the norm, forward and backward."""

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms it can run on."""
        ...

    def not_default(self, problem: Problem) -> str | None:
        """Why it runs `problem` only by name, or None if it may be the default.

        Users see the reason.

        An implementation is a default only on hardware that it has run on, and only if
        a benchmark shows that it wins.
        """
        ...

    def forward(self, problem: Problem) -> Callable[..., _equations.ForwardOutputs]:
        """The function that runs `problem`; the signature of `_equations.forward`.

        Raises:
          NotImplementedError: it cannot run `problem`; users see the reason.
        """
        ...

    def backward(self, problem: Problem) -> Callable[..., _equations.BackwardOutputs]:
        """The function that runs `problem`; the signature of `_equations.backward`.

        Raises:
          NotImplementedError: it cannot run `problem`; users see the reason.
        """
        ...


KERNELS: dict[str, Kernel] = {
    "cuda": cuda,
    "native_cpu": native_cpu,
    "pallas_tpu": pallas_tpu,
    "xla": xla,
}

DEVICES = {"cpu": "CPUs", "cuda": "CUDA GPUs", "rocm": "ROCm GPUs", "tpu": "TPUs"}


class Decision(NamedTuple):
    """One choice: the implementation that runs, and why each of the others does not.

    `chosen` is None if the implementation that was asked for cannot run. `op` is the pass
    that it runs, or None for equations that JAX differentiates.
    """

    chosen: str | None
    reasons: dict[str, str]
    op: str | None = None


class Record:
    """Decisions, in their order; hashed by identity, to be part of the caches' keys."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []


_recording = jax.make_user_context(None)


@contextlib.contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Records what is decided while the block traces or lowers, in this thread.

    Whatever the block calls is traced anew, because the record is in the keys of JAX's
    caches.
    """
    record = Record()
    with _recording(record):
        yield record.decisions


def _decide(decision: Decision) -> None:
    record: Record | None = _recording.value
    if record is not None:
        record.decisions.append(decision)


def _decide_for_equations(reason: str) -> None:
    """Records that XLA compiles the equations and no kernel runs, and why."""
    _decide(Decision("xla", {name: reason for name in KERNELS if name != "xla"}))


def select(problem: Problem) -> Callable[..., Any]:
    """The function to run for `problem`, decided while it is lowered.

    Raises:
      NotImplementedError: an implementation was asked for by name and cannot run
        this; the message gives its reason.
    """
    name = problem.static["spec"].implementation
    able: dict[str, Callable[..., Any]] = {}
    reasons: dict[str, str] = {}
    for each, kernel in KERNELS.items():
        try:
            function = _function_of(kernel, problem)
        except NotImplementedError as error:
            reasons[each] = str(error)
            continue
        declined = kernel.not_default(problem) if name is None else None
        if declined is not None:
            reasons[each] = declined
        elif name in (None, each):
            able[each] = function
        else:
            reasons[each] = f"implementation={name!r} was asked for"
    chosen = next(iter(able), None)
    for each in [*able][1:]:
        reasons[each] = f"{chosen} is preferred"
    _decide(Decision(chosen, reasons, problem.op))
    if chosen is None:
        raise NotImplementedError(_cannot_run(name, problem, reasons[name]))
    return able[chosen]


def _function_of(kernel: Kernel, problem: Problem) -> Callable[..., Any]:
    if problem.platform not in kernel.platforms:
        only = " and ".join(DEVICES[platform] for platform in kernel.platforms)
        raise NotImplementedError(f"it supports {only} only")
    passes = {
        _equations.FORWARD: kernel.forward,
        _equations.BACKWARD: kernel.backward,
    }
    return passes[problem.op](problem)


def check(problem: Problem) -> None:
    """Raises if the implementation that was asked for by name can run this nowhere.

    Raises:
      NotImplementedError: with the implementation's reason.
    """
    name = problem.static["spec"].implementation
    if name is None:
        return
    kernel = KERNELS[name]
    reasons = []
    for platform in kernel.platforms:
        try:
            _function_of(kernel, problem._replace(platform=platform))
        except NotImplementedError as error:
            reasons.append(str(error))
        else:
            return
    raise NotImplementedError(_cannot_run(name, problem, reasons[0]))


def needs_equations(spec: NormSpec, *, custom_vjp: bool) -> bool:
    """Whether the bare equations run instead of a kernel op, decided at tracing.

    A kernel op cannot hold a collective, because its batching rule would run outside
    the mapped axis. And its derivative is always the hand-written one.

    Raises:
      NotImplementedError: an implementation other than XLA was asked for by name.
    """
    if not custom_vjp:
        reason = "custom_vjp=False differentiates the equations themselves"
    elif spec.axis_names:
        reason = (
            f"the normalized axes are split over {', '.join(map(repr, spec.axis_names))},"
            " and only the equations merge the shards' statistics"
        )
    else:
        return False
    if spec.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation={spec.implementation!r} cannot run this norm: {reason}."
            " Pass None to choose automatically."
        )
    _decide_for_equations(reason)
    return True


def batched_reference(problem: Problem) -> None:
    """Records that the equations run in place of an op that `jax.vmap` maps."""
    named = problem.static["spec"].implementation
    reason = "jax.vmap maps parameters alone"
    if named not in (None, "xla"):
        reason = f"implementation={named!r} cannot run the norm with its mapped axis"
    _decide_for_equations(reason)


def _cannot_run(name: str | None, problem: Problem, reason: str) -> str:
    where = f" on {problem.platform!r}" if problem.platform else ""
    return (
        f"implementation={name!r} cannot run {problem.op}{where}: {reason}. Pass None to"
        " choose automatically."
    )
