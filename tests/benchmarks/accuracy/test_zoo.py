"""Trained networks are added whole or refused, and their page has a row each."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from benchmarks.accuracy import zoo as zoo_lib
from flax_cifar import errors, zoo
from flax_cifar.run import config as config_lib
from flax_cifar.run import weights as weights_lib
from flax_cifar.tools import evaluate
from tests.benchmarks.accuracy.test_results import create_content, write_folder


@pytest.fixture
def run(tmp_path):
  """The folder of a finished run of `pyramid`, whose weights are random."""
  content, records = create_content("pyramid-full")
  write_folder(tmp_path / "run", content | {"scored_weights": "last epoch"}, records)
  model = config_lib.create_model(content["config"], num_classes=10)
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False))
  weights_lib.save_weights(
    tmp_path / "run" / zoo.WEIGHTS,
    init(jax.random.key(0, impl="rbg")),
    config=content["config"],
    class_names=[str(label) for label in range(10)],
    image_shape=(32, 32, 3),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    data={},
  )
  return tmp_path / "run"


def test_a_run_is_added_and_described(tmp_path, run, monkeypatch):
  path = zoo_lib.add(run, tmp_path / "zoo", force=False)
  assert path == tmp_path / "zoo" / "pyramid-full"
  names = {file.name for file in path.iterdir()}
  assert names == {"weights.safetensors", "run.json", "layers.txt"}
  monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
  row = zoo_lib.describe("pyramid-full", create_score(0.8501))
  assert json.loads((path / "scores.json").read_text("utf-8")) == row
  zoo_lib.write_card(row)
  card = (path / "README.md").read_text("utf-8")
  for text in ("48,656", "85.01%", "44 x 44 pixels", 'load_pretrained("pyramid-full")'):
    assert text in card
  assert "/tmp" not in card
  assert json.loads((path / "run.json").read_text("utf-8"))["epochs"] == 3
  with pytest.raises(errors.UserError, match="--force replaces it"):
    zoo_lib.add(run, tmp_path / "zoo", force=False)
  zoo_lib.add(run, tmp_path / "zoo", force=True)


def test_what_cannot_be_repeated_is_not_added(tmp_path, run, monkeypatch):
  monkeypatch.setattr(zoo_lib, "MAX_BYTES", 1000)
  with pytest.raises(errors.UserError, match=r"bytes=.* must be up to 1,000"):
    zoo_lib.add(run, tmp_path / "zoo", force=False)
  content = json.loads((run / "result.json").read_text())
  (run / "result.json").write_text(json.dumps(content | {"protocol": "trial"}))
  with pytest.raises(errors.UserError, match="is a trial"):
    zoo_lib.add(run, tmp_path / "zoo", force=False)
  assert not (tmp_path / "zoo").exists()


def create_score(accuracy):
  corrupted = {"noise": [0.8, 0.7, 0.6, 0.5, 0.4]}
  return evaluate.Score("test", "cifar10", 10_000, accuracy, 0.3, 0.02, False, None, corrupted)


def test_the_page_has_a_row_for_each_network(tmp_path, run, monkeypatch):
  monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
  zoo_lib.add(run, zoo.FOLDER, force=False)
  monkeypatch.setattr(evaluate, "evaluate_weights", lambda options: create_score(0.85))
  (tmp_path / "docs" / "images").mkdir(parents=True)
  zoo_lib.score(tmp_path / "docs", zoo.list_models())
  shutil.copytree(zoo.FOLDER / "pyramid-full", zoo.FOLDER / "another")
  zoo_lib.score(tmp_path / "docs", ["another"])  # the row of the first one stays
  page, picture = zoo_lib.write_page(tmp_path / "docs")
  text = page.read_text("utf-8")
  assert text.count("| 48,656 |") == 2
  assert "| 85.00 | 0.3000 | 2.00 | 60.00 |" in text
  assert "| `pyramid-full` | 60.00 |" in text
  assert (
    json.loads((tmp_path / "docs" / "zoo.json").read_text("utf-8"))["rows"][0]["accuracy"] == 0.85
  )
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_score_that_is_not_that_of_the_run_is_refused(tmp_path, run, monkeypatch):
  monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
  zoo_lib.add(run, zoo.FOLDER, force=False)
  with pytest.raises(errors.UserError, match=r"accuracy of pyramid-full=0.8489 is not valid"):
    zoo_lib.describe("pyramid-full", create_score(0.8489))
