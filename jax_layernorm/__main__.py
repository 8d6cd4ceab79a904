"""`python -m jax_layernorm` prints versions and choices; `check` tests and times."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import jax

from jax_layernorm import _check, _functions
from jax_layernorm._explain import explain

COMMON = {  # what models normalize
    "BERT, GPT-2": ("layer_norm", (4096, 768), "float32"),
    "8B decoder": ("rms_norm", (8192, 4096), "bfloat16"),
    "27B decoder": ("rms_norm", (8192, 5120), "bfloat16"),
    "heads (QK norm)": ("rms_norm", (32768, 128), "bfloat16"),
    "one token": ("rms_norm", (1, 4096), "bfloat16"),
}


def print_choices() -> None:
    """Prints versions, devices, and what runs for a few common norms."""
    _check.print_environment()
    for model, (norm, shape, dtype) in COMMON.items():
        x = jax.ShapeDtypeStruct(shape, dtype)
        bias = norm == "layer_norm"
        params = jax.eval_shape(
            lambda n=shape[-1], bias=bias: _functions.init_params(n, bias=bias)
        )
        print(f"\n{model}: {norm}, {shape[0]} x {shape[1]} {dtype}")
        print(explain(params, x, function=_check.NORMS[norm]))


def shape(text: str) -> tuple[int, int]:
    try:
        rows, features = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape is ROWSxFEATURES, such as 4096x768; got {text!r}"
        ) from None
    if rows < 1 or features < 2:
        raise argparse.ArgumentTypeError(
            f"a shape must have a row and two features at least; got {text!r}"
        )
    return rows, features


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_layernorm")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "explain", help="print versions, devices and what runs (the default)"
    )
    check = commands.add_parser(
        "check",
        help="compare every implementation that runs on this device with float64 NumPy,"
        " and time it; exits with 1 if one is wrong",
    )
    check.add_argument(
        "--shapes", nargs="+", type=shape, metavar="ROWSxFEATURES",
        help="by default six, which take under two minutes",
    )  # fmt: skip
    check.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"],
                       choices=("bfloat16", "float16", "float32"))  # fmt: skip
    options = parser.parse_args(arguments)
    if options.command == "check":
        return _check.check(options.shapes, options.dtypes)
    print_choices()
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `head`, say; without this, Python would flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)
