"""The table of docs/guides/own-norm.md: its calls give the bits that it says they give.

Each call is read from the page and evaluated. What a model computes is written here anew,
op by op and not under `jit`, because XLA may leave out a rounding inside a program.
"""

import dataclasses
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_layernorm as jln

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "own-norm.md"
SHAPE = BATCH, TOKENS, FEATURES = 2, 64, 128
HEADS = GROUPS = 4
DTYPES = (jnp.bfloat16, jnp.float16)
for_both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def rows_of_the_page():
    """The calls and the claims of the table, by the name in its first column."""
    table = re.search(r"^\| norm \|.*?\n\n", PAGE.read_text(), re.M | re.DOTALL)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line]
    return {name: (call.strip("`"), bits) for name, call, bits, _ in lines}


def float32(a):
    return a.astype(jnp.float32)


def mean(a, axis=-1):
    return jnp.mean(a, axis, keepdims=True)


class Given(types.SimpleNamespace):
    """What the page's calls name, and `rstd`, if the model has such an array."""

    rstd = None

    def x_hat(self, x, epsilon, *, center=False, axis=-1):
        """Normalized in float32, not rounded."""
        x = float32(x)
        if center:
            x = x - mean(x, axis)
        self.rstd = lax.rsqrt(mean(x * x, axis) + epsilon)
        return x * self.rstd


# What the models compute. The names are those of the norms in the table.


def llama(g):
    return g.w * g.x_hat(g.x, g.eps).astype(g.x.dtype)


def flax_llama(g):
    h = g.x / jnp.sqrt(mean(jnp.power(float32(g.x), 2)) + g.eps)
    return g.w * h.astype(g.x.dtype)


def gemma(g):
    return (g.x_hat(g.x, g.eps) * (1.0 + float32(g.w))).astype(g.x.dtype)


def flax_gemma(g):
    h = g.x / jnp.sqrt(mean(jnp.power(float32(g.x), 2)) + g.eps)
    return (1 + g.w) * h.astype(g.x.dtype)


def t5(g):
    return g.w * g.x_hat(g.x, 1e-6).astype(g.w.dtype)


def maxtext(g):
    y = g.x_hat(g.x, 1e-6).astype(g.x.dtype)
    return jnp.einsum("...k,k->...k", y, g.w.astype(g.x.dtype) + g.offset)


def maxtext_gpt3(g):
    y = g.x_hat(g.x, 1e-6, center=True).astype(g.x.dtype)
    y = jnp.einsum("...k,k->...k", y, g.w.astype(g.x.dtype) + 1)
    return y + g.b.astype(g.x.dtype)


def olmo(g):
    return g.x_hat(g.x, 1e-5, center=True).astype(g.x.dtype)


def olmo2(g):
    return (float32(g.w) * g.x_hat(g.x, g.eps)).astype(g.x.dtype)


def olmo2_heads(g):
    flat = g.x_hat(g.q.reshape(g.x.shape), g.eps)
    return (float32(g.w) * flat).astype(g.q.dtype).reshape(g.q.shape)


def cohere_heads(g):
    return (float32(g.w) * g.x_hat(g.q, 1e-5, center=True)).astype(g.q.dtype)


def gemma_package(g):
    return g.x * lax.rsqrt(mean(jnp.square(g.x)) + 1e-6) * (1 + g.w)


def tunix_qwen(g):
    rms = jnp.sqrt(mean(float32(g.x) ** 2) + g.eps)
    return (float32(g.w) * (float32(g.x) / rms)).astype(g.x.dtype)


def tunix_llama(g):
    rms = jnp.sqrt(mean(float32(g.x) ** 2) + g.eps)
    return (g.w * g.x / rms).astype(g.x.dtype)


def flax_layer_norm(g):
    x = float32(g.x)
    variance = jnp.maximum(0, mean(x * x) - jnp.square(mean(x)))
    y = (x - mean(x)) * (lax.rsqrt(variance + 1e-6) * float32(g.w)) + float32(g.b)
    return y.astype(g.x.dtype)


def openpi(g):
    g.rstd = jnp.reciprocal(jnp.sqrt(mean(jnp.square(float32(g.x))) + 1e-6))
    return (g.x * g.rstd * (1 + g.w)).astype(g.x.dtype)


def openpi_adaptive(g):
    rstd = jnp.reciprocal(jnp.sqrt(mean(jnp.square(float32(g.x))) + 1e-6))
    return (g.x * rstd * (1 + g.scale) + g.shift).astype(g.x.dtype)


def dit(g):
    y = g.x_hat(g.x, 1e-6, center=True).astype(g.x.dtype)
    return y * (1 + g.scale) + g.shift


def equinox_layer_norm(g):
    def of_a_row(x):
        x = float32(x)
        out = (x - jnp.mean(x)) * lax.rsqrt(jnp.var(x) + 1e-5)
        return (float32(g.w) * out + float32(g.b)).astype(g.x.dtype)

    return jax.vmap(jax.vmap(of_a_row))(g.x)


def equinox_rms_norm(g):
    def of_a_row(x):
        x = float32(x)
        out = lax.rsqrt(jnp.mean(x**2) + 1e-5) * x
        return (float32(g.w) * out + float32(g.b)).astype(g.x.dtype)

    return jax.vmap(jax.vmap(of_a_row))(g.x)


def haiku_layer_norm(g, x=None):
    x = g.x if x is None else x
    variance = jnp.var(x, -1, keepdims=True)
    inv = g.w.astype(x.dtype) * lax.rsqrt(variance + jnp.asarray(1e-5, x.dtype))
    return inv * (x - mean(x)) + g.b.astype(x.dtype)


def haiku_rms_norm(g):
    return g.x * g.w * lax.rsqrt(mean(jnp.square(g.x)) + 1e-5)


def alphafold(g):
    return haiku_layer_norm(g, float32(g.x)).astype(g.x.dtype)


def mamba2(g):
    return (g.x_hat(g.gated, 1e-5) * float32(g.w)).astype(g.x.dtype)


def mamba2_transformers(g):
    return g.w * g.x_hat(g.gated, 1e-5).astype(g.x.dtype)


def mamba2_groups(g):
    of_groups = g.x_hat(g.x.reshape(BATCH, TOKENS, GROUPS, -1), 1e-5)
    return (of_groups.reshape(SHAPE) * float32(g.w)).astype(g.x.dtype)


def l2(g):
    x = float32(g.x)
    return (x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + g.eps)).astype(g.x.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table, and what it is tested with."""

    name: str
    model: Callable[[Given], Any]
    place_matters: bool = True  # of the rounding, before the scale or after it
    dtypes: tuple[Any, ...] = DTYPES
    param_dtype: Any = None  # that of x
    w_shape: tuple[int, ...] = (FEATURES,)
    offset: float = 0.0

    def __str__(self):
        return (
            f"{self.model.__name__}-{self.offset}"
            if self.offset
            else self.model.__name__
        )


CASES = [
    Case("Llama, Mistral, Qwen (transformers)", llama),
    Case("FlaxLlama, FlaxMistral (transformers 4)", flax_llama),
    Case("Gemma 1 to 3 (transformers), Gemma 3 (bonsai)", gemma),
    Case("FlaxGemma (transformers 4)", flax_gemma),
    Case("T5 (transformers), UMT5 (bonsai)", t5),
    Case(
        "`RMSNorm` (MaxText), `T5LayerNorm` (flaxformer)",
        maxtext,
        param_dtype=jnp.float32,
    ),
    Case(
        "`RMSNorm` (MaxText), `T5LayerNorm` (flaxformer)",
        maxtext,
        param_dtype=jnp.float32,
        offset=1.0,
    ),
    Case(
        "`Gpt3LayerNorm` (MaxText, `reductions_in_fp32`)",
        maxtext_gpt3,
        param_dtype=jnp.float32,
    ),
    Case("OLMo", olmo, place_matters=False),
    Case(
        "OLMo 2 (transformers, OLMo-core), Gemma 4 (tunix), LLaDA, Qwen3-VL (bonsai)",
        olmo2,
    ),
    Case("QK norm of all heads (OLMo 2)", olmo2_heads),
    Case(
        "QK norm with a scale for each head (Cohere)",
        cohere_heads,
        w_shape=(HEADS, FEATURES // HEADS),
    ),
    Case("Gemma 1 to 3 (gemma, tunix, big_vision)", gemma_package),
    Case("Qwen 2, Qwen 3 (tunix)", tunix_qwen),
    Case("Llama 3 (tunix)", tunix_llama),
    Case("`LayerNorm` (Flax; so big_vision)", flax_layer_norm),
    Case("`RMSNorm` (openpi)", openpi, param_dtype=jnp.float32),
    Case("the same with a condition", openpi_adaptive),
    Case("adaptive layer norm (DiT)", dit),
    Case("`LayerNorm` (equinox)", equinox_layer_norm),
    Case("`RMSNorm` (equinox)", equinox_rms_norm),
    Case("`LayerNorm` (haiku)", haiku_layer_norm),
    Case("`RMSNorm` (haiku)", haiku_rms_norm),
    Case("`LayerNorm` (AlphaFold)", alphafold, dtypes=(jnp.bfloat16,)),
    Case("gated (Mamba2)", mamba2, place_matters=False),
    Case("gated (Mamba2 of transformers)", mamba2_transformers, place_matters=False),
    Case("in groups (Mamba2, `group_size`)", mamba2_groups),
    Case("L2 norm", l2),
]
ROWS = rows_of_the_page()


def draw_exact(rng):
    """Heads of mean 0, whose sums of squares are exact in float32 in any order."""
    half = rng.integers(1, 128, (*SHAPE[:2], HEADS, FEATURES // HEADS // 2)) / 32
    return rng.permuted(np.concatenate([half, -half], -1), axis=-1)


def draw_random(rng):
    return rng.standard_normal(SHAPE) + 0.1


def given(case, dtype, draw):
    rng = np.random.default_rng(7)
    x = jnp.asarray(draw(rng).reshape(SHAPE), dtype)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape) / 4, dtype)

    of_a_model = case.param_dtype or dtype
    return Given(
        x=x,
        q=x.reshape(BATCH, TOKENS, HEADS, -1),
        gated=float32(x) * jax.nn.silu(float32(normal(*SHAPE))),
        w=(0.7 + normal(*case.w_shape, dtype=jnp.float32)).astype(of_a_model),
        b=normal(FEATURES, dtype=of_a_model),
        scale=normal(BATCH, 1, FEATURES),
        shift=normal(BATCH, 1, FEATURES),
        eps=1e-5,
        offset=case.offset,
        heads=HEADS,
        groups=GROUPS,
        n=FEATURES,
    )


def by_the_page(case, g, *, round_elsewhere=False):
    """The result of the page's call, and the statistics of the norm in it."""
    seen = []

    def recorded(norm, params, x, **options):
        if round_elsewhere:
            options["round_before_scale"] = not options.get("round_before_scale", False)
        y, statistics = norm(params, x, return_statistics=True, **options)
        seen.append(statistics)
        return y

    names = {
        "layer_norm": lambda *args, **options: recorded(
            jln.layer_norm, *args, **options
        ),
        "rms_norm": lambda *args, **options: recorded(jln.rms_norm, *args, **options),
    }
    y = eval(ROWS[case.name][0], {"jnp": jnp, **names, **vars(g)})
    (statistics,) = seen
    return y, statistics


def equal_parts(ours, models):
    """What part of the elements is equal, and how far off each is, in units of eps."""
    assert (ours.dtype, ours.shape) == (models.dtype, models.shape)
    a, b = np.asarray(ours, np.float64), np.asarray(models, np.float64)
    assert np.isfinite(b).all()
    return (a == b).mean(), np.abs(a - b) / float(jnp.finfo(ours.dtype).eps)


def test_every_row_of_the_page_is_tested():
    assert {case.name for case in CASES} == set(ROWS)
    assert {bits for _, bits in ROWS.values()} == {"same", "close", "no"}


def of_each(cases):
    """Each case with each of its dtypes."""
    pairs = [(case, dtype) for case in cases for dtype in case.dtypes]
    ids = [f"{case}-{dtype.__name__}" for case, dtype in pairs]
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=ids)


@of_each(CASES)
def test_the_call_of_a_row_gives_the_bits_that_the_row_says(case, dtype):
    g = given(case, dtype, draw_random)
    models = case.model(g)
    ours, _ = by_the_page(case, g)
    equal, off = equal_parts(ours, models)
    size = np.abs(np.asarray(models, np.float64))
    if ROWS[case.name][1] == "no":
        assert equal < 0.98
        assert (off <= 4 * (size + 1)).all()
    else:
        assert equal >= 0.999
        assert (off <= 2 * (size + 1)).all()
    if case.place_matters:
        elsewhere, _ = by_the_page(case, g, round_elsewhere=True)
        assert equal_parts(elsewhere, models)[0] < 0.98


@of_each([case for case in CASES if ROWS[case.name][1] == "same"])
def test_the_bits_are_the_same_wherever_the_statistics_are(case, dtype):
    """The inputs make them the same, up to the last bit of rstd."""
    g = given(case, dtype, draw_exact)
    models = case.model(g)
    ours, statistics = by_the_page(case, g)
    agree = np.asarray(statistics.rstd).reshape(g.rstd.shape) == np.asarray(g.rstd)
    assert agree.mean() > 0.2
    shape = (*agree.shape[:-1], -1)
    equal = np.asarray(ours == models).reshape(shape)
    assert (equal | ~agree).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float32_the_call_of_a_row_is_the_models_norm(case):
    g = given(case, jnp.float32, draw_random)
    ours, _ = by_the_page(case, g)
    np.testing.assert_allclose(ours, case.model(g), rtol=1e-5, atol=1e-5)


@for_both
def test_a_wider_weight_makes_the_result_wider_by_dtype(dtype):
    """Llama with float32 weights: x_hat is rounded, the product is not."""
    case = Case("Llama, Mistral, Qwen (transformers)", llama, param_dtype=jnp.float32)
    g = given(case, dtype, draw_random)
    models = case.model(g)
    assert models.dtype == jnp.float32
    ours = jln.rms_norm(
        {"scale": g.w}, g.x, epsilon=g.eps, round_before_scale=True, dtype=jnp.float32
    )
    assert equal_parts(ours, models)[0] >= 0.999
    once = jln.rms_norm({"scale": g.w}, g.x, epsilon=g.eps, dtype=jnp.float32)
    assert equal_parts(once, models)[0] < 0.5


@for_both
def test_llama_of_tunix_is_close_with_float32_weights(dtype):
    g = given(
        Case("Llama 3 (tunix)", tunix_llama, param_dtype=jnp.float32),
        dtype,
        draw_random,
    )
    ours = jln.rms_norm({"scale": g.w}, g.x, epsilon=g.eps)
    assert equal_parts(ours, tunix_llama(g))[0] >= 0.999
