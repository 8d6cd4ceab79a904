"""Models like those in use: a GPT in linen and a Gemma in NNX, with Flax's norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax_cases import FEATURES, SHAPE, draw, dtypes

VOCABULARY, WIDTH, HEADS, LAYERS = 17, 16, 2, 2
CONTEXT = 6
X = draw(0, *SHAPE)
TOKENS = jnp.arange(2 * CONTEXT).reshape(2, CONTEXT) * 5 % VOCABULARY


class Twice(nn.Module):
    """One norm, called twice, with a mask or without, between dense layers."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x, **call):
        return self.norm(nn.Dense(FEATURES)(self.norm(x, **call)), **call)


class GPTBlock(nn.Module):
    """Pre-norm attention and MLP."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        causal = nn.make_causal_mask(x[..., 0])
        # Without biases, because the gradient of the keys' bias is only rounding.
        attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
        x = x + attention(h, mask=causal, deterministic=True)
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h), None


class GPT(nn.Module):
    """Layers written out, or one layer that is scanned and rematerialized."""

    scanned: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        position = self.param("position", nn.initializers.normal(), (CONTEXT, WIDTH))
        x = embed(tokens) + position
        if self.scanned:
            stack = nn.scan(
                nn.remat(GPTBlock),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = stack()(x)
        else:
            for _ in range(LAYERS):
                x, _ = GPTBlock()(x)
        return embed.attend(nn.LayerNorm(use_bias=False, name="last")(x))


class GemmaBlock(nnx.Module):
    """RMS norms before and after attention and the gated MLP, and of queries and keys."""

    def __init__(self, rngs):
        def norm():
            return nnx.RMSNorm(WIDTH, rngs=rngs)

        self.norms = nnx.Dict(
            before_attention=norm(),
            after_attention=norm(),
            before_mlp=norm(),
            after_mlp=norm(),
        )
        self.query_key_norm = nnx.List(
            [nnx.RMSNorm(WIDTH // HEADS, rngs=rngs) for _ in range(2)]
        )
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def attention(self, x):
        heads = self.qkv(x).reshape(*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
        query, key, value = (heads[..., i, :, :] for i in range(3))
        query, key = (
            norm(a) for norm, a in zip(self.query_key_norm, (query, key), strict=True)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(x.shape))

    def mlp(self, x):
        return self.down(nnx.gelu(self.gate(x)) * self.up(x))

    def __call__(self, x):
        norms = self.norms
        x = x + norms.after_attention(self.attention(norms.before_attention(x)))
        return x + norms.after_mlp(self.mlp(norms.before_mlp(x)))


class NormWithASize(nnx.LayerNorm):
    """A subclass with arguments of its own, in a module that a new process can import."""

    def __init__(self, rngs):
        super().__init__(FEATURES, epsilon=0.25, rngs=rngs)


class Gemma(nnx.Module):
    """Layers in a list, or stacked and scanned."""

    def __init__(self, rngs, *, scanned=False):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        if scanned:
            self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(GemmaBlock))(rngs)
        else:
            self.layers = nnx.List([GemmaBlock(rngs) for _ in range(LAYERS)])
        self.last = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) * WIDTH**0.5
        if isinstance(self.layers, GemmaBlock):
            x = nnx.scan(
                nnx.remat(lambda layer, x: layer(x)),
                in_axes=(0, nnx.Carry),
                out_axes=nnx.Carry,
            )(self.layers, x)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.embed.attend(self.last(x))


def cross_entropy(logits):
    likely = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(likely, TOKENS[:, 1:, None], -1).mean()


def loss_and_logits_of_gpt(params, *, scanned=False):
    logits = GPT(scanned).apply({"params": params}, TOKENS)
    return cross_entropy(logits), logits


def loss_and_logits_of_gemma(model):
    logits = model(TOKENS)
    return cross_entropy(logits), logits


def count_ops(function, *arguments):
    """How often our forward and backward op run in `function(*arguments)`.

    It is traced again, because JAX may have cached a function that closes over a model.
    """
    counts = {"layer_norm_forward": 0, "layer_norm_backward": 0}

    def walk(jaxpr, times):
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name in counts:
                counts[name] += times
                continue
            repeats = times * eqn.params.get("length", 1) if name == "scan" else times
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner, repeats)

    walk(jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments).jaxpr, 1)
    return tuple(counts.values())


@jax.jit
def perturbed(tree, seed=0):
    """`tree` with every array a little different from its initial value."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        a + 0.1 * jax.random.normal(k, a.shape, a.dtype)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def assert_close(got, want, *, units=64):
    """Equal to `units` in the last place of each array's largest element, in float32."""
    assert dtypes(got) == dtypes(want)

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = units * float(jnp.finfo(jnp.float32).eps) * np.abs(b).max()
        assert np.abs(a - b).max() <= limit

    jax.tree.map(check, got, want)
