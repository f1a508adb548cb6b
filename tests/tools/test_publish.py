"""A run goes to the Hugging Face Hub and comes back; the Hub itself is a folder here."""

import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

import flax_cifar
from flax_cifar import errors
from flax_cifar.run import workdir
from flax_cifar.tools import evaluate, publish
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
      return f"https://hub/{repo}"

    def repo_info(self, repo):
      return types.SimpleNamespace(private="secret" in repo)

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
  options = publish.parse([str(run), f"--to={USER}", "--force"])
  assert publish.publish(options) == f"https://hub/{USER}"
  network = flax_cifar.load_pretrained(f"hf:{USER}")
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  expected = flax_cifar.load_run(run).load().predict(images)
  np.testing.assert_allclose(network.predict(images), expected, atol=1e-6)


def test_the_card_says_what_the_result_says(run, tmp_path):
  out = tmp_path / "out"
  publish.publish(publish.parse([str(run), f"--out={out}", "--force"]))
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


def test_a_path_of_the_machine_is_not_published(tiny_model, data, tmp_path, monkeypatch):
  del tiny_model
  monkeypatch.chdir(tmp_path)
  arguments = ["run", f"--to={USER}"]
  command = "python main.py --config=s9 --workdir=/home/somebody/run"
  runs.run(tmp_path / "run", data.replace(f"{tmp_path}/", ""), total_epochs=1)
  set_result(tmp_path / "run", command=command)
  publish.publish(publish.parse(["run", "--out=out"]))
  texts = [path.read_bytes() for path in (tmp_path / "out").iterdir()]
  assert not any(b"somebody" in text or bytes(tmp_path) in text for text in texts)
  assert "| command | `python main.py --config=s9` |" in (tmp_path / "out/README.md").read_text()
  for text in ("--config=/home/somebody/s9.py", "--config.data.name=npz:/data/a.npz"):
    set_result(tmp_path / "run", command=f"{command} {text}")
    with pytest.raises(
      errors.UserError, match=rf"command='.*{text}' of 'run' shows a path .*force"
    ):
      publish.publish(publish.parse(["run", "--out=other"]))
  publish.publish(publish.parse(["run", "--out=other", "--force"]))
  assert text in (tmp_path / "other" / "README.md").read_text()
  assert not publish.parse(arguments).force


def set_result(run, **changes):
  path = run / "result.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_name_of_the_data_may_be_no_absolute_path(run, data, tmp_path):
  with pytest.raises(errors.UserError, match=rf"config\.data\.name='{data}' of .* --force"):
    publish.publish(publish.parse([str(run), f"--out={tmp_path / 'out'}"]))
  assert not (tmp_path / "out").exists()


def test_the_card_has_the_score_of_the_weights_in_the_file(tiny_model, data, tmp_path):
  del tiny_model
  result = runs.run(tmp_path / "run", data, total_epochs=1, num_seeds=3)
  set_result(tmp_path / "run", test_accuracy_per_seed=[0.125, 0.25, 0.5])
  first = evaluate.evaluate_weights(
    evaluate.Options(tmp_path / "run" / "weights.safetensors", split="test")
  )
  assert first.accuracy == result["test_accuracy_per_seed"][0]
  card = publish.format_card(workdir.read_result(tmp_path / "run"), USER)
  mean = f"{result['test_accuracy']:.2%} ± {result['test_accuracy_sd']:.2%} (n = 3)"
  assert f"| test accuracy | 12.50%; of all seeds {mean} |" in card


@pytest.mark.parametrize(
  "name", ["", "tiny", "a/b/c", "a b/c", "../c", "a/", "/b", "hf:a/b", "a/b\n"]
)
def test_a_name_of_another_form_is_refused_before_the_network(name, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(errors.UserError, match="it must be USER/NAME"):
    hub.download(f"hf:{name}")
  if name:
    with pytest.raises(errors.UserError, match=r"--to='.*' is not valid; it must be USER/NAME"):
      publish.parse(["run", f"--to={name}"])


def test_a_folder_is_not_private():
  with pytest.raises(errors.UserError, match="--out uploads nothing"):
    publish.parse(["run", "--out=here", "--private"])
  assert publish.parse(["run", f"--to={USER}", "--private"]).private


def test_a_run_that_is_not_finished_is_named(tmp_path):
  with pytest.raises(errors.UserError, match="holds no finished run"):
    publish.publish(publish.parse([str(tmp_path), f"--to={USER}"]))


def test_a_run_that_lacks_a_file_leaves_nothing(run, tmp_path):
  (run / "summary.txt").unlink()
  with pytest.raises(errors.UserError, match=r"lacks summary\.txt"):
    publish.publish(publish.parse([str(run), f"--out={tmp_path / 'out'}", "--force"]))
  assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_has_made_stays(run, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "README.md").touch()
  with pytest.raises(errors.UserError, match=r"out' cannot be made: .*choose another"):
    publish.write_files(run, tmp_path / "out", repo="USER/NAME", force=True)
  assert (tmp_path / "out" / "README.md").exists()


def test_weights_of_another_run_are_refused(run):
  config = workdir.read_result(run)["config"]
  set_result(run, config=config | {"seed": 12})
  message = r"safetensors' is of another run: seed is \d+ there and 12 in result\.json; restore"
  with pytest.raises(errors.UserError, match=message):
    publish.publish(publish.parse([str(run), f"--to={USER}", "--force"]))
  with pytest.raises(errors.UserError, match=message):
    flax_cifar.load_run(run).load()


def test_a_name_that_the_hub_does_not_know_is_one_line(server):
  with pytest.raises(errors.UserError, match=r"'hf:no/one' cannot be downloaded .*404"):
    hub.download("hf:no/one")


def test_a_private_run_is_not_put_into_a_public_repository(server, tmp_path):
  (tmp_path / "run").mkdir()
  with pytest.raises(errors.UserError, match="'me/open' is there already, and public"):
    hub.upload(tmp_path / "run", "me/open", private=True)
  hub.upload(tmp_path / "run", "me/secret", private=True)
  assert [path.name for path in (server / "me").iterdir()] == ["secret"]


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(errors.UserError, match="pip install huggingface_hub"):
    hub.download("hf:no/one")
  with pytest.raises(errors.UserError, match="pip install huggingface_hub"):
    hub.upload(pathlib.Path(), "no/one", private=True)
