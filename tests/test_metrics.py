"""Every example counts once, whatever the batches and the padding."""

import itertools

import numpy as np
import pytest

from flax_cifar.metrics import NO_TOTALS, add_totals, compute_means, compute_totals


def test_masked_examples_do_not_count():
  logits = np.float32([[2, 1], [1, 2], [5, 0]])
  labels, losses = np.array([0, 0, 1]), np.float32([0.5, 1.5, 99.0])
  totals = compute_totals(losses, logits, labels, np.float32([1, 1, 0]))
  assert {name: float(value) for name, value in totals.items()} == {
    "loss_sum": 2.0,
    "correct": 1.0,
    "count": 2.0,
  }


def test_means_do_not_depend_on_the_batches():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(10, 3)).astype(np.float32), rng.integers(3, size=10)
  losses = rng.uniform(size=10).astype(np.float32)
  for bounds in ([0, 10], [0, 3, 6, 9, 10], [0, 1, 10]):
    totals = NO_TOTALS
    for a, b in itertools.pairwise(bounds):
      batch = compute_totals(losses[a:b], logits[a:b], labels[a:b], np.ones(b - a, np.float32))
      totals = add_totals(totals, batch)
    means = compute_means(totals)
    assert means["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert means["accuracy"] == (logits.argmax(-1) == labels).mean()


def test_adding_leaves_the_start_alone():
  add_totals(NO_TOTALS, {"count": 3.0})
  assert set(NO_TOTALS.values()) == {0.0}
