"""Cross-entropy and metrics against NumPy; each example counts once for any batches."""

import itertools

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import special

from flax_cifar import metrics


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_numpy(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 5, (2, 7, 4))  # the first axis is that of seeds
  labels = rng.integers(4, size=7)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
  actual = metrics.create_targets(labels, 4, label_smoothing=smoothing)
  np.testing.assert_allclose(actual, targets, rtol=1e-6)
  losses = metrics.cross_entropy(jnp.asarray(logits, jnp.float32), actual)
  np.testing.assert_allclose(losses, -(targets * log_p).sum(-1), rtol=1e-5)


def test_distillation_is_a_divergence_at_a_temperature():
  rng = np.random.default_rng(0)
  logits, taught, losses = rng.normal(0, 3, (6, 5)), rng.normal(0, 3, (6, 5)), rng.uniform(size=6)
  weight, temperature = 0.3, 4.0
  p, q = (special.softmax(values / temperature, -1) for values in (taught, logits))
  expected = (1 - weight) * losses + weight * temperature**2 * special.rel_entr(p, q).sum(-1)
  arrays = [jnp.asarray(array, jnp.float32) for array in (losses, logits, taught)]
  actual = metrics.distill(*arrays, weight=weight, temperature=temperature)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)
  arrays[2] = arrays[1]  # a student that has learned all
  alone = metrics.distill(*arrays, weight=1.0, temperature=temperature)
  np.testing.assert_allclose(alone, 0, atol=1e-5)


def test_the_calibration_error_is_that_of_the_bins():
  """Two bins of two examples: confidence 0.6 with accuracy 0.5, and 0.9 with accuracy 1."""
  logits = np.log([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
  error = metrics.compute_calibration(logits, np.array([0, 1, 1, 0]), bins=4).error
  assert error == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
  sure = metrics.compute_calibration(np.array([[99.0, 0.0]]), np.array([0])).error
  assert sure == pytest.approx(0.0, abs=1e-9)


def test_large_logits_stay_finite():
  loss = metrics.cross_entropy(jnp.float32([[1e4, -1e4]]), jnp.float32([[0, 1]]))
  np.testing.assert_allclose(loss, [2e4])


def compute_totals(losses, logits, labels, mask):
  """`metrics.compute_totals` of NumPy arrays."""
  losses, logits, mask = (jnp.asarray(array, jnp.float32) for array in (losses, logits, mask))
  return metrics.compute_totals(losses, logits, labels, mask)


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
    totals = metrics.create_totals(1)
    for a, b in itertools.pairwise(bounds):
      batch = compute_totals(losses[a:b], logits[a:b], labels[a:b], np.ones(b - a))
      totals = metrics.add_totals(totals, batch)
    means = metrics.compute_means(totals)
    assert means["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert means["accuracy"] == (logits.argmax(-1) == labels).mean()


def test_labels_with_an_axis_for_the_classes_are_refused():
  pytest.importorskip("beartype")
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'labels'"):
    compute_totals(np.ones(3), np.ones((3, 2)), np.ones((3, 2), int), np.ones(3))


def test_adding_totals_does_not_change_the_first_argument():
  start = metrics.create_totals(1)
  assert metrics.add_totals(start, {"count": np.float32(3)})["count"] == 3
  assert [float(value) for value in start.values()] == [0] * 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_totals_keep_their_shape_and_precision(seeds):
  """Orbax restores arrays of the given shape and type: float64, also of shape ()."""
  start = metrics.create_totals(seeds)
  shape = () if seeds == 1 else (seeds,)
  step = {"loss_sum": np.full(shape, np.float32(1e-9)), "count": np.full(shape, np.float32(1))}
  totals = metrics.add_totals({**start, "loss_sum": np.ones(shape)}, step)
  for name, values in totals.items():
    assert isinstance(values, np.ndarray)
    assert (values.shape, values.dtype) == (start[name].shape, np.float64)
  assert (totals["loss_sum"] > 1).all()


def test_each_seed_has_its_own_totals():
  rng = np.random.default_rng(0)
  logits, losses = rng.normal(size=(2, 6, 3)).astype(np.float32), rng.uniform(size=(2, 6))
  labels, mask = rng.integers(3, size=6), np.float32([1, 1, 1, 1, 0, 0])
  both = compute_totals(losses, logits, labels, mask)
  for seed in range(2):
    one = compute_totals(losses[seed], logits[seed], labels, mask)
    for name in ("loss_sum", "correct"):
      assert both[name][seed] == pytest.approx(float(one[name]), rel=1e-6)


def test_steps_come_in_order():
  chunks = [
    {"count": jnp.arange(3), "loss_sum": jnp.arange(6).reshape(3, 2)},
    {"count": jnp.array([3])},
  ]
  steps = list(metrics.iterate_steps(chunks))
  assert [int(step["count"]) for step in steps] == [0, 1, 2, 3]
  assert steps[2]["loss_sum"].tolist() == [4, 5]
