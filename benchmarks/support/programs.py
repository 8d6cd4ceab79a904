"""Programs that contain a norm. Each is a function and its abstract arguments.

inference  the forward pass alone: `(params, x) -> y`
forward    the forward pass under differentiation: what it saves is an output too, except
           x and the parameters, which exist already; as outputs XLA would copy them
backward   `(what forward saved, dy) -> dparams, dx`
joint      forward and backward in one jit: `(params, x, dy) -> y, dx, dscale, dbias`;
           an RMS norm has no dbias
add        the norm of a residual sum: `(params, x, residual) -> y, residual_out`
add joint  the same and its gradients in one jit
add backward
           only the backward pass of add, as in backward
block      `out = h + relu(norm(h) @ W1) @ W2`, and the gradients of all of it
block inference
           only out
layers     a scanned decoder: `LAYERS` pre-norm blocks of attention and of relu

`FLOOR_ARRAYS` are the arrays of the size of x that each must read or write.
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

from benchmarks.support.peers import AddNorm, Norm, Peer
from benchmarks.support.shapes import Shape

FLOOR_ARRAYS: dict[str, int | None] = {
    "inference": 2,  # x; y
    "forward": 2,
    "backward": 3,  # x, dy; dx
    "joint": 5,  # the two passes one after the other: x, y; x, dy, dx
    "add": 4,  # x, residual; y, residual_out
    "add forward": 4,  # of `tpu_passes`
    "add backward": 4,  # residual_out, dy, dresidual_out; dx is the residual's gradient too
    "add joint": 8,
    "block": None,  # bound by products
    "block inference": None,
    "layers": None,
}
"""How many arrays of the size of x each program reads or writes at the least.

A program that reads x only once could do joint with 4. No implementation does, because
the forward and the backward pass are separate kernels, each of which reads x.
"""
LAYERS = 4
WIDEN = 4
HEAD = 128
LENGTH = 2048
FLASH_BLOCK = 512
"""Positions in a block of `flash_attention`."""

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


def forward_backward(norm: Norm) -> Callable[..., tuple[jax.Array, ...]]:
    """The function of `joint`, for arrays of any shape."""

    def run(params: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(norm, params, x)
        dparams, dx = vjp(dy)
        return y, dx, *(dparams[name] for name in ("scale", "bias") if name in dparams)

    return run


def _arrays(count: int, shape: Shape, dtype: Any) -> tuple[Any, ...]:
    """Parameters, and `count` arrays of the size of x."""
    return params_of(shape.features), *(abstract(shape, dtype),) * count


def inference(norm: Norm, shape: Shape, dtype: Any) -> Program:
    return Program(norm, _arrays(1, shape, dtype))


def forward(norm: Norm, shape: Shape, dtype: Any) -> Program:
    def run(params: Any, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        y, vjp = jax.vjp(norm, params, x)
        given = {id(array) for array in jax.tree.leaves((params, x))}
        return y, [array for array in jax.tree.leaves(vjp) if id(array) not in given]

    return Program(run, _arrays(1, shape, dtype))


def backward(norm: Norm, shape: Shape, dtype: Any) -> Program:
    return _pullback(norm, _arrays(1, shape, dtype))


def _pullback(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Program:
    out, vjp = jax.eval_shape(functools.partial(jax.vjp, function), *arguments)

    def run(vjp: Any, cotangents: Any) -> Any:
        # The two summands have the same gradient, so it is written once.
        return vjp(cotangents)[:2]

    return Program(run, (vjp, out))


def joint(norm: Norm, shape: Shape, dtype: Any) -> Program:
    return Program(forward_backward(norm), _arrays(2, shape, dtype))


def add(norm: AddNorm, shape: Shape, dtype: Any) -> Program:
    return Program(norm, _arrays(2, shape, dtype))


def add_backward(norm: AddNorm, shape: Shape, dtype: Any) -> Program:
    return _pullback(norm, _arrays(2, shape, dtype))


def add_joint(norm: AddNorm, shape: Shape, dtype: Any) -> Program:
    """The residual and x serve again as the cotangents of y and of the sum."""

    def run(params: Any, x: jax.Array, residual: jax.Array) -> Any:
        # Both summands have the same gradient. torch returns the same array for both;
        # XLA would copy it for a second result.
        out, vjp = jax.vjp(norm, params, x, residual)
        return out, vjp((residual, x))[:2]

    return Program(run, _arrays(2, shape, dtype))


def block(norm: Norm, shape: Shape, dtype: Any) -> Program:
    inference, arguments = block_inference(norm, shape, dtype)

    def run(params: Any, w1: Any, w2: Any, h: jax.Array, dout: jax.Array) -> Any:
        value, vjp = jax.vjp(inference, params, w1, w2, h)
        return value, vjp(dout)

    return Program(run, (*arguments, arguments[-1]))


def block_inference(norm: Norm, shape: Shape, dtype: Any) -> Program:
    features = shape.features

    def run(params: Any, w1: Any, w2: Any, h: jax.Array) -> jax.Array:
        return h + jax.nn.relu(norm(params, h) @ w1) @ w2

    w1 = abstract((features, WIDEN * features), dtype)
    w2 = abstract((WIDEN * features, features), dtype)
    return Program(run, (params_of(features), w1, w2, abstract(shape, dtype)))


def heads_of(shape: Shape) -> tuple[int, int, int]:
    """Sequences, their length, and heads of a decoder."""
    length = min(shape.rows, LENGTH)
    return shape.rows // length, length, shape.features // HEAD


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes the scores again in the backward pass, as attention kernels do."""
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
      norm: the first norm of a layer, and the second if `add_norm` is None.
      add_norm: `(params, branch, stream) -> y, stream`, the second norm with the sum
        before it; None if the sum is not fused with the norm.
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


PROGRAMS: dict[str, Callable[..., Program]] = {
    "inference": inference,
    "forward": forward,
    "backward": backward,
    "joint": joint,
    "add": add,
    "add backward": add_backward,
    "add joint": add_joint,
    "block": block,
    "block inference": block_inference,
    "layers": layers,
}


def make(name: str, peer: Peer, shape: Shape, dtype: Any) -> Program:
    """The program of that name with one of `peers.NORMS`."""
    norm = peer.add if name.startswith("add") else peer.norm
    return PROGRAMS[name](norm, shape, dtype)
