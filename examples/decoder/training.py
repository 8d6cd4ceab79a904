"""Training of the decoder: optimizer, training step, evaluation and the loop.

Nothing here reads or writes a file.

Example:
    config, settings = DecoderConfig(), TrainingConfig()
    for result in train(config, settings, training_text, held_out_text):
        print(result.step, result.training, result.validation)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import corpus
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from mesh import Devices
from model import DecoderConfig, Params, init_params, next_byte_losses, param_axes

ONE_DEVICE = Devices()
VALIDATION_WINDOWS = 64
NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class TrainingConfig:
    """How the model is trained.

    The optimizer is AdamW. The learning rate rises linearly over a tenth of the steps,
    then falls to zero as a cosine. It rises from zero, so the first step changes nothing.
    """

    steps: int = 1500
    """Optimizer steps."""
    batch: int = 16
    """Windows of text in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's weight decay; applied to matrices only."""
    seed: int = 0
    """Seed of the initial parameters and the order of the data."""
    validate_every: int = 50
    """Steps between validations."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}."
                )
        if self.steps >= 2**31:
            raise ValueError(f"steps must be below {2**31}; got {self.steps}.")
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(
                "learning_rate must be positive and finite; "
                f"got {self.learning_rate}. Try 0.003."
            )
        if not (0 <= self.weight_decay < math.inf):
            raise ValueError(
                "weight_decay must be finite and not negative; "
                f"got {self.weight_decay}. Try 0.1."
            )
        if not self.learning_rate * self.weight_decay < 1:
            raise ValueError(
                "learning_rate * weight_decay must be below 1, because a step multiplies"
                " the weights by 1 minus it; got"
                f" {self.learning_rate} * {self.weight_decay}. Lower one of them."
            )
        if not (0 <= self.seed < 2**32):
            raise ValueError(f"seed must be from 0 to 4294967295; got {self.seed}.")


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds."""

    params: Params
    optimizer: optax.OptState


class Step(NamedTuple):
    """What `train` yields after each step; losses in bits per byte."""

    step: int
    state: TrainState
    training: float
    validation: float | None


def make_optimizer(settings: TrainingConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; no weight decay on scales and biases."""
    peak = settings.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, settings.steps // 10, settings.steps
    )
    matrices = partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b1=0.9, b2=0.99, weight_decay=settings.weight_decay, mask=matrices
        ),
    )


def init_state(
    config: DecoderConfig, settings: TrainingConfig, devices: Devices = ONE_DEVICE
) -> TrainState:
    def init() -> TrainState:
        params = init_params(config, settings.seed)
        return TrainState(params, make_optimizer(settings).init(params))

    return devices.make_state(init, state_axes(config, settings))


def state_axes(config: DecoderConfig, settings: TrainingConfig) -> TrainState:
    """The names of the arrays' axes; the optimizer's are those of their parameter."""
    optimizer, params = make_optimizer(settings), param_axes(config)
    shapes = jax.eval_shape(partial(init_params, config), 0)
    kept = optax.tree.map_params(
        optimizer,
        lambda _, axes: axes,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: PartitionSpec(),
    )
    return TrainState(params, kept)


def make_train_step(
    config: DecoderConfig, settings: TrainingConfig, devices: Devices = ONE_DEVICE
) -> Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]:
    """The jitted step `(state, windows) -> (state, mean loss in nats)`.

    It donates `state`: the arrays passed in cannot be used again.
    """
    optimizer = make_optimizer(settings)
    axes = state_axes(config, settings)

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, windows: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(
            lambda params: next_byte_losses(config, params, windows).mean()
        )(state.params)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return devices.keep(TrainState(params, optimizer_state), axes), loss

    return train_step


@partial(jax.jit, static_argnames="config")
def _counted_nats(
    config: DecoderConfig, params: Params, windows: jax.Array, counts: jax.Array
) -> jax.Array:
    """The sum of the last `counts` losses of each window."""
    counted = jnp.arange(config.context) >= config.context - counts[:, None]
    losses = next_byte_losses(config, params, windows)
    # Put all sums on every device, and so in every process.
    return nn.with_logical_constraint(jnp.sum(losses, 1, where=counted), (None,))


def default_stride(context: int) -> int:
    """Half the context: each byte is predicted from at least half of it."""
    return max(1, context // 2)


def evaluate(
    config: DecoderConfig,
    params: Params,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    stride: int | None = None,
    windows: int | None = None,
    batch: int = 32,
    devices: Devices = ONE_DEVICE,
) -> float:
    """Bits per held-out byte, each byte predicted once; see `corpus.held_out_windows`.

    Args:
      stride: how far the windows move, from 1 to the context; by default half the
        context. A smaller stride is slower, and gives more context.
      windows: how many of the windows to take, evenly spread; by default all of them.
      batch: how many windows are computed at once.
      devices: where they are computed.
    """
    stride = default_stride(config.context) if stride is None else stride
    if not 1 <= stride <= config.context:
        raise ValueError(
            f"stride must be from 1 to context {config.context}; got {stride}."
        )
    if batch < 1 or (windows is not None and windows < 1):
        raise ValueError(
            f"windows and batch must be at least 1; got {windows} and {batch}."
        )
    texts, counts = corpus.held_out_windows(
        training, held_out, context=config.context, stride=stride
    )
    if windows is not None and windows < len(texts):
        chosen = np.arange(windows) * len(texts) // windows
        texts, counts = texts[chosen], counts[chosen]
    total = int(counts.sum())
    batch += -batch % devices.shape.data
    # Windows that count no prediction fill the last batch, because another shape would
    # be compiled again.
    pad = -len(texts) % batch
    texts, counts = np.pad(texts, ((0, pad), (0, 0))), np.pad(counts, (0, pad))
    nats = 0.0
    for at in range(0, len(texts), batch):
        some, of_each = (
            devices.rows(batch, array[at : at + batch].__getitem__)
            for array in (texts, counts)
        )
        sums = _counted_nats(config, params, some, of_each)
        nats += float(np.sum(np.asarray(sums), dtype=np.float64))
    return nats / total / NATS_PER_BIT


def train(
    config: DecoderConfig,
    settings: TrainingConfig,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    state: TrainState | None = None,
    done: int = 0,
    devices: Devices = ONE_DEVICE,
) -> Iterator[Step]:
    """Continue from `state`, the state after `done` steps, and yield each step.

    The yielded state is valid until the next step, which consumes it.

    The validation loss is an estimate, made every `validate_every` steps and at the end
    from evenly spread windows without overlap. They cover a part of the held-out text,
    and give less context than `evaluate` does by default, so it is a little higher.
    """
    state = init_state(config, settings, devices) if state is None else state
    train_step = make_train_step(config, settings, devices)
    for step in range(done + 1, settings.steps + 1):
        read = partial(
            corpus.training_batch,
            training,
            seed=settings.seed,
            step=step,
            batch=settings.batch,
            context=config.context,
        )
        windows = devices.rows(settings.batch, read)
        state, loss = train_step(state, windows)
        validation = None
        if step % settings.validate_every == 0 or step == settings.steps:
            validation = evaluate(
                config,
                state.params,
                training,
                held_out,
                stride=config.context,
                windows=VALIDATION_WINDOWS,
                devices=devices,
            )
        yield Step(step, state, float(loss) / NATS_PER_BIT, validation)
