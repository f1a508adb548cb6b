"""An exported network gives the probabilities of the network, without this package."""

import subprocess
import sys

import jax.export
import numpy as np
import pytest

import flax_cifar
from flax_cifar import errors
from flax_cifar.tools import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  path = tmp_path_factory.mktemp("export") / "it's.stablehlo"
  export.export(export.parse(["--model=tiny50k", f"--out={path}"]))
  return path


def test_any_number_of_images_gets_the_probabilities_of_the_network(exported):
  program = jax.export.deserialize(exported.read_bytes())
  network = flax_cifar.load_pretrained("tiny50k")
  assert set(program.platforms) == set(export.PLATFORMS)
  for count in (1, 5):
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(program.call(images), network.predict(images), atol=1e-5)


def test_the_example_runs_where_this_package_is_not(exported):
  text = exported.with_name("it's.stablehlo.py").read_text()
  hidden = "import sys; sys.modules['flax_cifar'] = sys.modules['flax'] = None\n"
  done = subprocess.run(
    [sys.executable, "-c", hidden + text], cwd=exported.parent, capture_output=True, text=True
  )
  assert done.stdout.strip() in flax_cifar.load_pretrained("tiny50k").class_names, done.stderr


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
  out = tmp_path / "no" / "a"
  options = export.parse(["--model=tiny50k", f"--out={out}", "--platforms", "cpu"])
  with pytest.raises(errors.UserError, match=r"--out=.*cannot be written"):
    export.export(options)


def test_a_program_has_the_platforms_that_are_asked_for(tmp_path):
  path = tmp_path / "a"
  export.export(export.parse(["--model=tiny50k", f"--out={path}", "--platforms", "cpu"]))
  assert jax.export.deserialize(path.read_bytes()).platforms == ("cpu",)
