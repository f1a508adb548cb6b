"""Exact evaluation of a split: the last batch is padded, and the padding masked."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import Normalize, padded_batches
from flax_cifar.losses import create_targets, cross_entropy
from flax_cifar.metrics import Metrics, add_totals, compute_means, compute_totals, create_totals
from flax_cifar.partition import replicated, split_batch
from flax_cifar.seeds import over_seeds

Stop = Callable[[], bool]
EvalStep = Callable[[Any, dict[str, np.ndarray]], tuple[jax.Array, Metrics]]


class Stopped(Exception):
  """The evaluation was left unfinished, as `stop` demanded."""


def never() -> bool:
  """The `stop` of an evaluation that goes to its end."""
  return False


def create_eval_step(
  *, model: nn.Module, normalize: Normalize, mesh: Mesh, num_seeds: int
) -> EvalStep:
  """Compiles (variables, batch of image, label and mask) -> (logits (N, classes), totals).

  For several seeds all arrays but the batch have an axis for them in front.
  """

  def eval_step(variables: Any, batch: Any) -> Any:
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    targets = create_targets(batch["label"], logits.shape[-1], label_smoothing=0.0)
    losses = cross_entropy(logits, targets)
    return logits, compute_totals(losses, logits, batch["label"], batch["mask"])

  return jax.jit(
    over_seeds(eval_step, num_seeds, in_axes=(0, None)),
    in_shardings=(replicated(mesh), split_batch(mesh)),
  )


def evaluate(
  eval_step: EvalStep, variables: Any, split: Split, batch_size: int, *, stop: Stop = never
) -> dict[str, np.ndarray]:
  """Mean `loss` in nats and `accuracy` in [0, 1] over every example of `split`, each once.

  Each () or (seeds,).

  Raises:
    Stopped: `stop()`, which is asked after each batch, was true.
  """
  _, totals = _run(eval_step, variables, split, batch_size, stop)
  return compute_means(functools.reduce(add_totals, totals, create_totals(1)))


def predict(
  eval_step: EvalStep, variables: Any, split: Split, batch_size: int, *, stop: Stop = never
) -> np.ndarray:
  """Logits float32 (N, classes) of every example of `split`, in its order.

  For several seeds (seeds, N, classes).

  Raises:
    Stopped: see `evaluate`.
  """
  logits, _ = _run(eval_step, variables, split, batch_size, stop)
  return np.concatenate(logits, axis=-2)[..., : len(split), :]


def _run(eval_step: EvalStep, variables: Any, split: Split, batch_size: int, stop: Stop) -> Any:
  """Logits and totals of each batch, on the host."""
  results: list[tuple[jax.Array, Metrics]] = []
  for batch in padded_batches(split, batch_size):
    results.append(eval_step(variables, batch))
    jax.block_until_ready(results[-2:-1])  # many batches at once might not fit into memory
    if stop():
      raise Stopped
  return zip(*jax.device_get(results), strict=True)
