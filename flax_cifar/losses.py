"""The training loss."""

import jax
import optax


def create_targets(labels: jax.Array, num_classes: int, *, label_smoothing: float) -> jax.Array:
  """Distributions float32 (N, classes) for labels int32 (N,).

  Source: Szegedy et al. 2016, arXiv:1512.00567.

  Args:
    labels: int32 (N,).
    num_classes: number of classes.
    label_smoothing: probability mass spread evenly over all classes, in [0, 1).
  """
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy of each example in nats.

  Args:
    logits: float32 (..., N, classes).
    targets: float32 (N, classes), each a distribution.

  Returns:
    float32 (..., N).
  """
  return -(targets * jax.nn.log_softmax(logits)).sum(-1)
