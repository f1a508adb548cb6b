"""Metrics as sums and counts under a mask, divided once, so that every example counts once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Metrics = dict[str, jax.Array]  # what a step gives, on the device
Totals = dict[str, np.ndarray]  # their sums on the host: float64, () or (seeds,)


def create_totals(num_seeds: int) -> Totals:
  """Zero nats, examples, examples, and seconds of training (0 in evaluation)."""
  shape = () if num_seeds == 1 else (num_seeds,)
  names = ("loss_sum", "correct", "count")
  return {name: np.zeros(shape) for name in names} | {"seconds": np.zeros(())}


def compute_totals(
  losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> Metrics:
  """Sums over the examples whose mask is 1.

  Args:
    losses: float32 (..., N), nats.
    logits: float32 (..., N, classes).
    labels: int32 (N,).
    mask: float32 (N,) of 0 and 1.

  Returns:
    `loss_sum` (...), `correct` (...), `count` ().
  """
  return {
    "loss_sum": jnp.sum(losses * mask, -1),
    "correct": jnp.sum((logits.argmax(-1) == labels) * mask, -1),
    "count": jnp.sum(mask),
  }


def add_totals(a: Totals, b: Mapping[str, Any]) -> Totals:
  """`a` with what `b` names added, on the host in float64."""
  return {**a, **{name: np.asarray(a[name] + np.float64(b[name])) for name in b}}


def iterate_steps(calls: Sequence[Metrics]) -> Iterator[dict[str, np.ndarray]]:
  """Fetches what some calls returned, arrays (steps, ...), and yields it step by step."""
  for call in jax.device_get(calls):
    for step in range(len(call["count"])):
      yield {name: values[step] for name, values in call.items()}


def compute_means(totals: Totals) -> dict[str, np.ndarray]:
  """Mean `loss` in nats and `accuracy` in [0, 1], () or (seeds,)."""
  return {
    "loss": totals["loss_sum"] / totals["count"],
    "accuracy": totals["correct"] / totals["count"],
  }
