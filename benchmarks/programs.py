"""Programs that a norm is part of, each a function and its abstract arguments.

joint      forward and backward in one jit: `(params, x, dy) -> y, dx, dscale, dbias`
forward, backward
           the two as separate programs, what is saved passed from one to the other
block      `out = h + relu(norm(h) @ W1) @ W2`, and the gradients of all of it
layers     a scanned decoder: `LAYERS` pre-norm blocks of attention and of relu
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.peers import Norm, forward_backward
from benchmarks.shapes import Shape

LAYERS = 4
WIDEN = 4
HEAD = 128
LENGTH = 2048
FLASH_BLOCK = 512
"""Positions of a block of `flash_attention`."""

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Program(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Arrays' shapes and dtypes."""


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(features: int, *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (*leading, features)
    return {name: abstract(shape, jnp.float32) for name in ("scale", "bias")}


def joint(norm: Norm, shape: Shape, dtype: Any) -> Program:
    x = abstract(shape, dtype)
    return Program(forward_backward(norm), (params_of(shape.features), x, x))


def forward(norm: Norm, shape: Shape, dtype: Any) -> Program:
    """As it is under differentiation: what is saved is an output too."""

    def run(params: Any, x: jax.Array) -> Any:
        return jax.vjp(norm, params, x)

    return Program(run, (params_of(shape.features), abstract(shape, dtype)))


def backward(norm: Norm, shape: Shape, dtype: Any) -> Program:
    def run(vjp: Any, dy: jax.Array) -> Any:
        return vjp(dy)

    before = forward(norm, shape, dtype)
    y, vjp = jax.eval_shape(before.function, *before.arguments)
    return Program(run, (vjp, abstract(y.shape, y.dtype)))


def block(norm: Norm, shape: Shape, dtype: Any) -> Program:
    features = shape.features

    def run(params: Any, w1: Any, w2: Any, h: jax.Array, dout: jax.Array) -> Any:
        def out(params: Any, w1: Any, w2: Any, h: jax.Array) -> jax.Array:
            return h + jax.nn.relu(norm(params, h) @ w1) @ w2

        value, vjp = jax.vjp(out, params, w1, w2, h)
        return value, vjp(dout)

    h = abstract(shape, dtype)
    w1 = abstract((features, WIDEN * features), dtype)
    w2 = abstract((WIDEN * features, features), dtype)
    return Program(run, (params_of(features), w1, w2, h, h))


def heads_of(shape: Shape) -> tuple[int, int, int]:
    """Sequences, their length, and heads of a decoder."""
    length = min(shape.rows, LENGTH)
    return shape.rows // length, length, shape.features // HEAD


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scores are computed again backward, and not kept: as attention kernels do."""
    causal = nn.make_causal_mask(jnp.ones((1, q.shape[1])))
    return jax.checkpoint(functools.partial(nn.dot_product_attention, mask=causal))(
        q, k, v
    )


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    return jnp.swapaxes(flash_by_head(q, k, v), 1, 2)


def flash_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's kernels for TPU; all (batch, heads, length, head)."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    names = [field.name for field in dataclasses.fields(flash.BlockSizes)]
    blocks = dict.fromkeys(names, min(FLASH_BLOCK, q.shape[2])) | {"block_b": 1}
    return flash.flash_attention(
        q, k, v,
        causal=True,
        sm_scale=1 / math.sqrt(q.shape[3]),
        block_sizes=flash.BlockSizes(**blocks),
    )  # fmt: skip


def decoder(
    norm: Norm,
    add_norm: Any,
    shape: Shape,
    dtype: Any,
    *,
    layers: int | None = LAYERS,
    remat: bool = False,
    attention: Attention = xla_attention,
) -> Program:
    """Sequences of up to `LENGTH`; weights stacked along the layers, which are scanned.

    Args:
      norm: of a layer's first norm, and of the second.
      add_norm: `(params, branch, stream) -> y, stream`, for the second; None: the sum
        is not fused with the norm.
      layers: None for one layer, not scanned.
      remat: whether the backward pass computes a layer again.
      attention: causal, `(q, k, v) -> mixed`, all (batch, length, heads, head).
    """
    features = shape.features
    batch, length, heads = heads_of(shape)

    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        a = norm(w["ln1"], h)
        q, k, v = (jnp.einsum("btf,fhd->bthd", a, w[name]) for name in "qkv")
        branch = jnp.einsum("bthd,hdf->btf", attention(q, k, v), w["out"])
        if add_norm is None:
            h = h + branch
            m = norm(w["ln2"], h)
        else:
            m, h = add_norm(w["ln2"], branch, h)
        return h + jax.nn.relu(m @ w["up"]) @ w["down"], None

    one = jax.checkpoint(layer) if remat else layer

    def run(weights: Any, h: jax.Array, dout: jax.Array) -> Any:
        def out(weights: Any, h: jax.Array) -> jax.Array:
            if layers is None:
                return one(h, weights)[0]
            return jax.lax.scan(one, h, weights)[0]

        value, vjp = jax.vjp(out, weights, h)
        return value, vjp(dout)

    stack = () if layers is None else (layers,)
    h = abstract((batch, length, features), dtype)
    weights = {
        "ln1": params_of(features, *stack),
        "ln2": params_of(features, *stack),
        **{name: abstract((*stack, features, heads, HEAD), dtype) for name in "qkv"},
        "out": abstract((*stack, heads, HEAD, features), dtype),
        "up": abstract((*stack, features, WIDEN * features), dtype),
        "down": abstract((*stack, WIDEN * features, features), dtype),
    }
    return Program(run, (weights, h, h))


def layers(norm: Norm, shape: Shape, dtype: Any) -> Program:
    return decoder(norm, None, shape, dtype)


PROGRAMS = {
    "joint": joint,
    "forward": forward,
    "backward": backward,
    "block": block,
    "layers": layers,
}
