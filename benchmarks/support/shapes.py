"""Shapes of norms in real models, `(rows, features)`, used by every benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    rows: int
    features: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}"


SHAPES = {
    "gpt2": Shape(4096, 768),  # GPT-2 small and BERT base: 4 sequences of 1024
    "gpt3-6.7b": Shape(4096, 4096),
    "bert-large": Shape(8192, 1024),
    "pairs": Shape(32768, 128),  # AlphaFold's pair representation, attention heads
    "decode": Shape(64, 768),  # one token each of 64 sequences
    "one-token": Shape(1, 4096),  # a decoder's next token, alone
    "wide": Shape(512, 16384),
    "uneven": Shape(1000, 1000),  # no multiple of a vector or of a block
    "large": Shape(8192, 4096),
}


def parse(text: str) -> Shape:
    """A name in `SHAPES`, or rows x features as in `4096x768`."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = Shape(*map(int, text.split("x")))
        if min(shape) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"a shape is one of {', '.join(SHAPES)}, or ROWSxFEATURES; got {text!r}."
        ) from None
    return shape


def add_argument(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """`--shapes`; if none is given, `default`."""
    parser.add_argument(
        "--shapes", nargs="+", type=parse, metavar="ROWSxFEATURES",
        default=list(map(parse, default)),
    )  # fmt: skip


def add_dtypes(parser: argparse.ArgumentParser, *default: str) -> None:
    """`--dtypes`; if none is given, `default`."""
    parser.add_argument(
        "--dtypes", nargs="+", default=[*default],
        choices=("bfloat16", "float16", "float32"),
    )  # fmt: skip
