"""A decoder-only transformer in Flax linen, with a choice of normalization.

    x = token[t] + position[i]
    pre:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    post:  x = norm(x + attention(x));   x = norm(x + mlp(x))
    logits = norm(x) @ token.T

Tokens are bytes. Parameters are float32, the computation runs in `config.dtype`, the
logits and the loss are float32. Every norm choice has the same parameter names, so the
same seed gives the same initial parameters. The axes of arrays have names. On one
device the names mean nothing; on several devices, mesh.py says how the axes are split.

Nothing here reads or writes a file.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jax_layernorm import linen

NORMS = {"layernorm": linen.LayerNorm, "rmsnorm": linen.RMSNorm, "flax": nn.LayerNorm}
Placement = Literal["pre", "post"]
Dtype = Literal["float32", "bfloat16"]
VOCABULARY = 256  # one token is one byte

Params = Any  # the tree of arrays that `Decoder.init` returns under "params"


@dataclass(frozen=True)
class DecoderConfig:
    """What the model is. `width` must be a multiple of `heads`."""

    layers: int = 4
    """Transformer blocks."""
    width: int = 128
    """Features of the residual stream."""
    heads: int = 2
    """Attention heads."""
    context: int = 128
    """Bytes that the model looks back."""
    norm: Literal["layernorm", "rmsnorm", "flax"] = "layernorm"
    """Two norms of jax_layernorm, and flax.linen.LayerNorm to compare."""
    placement: Placement = "pre"
    """Norm before (pre) or after (post) attention and MLP."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters are always float32."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}."
                )
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads; got width {self.width} "
                f"and heads {self.heads}. "
                f"Try width {self.heads * max(1, round(self.width / self.heads))}."
            )
        for name, known in (
            ("norm", NORMS),
            ("placement", get_args(Placement)),
            ("dtype", get_args(Dtype)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {value!r}."
                )

    def title(self) -> str:
        """The model in a few words."""
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads, "
            f"{self.norm} ({self.placement}), {self.dtype}"
        )


def normal(deviation: float, *axes: str | None) -> Any:
    """An initializer of an array whose axes have these names."""
    return nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)


init = partial(normal, 0.04)


def init_to_residual(config: DecoderConfig, *axes: str | None) -> Any:
    """Smaller values, so that the residual does not grow with the number of layers."""
    return normal(0.04 / (2 * config.layers) ** 0.5, *axes)


def residual_stream(x: jax.Array) -> jax.Array:
    """`x` `(batch, length, width)`, with whole rows on each device."""
    return nn.with_logical_constraint(x, ("batch", None, None))


class Attention(nn.Module):
    """Causal self-attention: position i sees positions 0 to i."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        linear = partial(nn.Dense, config.width, use_bias=False, dtype=config.dtype)
        heads = (*x.shape[:-1], config.heads, config.width // config.heads)
        query, key, value = (
            linear(kernel_init=init("width", "heads"), name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        to_residual = init_to_residual(config, "heads", "width")
        return linear(kernel_init=to_residual, name="out")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two linear maps with a squared ReLU between them, four times as wide inside."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        linear = partial(nn.Dense, use_bias=False, dtype=config.dtype)
        up = linear(4 * config.width, kernel_init=init("width", "mlp"), name="up")
        to_residual = init_to_residual(config, "mlp", "width")
        down = linear(config.width, kernel_init=to_residual, name="down")
        return down(jax.nn.relu(up(x)) ** 2)


class Block(nn.Module):
    """Attention then MLP, each with its norm and its residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(NORMS[self.config.norm], dtype=self.config.dtype)
        attention, mlp = (
            Attention(self.config, name="attention"),
            MLP(self.config, name="mlp"),
        )
        norm_attention, norm_mlp = norm(name="norm_attention"), norm(name="norm_mlp")
        if self.config.placement == "pre":
            x = residual_stream(x + attention(norm_attention(x)))
            return residual_stream(x + mlp(norm_mlp(x)))
        x = norm_attention(residual_stream(x + attention(x)))
        return norm_mlp(residual_stream(x + mlp(x)))


class Decoder(nn.Module):
    """Bytes `(batch, length)` to float32 logits of the next, `(batch, length, 256)`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        if tokens.shape[1] > config.context:
            raise ValueError(
                f"tokens must be at most context {config.context} long; "
                f"got {tokens.shape[1]}."
            )
        token, position = (
            nn.Embed(
                length, config.width, dtype=config.dtype, name=name,
                embedding_init=normal(0.02, axis, "width"),
            )
            for name, length, axis in (
                ("token", VOCABULARY, "vocabulary"), ("position", config.context, None),
            )
        )  # fmt: skip
        x = residual_stream(token(tokens) + position(jnp.arange(tokens.shape[1])))
        for layer in range(config.layers):
            x = Block(config, name=f"block_{layer}")(x)
        x = NORMS[config.norm](dtype=config.dtype, name="norm_out")(x)
        embedding = token.embedding.astype(x.dtype)
        return jnp.dot(x, embedding.T, preferred_element_type=jnp.float32)


def next_byte_losses(
    config: DecoderConfig, params: Params, windows: jax.Array
) -> jax.Array:
    """The loss in nats, `(batch, length)`, of each byte but a window's first."""
    tokens = windows.astype(jnp.int32)
    logits = Decoder(config).apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def init_named_params(config: DecoderConfig, seed: int) -> Params:
    """Parameters in boxes that hold the names of their axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(jax.random.key(seed), tokens)["params"]


def init_params(config: DecoderConfig, seed: int) -> Params:
    """Float32 parameters that depend on `seed` and the sizes only."""
    return nn.unbox(init_named_params(config, seed))


def param_axes(config: DecoderConfig) -> Any:
    """A `PartitionSpec` of axis names for each parameter."""
    return nn.get_partition_spec(jax.eval_shape(partial(init_named_params, config), 0))


def generate(
    config: DecoderConfig,
    params: Params,
    prompt: bytes,
    length: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
) -> bytes:
    """`length` bytes after `prompt`, each drawn from the `context` bytes before it.

    A lower temperature makes likely bytes likelier; 0 takes the likeliest of all.
    """
    if not prompt:
        raise ValueError("prompt must hold at least one byte; got none.")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and not negative; got {temperature}. Try 0.8."
        )
    seen = list(prompt[-config.context :])
    window = jnp.zeros(config.context, jnp.int32).at[: len(seen)].set(jnp.array(seen))
    drawn = _generate(
        config, params, window, len(seen), length, jax.random.key(seed), temperature
    )
    return bytes(drawn.tolist())


@partial(jax.jit, static_argnames=("config", "length"))
def _generate(config, params, window, seen, length, key, temperature):
    def draw(carry, key):
        window, seen = carry
        # What lies beyond `seen` does not matter: attention is causal.
        logits = Decoder(config).apply({"params": params}, window[None])[0, seen - 1]
        byte = jnp.where(
            temperature > 0,
            jax.random.categorical(key, logits / temperature),
            jnp.argmax(logits),
        )
        full = seen == config.context
        window = (
            jnp.where(full, jnp.roll(window, -1), window)
            .at[jnp.where(full, seen - 1, seen)]
            .set(byte)
        )
        return (window, jnp.minimum(seen + 1, config.context)), byte

    return jax.lax.scan(draw, (window, seen), jax.random.split(key, length))[1]
