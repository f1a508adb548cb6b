"""The tool that evaluates saved weights: it gives the scores of their run, and checks requests."""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from flax_cifar import errors, models, train
from flax_cifar import evaluate as evaluate_lib
from flax_cifar.data import splits as splits_lib
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import weights
from flax_cifar.tools import evaluate
from tests import tiny


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models.MODELS, "tiny", tiny.TinyNet)


@pytest.fixture
def data(tmp_path):
  return tiny.write_data(tmp_path / "tiny.npz", test=41)  # not a whole number of batches


def run(workdir, data, monkeypatch, **changes):
  """Trains and saves the weights of the final test; returns their path and the result."""
  config = tiny.get_config(data, **{"total_epochs": 1, **changes})
  splits, path = (
    splits_lib.load_splits(protocol=config.protocol, **config.data),
    workdir / "copy.safetensors",
  )
  predict = evaluate_lib.predict

  def save_and_predict(eval_step, variables, *rest, **options):
    weights.save_weights(
      path,
      seeds_lib.select(variables, config.num_seeds),
      config=config.to_dict(),
      class_names=splits.class_names,
      image_shape=splits.image_shape,
      mean=config.augment.mean or splits.mean,
      std=config.augment.std or splits.std,
      data=splits.fingerprint,
    )
    return predict(eval_step, variables, *rest, **options)

  with monkeypatch.context() as patch:
    patch.setattr(evaluate_lib, "predict", save_and_predict)
    result = train.train_and_evaluate(config, workdir)
  return path, result


def last_record(workdir):
  return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
  "changes",
  [
    {
      "ema.decay": 0.9,
      "num_devices": 4,
      "augment.mean": (0.5, 0.4, 0.3),
      "augment.std": (0.3, 0.2, 0.1),
    },
  ],
)
def test_the_scores_are_those_of_the_run(tmp_path, data, monkeypatch, changes):
  path, result = run(tmp_path / "run", data, monkeypatch, **changes)
  test = evaluate.evaluate_weights(evaluate.Options(path, split="test"))
  assert (test.split, test.count, test.data) == ("test", 41, data)
  assert test.accuracy == result["test_accuracy"]
  assert test.loss == pytest.approx(result["test_loss"], rel=1e-6)
  validation = evaluate.evaluate_weights(evaluate.Options(path))
  assert (validation.split, validation.count) == ("validation", 16)
  assert validation.accuracy == last_record(tmp_path / "run")["validation_accuracy"]
  assert validation.loss == last_record(tmp_path / "run")["validation_loss"]
  assert not validation.peeked


def test_weights_of_several_seeds_have_the_scores_of_the_first(tmp_path, data, monkeypatch):
  path, result = run(tmp_path / "run", data, monkeypatch, num_seeds=2)
  test = evaluate.evaluate_weights(evaluate.Options(path, split="test"))
  assert test.accuracy == result["test_accuracy_per_seed"][0]
  assert test.loss == pytest.approx(result["test_loss_per_seed"][0], rel=1e-5)


@functools.cache
def create_variables():
  shape = (1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)
  init = jax.jit(lambda key: tiny.TinyNet().init(key, jnp.zeros(shape), train=False))
  return init(jax.random.key(0))


def make_weights(path, data, *, split=None, fingerprint=None, **changes):
  """Saves weights without training; returns the options that evaluate them."""
  config = tiny.get_config(data, **changes)
  weights.save_weights(
    path,
    create_variables(),
    config=config.to_dict(),
    class_names=("0", "1", "2"),
    image_shape=(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    data=fingerprint or {},
  )
  return evaluate.Options(path, split=split)


def test_without_held_out_images_the_default_is_test(tmp_path, data):
  options = make_weights(tmp_path / "w", data, **{"data.validation_size": 0})
  score = evaluate.evaluate_weights(options)
  assert (score.split, score.count) == ("test", 41)
  with pytest.raises(errors.UserError, match="held no images out; try --split=test"):
    evaluate.evaluate_weights(dataclasses.replace(options, split="validation"))


def test_published_validation_is_reported_as_the_test_split(tmp_path, data, monkeypatch, capsys):
  options = make_weights(tmp_path / "w", data, protocol="published")
  score = evaluate.evaluate_weights(options)
  assert (score.split, score.count, score.peeked) == ("validation", 41, True)
  assert (
    score.accuracy == evaluate.evaluate_weights(dataclasses.replace(options, split="test")).accuracy
  )
  monkeypatch.setattr(sys, "argv", ["evaluate", f"--weights={options.weights}"])
  evaluate.main()
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"data      {data}: 41 validation images"
  shown = f"validation accuracy {score.accuracy:.2%} (on the test split), loss {score.loss:.4f}, "
  shown += f"calibration error {score.calibration_error:.2%}"
  assert lines[1] == shown


def test_the_test_split_can_be_evaluated_after_a_trial(tmp_path, data):
  """The trial did not use it, but a user may evaluate on it explicitly."""
  trial = make_weights(tmp_path / "trial", data, split="test", protocol="trial")
  score = evaluate.evaluate_weights(trial)
  assert (score.split, score.count) == ("test", 41)
  assert score == evaluate.evaluate_weights(make_weights(tmp_path / "honest", data, split="test"))


def test_other_data_of_the_same_classes_can_be_evaluated(tmp_path, data):
  """Its test split may be smaller than the validation split of the run."""
  options = make_weights(tmp_path / "w", data, split="test")
  other = tiny.write_data(tmp_path / "other.npz", train=10, test=7, seed=1)
  score = evaluate.evaluate_weights(dataclasses.replace(options, data=other))
  assert (score.data, score.count) == (other, 7)


def write_folder(path, parts=("",), count=6, seed=0):
  rng = np.random.default_rng(seed)
  for part in parts:
    for name in "012":
      (path / part / name).mkdir(parents=True)
      for number in range(count):
        image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(image).save(path / part / name / f"{number}.png")
  return f"folder:{path}"


def test_a_folder_without_a_test_split_is_scored_whole(tmp_path, data):
  options = make_weights(tmp_path / "w", data, **{"data.limit": 4})
  folder = write_folder(tmp_path / "new")
  score = evaluate.evaluate_weights(dataclasses.replace(options, data=folder))
  assert (score.split, score.count) == ("all", 18)
  with pytest.raises(errors.UserError, match="no test split of its own; try --split=all"):
    evaluate.evaluate_weights(dataclasses.replace(options, data=folder, split="test"))


@pytest.mark.parametrize(
  ("split", "count"), [(None, 9), ("test", 9), ("validation", 9), ("all", 27)]
)
def test_the_splits_of_other_data_are_those_of_its_folders(tmp_path, data, split, count):
  options = make_weights(tmp_path / "w", data, split=split)
  folder = write_folder(tmp_path / "new", ("train", "val", "test"), count=3)
  score = evaluate.evaluate_weights(dataclasses.replace(options, data=folder))
  assert (score.split, score.count) == (split or "test", count)


def train_on(path, folder, **changes):
  """Weights as of a run on the data `folder`, without its training, and its split."""
  config = tiny.get_config(folder, **changes)
  splits = splits_lib.load_splits(protocol=config.protocol, **config.data)
  return make_weights(path, folder, fingerprint=splits.fingerprint, **changes), splits


def test_images_that_trained_the_network_are_told_from_others(tmp_path, capsys):
  folder = write_folder(tmp_path / "own", count=20)
  options, splits = train_on(tmp_path / "w", folder, **{"data.validation_size": 5})
  shutil.copytree(tmp_path / "own", tmp_path / "copy")

  def find_warning(**changes):
    evaluate.evaluate_weights(dataclasses.replace(options, **changes))
    return capsys.readouterr().err

  seen = f"warning: {len(splits.train)} of these 60 images trained the network; "
  assert find_warning(data=folder).startswith(seen)
  assert find_warning(data=f"folder:{tmp_path / 'copy'}").startswith(seen)
  assert find_warning() == find_warning(split="test") == ""
  assert find_warning(data=write_folder(tmp_path / "other", count=4, seed=1)) == ""
  (tmp_path / "own" / "2" / "0.png").unlink()
  (tmp_path / "copy" / "2" / "0.png").unlink()
  changed = f"warning: up to {len(splits.train)} of these 59 images trained the network; "
  assert find_warning(data=f"folder:{tmp_path / 'copy' / '..' / 'own'}").startswith(changed)


def test_training_images_in_the_place_of_a_test_split_are_noticed(tmp_path, data, capsys):
  options, splits = train_on(tmp_path / "w", data)
  arrays = {"test_images": splits.train.images, "test_labels": splits.train.labels}
  np.savez(tmp_path / "moved.npz", **(dict(np.load(data.removeprefix("npz:"))) | arrays))
  other = dataclasses.replace(options, data=f"npz:{tmp_path / 'moved.npz'}")
  evaluate.evaluate_weights(other)
  assert capsys.readouterr().err.startswith("warning: 80 of these 80 images trained the network; ")
  evaluate.evaluate_weights(dataclasses.replace(options, data=data))  # its own test split
  assert capsys.readouterr().err == ""


def test_all_images_are_shown_without_the_name_of_a_split(tmp_path, data, monkeypatch, capsys):
  options = make_weights(tmp_path / "w", data)
  folder = write_folder(tmp_path / "new")
  monkeypatch.setattr(sys, "argv", ["evaluate", f"--weights={options.weights}", f"--data={folder}"])
  evaluate.main()
  first, second = capsys.readouterr().out.splitlines()
  assert first == f"data      {folder}: 18 images"
  assert second.startswith("accuracy ")


def test_all_needs_other_data(tmp_path, data):
  with pytest.raises(errors.UserError, match="--split='all' needs --data"):
    evaluate.evaluate_weights(make_weights(tmp_path / "w", data, split="all"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_images_that_have_changed_since_the_run_are_refused(tmp_path, data, split):
  config = tiny.get_config(data)
  splits = splits_lib.load_splits(protocol=config.protocol, **config.data)
  options = make_weights(tmp_path / "w", data, split=split, fingerprint=splits.fingerprint)
  evaluate.evaluate_weights(options)
  tiny.write_data(tmp_path / "tiny.npz", test=41, seed=1)
  with pytest.raises(
    errors.UserError, match=rf"the {split} images .* not those of the run: {split}_sha256"
  ) as refusal:
    evaluate.evaluate_weights(options)
  assert f"--data={data}" not in str(refusal.value)  # it has images that trained the network
  score = evaluate.evaluate_weights(dataclasses.replace(options, data=data, split="test"))
  assert score.count == 41


def test_other_classes_are_refused(tmp_path, data):
  options = make_weights(tmp_path / "w", data)
  arrays = dict(np.load(data.removeprefix("npz:")))
  np.savez(tmp_path / "named.npz", **arrays, class_names=np.array(["a", "b", "c"]))
  expected = r"class_names is \('0', '1', '2'\) there and \('a', 'b', 'c'\) here"
  with pytest.raises(errors.UserError, match=expected):
    evaluate.evaluate_weights(dataclasses.replace(options, data=f"npz:{tmp_path / 'named.npz'}"))


def test_the_directory_of_the_data_can_be_another(tmp_path, data, monkeypatch):
  """Weights may be evaluated on another machine than that of their training."""
  options = make_weights(tmp_path / "w", data, **{"data.dir": "/there"})
  seen, original = [], splits_lib.load_splits

  def load(**arguments):
    seen.append(arguments["dir"])
    return original(**arguments)

  monkeypatch.setattr("flax_cifar.data.splits.load_splits", load)
  evaluate.evaluate_weights(options)
  evaluate.evaluate_weights(dataclasses.replace(options, data_dir="/here"))
  assert seen == ["/there", "/here"]


def test_weights_trained_on_more_devices_can_be_evaluated(tmp_path, data):
  few = evaluate.evaluate_weights(make_weights(tmp_path / "few", data, num_devices=1))
  many = evaluate.evaluate_weights(make_weights(tmp_path / "many", data, num_devices=64))
  odd = evaluate.evaluate_weights(
    make_weights(tmp_path / "odd", data, num_devices=3, eval_batch_size=7)
  )
  assert few == many
  assert odd.accuracy == few.accuracy


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "one of the arguments --weights --model is required"),
    (["--weights=nowhere"], "'nowhere' does not exist"),
    (["--weights=x", "--split=train"], "--split: invalid choice: 'train'"),
    (["--weights=x", "--wieghts=y"], "unrecognized arguments: --wieghts=y"),
    (["--weights", f"{pathlib.Path(__file__)}"], "is damaged or no weights file"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
  with pytest.raises(SystemExit) as stop:
    evaluate.main()
  assert stop.value.code == 2
  stderr = capsys.readouterr().err
  assert stderr.startswith("error: ")
  assert message in stderr
  assert stderr.count("\n") == 1


def test_mirror_images_and_corruptions_are_scored_apart(tmp_path, data):
  """Mirrored data have the same accuracy with mirror images, and other ones without."""
  options = make_weights(tmp_path / "w", data, split="test")
  arrays = dict(np.load(data.removeprefix("npz:")))
  images = {key: array[:, :, ::-1] for key, array in arrays.items() if key.endswith("images")}
  np.savez(tmp_path / "mirrored.npz", **(arrays | images))
  plain = dataclasses.replace(options, data=data, flip=True, corruptions=True)
  score = evaluate.evaluate_weights(plain)
  other = evaluate.evaluate_weights(
    dataclasses.replace(plain, data=f"npz:{tmp_path / 'mirrored.npz'}", corruptions=False)
  )
  assert score.flipped_accuracy == other.flipped_accuracy
  assert score.loss != other.loss
  assert {len(values) for values in score.corrupted.values()} == {5}
  assert score.accuracy == evaluate.evaluate_weights(options).accuracy
  lines = evaluate.format_score(score).splitlines()
  assert lines[2] == f"with mirror images {score.flipped_accuracy:.2%} (test-time augmentation)"
  assert lines[-1] == f"corrupted accuracy {score.corrupted_accuracy:.2%}"
  row = next(line for line in lines if line.startswith("noise"))
  assert row.split()[1:6] == [f"{100 * value:.2f}" for value in score.corrupted["noise"]]


@pytest.mark.parametrize("flag", ["data", "data_dir"])
def test_an_empty_flag_is_refused(flag):
  with pytest.raises(errors.UserError, match=f"--{flag}='' "):
    evaluate.parse(["--model=tiny50k", f"--{flag}="])
