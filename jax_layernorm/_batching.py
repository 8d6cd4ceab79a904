"""`jax.vmap` of the norm's ops: the mapped axis becomes another axis of rows.

So a kernel still runs, once for the whole batch, and the backward pass is still the
hand-written one. If parameters are mapped too, they are reshaped to broadcast against
`x`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_layernorm._equations import BackwardOutputs
from jax_layernorm._kernel_op import Batched


def batch_forward(operands: Any, dims: Any, static: dict[str, Any]) -> Batched | None:
    x, residual, *broadcast = operands
    rows = _same_size((x, residual), dims[:2])
    if rows is None:  # one x, several parameters: its statistics are taken once
        return None
    broadcast = _aligned(broadcast, dims[2:], rows[0].ndim)
    return Batched((*rows, *broadcast), static, lambda out: out)


def batch_backward(operands: Any, dims: Any, static: dict[str, Any]) -> Batched | None:
    x, scale, mask, *cotangents = operands
    rows = _same_size((x, *cotangents), (dims[0], *dims[3:]))
    if rows is None:
        return None
    (x, *cotangents) = rows
    size, ndim = x.shape[0], x.ndim
    scale, mask = _aligned((scale, mask), dims[1:3], ndim)
    shapes = {key: static[key] for key in ("scale_shape", "bias_shape")}
    one_each = {
        key: None if shape is None else (size, *(1,) * (ndim - 1 - len(shape)), *shape)
        for key, shape in shapes.items()
    }

    def finish(out: BackwardOutputs) -> BackwardOutputs:
        dscale, dbias = (
            None if gradient is None else gradient.reshape(size, *shape)
            for gradient, shape in zip(out[1:], shapes.values(), strict=True)
        )
        return BackwardOutputs(out.dx, dscale, dbias)

    return Batched((x, scale, mask, *cotangents), static | one_each, finish)


def _same_size(operands: Any, dims: Any) -> Any:
    """All operands with the mapped axis in front; None if no operand is mapped."""
    leaves, treedef = jax.tree.flatten(operands)
    positions = treedef.flatten_up_to(dims)
    sizes = {
        leaf.shape[position]
        for leaf, position in zip(leaves, positions, strict=True)
        if position is not None
    }
    if not sizes:
        return None
    (size,) = sizes
    return treedef.unflatten(
        jnp.broadcast_to(leaf, (size, *leaf.shape))
        if position is None
        else jnp.moveaxis(leaf, position, 0)
        for leaf, position in zip(leaves, positions, strict=True)
    )


def _aligned(operands: Any, dims: Any, ndim: int) -> list[Array | None]:
    """Operands that broadcast against rank `ndim`; a mapped axis comes first."""
    return [
        operand
        if operand is None or position is None
        else lax.expand_dims(
            jnp.moveaxis(operand, position, 0), range(1, 1 + ndim - operand.ndim)
        )
        for operand, position in zip(operands, dims, strict=True)
    ]
