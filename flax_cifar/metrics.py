"""Metrics as sums and counts under a mask, divided once, so that every example counts once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Totals = dict[str, float]

# Nats, examples, examples, and seconds of training (0 in evaluation).
NO_TOTALS: Totals = {"loss_sum": 0.0, "correct": 0.0, "count": 0.0, "seconds": 0.0}


def compute_totals(
  losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Sums over the examples whose mask is 1.

  Args:
    losses: float32 (N,), nats.
    logits: float32 (N, classes).
    labels: int32 (N,).
    mask: float32 (N,) of 0 and 1.

  Returns:
    Scalars `loss_sum`, `correct`, `count`.
  """
  return {
    "loss_sum": jnp.sum(losses * mask),
    "correct": jnp.sum((logits.argmax(-1) == labels) * mask),
    "count": jnp.sum(mask),
  }


def add_totals(a: Totals, b: Mapping[str, float | jax.Array]) -> Totals:
  """`a` with what `b` names added, on the host in float64."""
  return {**a, **{name: a[name] + float(b[name]) for name in b}}


def compute_means(totals: Totals) -> dict[str, float]:
  """Mean `loss` in nats and `accuracy` in [0, 1]."""
  return {
    "loss": totals["loss_sum"] / totals["count"],
    "accuracy": totals["correct"] / totals["count"],
  }
