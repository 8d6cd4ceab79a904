"""`python -m jax_layernorm` prints versions and choices; `check` tests and times."""

from __future__ import annotations

import argparse
import sys


def shape(text: str) -> tuple[int, int]:
    rows, features = map(int, text.split("x"))
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
        from jax_layernorm import _check

        return _check.check(options.shapes, options.dtypes)
    from jax_layernorm import _explain

    _explain.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
