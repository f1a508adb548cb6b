"""Cross-entropy against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import metrics


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_numpy(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 5, (2, 7, 4))  # the first axis are seeds
  labels = rng.integers(4, size=7)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
  actual = metrics.create_targets(labels, 4, label_smoothing=smoothing)
  np.testing.assert_allclose(actual, targets, rtol=1e-6)
  losses = metrics.cross_entropy(jnp.asarray(logits, jnp.float32), actual)
  np.testing.assert_allclose(losses, -(targets * log_p).sum(-1), rtol=1e-5)


def test_large_logits_stay_finite():
  loss = metrics.cross_entropy(jnp.float32([[1e4, -1e4]]), jnp.float32([[0, 1]]))
  np.testing.assert_allclose(loss, [2e4])
