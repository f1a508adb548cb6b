"""A run goes to the Hugging Face Hub and comes back; the Hub itself is a folder here."""

import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

import flax_cifar
from flax_cifar import errors
from flax_cifar.run import workdir
from flax_cifar.tools import publish
from flax_cifar.zoo import hub
from tests import runs

USER = "someone/tiny"


@pytest.fixture
def run(tiny_model, data, tmp_path):
  runs.run(tmp_path / "run", data, total_epochs=1)
  return tmp_path / "run"


@pytest.fixture
def server(tmp_path, monkeypatch):
  """The folder that a stand-in for huggingface_hub uploads to and downloads from."""
  server = tmp_path / "hub"

  class HfApi:
    def create_repo(self, repo, *, private, exist_ok):
      assert exist_ok
      assert not private
      return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
      shutil.copytree(folder_path, server / repo_id)

  def hf_hub_download(repo, file, *, revision):
    assert revision is None
    path = server / repo / file
    if not path.exists():
      raise RuntimeError("404: Repository\nnot found")
    return str(path)

  stand_in = types.SimpleNamespace(HfApi=HfApi, hf_hub_download=hf_hub_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
  return server


def test_a_published_run_can_be_loaded_by_name(run, server):
  assert publish.publish(publish.parse([str(run), f"--to={USER}"])) == f"https://hub/{USER}"
  network = flax_cifar.load_pretrained(f"hf:{USER}")
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  expected = flax_cifar.load_run(run).load().predict(images)
  np.testing.assert_allclose(network.predict(images), expected, atol=1e-6)


def test_the_card_says_what_the_result_says(run, tmp_path):
  out = tmp_path / "out"
  publish.publish(publish.parse([str(run), f"--out={out}"]))
  assert {path.name for path in out.iterdir()} == {*publish.FILES, "README.md"}
  result, card = workdir.read_result(run), (out / "README.md").read_text("utf-8")
  assert f"| test accuracy | {result['test_accuracy']:.2%}" in card
  assert f"{result['parameters']:,} parameters" in card
  _, front, _ = card.split("---\n", 2)
  assert "library_name: flax\n" in front
  with pytest.raises(errors.UserError, match="a folder that does not exist yet"):
    publish.publish(publish.parse([str(run), f"--out={out}"]))


def test_the_hub_can_read_the_card(run):
  library = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
  card = library.ModelCard(publish.format_card(workdir.read_result(run), USER))
  assert card.data.library_name == "flax"


def test_a_run_that_is_not_finished_is_named(tmp_path):
  with pytest.raises(errors.UserError, match="holds no finished run"):
    publish.publish(publish.parse([str(tmp_path), f"--to={USER}"]))


def test_a_run_that_lacks_a_file_leaves_nothing(run, tmp_path):
  (run / "summary.txt").unlink()
  with pytest.raises(errors.UserError, match=r"lacks summary\.txt"):
    publish.publish(publish.parse([str(run), f"--out={tmp_path / 'out'}"]))
  assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_does_not_know_is_one_line(server):
  with pytest.raises(errors.UserError, match=r"'hf:no/one' cannot be downloaded .*404"):
    hub.download("hf:no/one")


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(errors.UserError, match="pip install huggingface_hub"):
    hub.download("hf:no/one")
  with pytest.raises(errors.UserError, match="pip install huggingface_hub"):
    hub.upload(pathlib.Path(), "no/one", private=True)
