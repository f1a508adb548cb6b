"""Exact evaluation of a split: the last batch is padded, and the padding masked."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flax_cifar import metrics, signals
from flax_cifar.data import batches, dataset
from flax_cifar.data.augment import normalize as normalize_lib
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib

EvalStep = Callable[[Any, Any], tuple[jax.Array, metrics.Metrics]]


def create_eval_step(
  *, model: nn.Module, normalize: normalize_lib.Normalize, mesh: Mesh, num_seeds: int
) -> EvalStep:
  """Compiles (variables, batch of image, label and mask) -> (logits (N, classes), totals).

  The variables are on the devices of `mesh`, as `mesh.split_seeds` says; the batch is on the host,
  whole in every process. For several seeds all arrays but the batch have an axis for them in front.
  """

  def eval_step(variables: Any, batch: Any) -> Any:
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    targets = metrics.create_targets(batch["label"], logits.shape[-1], label_smoothing=0.0)
    losses = metrics.cross_entropy(logits, targets)
    return logits, metrics.compute_totals(losses, logits, batch["label"], batch["mask"])

  sharding = mesh_lib.split_batch(mesh)
  compiled = jax.jit(
    seeds_lib.map_seeds(eval_step, mesh, num_seeds=num_seeds, in_axes=(0, None)),
    in_shardings=(mesh_lib.split_seeds(mesh), sharding),
    out_shardings=mesh_lib.replicated(mesh),  # every process scores all images
  )

  def run(variables: Any, batch: Any) -> Any:
    batch = mesh_lib.place(batch, sharding)
    with jax.transfer_guard("disallow"):  # a hidden copy is an error
      return compiled(variables, batch)

  return run


def validate(
  eval_step: EvalStep,
  variables: Any,
  split: dataset.Split,
  batch_size: int,
  *,
  stop: signals.Stop = signals.never,
) -> dict[str, np.ndarray] | None:
  """The means of `predict_and_score`, which raises what this raises; None of an empty split."""
  if not len(split):
    return None
  return predict_and_score(eval_step, variables, split, batch_size, stop=stop)[1]


def predict(
  eval_step: EvalStep,
  variables: Any,
  split: dataset.Split,
  batch_size: int,
  *,
  stop: signals.Stop = signals.never,
) -> np.ndarray:
  """The logits of `predict_and_score`, which raises what this raises."""
  return predict_and_score(eval_step, variables, split, batch_size, stop=stop)[0]


def predict_and_score(
  eval_step: EvalStep,
  variables: Any,
  split: dataset.Split,
  batch_size: int,
  *,
  stop: signals.Stop = signals.never,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Scores every example of `split` once.

  Returns:
    Logits float32 (N, classes), of several seeds (seeds, N, classes), in the order of `split`; and
    the means `loss` in nats and `accuracy` in [0, 1], each () or (seeds,).

  Raises:
    Stopped: `stop()`, which is asked after each batch, was true.
  """
  results: list[tuple[jax.Array, metrics.Metrics]] = []
  for batch in batches.padded_batches(split, batch_size):
    results.append(eval_step(variables, batch))
    jax.block_until_ready(results[-2:-1])  # many batches at once might not fit into memory
    if stop():
      raise signals.Stopped
  logits, totals = zip(*jax.device_get(results), strict=True)
  means = metrics.compute_means(
    functools.reduce(metrics.add_totals, totals, metrics.create_totals(1))
  )
  return np.concatenate(logits, axis=-2)[..., : len(split), :], means
