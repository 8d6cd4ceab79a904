"""Models with norm classes that are not Flax's, like five models in use.

Each exists in NNX and in linen, with the same formula. Beside each norm is the function
that a user would pass to `replace(also=)`, which computes the norm by our functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax_cases import draw
from jax import lax

import jax_layernorm as jln

WIDTH, HEADS, LAYERS = 32, 2, 2
EPSILON = 1e-5
X = draw(0, 2, 6, WIDTH)
CONDITION = draw(1, 2, 8)


def rms(x):
    """`x_hat` in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON)


def our_rounded(scale, x):
    """`x_hat`, rounded to the dtype of the scale, times the scale."""
    params = {"scale": scale}
    if scale.dtype == x.dtype:
        return jln.rms_norm(params, x, epsilon=EPSILON, round_before_scale=True)
    return scale * jln.rms_norm({}, x, epsilon=EPSILON, dtype=scale.dtype)


# Llama rounds to x's dtype before it multiplies by the weight.


def llama(weight, x):
    return weight * rms(x).astype(x.dtype)


def our_llama(weight, x, epsilon):
    dtype = jnp.promote_types(weight.dtype, x.dtype)
    params = {"scale": weight}
    return jln.rms_norm(
        params, x, epsilon=epsilon, dtype=dtype, round_before_scale=True
    )


class LlamaNorm(nnx.Module):
    def __init__(self, dtype, *, rngs):
        self.weight = nnx.Param(jnp.ones(WIDTH, dtype))
        self.eps = EPSILON

    def __call__(self, x):
        return llama(self.weight[...], x)


class LinenLlamaNorm(nn.Module):
    dtype: Any
    eps: float = EPSILON

    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.ones
        return llama(self.param("weight", ones, x.shape[-1:], self.dtype), x)


def compute_llama(norm, x):
    return our_llama(norm.weight[...], x, norm.eps)


def compute_linen_llama(norm, x):
    return our_llama(norm.variables["params"]["weight"], x, norm.eps)


# Gemma's gain is 1 + scale, and only the result is rounded.


def gemma(scale, x):
    return (rms(x) * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def our_gemma(scale, x):
    return jln.rms_norm({"scale": scale}, x, epsilon=EPSILON, scale_offset=1.0)


class GemmaNorm(nnx.Module):
    def __init__(self, dtype, *, rngs):
        self.scale = nnx.Param(jnp.zeros(WIDTH, dtype))

    def __call__(self, x):
        return gemma(self.scale[...], x)


class LinenGemmaNorm(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return gemma(self.param("scale", zeros, x.shape[-1:], self.dtype), x)


def compute_gemma(norm, x):
    return our_gemma(norm.scale[...], x)


def compute_linen_gemma(norm, x):
    return our_gemma(norm.variables["params"]["scale"], x)


# T5 rounds before it multiplies if the weight has half precision.


def t5(weight, x):
    x_hat = rms(x)
    if weight.dtype in (jnp.bfloat16, jnp.float16):
        x_hat = x_hat.astype(weight.dtype)
    return weight * x_hat


class T5Norm(nnx.Module):
    def __init__(self, dtype, *, rngs):
        self.weight = nnx.Param(jnp.ones(WIDTH, dtype))

    def __call__(self, x):
        return t5(self.weight[...], x)


class LinenT5Norm(nn.Module):
    dtype: Any

    def setup(self):
        self.weight = self.param("weight", nn.initializers.ones, (WIDTH,), self.dtype)

    def __call__(self, x):
        return t5(self.weight, x)


def compute_t5(norm, x):
    return our_rounded(norm.weight[...], x)


def compute_linen_t5(norm, x):
    return our_rounded(norm.weight, x)


# MaxText keeps a float32 scale, in a box that names its axis, and rounds to `dtype`.


def max_text(scale, x, dtype):
    return rms(x).astype(dtype) * scale.astype(dtype)


class MaxTextNorm(nnx.Module):
    def __init__(self, dtype, *, weight_dtype=jnp.float32, rngs):
        boxed = {"out_sharding": ("norm",), "eager_sharding": False}
        self.scale = nnx.Param(jnp.ones(WIDTH, weight_dtype), **boxed)
        self.dtype = dtype

    def __call__(self, x):
        return max_text(self.scale[...], x, self.dtype)


class LinenMaxTextNorm(nn.Module):
    dtype: Any
    weight_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], self.weight_dtype)
        return max_text(scale, x, self.dtype)


def compute_max_text(norm, x):
    return our_rounded(norm.scale[...].astype(norm.dtype), x)


def compute_linen_max_text(norm, x):
    scale = nn.meta.unbox(norm.variables["params"]["scale"])
    return our_rounded(scale.astype(norm.dtype), x)


# A diffusion transformer makes scale, shift and gate from a condition.


def modulated(modulation, x, *, center):
    scale, shift, gate = jnp.split(modulation[:, None], 3, -1)
    wide, scale, shift = (a.astype(jnp.float32) for a in (x, scale, shift))
    x_hat = rms(wide - wide.mean(-1, keepdims=True) if center else wide)
    return (x_hat * (1 + scale) + shift).astype(x.dtype), gate


def our_modulated(modulation, x, *, center):
    scale, shift, gate = jnp.split(modulation[:, None], 3, -1)
    params = {"scale": scale, "bias": shift}
    norm = jln.layer_norm if center else jln.rms_norm
    return norm(params, x, epsilon=EPSILON, scale_offset=1.0), gate


class AdaptiveNorm(nnx.Module):
    def __init__(self, dtype, *, center=True, rngs):
        size = CONDITION.shape[-1]
        self.modulation = nnx.Linear(size, 3 * WIDTH, param_dtype=dtype, rngs=rngs)
        self.center = center

    def __call__(self, x, condition):
        modulation = self.modulation(jax.nn.silu(condition))
        return modulated(modulation, x, center=self.center)


class LinenAdaptiveNorm(nn.Module):
    dtype: Any
    center: bool = True

    def setup(self):
        self.modulation = nn.Dense(3 * WIDTH, param_dtype=self.dtype)

    def __call__(self, x, condition):
        modulation = self.modulation(jax.nn.silu(condition))
        return modulated(modulation, x, center=self.center)


def compute_adaptive(norm, x, condition):
    modulation = norm.modulation(jax.nn.silu(condition))
    return our_modulated(modulation, x, center=norm.center)


# The models.


class Parts(NamedTuple):
    """What a block is made of."""

    norm: type
    after: bool = False  # norms after attention and MLP too
    causal: bool = True
    dtype: Any = jnp.float32


def attention(qkv, *, causal):
    heads = qkv.reshape(*qkv.shape[:-1], 3, HEADS, WIDTH // HEADS)
    query, key, value = (heads[..., i, :, :] for i in range(3))
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / (WIDTH // HEADS) ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -1e9)
    mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)
    return mixed.reshape(*mixed.shape[:-2], WIDTH)


def swiglu(gate_and_up):
    gate, up = jnp.split(gate_and_up, 2, -1)
    return jax.nn.silu(gate) * up


class Layers(nnx.Module):
    """Attention and a gated MLP, without norms."""

    def __init__(self, parts, rngs):
        def dense(size, features):
            options = {"use_bias": False, "param_dtype": parts.dtype, "rngs": rngs}
            return nnx.Linear(size, features, **options)

        self.qkv, self.out = dense(WIDTH, 3 * WIDTH), dense(WIDTH, WIDTH)
        self.up, self.down = dense(WIDTH, 4 * WIDTH), dense(2 * WIDTH, WIDTH)
        self.causal = parts.causal

    def attention(self, x):
        return self.out(attention(self.qkv(x), causal=self.causal))

    def mlp(self, x):
        return self.down(swiglu(self.up(x)))


class Block(nnx.Module):
    def __init__(self, parts, rngs):
        self.layers = Layers(parts, rngs)
        norms = 2 + 2 * parts.after
        self.norms = nnx.List(
            [parts.norm(parts.dtype, rngs=rngs) for _ in range(norms)]
        )

    def __call__(self, x):
        before_attention, before_mlp, *after = self.norms
        after_attention, after_mlp = after or [lambda x: x] * 2
        x = x + after_attention(self.layers.attention(before_attention(x)))
        return x + after_mlp(self.layers.mlp(before_mlp(x)))


class AdaptiveBlock(nnx.Module):
    """The norm before attention is a layer norm, the norm before the MLP an RMS norm."""

    def __init__(self, parts, rngs):
        self.layers = Layers(parts, rngs)
        self.before_attention = parts.norm(parts.dtype, rngs=rngs)
        self.before_mlp = parts.norm(parts.dtype, center=False, rngs=rngs)

    def __call__(self, x, condition):
        y, gate = self.before_attention(x, condition)
        x = x + gate * self.layers.attention(y)
        y, gate = self.before_mlp(x, condition=condition)
        return x + gate * self.layers.mlp(y)


class Model(nnx.Module):
    """Blocks in a list, or stacked and then scanned and rematerialized."""

    def __init__(self, parts, rngs, *, scanned=False):
        block = AdaptiveBlock if parts.norm is AdaptiveNorm else Block
        if scanned:
            make = nnx.vmap(lambda rngs: block(parts, rngs))
            self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        else:
            self.blocks = nnx.List([block(parts, rngs) for _ in range(LAYERS)])
        self.last = parts.norm(parts.dtype, rngs=rngs)

    def __call__(self, x, *condition):
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x, *condition)
        else:
            x = nnx.scan(
                nnx.remat(lambda block, x: block(x, *condition)),
                in_axes=(0, nnx.Carry),
                out_axes=nnx.Carry,
            )(self.blocks, x)
        y = self.last(x, *condition)
        return y[0] if condition else y


class LinenLayers(nn.Module):
    """Attention and a gated MLP, without norms."""

    parts: Parts

    def setup(self):
        def dense(features):
            return nn.Dense(features, use_bias=False, param_dtype=self.parts.dtype)

        self.qkv, self.out = dense(3 * WIDTH), dense(WIDTH)
        self.up, self.down = dense(4 * WIDTH), dense(WIDTH)

    def attention(self, x):
        return self.out(attention(self.qkv(x), causal=self.parts.causal))

    def mlp(self, x):
        return self.down(swiglu(self.up(x)))


class LinenBlock(nn.Module):
    parts: Parts

    @nn.compact
    def __call__(self, x):
        layers = LinenLayers(self.parts)

        def norm(x):
            return self.parts.norm(self.parts.dtype)(x)

        after = norm if self.parts.after else lambda x: x
        x = x + after(layers.attention(norm(x)))
        return x + after(layers.mlp(norm(x))), None


class LinenAdaptiveBlock(nn.Module):
    parts: Parts

    @nn.compact
    def __call__(self, x, condition):
        layers, norm = LinenLayers(self.parts), self.parts.norm
        y, gate = norm(self.parts.dtype)(x, condition)
        x = x + gate * layers.attention(y)
        y, gate = norm(self.parts.dtype, center=False)(x, condition=condition)
        return x + gate * layers.mlp(y), None


class LinenModel(nn.Module):
    """Layers written out, or one layer that is scanned and rematerialized."""

    parts: Parts
    scanned: bool = False

    @nn.compact
    def __call__(self, x, *condition):
        adaptive = self.parts.norm is LinenAdaptiveNorm
        block = LinenAdaptiveBlock if adaptive else LinenBlock
        if self.scanned:
            stack = nn.scan(
                nn.remat(block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
                metadata_params={nn.PARTITION_NAME: None},
            )
            x, _ = stack(self.parts)(x, *condition)
        else:
            for _ in range(LAYERS):
                x, _ = block(self.parts)(x, *condition)
        y = self.parts.norm(self.parts.dtype)(x, *condition)
        return y[0] if condition else y


class Case(NamedTuple):
    """A model, its class of norm, and the norm by our functions.

    Attributes:
      make: makes the model; takes the dtype of its parameters, and `scanned`.
      norm: the class of its norms.
      compute: the function that `also` maps the class to.
      norms: how many the model has.
      conditioned: whether the model and its norms take a condition after `x`.
      rounds_before_scale: whether `x_hat` is rounded before it is scaled.
    """

    make: Callable[..., Any]
    norm: type
    compute: Callable[..., Any]
    norms: int = 2 * LAYERS + 1
    conditioned: bool = False
    rounds_before_scale: bool = True

    @property
    def linen(self):
        return issubclass(self.norm, nn.Module)

    @property
    def inputs(self):
        return (X, CONDITION) if self.conditioned else (X,)

    @property
    def also(self):
        return {self.norm: self.compute}


def case(norm, compute, *, after=False, causal=True, **options):
    def make(dtype=jnp.float32, *, scanned=False):
        parts = Parts(norm, after, causal, dtype)
        if issubclass(norm, nn.Module):
            return LinenModel(parts, scanned)
        return Model(parts, nnx.Rngs(0), scanned=scanned)

    return Case(make, norm, compute, **options)


GEMMA = {"after": True, "norms": 4 * LAYERS + 1, "rounds_before_scale": False}
ADAPTIVE = {"conditioned": True, "rounds_before_scale": False}
MODELS = {
    "llama-nnx": case(LlamaNorm, compute_llama),
    "llama-linen": case(LinenLlamaNorm, compute_linen_llama),
    "gemma-nnx": case(GemmaNorm, compute_gemma, **GEMMA),
    "gemma-linen": case(LinenGemmaNorm, compute_linen_gemma, **GEMMA),
    "t5-nnx": case(T5Norm, compute_t5, causal=False),
    "t5-linen": case(LinenT5Norm, compute_linen_t5, causal=False),
    "max_text-nnx": case(MaxTextNorm, compute_max_text),
    "max_text-linen": case(LinenMaxTextNorm, compute_linen_max_text),
    "adaptive-nnx": case(AdaptiveNorm, compute_adaptive, **ADAPTIVE),
    "adaptive-linen": case(LinenAdaptiveNorm, compute_adaptive, **ADAPTIVE),
}
NNX = {name: case for name, case in MODELS.items() if not case.linen}
LINEN = {name: case for name, case in MODELS.items() if case.linen}
