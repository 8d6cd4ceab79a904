"""The sentence encoder: its model against NumPy and the original, and its program."""

import collections
import importlib.util
import json
import math
import shutil
from dataclasses import replace

import embed as program
import encoder
import jax
import jax.numpy as jnp
import minilm_reference
import numpy as np
import pytest
from encoder import NORMS, EncoderConfig, embed, params_from_torch
from jax.extend.core import jaxprs_in_params

import jax_layernorm as jln

TINY = EncoderConfig(
    vocabulary=11, positions=8, kinds=2, width=12, hidden=20, layers=2, heads=3,
    epsilon=1e-12,
)  # fmt: skip
HUGGING_FACE = {
    "model_type": "bert",
    "vocab_size": 11,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-12,
}
TOKENS = np.array([[2, 5, 7, 3, 0, 0], [2, 9, 9, 4, 6, 3]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
erf = np.vectorize(math.erf)


def tiny_weights():
    """A state dict with the names of `BertModel` and random numbers."""
    rng = np.random.default_rng(0)
    width, hidden = TINY.width, TINY.hidden
    shapes = {
        "embeddings.word_embeddings.weight": (TINY.vocabulary, width),
        "embeddings.position_embeddings.weight": (TINY.positions, width),
        "embeddings.token_type_embeddings.weight": (TINY.kinds, width),
    }
    norms, linears = ["embeddings.LayerNorm"], {}
    for i in range(TINY.layers):
        layer = f"encoder.layer.{i}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linears[f"{layer}.attention.{name}"] = (width, width)
        linears[f"{layer}.intermediate.dense"] = (hidden, width)
        linears[f"{layer}.output.dense"] = (width, hidden)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {
        name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }


def numpy_embed(weights, tokens, mask):
    """The encoder in float64, one sentence at a time, without its padding."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        c = x - x.mean(-1, keepdims=True)
        x_hat = c / np.sqrt((c**2).mean(-1, keepdims=True) + TINY.epsilon)
        return x_hat * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(x, name):
        query, key, value = (
            np.split(linear(x, f"{name}.self.{part}"), TINY.heads, axis=-1)
            for part in ("query", "key", "value")
        )
        heads = []
        for q, k, v in zip(query, key, value, strict=True):
            score = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            heads.append(score / score.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(heads, -1), f"{name}.output.dense")

    embeddings = []
    for row, real in zip(tokens, mask, strict=True):
        row = row[real]
        x = w["embeddings.word_embeddings.weight"][row]
        x = x + w["embeddings.position_embeddings.weight"][: len(row)]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        for i in range(TINY.layers):
            layer = f"encoder.layer.{i}"
            y = attend(x, f"{layer}.attention")
            x = norm(x + y, f"{layer}.attention.output.LayerNorm")
            h = linear(x, f"{layer}.intermediate.dense")
            y = linear(h * (1 + erf(h / np.sqrt(2))) / 2, f"{layer}.output.dense")
            x = norm(x + y, f"{layer}.output.LayerNorm")
        mean = x.mean(axis=0)
        embeddings.append(mean / np.linalg.norm(mean))
    return np.array(embeddings)


@pytest.mark.parametrize("norm", NORMS)
def test_the_encoder_agrees_with_numpy(norm):
    config = EncoderConfig.from_hugging_face(HUGGING_FACE, norm)
    assert config == replace(TINY, norm=norm)
    weights = tiny_weights()
    embeddings = embed(config, params_from_torch(config, weights), TOKENS, MASK)
    assert embeddings.dtype == jnp.float32
    np.testing.assert_allclose(
        embeddings, numpy_embed(weights, TOKENS, MASK), atol=2e-6
    )


def test_padding_changes_nothing():
    params = params_from_torch(TINY, tiny_weights())
    other = TOKENS.copy()
    other[~MASK] = 8
    padded, changed = (embed(TINY, params, t, MASK)[0] for t in (TOKENS, other))
    np.testing.assert_array_equal(padded, changed)
    alone = embed(TINY, params, TOKENS[:1, :4], MASK[:1, :4])[0]
    np.testing.assert_allclose(padded, alone, atol=1e-6)


def test_the_loaded_parameters_are_those_that_the_encoder_makes():
    init = encoder.Encoder(TINY).init
    made = jax.eval_shape(init, jax.random.key(0), TOKENS, MASK)["params"]
    loaded = jax.eval_shape(lambda: params_from_torch(TINY, tiny_weights()))
    assert loaded == made


def test_a_model_with_a_head_has_the_encoder_inside():
    weights = tiny_weights()
    headed = {f"bert.{name}": value for name, value in weights.items()}
    headed["cls.predictions.bias"] = np.zeros(3)
    same = jax.tree.map(
        np.array_equal,
        params_from_torch(TINY, headed),
        params_from_torch(TINY, weights),
    )
    assert all(jax.tree.leaves(same))


def primitives(jaxpr):
    """How often each primitive is in a program, at any depth."""
    count = collections.Counter()
    for equation in jaxpr.eqns:
        count[equation.primitive.name] += 1
        for inner in jaxprs_in_params(equation.params):
            count += primitives(inner)
    return count


@pytest.mark.parametrize(
    ("norm", "calls"), [("ours", 2 * TINY.layers + 1), ("flax", 0)]
)
def test_our_op_runs_in_every_place_and_in_no_other_norm(norm, calls):
    params = params_from_torch(TINY, tiny_weights())

    def first(params):
        return embed(replace(TINY, norm=norm), params, TOKENS, MASK)[:, 0].sum()

    count = primitives(jax.make_jaxpr(jax.grad(first))(params).jaxpr)
    assert count["layer_norm_forward"] == count["layer_norm_backward"] == calls


def assert_close_trees(got, wanted, tolerance):
    """Each leaf to `tolerance` times the largest number in the tree.

    The largest in the leaf would be too strict: gradients of the keys' biases are 0
    except for rounding.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_act": "relu"},
            "hidden_act must be 'gelu'; the configuration has 'relu'",
        ),
        ({"model_type": "roberta"}, "model_type must be 'bert'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute'"),
    ],
    ids=str,
)
def test_other_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_hugging_face(HUGGING_FACE | change, "ours")


@pytest.fixture(scope="module")
def minilm():
    """MiniLM's folder, and the sentences and embeddings of the original."""
    package = pytest.importorskip(
        program.WEIGHTS_PACKAGE,
        reason="needs MiniLM's weights: make .venv/.minilm",
    )
    stored = json.loads(minilm_reference.DATA.read_text())
    return package.get_model_path(), stored["sentences"], np.array(stored["embeddings"])


@pytest.mark.parametrize("norm", NORMS)
def test_minilm_agrees_with_the_original(minilm, norm):
    folder, sentences, wanted = minilm
    config, params = program.load_model(folder, norm)
    limit = program.longest(folder, config)
    tokens, mask = program.tokenize(folder, sentences, limit)
    assert tokens.shape == (len(sentences), limit) == (5, 256)  # the last is cut
    embeddings = embed(config, params, tokens, mask)
    np.testing.assert_allclose(embeddings, wanted, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("quick_compilation")
def test_minilm_has_one_gradient_by_ours_by_flax_and_inside_replace(minilm):
    folder, sentences, _ = minilm
    config, params = program.load_model(folder, "flax")
    tokens, mask = program.tokenize(folder, sentences[:2], 32)

    def programs(norm):
        """Calls of our op, embeddings, gradients."""

        def both(params):
            embeddings = embed(replace(config, norm=norm), params, tokens, mask)
            return jnp.vdot(embeddings, cotangent), embeddings

        cotangent = jax.random.normal(jax.random.key(0), (len(tokens), config.width))
        traced = jax.jit(jax.grad(both, has_aux=True)).trace(params)
        count = primitives(traced.jaxpr.jaxpr)
        assert count["layer_norm_forward"] == count["layer_norm_backward"]
        gradient, embeddings = traced.lower().compile()(params)
        return count["layer_norm_forward"], embeddings, gradient

    calls, wanted, wanted_gradient = programs("flax")
    assert calls == 0
    ours = programs("ours")
    with jln.linen.replace():
        replaced = programs("flax")
    for calls, embeddings, gradient in (ours, replaced):
        assert calls == 2 * config.layers + 1
        np.testing.assert_allclose(embeddings, wanted, atol=1e-6)
        assert_close_trees(gradient, wanted_gradient, 1e-5)


def test_the_stored_embeddings_are_those_of_the_original(minilm):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"needs {name}, which is not installed")
    _, sentences, wanted = minilm
    assert sentences == list(minilm_reference.SENTENCES)
    made = minilm_reference.embed(sentences, "float64")
    np.testing.assert_allclose(made, wanted, atol=1e-8, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in the files that the program reads, with a lower-case tokenizer."""
    reason = "needs {}, which is not installed"
    tokenizers = pytest.importorskip("tokenizers", reason=reason.format("tokenizers"))
    numpy = pytest.importorskip(
        "safetensors.numpy", reason=reason.format("safetensors")
    )
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(HUGGING_FACE))
    numpy.save_file(tiny_weights(), folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words += ["a", "cat", "dog", "sleeps", "runs", "in", "rain"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 3), ("[CLS]", 2)
    )
    tokenizer.enable_truncation(3)  # which the model does not want
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = program.main([str(each) for each in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("norm", NORMS)
def test_the_program_prints_the_similarities(folder, capsys, tmp_path, norm):
    saved = tmp_path / "embeddings.npy"
    sentences = ("a cat sleeps", "dog", "a cat sleeps")
    given = ("--model", folder, "--norm", norm, "--save", saved)
    code, printed, errors = run(capsys, *given, *sentences)
    assert (code, errors) == (0, "")
    assert f"2 layers, width 12, 3 heads, norm {norm} (epsilon 1e-12)" in printed
    assert "3, of 3 to 5 tokens" in printed
    assert "The closest are 1 and 3." in printed
    embeddings = np.load(saved)
    tokens = np.array([[2, 4, 5, 7, 3], [2, 6, 3, 0, 0], [2, 4, 5, 7, 3]])
    wanted = numpy_embed(tiny_weights(), tokens, tokens > 0)
    np.testing.assert_allclose(embeddings, wanted, atol=2e-6)
    rows = [line.split() for line in printed.splitlines() if line.startswith("  ")][1:]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    table = np.array([[float(cell) for cell in row[1:4]] for row in rows])
    np.testing.assert_allclose(table, wanted @ wanted.T, atol=6e-3)
    assert [" ".join(row[4:]) for row in rows] == list(sentences)


def test_without_sentences_the_program_has_its_own(folder, capsys):
    code, printed, _ = run(capsys, "--model", folder)
    assert code == 0
    assert all(sentence in printed for sentence in program.SENTENCES)


def test_one_sentence_is_like_itself(folder, capsys):
    code, printed, _ = run(capsys, "--model", folder, "a dog runs")
    assert (
        code == 0 and "  1  1.00   a dog runs" in printed and "closest" not in printed
    )


def test_a_long_sentence_is_cut_with_a_notice(folder, capsys, tmp_path):
    long = "a cat sleeps in a rain"
    given = (
        "--model",
        folder,
        "--save",
        tmp_path / "e.npy",
        long,
        long + " a dog runs",
    )
    code, printed, errors = run(capsys, *given)
    assert code == 0 and "of 8 to 8 tokens" in printed
    assert errors == (
        "Sentence 2 has 11 tokens, and the model takes 8: the last 3 are left out.\n"
    )
    first, second = np.load(tmp_path / "e.npy")
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("quick_compilation")
def test_timing_shows_both_norms(folder, capsys, monkeypatch):
    monkeypatch.setattr(program, "TIMED_BATCH", 2)
    code, printed, _ = run(capsys, "--model", folder, "--timing", "a cat", "a dog")
    assert code == 0
    for row in ("embed", "and gradient"):
        (line,) = (line for line in printed.splitlines() if line.startswith(row))
        ours, flax, ratio = map(float, line.removeprefix(row).split())
        assert ours > 0 and flax > 0 and ratio > 0
    difference = float(printed.partition("differ by at most ")[2].split()[0][:-1])
    assert 0 <= difference < 1e-5
    assert f"jax {jax.__version__}, " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", " "], "every sentence must hold a word; sentence 2 is ' '"),
        (["a \udcff"], "every sentence must be text; sentence 1 is 'a \\udcff'"),
        (["--save", "/", "a cat"], "--save must name a file that can be written; /"),
    ],
    ids=ascii,
)
def test_bad_input_is_one_line_that_says_what_to_do(folder, capsys, arguments, message):
    code, _, errors = run(capsys, "--model", folder, *arguments)
    assert code == 2
    assert errors.startswith(f"embed: {message}") and errors.count("\n") == 1


def test_a_folder_of_something_else_is_refused(folder, capsys, tmp_path):
    code, _, errors = run(capsys, "--model", tmp_path)
    assert code == 2 and "has no config.json and no model.safetensors" in errors
    (tmp_path / "1_Pooling").mkdir()
    right = {name: (folder / name).read_bytes() for name in program.FILES}
    right[program.LIMITS] = b'{"max_seq_length": 6}'
    right[program.MODULES] = b'[{"type": "x.Transformer"}, {"type": "x.Pooling"}]'
    right[program.POOLING] = (
        b'{"pooling_mode_mean_tokens": true, "include_prompt": true}'
    )
    other_heads, other_hidden = (
        json.dumps(HUGGING_FACE | change).encode()
        for change in ({"num_attention_heads": 5}, {"intermediate_size": 21})
    )
    for broken, name, content in (
        (None, "config.json", right["config.json"]),
        ("hidden_act must be 'gelu'", "config.json", b'{"hidden_act": "relu"}'),
        ("KeyError: vocab_size", "config.json", b"{}"),
        ("AttributeError", "config.json", b"[]"),
        ("JSONDecodeError", "config.json", b"no JSON"),
        ("width must be a multiple of heads; got 12 and 5", "config.json", other_heads),
        ("['down']['kernel'] must have shape (21, 12)", "config.json", other_hidden),
        ("SafetensorError", "model.safetensors", b"no safetensors"),
        ("raised Exception", "tokenizer.json", b"{}"),
        ("KeyError: max_seq_length", program.LIMITS, b"{}"),
        ("it has x.Dense", program.MODULES, b'[{"type": "x.Dense"}]'),
        ("mode_cls", program.POOLING, b'{"pooling_mode_cls_token": true}'),
    ):
        for each, before in right.items():
            (tmp_path / each).write_bytes(content if each == name else before)
        code, _, errors = run(capsys, "--model", tmp_path)
        if broken is None:
            assert code == 0
        else:
            assert code == 2 and broken in errors and errors.count("\n") == 1


def test_weights_in_float16_are_computed_in_float32(folder, capsys, tmp_path):
    import safetensors.numpy

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    halves = {name: value.astype("float16") for name, value in tiny_weights().items()}
    safetensors.numpy.save_file(halves, tmp_path / "model.safetensors")
    saved = tmp_path / "embeddings.npy"
    assert run(capsys, "--model", tmp_path, "--save", saved, "a cat")[0] == 0
    tokens, mask = np.array([[2, 4, 5, 3]]), np.ones((1, 4), bool)
    right = embed(TINY, params_from_torch(TINY, halves), tokens, mask)
    np.testing.assert_allclose(np.load(saved), right, atol=1e-6)
    assert np.load(saved).dtype == "float32"


def test_a_tokenizer_of_another_model_is_refused(folder, capsys, tmp_path):
    import safetensors.numpy

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE | {"vocab_size": 5}))
    weights, words = tiny_weights(), "embeddings.word_embeddings.weight"
    weights[words] = weights[words][:5].copy()
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    code, _, errors = run(capsys, "--model", tmp_path, "a cat")
    assert code == 2 and "it gives token 5, and the model knows 5" in errors


@pytest.mark.parametrize(
    "missing", [("tokenizers",), ("safetensors", program.WEIGHTS_PACKAGE)]
)
def test_what_is_not_installed_is_named_with_the_command(capsys, monkeypatch, missing):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else "found"
    )
    code, _, errors = run(capsys)
    assert code == 2
    assert " and ".join(missing) in errors and "`make embed` installs" in errors
