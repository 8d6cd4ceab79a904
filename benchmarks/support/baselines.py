"""Programs that move a norm's arrays but compute no norm: how fast a norm could be.

copy    copies x (and dy, or the residual)
floor   reads all inputs of the program, and writes arrays of the size of all its outputs
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _copy_x(params: Any, x: Any) -> Any:
    del params
    return jnp.copy(x)


def _copy_both(params: Any, x: Any, other: Any) -> Any:
    del params
    return jnp.copy(x), jnp.copy(other)


def _inference(params: Any, x: Any) -> Any:
    return x + (params["scale"] + params["bias"]).astype(x.dtype)


def _joint(params: Any, x: Any, dy: Any) -> Any:
    dparams = jax.tree.map(jnp.negative, params)
    return _inference(params, x) + dy, x - dy, dparams


def _add(params: Any, x: Any, residual: Any) -> Any:
    return _joint(params, x, residual)[:2]


def _add_joint(params: Any, x: Any, residual: Any) -> Any:
    return *_joint(params, x, residual), x + residual


BASELINES = {
    "copy": {
        "inference": _copy_x,
        "joint": _copy_both,
        "add": _copy_both,
        "add joint": _copy_both,
    },
    "floor": {
        "inference": _inference,
        "joint": _joint,
        "add": _add,
        "add joint": _add_joint,
    },
}
"""A function for each program of `benchmarks.cpu`, with the arguments of that program."""
