"""The command line of `train_decoder.py`, with every check before the first write."""

import argparse
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import corpus
import jax
import numpy as np
from decoder import DTYPES, NORMS, PLACEMENTS, VOCABULARY, DecoderConfig
from run_folder import UsageError, check_folder
from training import TrainingConfig


class Run(NamedTuple):
    """What was asked for, checked."""

    out: Path
    config: DecoderConfig
    settings: TrainingConfig
    text_name: str
    training: np.ndarray
    held_out: np.ndarray
    resume: bool
    checkpoint_every: int

    def describe(self) -> dict[str, Any]:
        """All that the metrics depend on: what `config.json` holds."""
        text = np.concatenate([self.training, self.held_out])
        return {
            **dataclasses.asdict(self.config),
            **dataclasses.asdict(self.settings),
            "text_bytes": len(text),
            "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
        }


def read_options(arguments: list[str] | None) -> Run:
    """Parse, check, and load the text. Writes nothing.

    Raises:
      UsageError: the first thing that is wrong.
    """
    given = parse(arguments)
    try:
        config = DecoderConfig(**pick(given, DecoderConfig))
        settings = TrainingConfig(**pick(given, TrainingConfig))
    except ValueError as error:
        raise UsageError(str(error)) from None
    every = given.checkpoint_every
    if every < 1:
        raise UsageError(f"checkpoint_every must be at least 1; got {every}. Try 100.")
    try:
        text = corpus.load_text(given.text)
    except OSError as error:
        raise UsageError(
            f"--text must be a readable file; {given.text}: {error.strerror}. "
            "Give another --text."
        ) from None
    training, held_out = corpus.split_text(text)
    if len(held_out) < config.context:
        raise UsageError(
            "the held-out tenth of the text must be at least as long as --context; "
            f"the text has {len(text)} bytes, its tenth {len(held_out)}, and "
            f"--context is {config.context}. Give a longer --text or a smaller "
            "--context."
        )
    check_memory(config, settings)
    name = "pydoc_data.topics" if given.text is None else given.text
    run = Run(
        given.out, config, settings, name, training, held_out, given.resume, every
    )
    check_folder(run.out, run.describe(), resume=run.resume)
    return run


def pick(given: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options that are fields of `kind`."""
    return {each.name: getattr(given, each.name) for each in dataclasses.fields(kind)}


def check_memory(config: DecoderConfig, settings: TrainingConfig) -> None:
    """Refuse a model and batch that clearly cannot fit; a rough count from below."""
    layers, width, context = config.layers, config.width, config.context
    parameters = 12 * layers * width**2 + (VOCABULARY + context) * width
    saved = layers * (16 * width + 2 * config.heads * context) + 2 * VOCABULARY
    # Four float32 per parameter: itself, its gradient and the two moments of Adam.
    needed = 16 * parameters + 4 * settings.batch * context * saved
    device = jax.devices()[0]
    there = (device.memory_stats() or {}).get("bytes_limit")
    if there is None:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            "model and batch must fit into memory; they need about "
            f"{needed / 1e9:,.0f} GB and {device.device_kind} has {there / 1e9:,.0f} "
            "GB. Lower --batch, --context, --layers or --width."
        )


class OneLineParser(argparse.ArgumentParser):
    """Argparse without the usage in front of the error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description="Train a small decoder-only transformer on bytes.",
        allow_abbrev=False,
    )

    def add(name: str, help: str, default: Any, **other: Any) -> None:
        keywords: dict[str, Any] = {"type": type(default), "metavar": "N"} | other
        help += f" (default: {default})"
        parser.add_argument(name, help=help, default=default, **keywords)

    model, train = DecoderConfig, TrainingConfig
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="train on this file (default: the reference texts that Python carries)",
    )
    add("--out", "folder for the files", Path("decoder-run"), type=Path, metavar="DIR")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, if there is one",
    )
    for name, choices, default, help in (
        ("--norm", NORMS, model.norm, "flax is flax.linen.LayerNorm, to compare"),
        ("--placement", PLACEMENTS, model.placement, "norm before or after a branch"),
        ("--dtype", DTYPES, model.dtype, "of the computation; parameters are float32"),
    ):
        add(name, help, default, choices=choices, metavar=None)
    add("--layers", "transformer blocks", model.layers)
    add("--width", "features of the residual stream", model.width)
    add("--heads", "attention heads", model.heads)
    add("--context", "bytes that the model looks back", model.context)
    add("--steps", "optimizer steps", train.steps)
    add("--batch", "windows of text in a step", train.batch)
    add("--learning-rate", "peak learning rate", train.learning_rate, metavar="X")
    add("--weight-decay", "AdamW's, of the matrices", train.weight_decay, metavar="X")
    add("--seed", "of the parameters and the order of the data", train.seed)
    add("--validate-every", "steps between validations", train.validate_every)
    add("--checkpoint-every", "steps between checkpoints", 100)
    return parser.parse_args(arguments)
