"""A BERT encoder in Flax linen, with a choice of normalization and weights from torch.

    x = norm(word[t] + position[i] + kind[0])
    x = norm(x + attention(x));   x = norm(x + mlp(x))        in every layer
    sentence = the mean of x over the tokens, scaled to length 1

Each norm follows a sum, and ours adds and normalizes in one pass, `norm(y, residual=x)`.
Both norms have the same parameters. Everything is float32.

Used by `embed.py`; nothing here reads or writes a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm as jln

NORMS = {"ours": jln.linen.LayerNorm, "flax": nn.LayerNorm}
# A Hugging Face configuration may ask for other values; they are not supported.
SUPPORTED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}

Params = Any  # the tree of arrays that `Encoder.init` returns under "params"


@dataclass(frozen=True)
class EncoderConfig:
    """What the model is. `width` must be a multiple of `heads`."""

    vocabulary: int
    positions: int
    kinds: int
    width: int
    hidden: int
    layers: int
    heads: int
    epsilon: float
    norm: str = "ours"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads; got {self.width} and {self.heads}."
            )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], norm: str) -> "EncoderConfig":
        """Makes a configuration from the content of a Hugging Face `config.json`.

        Raises:
          ValueError: the model is not a BERT of the supported kind.
        """
        for key, only in SUPPORTED.items():
            if config.get(key, only) != only:
                raise ValueError(
                    f"{key} must be {only!r}; the configuration has {config[key]!r}."
                )
        return cls(
            vocabulary=config["vocab_size"],
            positions=config["max_position_embeddings"],
            kinds=config["type_vocab_size"],
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            epsilon=config["layer_norm_eps"],
            norm=norm,
        )

    def title(self) -> str:
        """The model in a few words."""
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads, "
            f"norm {self.norm} (epsilon {self.epsilon})"
        )


def add_norm(config: EncoderConfig, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`norm(x + y)`, by a submodule called `name` of the module that is running."""
    norm = NORMS[config.norm](epsilon=config.epsilon, name=name)
    if isinstance(norm, jln.linen.LayerNorm):
        return norm(y, residual=x)[0]  # [1] is the sum
    return norm(x + y)


class Attention(nn.Module):
    """Every token sees all tokens of its sentence."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        config = self.config
        heads = (*x.shape[:2], config.heads, config.width // config.heads)
        query, key, value = (
            nn.Dense(config.width, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None, None, :]
        )
        return nn.Dense(config.width, name="out")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Attention then MLP, each added to the stream and normalized."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        config = self.config
        y = Attention(config, name="attention")(x, mask)
        x = add_norm(config, "norm_attention", x, y)
        y = nn.gelu(nn.Dense(config.hidden, name="up")(x), approximate=False)
        y = nn.Dense(config.width, name="down")(y)
        return add_norm(config, "norm_mlp", x, y)


class Encoder(nn.Module):
    """Tokens `(batch, length)`, and which of them are real, to `(batch, length, width)`."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        config = self.config
        embed = partial(nn.Embed, features=config.width)
        word = embed(config.vocabulary, name="word")(tokens)
        position = embed(config.positions, name="position")(jnp.arange(tokens.shape[1]))
        kind = embed(config.kinds, name="kind")(jnp.zeros_like(tokens))
        x = add_norm(config, "norm_embeddings", word + position, kind)
        for layer in range(config.layers):
            x = Layer(config, name=f"layer_{layer}")(x, mask)
        return x


@partial(jax.jit, static_argnames="config")
def embed(
    config: EncoderConfig, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """One vector of length 1 for each sentence, `(batch, width)`."""
    # By default, accelerators multiply float32 in fewer bits.
    with jax.default_matmul_precision("float32"):
        x = Encoder(config).apply({"params": params}, tokens, mask)
    mean = x.mean(axis=1, where=mask[:, :, None])
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def params_from_torch(
    config: EncoderConfig, weights: Mapping[str, np.ndarray]
) -> Params:
    """The parameters of `Encoder` from the state dict of Hugging Face's `BertModel`.

    Raises:
      KeyError: a parameter is missing; the message names it.
      ValueError: a parameter has not the shape that the configuration gives it.
    """

    # A model with a head has the encoder under this name.
    weights = {key.removeprefix("bert."): value for key, value in weights.items()}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {
            "kernel": weights[f"{name}.weight"].T,
            "bias": weights[f"{name}.bias"],
        }

    def table(name: str) -> dict[str, np.ndarray]:
        return {"embedding": weights[f"embeddings.{name}_embeddings.weight"]}

    def norm(name: str) -> dict[str, jax.Array]:
        return jln.convert.from_torch(weights, f"{name}.LayerNorm")

    params: dict[str, Any] = {
        "word": table("word"),
        "position": table("position"),
        "kind": table("token_type"),
        "norm_embeddings": norm("embeddings"),
    }
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "attention": {
                "query": linear(f"{layer}.attention.self.query"),
                "key": linear(f"{layer}.attention.self.key"),
                "value": linear(f"{layer}.attention.self.value"),
                "out": linear(f"{layer}.attention.output.dense"),
            },
            "norm_attention": norm(f"{layer}.attention.output"),
            "up": linear(f"{layer}.intermediate.dense"),
            "down": linear(f"{layer}.output.dense"),
            "norm_mlp": norm(f"{layer}.output"),
        }
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    needed = jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens, mask)
    needed = jax.tree_util.tree_leaves_with_path(needed["params"])
    for (path, leaf), array in zip(needed, jax.tree.leaves(params), strict=True):
        if leaf.shape != array.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} must have shape {leaf.shape}; got {array.shape}.")
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
