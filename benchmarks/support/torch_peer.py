"""torch's layer norm on a CPU: the programs of `programs`, run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.support.peers import EPSILON


def programs(params: Any, x: jax.Array, dy: jax.Array) -> dict[str, Callable[[], Any]]:
    """Each program as a function of no arguments, over torch's copies of these arrays.

    Their names and results are those of `programs.PROGRAMS`; `dy` is the residual too.
    """
    import torch

    given = [_tensor(a) for a in (x, params["scale"], params["bias"])]
    other = _tensor(dy)
    fixed = other.detach()

    def norm(residual_out: torch.Tensor) -> torch.Tensor:
        shape = residual_out.shape[-1:]
        return torch.nn.functional.layer_norm(residual_out, shape, *given[1:], EPSILON)

    def inference() -> Any:
        with torch.no_grad():
            return norm(given[0])

    def joint() -> Any:
        y = norm(given[0])
        return y, *torch.autograd.grad(y, given, fixed)

    def add() -> Any:
        with torch.no_grad():
            residual_out = other + given[0]
            return norm(residual_out), residual_out

    def add_joint() -> Any:
        residual_out = other + given[0]
        y = norm(residual_out)
        cotangents = (fixed, given[0].detach())
        return (
            y,
            residual_out,
            torch.autograd.grad((y, residual_out), (*given, other), cotangents),
        )

    return {"inference": inference, "joint": joint, "add": add, "add joint": add_joint}


def forward_backward(params: Any, x: jax.Array, dy: jax.Array) -> list[np.ndarray]:
    """y, dx, dscale and dbias in float64."""
    return as_arrays(programs(params, x, dy)["joint"]())


def as_arrays(tensors: Sequence[Any]) -> list[np.ndarray]:
    """In float64, which holds the values of all these dtypes exactly."""
    return [t.detach().double().numpy() for t in tensors]


def _tensor(array: jax.Array) -> Any:
    import torch

    wide = np.array(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
    return torch.from_numpy(wide).to(getattr(torch, array.dtype.name)).requires_grad_()
