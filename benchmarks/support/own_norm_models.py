"""The models of `benchmarks.own_norms`, each with a function for `also`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jax_layernorm as jln
from jax_layernorm.linen import replace as replace_in_linen
from jax_layernorm.nnx import replace as replace_in_nnx
from jax_layernorm.nnx import report as report_of_nnx


class Size(NamedTuple):
    """What the models have in common."""

    width: int
    layers: int
    length: int
    """Tokens in an example."""
    heads: int = 4
    vocab: int = 512

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def positions(self) -> int:
        """Transformers cuts the columns of its table of angles to this number, too."""
        return max(self.length, 2 * self.head)

    @property
    def mlp(self) -> int:
        return 4 * self.width


Logits = Callable[[Any, jax.Array], jax.Array]
"""`(params, tokens) -> logits`."""


class Model(NamedTuple):
    """A model as its package makes it."""

    params: Any
    logits: Logits
    norm: nn.Module | nnx.Module
    """Another norm of the class that the model has."""
    compute: Callable[..., jax.Array]
    """For `also`: what the class's `__call__` returns, by our functions."""
    replaced: Callable[[Mapping[type, Any]], Any]
    """Makes a context manager from `also`; it gives `Logits` and the report."""


# transformers


def llama(kind: Any, dtype: Any, size: Size) -> Model:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaRMSNorm

    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.heads, max_position_embeddings=size.positions,
    )  # fmt: skip
    norm = FlaxLlamaRMSNorm(config, dtype=dtype)
    return _of_transformers(kind, config, dtype, size, norm, compute_llama)


def compute_llama(norm: Any, x: jax.Array) -> jax.Array:
    """It rounds to `norm.dtype`, which is that of `x` in the whole model."""
    return jln.rms_norm(
        {"scale": norm.weight},
        x,
        epsilon=norm.epsilon,
        dtype=jnp.promote_types(norm.weight.dtype, norm.dtype),
        round_before_scale=True,
    )


def gemma_of_transformers(kind: Any, dtype: Any, size: Size) -> Model:
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_flax_gemma import FlaxGemmaRMSNorm

    config = GemmaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=1, head_dim=size.head, max_position_embeddings=size.positions,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    norm = FlaxGemmaRMSNorm(config, dtype=dtype)
    return _of_transformers(
        kind, config, dtype, size, norm, compute_gemma_of_transformers
    )


def compute_gemma_of_transformers(norm: Any, x: jax.Array) -> jax.Array:
    return jln.rms_norm(
        {"scale": norm.weight},
        x,
        epsilon=norm.epsilon,
        scale_offset=1.0,
        dtype=jnp.promote_types(norm.weight.dtype, norm.dtype),
        round_before_scale=True,
    )


def t5(kind: Any, dtype: Any, size: Size) -> Model:
    from transformers import T5Config
    from transformers.models.t5 import modeling_flax_t5

    modeling_flax_t5.jnp = _NumpyWithOldClip()
    config = T5Config(
        vocab_size=size.vocab, d_model=size.width, d_kv=size.head, d_ff=size.mlp,
        num_layers=size.layers, num_heads=size.heads,
    )  # fmt: skip
    norm = modeling_flax_t5.FlaxT5LayerNorm(size.width, dtype=dtype)
    return _of_transformers(
        kind, config, dtype, size, norm, compute_t5, arguments=("decoder_input_ids",)
    )


def compute_t5(norm: Any, x: jax.Array) -> jax.Array:
    """The result has the statistics' dtype, which Flax's layers then round."""
    dtype = jnp.promote_types(norm.weight.dtype, jnp.float32)
    return jln.rms_norm({"scale": norm.weight}, x, epsilon=norm.eps, dtype=dtype)


class _NumpyWithOldClip:
    """`jax.numpy` with the keyword arguments of `clip` that JAX removed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(x, a_min, a_max)


def _of_transformers(
    kind: Any,
    config: Any,
    dtype: Any,
    size: Size,
    norm: nn.Module,
    compute: Callable[..., jax.Array],
    arguments: tuple[str, ...] = (),
) -> Model:
    """Args: `arguments` also get the tokens."""
    model = kind(config, seed=0, dtype=dtype, _do_init=False)
    params = jax.jit(model.init_weights, static_argnums=1)(model.key, (1, size.length))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        more = dict.fromkeys(arguments, tokens)
        return model(tokens, params=params, train=False, **more).logits

    return Model(params, logits, norm, compute, _replacing_linen(logits))


# gemma


def gemma(kind: Any, dtype: Any, size: Size) -> Model:
    from gemma import gm

    attention_types = tuple(kind.config.attention_types) * size.layers
    config = dataclasses.replace(
        kind.config, num_embed=size.vocab, embed_dim=size.width, hidden_dim=size.mlp,
        num_heads=size.heads, num_kv_heads=1, head_dim=size.head,
        attention_types=attention_types[: size.layers],
    )  # fmt: skip
    model = kind(config=config, dtype=dtype)
    tokens = jnp.ones((1, size.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply(params, tokens).logits

    norm = gm.nn.RMSNorm()
    return Model(params, logits, norm, compute_gemma, _replacing_linen(logits))


def compute_gemma(norm: Any, x: jax.Array) -> jax.Array:
    """The class takes the statistics in the dtype of `x`; ours are in float32."""
    params = {"scale": norm.variables["params"]["scale"]}
    return jln.rms_norm(
        params, x, epsilon=1e-6, scale_offset=1.0, round_before_scale=True
    )


# bonsai


def llada(kind: Any, dtype: Any, size: Size) -> Model:
    from bonsai.models.llada import modeling

    # Without a mesh no partition may be given, not even an empty one.
    fields = dataclasses.fields(modeling.ShardingConfig)
    config = dataclasses.replace(
        modeling.ModelConfig.llada_8b_it(use_fsdp=False, use_tp=False, dtype=dtype),
        shd_cfg=modeling.ShardingConfig(**{f.name: None for f in fields}),
        d_model=size.width, n_heads=size.heads, n_kv_heads=size.heads,
        n_layers=size.layers, max_sequence_length=size.length,
        mlp_hidden_size=size.mlp, vocab_size=size.vocab, embedding_size=size.vocab,
    )  # fmt: skip
    model = kind(config, rngs=nnx.Rngs(0))
    model.wte.dtype = dtype
    for _, module in nnx.iter_modules(model):
        if isinstance(module, modeling.RMSNorm):  # zeros, until a checkpoint is read
            module.weight[...] = jnp.ones_like(module.weight[...])
    ours = nnx.clone(model)

    def replaced(also: Mapping[type, Any]) -> Any:
        replace_in_nnx(ours, also=also)
        return contextlib.nullcontext((_logits_of_llada(ours), report_of_nnx(ours)))

    norm = modeling.RMSNorm(
        size.width, config.rms_norm_eps, dtype=dtype, shd=None, rngs=nnx.Rngs(0)
    )
    params = nnx.state(model, nnx.Param)
    return Model(params, _logits_of_llada(model), norm, compute_llada, replaced)


def _logits_of_llada(model: Any) -> Logits:
    graph, _, others = nnx.split(model, nnx.Param, ...)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, params, others)
        return merged(tokens, jnp.ones(tokens.shape, bool), jax.random.key(0))[0]

    return logits


def compute_llada(norm: Any, x: jax.Array) -> jax.Array:
    return jln.rms_norm({"scale": norm.weight[...]}, x, epsilon=norm.eps)


def _replacing_linen(logits: Logits) -> Callable[[Mapping[type, Any]], Any]:
    @contextlib.contextmanager
    def replaced(also: Mapping[type, Any]) -> Iterator[Any]:
        with replace_in_linen(also=also) as found:
            yield logits, found

    return replaced


class Source(NamedTuple):
    """Where a model comes from."""

    name: str
    """For `pkgutil.resolve_name`."""
    install: str
    load: Callable[[Any, Any, Size], Model]
    """From the model's class, a dtype and a size."""
    note: str | None = None


TRANSFORMERS = 'pip install "transformers<5"'
GEMMA = "pip install gemma (needs Python 3.12)"
BONSAI = "git clone https://github.com/jax-ml/bonsai; export PYTHONPATH=$PWD/bonsai"
SOURCES = {
    "FlaxLlama": Source(
        "transformers.models.llama.modeling_flax_llama:FlaxLlamaForCausalLM",
        TRANSFORMERS, llama,
    ),
    "FlaxGemma": Source(
        "transformers.models.gemma.modeling_flax_gemma:FlaxGemmaForCausalLM",
        TRANSFORMERS, gemma_of_transformers,
    ),
    "FlaxT5": Source(
        "transformers.models.t5.modeling_flax_t5:FlaxT5ForConditionalGeneration",
        TRANSFORMERS, t5,
        "a shim: its module gets a jnp.clip that takes a_max, which JAX has removed",
    ),
    "Gemma3": Source("gemma.gm.nn:Gemma3_1B", GEMMA, gemma),
    "LLaDA": Source(
        "bonsai.models.llada.modeling:LLaDAModel",
        BONSAI,
        llada,
        "its embedding gets the dtype of the model; otherwise all activations would be"
        " float32",
    ),
}  # fmt: skip
