"""The trained networks of the package."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import flax_cifar
from flax_cifar import errors, zoo
from flax_cifar.run import config as config_lib
from flax_cifar.run import weights as weights_lib


def test_the_names_come_without_jax():
  code = "import flax_cifar, sys; print(flax_cifar.list_models(), 'jax' in sys.modules)"
  output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
  assert output.stdout == f"{zoo.list_models()} False\n"


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_folder_is_whole(name):
  folder = zoo.FOLDER / name
  run = json.loads((folder / "run.json").read_text("utf-8"))
  weights = weights_lib.load_weights(zoo.find_weights(name))
  weights_lib.create_network(weights)
  assert weights.config == config_lib.complete(run["config"])
  leaves = weights_lib.state_lib.name_leaves(weights.variables["params"]).values()
  assert sum(leaf.size for leaf in leaves) == run["parameters"]
  assert f"{run['parameters']:,}" in (folder / "layers.txt").read_text("utf-8").splitlines()[-1]
  scores = json.loads((folder / "scores.json").read_text("utf-8"))
  assert abs(scores["accuracy"] - run["test_accuracy"]) < 0.001
  assert f"{scores['accuracy']:.2%}" in (folder / "README.md").read_text("utf-8")


def test_a_pretrained_network_gives_probabilities():
  network = flax_cifar.load_pretrained("tiny50k")
  assert repr(network) == "Classifier('tiny50k': tiny50k, 32x32 pixels, 10 classes)"
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
  probabilities = network.predict(images)
  assert (probabilities.shape, probabilities.dtype) == ((3, 10), np.float32)
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(network.predict(images[1:]), probabilities[1:], atol=1e-5)
  assert network.predict(images[:0]).shape == (0, 10)
  assert network.class_names[0] == "airplane"
  with pytest.raises(errors.UserError, match=r"float64 \(3, 32, 32, 3\); this network takes uint8"):
    network.predict(images / 255)
  with pytest.raises(errors.UserError, match=r"uint8 \(32, 32, 3\)"):
    network.predict(images[0])


def test_an_unknown_name_is_one_line_with_the_known_ones():
  with pytest.raises(errors.UserError, match=r"model='tiny' is unknown.*tiny50k"):
    flax_cifar.load_pretrained("tiny")


@pytest.mark.skipif(not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR has no CIFAR-10")
def test_the_score_is_the_stated_one():
  stated = json.loads((zoo.FOLDER / "tiny50k" / "scores.json").read_text("utf-8"))
  program = [sys.executable, "-m", "flax_cifar.tools.evaluate", "--model=tiny50k", "--split=test"]
  changes = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as a user has it
  done = subprocess.run(
    [*program, "--json"], env=os.environ | changes, stdout=subprocess.PIPE, check=True
  )
  score = json.loads(done.stdout)
  assert (score["count"], score["accuracy"]) == (10_000, stated["accuracy"])
