"""Exact evaluation of a split: the last batch is padded, and the padding masked."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import Normalize, padded_batches
from flax_cifar.losses import cross_entropy
from flax_cifar.metrics import NO_TOTALS, add_totals, compute_means, compute_totals
from flax_cifar.partition import replicated, split_batch

EvalStep = Callable[[Any, dict[str, np.ndarray]], tuple[jax.Array, dict[str, jax.Array]]]


def create_eval_step(*, model: nn.Module, normalize: Normalize, mesh: Mesh) -> EvalStep:
  """Compiles (variables, batch of image, label and mask) -> (logits (N, classes), totals)."""

  def eval_step(variables: Any, batch: Any) -> Any:
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    losses = cross_entropy(logits, batch["label"], label_smoothing=0.0)
    return logits, compute_totals(losses, logits, batch["label"], batch["mask"])

  return jax.jit(eval_step, in_shardings=(replicated(mesh), split_batch(mesh)))


def evaluate(
  eval_step: EvalStep, variables: Any, split: Split, batch_size: int
) -> dict[str, float]:
  """Mean `loss` in nats and `accuracy` in [0, 1] over every example of `split`, each once."""
  totals = NO_TOTALS
  for batch in padded_batches(split, batch_size):
    totals = add_totals(totals, eval_step(variables, batch)[1])
  return compute_means(totals)


def predict(eval_step: EvalStep, variables: Any, split: Split, batch_size: int) -> np.ndarray:
  """Logits float32 (N, classes) of every example of `split`, in its order."""
  batches = padded_batches(split, batch_size)
  logits = [np.asarray(eval_step(variables, batch)[0]) for batch in batches]
  return np.concatenate(logits)[: len(split)]
