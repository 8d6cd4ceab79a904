"""Time and memory of a training step of `examples/decoder` with each norm, on any device.

The step is that of the example: AdamW, 16 windows of 128 bytes. "none" is a model
without norms, which shows how much of the time is not the norms'. "ours fused" is ours
with the sum before each norm computed by the norm, `norm(branch, residual=x)`. The table
gives medians over interleaved repetitions in ms, how many times as long as Flax's, and
the temporary memory of the compiled step in MiB; lower is better.

    python -m benchmarks.decoder_step --widths 128
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
import unittest.mock
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "decoder"))

import flax.linen
import model as decoder
import training

from benchmarks.support import peers, report, timing

FUSED = "ours fused"
NORMS = ("ours", FUSED, "xla", "flax", "none")


class NoNorm(flax.linen.Module):
    """Returns `x`, but has a norm's parameters, so the optimizer does the same work."""

    dtype: Any = None

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1:]
        scale = self.param("scale", flax.linen.initializers.ones, features)
        bias = self.param("bias", flax.linen.initializers.zeros, features)
        return x + 0 * (scale + bias).astype(x.dtype)


class Terms(NamedTuple):
    """The residual stream before its last sum, which the next norm computes."""

    stream: jax.Array
    branch: jax.Array


class NormOfSum(flax.linen.Module):
    """The norm after the last block, which takes `Terms`."""

    dtype: Any = None

    @flax.linen.compact
    def __call__(self, terms: Terms) -> jax.Array:
        norm = peers.NORMS["ours"].linen(dtype=self.dtype)
        flax.linen.share_scope(self, norm)
        return norm(terms.branch, residual=terms.stream)[0]


class FusedBlock(flax.linen.Module):
    """The example's pre-norm block, each of its sums computed by the norm after it."""

    config: decoder.DecoderConfig

    @flax.linen.compact
    def __call__(self, x: jax.Array | Terms) -> Terms:
        norm = functools.partial(peers.NORMS["ours"].linen, dtype=self.config.dtype)
        norm_attention, norm_mlp = norm(name="norm_attention"), norm(name="norm_mlp")
        attention = decoder.Attention(self.config, name="attention")
        mlp = decoder.MLP(self.config, name="mlp")
        if isinstance(x, Terms):
            y, x = norm_attention(x.branch, residual=x.stream)
        else:  # the first block
            y = norm_attention(x)
        y, x = norm_mlp(attention(y), residual=decoder.residual_stream(x))
        return Terms(decoder.residual_stream(x), mlp(y))


class Step(NamedTuple):
    """A compiled training step."""

    run: Callable[[], jax.Array]
    """Takes one step, keeps the state, and returns the loss."""
    params: Any
    """Abstract arrays."""
    temp_bytes: int
    """Temporary memory."""


def step_of(
    norm: str, config: decoder.DecoderConfig, settings: training.TrainingConfig
) -> Step:
    """The step of the model with one of `modules`; `config.norm` does not matter."""
    fused = unittest.mock.patch.object(decoder, "Block", FusedBlock)
    module = unittest.mock.patch.dict(decoder.NORMS, {config.norm: modules()[norm]})
    with module, fused if norm == FUSED else contextlib.nullcontext():
        state = training.init_state(config, settings)
        rng = np.random.default_rng(0)
        shape = (settings.batch, config.context + 1)
        windows = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
        step = training.make_train_step(config, settings)
        compiled = step.lower(state, windows).compile()

    def run() -> jax.Array:
        nonlocal state
        state, loss = jax.block_until_ready(compiled(state, windows))
        return loss

    params = jax.eval_shape(lambda: state.params)
    return Step(run, params, compiled.memory_analysis().temp_size_in_bytes)


def modules() -> dict[str, Callable[..., Any]]:
    """Makers of the norm after the last block, and, unless fused, of all others."""
    of_peers = {name: peers.NORMS[name].linen for name in peers.LINEN_NORMS}
    return of_peers | {FUSED: NormOfSum, "none": NoNorm}


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--widths", nargs="+", type=report.positive, default=[128, 256])
    parser.add_argument(
        "--layers", type=report.positive, default=decoder.DecoderConfig.layers
    )
    peers.add_argument(parser, NORMS, modules())
    parser.add_argument("--repetitions", type=report.positive, default=31)
    options = parser.parse_args(arguments)
    where = report.environment()
    report.print_environment(where)
    found = peers.available(["ours" if n == FUSED else n for n in options.norms])
    known = {*found, "none"} | ({FUSED} if "ours" in found else set())
    norms = [name for name in options.norms if name in known]
    results = []
    for width in options.widths:
        config = decoder.DecoderConfig(layers=options.layers, width=width)
        steps = {n: step_of(n, config, training.TrainingConfig()) for n in norms}
        run = {norm: step.run for norm, step in steps.items()}
        seconds = timing.interleaved(run, repetitions=options.repetitions)
        results += [
            {"width": width, "norm": norm, "ms": value * 1e3}
            | {"over flax": value / seconds["flax"] if "flax" in seconds else None}
            | {"temp MiB": steps[norm].temp_bytes / 2**20}
            for norm, value in seconds.items()
        ]
    columns = ("width", "norm", "ms", "over flax", "temp MiB")
    print(f"A training step of {options.layers} layers; lower is better")
    report.print_table(columns, [[r[c] for c in columns] for r in results])
    report.write_json(
        options.json, where, results, layers=options.layers,
        ours=peers.implementation() if "ours" in found else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
