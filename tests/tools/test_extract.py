"""The tool that writes a checkpoint's network: the best epoch, the newest state, another seed."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from flax_cifar import errors, models, train, zoo
from flax_cifar.run import checkpoint, weights, workdir
from flax_cifar.tools import evaluate, extract
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_data(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models.MODELS, "tiny", tiny.TinyNet)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("run")
  with tiny.registered():
    train.train_and_evaluate(tiny.get_config(data, **{"checkpoint.every": 1}), folder)
  return folder


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("seeds")
  with tiny.registered():
    train.train_and_evaluate(tiny.get_config(data, seed=3, num_seeds=2), folder)
  return folder


def write(folder, out, *flags):
  return extract.extract(extract.parse([str(folder), f"--out={out}", *flags]))


def score(path):
  """The validation accuracy of a weights file."""
  return evaluate.evaluate_weights(evaluate.Options(path, split="validation")).accuracy


def test_the_latest_checkpoint_of_a_finished_run_has_its_weights(run, tmp_path):
  found = write(run, tmp_path / "a.safetensors", "--checkpoint=latest")
  assert (tmp_path / "a.safetensors").read_bytes() == (run / zoo.WEIGHTS).read_bytes()
  assert (found.step, found.epochs, found.seed, found.peeked) == (15, 3, 0, False)


def test_the_best_epoch_has_the_accuracy_that_the_run_reports(run, tmp_path):
  best = json.loads((run / "result.json").read_text())["best_validation"]["accuracy"]
  found = write(run, tmp_path / "a.safetensors")
  assert found.step == 5 * found.epochs
  assert found.validation_accuracy == best == score(tmp_path / "a.safetensors")


@pytest.mark.parametrize("seed", [3, 4])
def test_a_seed_of_several_has_its_own_accuracy(two_seeds, tmp_path, seed):
  found = write(two_seeds, tmp_path / "a.safetensors", f"--seed={seed}")
  record = json.loads((two_seeds / "metrics.jsonl").read_text().splitlines()[-1])
  assert found.validation_accuracy == record["validation_accuracy_per_seed"][seed - 3]
  assert found.validation_accuracy == score(tmp_path / "a.safetensors")
  config = weights.load_weights(tmp_path / "a.safetensors").config
  assert (config["seed"], config["num_seeds"]) == (seed, 1)


def test_the_first_seed_is_the_one_whose_weights_the_run_has_written(two_seeds, tmp_path):
  write(two_seeds, tmp_path / "a.safetensors")
  ours, theirs = (
    weights.load_weights(path) for path in (tmp_path / "a.safetensors", two_seeds / zoo.WEIGHTS)
  )
  kernel, written = (one.variables["params"]["head"]["conv"]["kernel"] for one in (ours, theirs))
  np.testing.assert_array_equal(kernel, written)


@pytest.mark.parametrize("seed", [2, 5])
def test_an_unknown_seed_is_refused(two_seeds, tmp_path, seed):
  with pytest.raises(errors.UserError, match=rf"--seed={seed} .* must be from 3 to 4"):
    write(two_seeds, tmp_path / "a.safetensors", f"--seed={seed}")


def test_the_seed_of_a_run_of_one_is_named(run, tmp_path):
  with pytest.raises(errors.UserError, match=r"--seed=1 .* must be 0, the run's only one"):
    write(run, tmp_path / "a.safetensors", "--seed=1")


def test_a_run_that_was_stopped_before_its_end_will_do(run, tmp_path):
  """As one that still trains: it has neither result.json nor weights."""
  shutil.copytree(run, tmp_path / "run")
  for name in ("result.json", zoo.WEIGHTS):
    (tmp_path / "run" / name).unlink()
  write(tmp_path / "run", tmp_path / "a.safetensors", "--checkpoint=latest")
  assert (tmp_path / "a.safetensors").read_bytes() == (run / zoo.WEIGHTS).read_bytes()


def test_the_epoch_of_a_checkpoint_may_lack_a_validation_accuracy(run, tmp_path, monkeypatch):
  """As where the run held no images out."""
  read = checkpoint.read
  monkeypatch.setattr(
    checkpoint,
    "read",
    lambda *args, **options: dataclasses.replace(read(*args, **options), records=[{"epoch": 1}]),
  )
  found = write(run, tmp_path / "a.safetensors")
  assert (found.epochs, found.validation_accuracy) == (1, None)
  assert "accuracy" not in extract.format_text(found)


def test_an_epoch_that_test_images_chose_is_labelled(run, tmp_path, monkeypatch, capsys):
  config, fingerprint = workdir.read_start(run)
  peeking = config | {"protocol": "published"}
  monkeypatch.setattr(workdir, "read_start", lambda folder: (peeking, fingerprint))
  monkeypatch.setattr(workdir, "check_data", lambda folder, data: None)
  found = write(run, tmp_path / "a.safetensors")
  assert "the test images chose this epoch" in capsys.readouterr().err
  assert "(on the test split)" in extract.format_text(found)


def test_damage_is_named(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  folder = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
  victim = max(folder.glob("state/**/*"), key=lambda path: path.is_file() and path.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-1])
  with pytest.raises(
    errors.UserError, match=rf"{folder.name}' is damaged \(.* has changed\), .*try again"
  ):
    write(tmp_path / "run", tmp_path / "a.safetensors", "--checkpoint=latest")


def test_other_data_are_refused(run, data, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"]["name"] = tiny.write_data(tmp_path / "other.npz", seed=1)
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match=r"holds a run on other data"):
    write(tmp_path / "run", tmp_path / "a.safetensors")


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=r"holds no run that has begun to train"):
    write(tmp_path, tmp_path / "a.safetensors")


@pytest.mark.parametrize("out", ["a.npz", "missing/a.safetensors", zoo.WEIGHTS])
def test_a_file_that_cannot_be_written_is_refused_at_once(run, out):
  with pytest.raises(errors.UserError, match=r"--out="):
    extract.parse([str(run), f"--out={run / out}"])


def test_the_screen_and_json_have_the_same_values(run, tmp_path, monkeypatch, capsys):
  arguments = ["extract", str(run), f"--out={tmp_path / 'a.safetensors'}"]
  monkeypatch.setattr("sys.argv", arguments)
  extract.main()
  text = capsys.readouterr().out
  monkeypatch.setattr("sys.argv", [*arguments, "--json"])
  extract.main()
  found = json.loads(capsys.readouterr().out)
  assert f"step {found['step']}, {found['epochs']} whole epochs" in text
  assert f"validation accuracy {found['validation_accuracy']:.2%}\n" in text
  assert pathlib.Path(found["weights"]) == tmp_path / "a.safetensors"
