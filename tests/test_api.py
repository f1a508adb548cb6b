"""The functions for notebooks: they train, load and show what main.py would."""

import json
import subprocess
import sys

import numpy as np
import pytest

import flax_cifar
from flax_cifar import errors
from tests import tiny

CONFIG = """
from tests import tiny

def get_config(arg=""):
  return tiny.get_config({data!r})
"""


@pytest.fixture(autouse=True)
def known_model(tiny_model):
  """The network of the run is known by its name."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("api")
  config = folder / "own.py"
  config.write_text(CONFIG.format(data=tiny.write_data(folder / "data.npz")))
  with tiny.registered():
    return flax_cifar.train_network(
      str(config), workdir=folder / "a&b", name="x<y", total_epochs=2, optimizer__learning_rate=0.2
    )


def test_a_run_has_its_result_its_network_and_its_pictures(run):
  result = json.loads((run.workdir / "result.json").read_text())
  assert run.accuracy == result["test_accuracy"]
  assert [record["epoch"] for record in run.records] == [1, 2]
  config = result["config"]
  assert (config["total_epochs"], config["optimizer"]["learning_rate"]) == (2, 0.2)
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
  np.testing.assert_allclose(run.load().predict(images).sum(-1), 1, rtol=1e-5)
  assert len(run.plot_curves().axes) == 2
  assert run.write_report().read_text().startswith("<!DOCTYPE html>")
  assert repr(run) == f"Run(workdir={run.workdir!r})"


def test_a_notebook_shows_a_summary_in_which_names_are_escaped(run):
  shown = run._repr_html_()
  assert f"{run.accuracy:.2%}" in shown
  assert "<h3>x&lt;y</h3>" in shown
  assert "a&amp;b" in shown
  assert 'src="data:image/svg+xml;base64,' in shown


def test_a_finished_run_is_loaded(run):
  again = flax_cifar.load_run(run.workdir)
  assert (again.result, list(again.records)) == (run.result, list(run.records))
  with pytest.raises(errors.UserError, match=r"holds no finished run: it has no result\.json"):
    flax_cifar.load_run(run.workdir.parent)


@pytest.mark.parametrize(
  ("config", "changes", "message"),
  [
    ("nothing", {}, "config='nothing' is unknown"),
    ("s9:odd", {}, "config variant 'odd' is unknown"),
    ("s9", {"learning_rate": 1.0}, "did you mean 'optimizer.learning_rate'"),
    ("s9", {"total_epochs": "many"}, "total_epochs"),
    ("s9", {"optimizer": {"name": "adamw"}}, "'optimizer' is a section; set its keys"),
  ],
)
def test_a_wrong_config_is_one_line(config, changes, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    flax_cifar.create_config(config, **changes)
  assert "\n" not in str(caught.value)


def test_short_keys_are_those_of_variants():
  config = flax_cifar.create_config("s9", norm="layer", lr=0.5, epochs=2, augment__ops=("rotate",))
  assert (config.model.norm, config.optimizer.learning_rate) == ("layer", 0.5)
  assert (config.total_epochs, config.augment.ops) == (2, ("rotate",))
  assert flax_cifar.create_config("s9", seed=np.int64(3)).seed == 3


def test_a_key_that_is_set_twice_is_refused():
  with pytest.raises(errors.UserError, match=r"optimizer\.learning_rate is set twice"):
    flax_cifar.create_config("s9", lr=0.5, optimizer__learning_rate=0.1)


@pytest.mark.parametrize("line", ["config.optimizer.learnig_rate = 1", "1 / 0", "return return"])
def test_a_config_file_that_fails_is_one_line(tmp_path, line):
  path = tmp_path / "own.py"
  path.write_text(
    "from flax_cifar.configs import common\n"
    f"def get_config(arg):\n  config = common.get_config()\n  {line}\n  return config\n"
  )
  with pytest.raises(errors.UserError, match=r"config='.*own\.py'") as caught:
    flax_cifar.create_config(str(path))
  assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_directory(run, monkeypatch):
  monkeypatch.setenv("HOME", str(run.workdir.parent))
  folder = f"~/{run.workdir.name}"
  assert flax_cifar.load_run(folder).workdir == run.workdir
  assert run.write_report(f"{folder}/own.html") == run.workdir / "own.html"


def test_the_import_brings_no_jax():
  code = "import sys, flax_cifar; print('jax' in sys.modules, len(flax_cifar.__all__))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == f"False {len(flax_cifar.__all__)}\n"
