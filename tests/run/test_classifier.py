"""A trained network as a classifier, for images of any number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.run import classifier
from flax_cifar.run import weights as weights_lib
from tests import runs, tiny

COUNT = 21
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("classifier")
  with tiny.registered():
    runs.run(folder / "run", tiny.write_data(folder / "tiny.npz"), total_epochs=1)
  return weights_lib.load_weights(folder / "run" / "weights.safetensors")


@pytest.fixture
def network(tiny_model, weights):
  return classifier.create_classifier(weights, dtype="float32")


def test_predictions_are_those_of_the_module(network, weights):
  images = (np.float64(IMAGES) / 255 - weights.mean) / weights.std
  variables = jax.tree.map(jnp.asarray, weights.variables)
  logits = network.model.apply(variables, jnp.asarray(images, jnp.float32), train=False)
  expected = np.exp(np.float64(logits))
  expected /= expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(network.predict(IMAGES), expected, atol=1e-6)
  for count in (0, 1, 16):
    np.testing.assert_allclose(network.predict(IMAGES[:count]), expected[:count], atol=1e-6)


def test_the_scores_are_those_of_the_logits(network):
  labels = np.arange(COUNT, dtype=np.int32) % tiny.CLASSES
  logits, scores = network.score(dataset.Split(IMAGES, labels))
  assert scores["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
  shares = np.exp(np.float64(logits))
  shares /= shares.sum(-1, keepdims=True)
  loss = -np.log(shares[np.arange(COUNT), labels]).mean()
  assert scores["loss"] == pytest.approx(loss, rel=1e-5)


def test_outputs_that_are_not_finite_are_one_line(tiny_model, weights):
  huge = dataclasses.replace(weights, variables=jax.tree.map(lambda x: x * 1e30, weights.variables))
  network = classifier.create_classifier(huge, dtype="float32")
  with pytest.raises(errors.UserError, match="the outputs of 'tiny' are not all finite"):
    network.score(dataset.Split(IMAGES, np.zeros(COUNT, np.int32)))


def test_the_type_may_be_left_to_the_machine(tiny_model, weights, network):
  automatic = classifier.create_classifier(weights, dtype="auto")
  np.testing.assert_allclose(automatic.predict(IMAGES), network.predict(IMAGES), atol=0.02)


def test_few_sizes_of_batches_are_compiled(network, monkeypatch):
  sizes = set()
  step = network.eval_step

  def record(variables, batch):
    sizes.add(len(batch["image"]))
    return step(variables, batch)

  recorded = dataclasses.replace(network, eval_step=record)
  for count in range(1, COUNT + 1):
    assert len(recorded.predict(IMAGES[:count])) == count
  assert sizes == {1, 2, 4, 8, 16}


def test_no_images_have_no_score(network):
  with pytest.raises(errors.UserError, match="one image or more"):
    network.score(dataset.Split(IMAGES[:0], np.zeros(0, np.int32)))
