"""The training loss."""

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float) -> jax.Array:
  """Cross-entropy of each example in nats.

  Args:
    logits: float32 (N, classes).
    labels: int32 (N,).
    label_smoothing: probability mass spread evenly over all classes, in [0, 1).

  Returns:
    float32 (N,).
  """
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)
