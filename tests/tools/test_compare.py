"""The comparison of two recipes, seed by seed."""

import json
import sys

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.tools import compare
from tests import tiny


def write_run(folder, seed, *accuracies, **changes):
  """A finished run without its training: `accuracies` are of seed, seed + 1, ..."""
  config = tiny.get_config("shapes", seed=seed, num_seeds=len(accuracies), **changes).to_dict()
  scores = {"test_accuracy": float(np.mean(accuracies))}
  record = {"epoch": 1, "train_accuracy": 0.9, "validation_accuracy": float(np.mean(accuracies))}
  if len(accuracies) > 1:
    for content in (scores, record):
      content |= {f"{name}_per_seed": list(accuracies) for name in content if name != "epoch"}
  folder.mkdir(parents=True)
  (folder / "result.json").write_text(
    json.dumps({**scores, "epochs": 1, "seed": seed, "config": config})
  )
  (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_the_interval_is_students_of_the_paired_differences(tmp_path):
  """Differences 1, 2 and 3 points: mean 2, sd 1; t of two degrees of freedom is 4.3027."""
  for seed, (a, b) in enumerate([(0.80, 0.81), (0.85, 0.87), (0.90, 0.93)]):
    write_run(tmp_path / "a" / str(seed), seed, a)
    write_run(tmp_path / "b" / str(seed), seed, b, **{"compute_dtype": "bfloat16"})
  write_run(tmp_path / "b" / "more", 3, 0.5, **{"compute_dtype": "bfloat16"})  # no partner
  difference = compare.compare(tmp_path / "a", tmp_path / "b", "test")
  assert (difference.seeds, difference.unpaired) == ([0, 1, 2], ([], [3]))
  half = 0.01 * 4.302653 / 3**0.5
  np.testing.assert_allclose(difference.sample["interval"], (0.02 - half, 0.02 + half), rtol=1e-6)
  assert difference.verdict.startswith("no difference is shown")
  assert difference.changes == ["compute_dtype is 'float32' in A and 'bfloat16' in B"]


@pytest.mark.parametrize(("better", "verdict"), [(0.9, "B is better"), (0.7, "A is better")])
def test_several_seeds_of_one_run_count_each(tmp_path, better, verdict):
  write_run(tmp_path / "a", 0, 0.80, 0.81, 0.79, 0.80)
  write_run(tmp_path / "b", 1, better, better, better)
  difference = compare.compare(tmp_path / "a", tmp_path / "b", "validation")
  assert (difference.seeds, difference.a) == ([1, 2, 3], [0.81, 0.79, 0.80])
  assert difference.unpaired == ([0], [])
  assert difference.verdict == verdict


def test_one_pair_has_no_interval(tmp_path, monkeypatch, capsys):
  write_run(tmp_path / "a", 0, 0.8)
  write_run(tmp_path / "b", 0, 0.9, **{"model.norm": "group"})
  arguments = [str(tmp_path / name) for name in "ab"]
  monkeypatch.setattr(sys, "argv", ["compare", *arguments])
  compare.main()
  assert capsys.readouterr().out.splitlines() == [
    "A         validation accuracy 80.00 (n = 1)",
    "B         validation accuracy 90.00 (n = 1)",
    "B - A     +10.00 points (1 pair)",
    "verdict   one pair says nothing of chance; train more seeds",
    "differs   model.norm is 'batch' in A and 'group' in B",
  ]
  monkeypatch.setattr(sys, "argv", ["compare", *arguments, "--json"])
  compare.main()
  content = json.loads(capsys.readouterr().out)
  assert (content["n"], content["interval"], content["a"]) == (1, None, [0.8])


@pytest.mark.parametrize("name", ["cost$_$x", "_old"])
def test_any_name_of_a_folder_is_in_the_legend(tmp_path, name):
  write_run(tmp_path / name, 0, 0.8)
  groups = {name: compare.find_runs(tmp_path / name)}
  figure = compare.draw_curves(groups)
  legend = [text.get_text().strip() for text in figure.axes[1].get_legend().get_texts()]
  assert legend == [name, "train", "validation"]
  compare.save_curves(tmp_path / "curves.png", groups)
  assert (tmp_path / "curves.png").exists()


def test_settings_of_augmentations_that_no_run_uses_make_no_difference(tmp_path):
  write_run(tmp_path / "a", 0, 0.8, **{"augment.ops": ("random_crop",)})
  changes = {"augment.ops": ("random_crop",), "augment.rotate.limit": 3.0}
  write_run(tmp_path / "b", 0, 0.9, **changes, **{"augment.random_crop.padding": 1})
  difference = compare.compare(tmp_path / "a", tmp_path / "b", "test")
  assert difference.changes == ["augment.random_crop.padding is 4 in A and 1 in B"]


def test_a_run_that_was_extended_is_no_repetition(tmp_path):
  for name in "ab":
    write_run(tmp_path / name, 0, 0.8, total_epochs=1)
  path = tmp_path / "b" / "metrics.jsonl"
  path.write_text(json.dumps({**json.loads(path.read_text()), "total_epochs": 8}))
  difference = compare.compare(tmp_path / "a", tmp_path / "b", "test")
  assert difference.changes == ["extended from epochs is 'absent' in A and [8] in B"]


def write_sweep(folder, rates=("0.1", "0.12")):
  """The runs of a sweep over the rate and the seed, which lie in one folder."""
  for number, rate in enumerate(rates):
    for seed in (0, 1):
      accuracy = 0.5 + 0.1 * number + 0.01 * seed
      changes = {"optimizer.learning_rate": float(rate), "name": f"lr-{rate}-seed-{seed}"}
      write_run(folder / f"lr={rate},seed={seed}", seed, accuracy, **changes)


def test_settings_name_the_runs_of_a_sweep_that_have_all_of_them(tmp_path):
  write_sweep(tmp_path)
  (tmp_path / "lr=0.1,seed=2").mkdir()  # not finished
  difference = compare.compare(tmp_path / "lr=0.1", tmp_path / "lr=0.12", "test")
  assert (difference.seeds, difference.a, difference.b) == ([0, 1], [0.5, 0.51], [0.6, 0.61])
  assert difference.changes == ["optimizer.learning_rate is 0.1 in A and 0.12 in B"]
  single = compare.compare(tmp_path / "seed=1,lr=0.1", tmp_path / "lr=0.12", "test")
  assert (single.seeds, single.a) == ([1], [0.51])


def test_settings_that_name_no_recipe_are_one_line(tmp_path):
  write_sweep(tmp_path)
  with pytest.raises(errors.UserError, match=r"of several recipes: .* as SWEEP/norm=batch does"):
    compare.find_runs(tmp_path)
  with pytest.raises(errors.UserError, match="seed=0' are of several recipes"):
    compare.find_runs(tmp_path / "seed=0")
  for name in ("lr=0.1,norm=batch", "lr=0.", "lr"):
    with pytest.raises(errors.UserError, match=f"no finished run with the settings '{name}'"):
      compare.find_runs(tmp_path / name)
  with pytest.raises(errors.UserError, match=r"'.*lr=0\.1' holds no finished run"):
    compare.find_runs(tmp_path / "no" / "lr=0.1")


def test_the_groups_of_a_folder_differ_in_more_than_their_seeds(tmp_path):
  write_sweep(tmp_path / "sweep")
  groups = compare.find_groups(tmp_path / "sweep")
  assert [path.name for path in groups] == ["lr=0.1", "lr=0.12"]
  assert [[run.result["seed"] for run in runs] for runs in groups.values()] == [[0, 1], [0, 1]]
  assert list(compare.find_groups(tmp_path / "sweep" / "lr=0.1")) == [tmp_path / "sweep" / "lr=0.1"]
  write_run(tmp_path / "sweep" / "lr=0.1,seed=3", 3, 0.5, compute_dtype="bfloat16")  # as no sweep
  names = [path.name for path in compare.find_groups(tmp_path / "sweep")]
  assert names == ["lr=0.1", "lr=0.1,seed=3", "lr=0.12"]


def test_a_replay_that_validates_on_test_says_so(tmp_path):
  write_run(tmp_path / "a", 0, 0.8, protocol="published")
  difference = compare.compare(tmp_path / "a", tmp_path / "a", "validation")
  lines = compare.format_difference(difference).splitlines()
  assert lines[0] == "A         validation accuracy 80.00 (n = 1) (on the test split)"
  assert lines[1].endswith(" (on the test split)")
  assert compare.compare(tmp_path / "a", tmp_path / "a", "test").peeked == (False, False)
  write_run(tmp_path / "b", 0, 0.9, protocol="honest")
  for names, expected in (("ab", [True, False]), ("ba", [False, True])):
    difference = compare.compare(*(tmp_path / name for name in names), "validation")
    lines = compare.format_difference(difference).splitlines()
    assert [line.endswith(" (on the test split)") for line in lines[:2]] == expected


def set_data(folder, **data):
  """Writes into the result of a run on what images it was scored."""
  path = folder / "result.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))


def test_scores_on_different_images_are_warned_of(tmp_path, capsys):
  write_run(tmp_path / "a", 0, 0.8)
  write_run(tmp_path / "b", 0, 0.9)

  def find_warning(score):
    compare.compare(tmp_path / "a", tmp_path / "b", score)
    return capsys.readouterr().err

  set_data(tmp_path / "a", test_sha256="aa", validation_sha256="ab")
  assert find_warning("test") == ""  # B is of an older version
  set_data(tmp_path / "b", test_sha256="aa", validation_sha256="bb")
  assert find_warning("test") == ""
  start = "warning: A and B were scored on different validation images (validation_sha256 is ab in"
  assert find_warning("validation").startswith(f"{start} A and bb in B)")


def test_runs_and_seeds_that_are_left_out_are_named(tmp_path, capsys):
  write_sweep(tmp_path)
  write_run(tmp_path / "lr=0.12,seed=3", 3, 0.7, **{"optimizer.learning_rate": 0.12})
  for name in ("lr=0.1,seed=3", "lr=0.3,seed=0"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
  (tmp_path / "lr=0.1,notes").mkdir()
  difference = compare.compare(tmp_path / "lr=0.1", tmp_path / "lr=0.12", "test")
  assert capsys.readouterr().err == "warning: not finished and left out: lr=0.1,seed=3\n"
  assert "left out  seed 3, which B alone has" in compare.format_difference(difference)
  compare.find_groups(tmp_path)
  expected = "warning: not finished and left out: lr=0.1,seed=3, lr=0.3,seed=0\n"
  assert capsys.readouterr().err == expected
  compare.find_groups(tmp_path / "lr=0.1,seed=0")
  assert capsys.readouterr().err == ""


def test_what_is_no_pair_is_one_line(tmp_path):
  write_run(tmp_path / "a" / "0", 0, 0.8)
  write_run(tmp_path / "b" / "1", 1, 0.8)
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match=r"has seeds \[0\] and .* has \[1\]"):
    compare.compare(tmp_path / "a", tmp_path / "b", "test")
  with pytest.raises(errors.UserError, match=r"'.*empty' holds no finished run"):
    compare.compare(tmp_path / "a", tmp_path / "empty", "test")
  write_run(tmp_path / "a" / "again", 0, 0.8)
  with pytest.raises(errors.UserError, match="two runs of 'tiny' have seed 0"):
    compare.compare(tmp_path / "a", tmp_path / "b", "test")
  write_run(tmp_path / "b" / "other", 2, 0.8, **{"optimizer.learning_rate": 0.5})
  with pytest.raises(errors.UserError, match=r"of several recipes: optimizer\.learning_rate"):
    compare.compare(tmp_path / "b", tmp_path / "b", "test")


def test_a_run_without_the_score_is_named(tmp_path):
  write_run(tmp_path / "a", 0, 0.8)
  (tmp_path / "a" / "metrics.jsonl").write_text('{"epoch": 1, "train_accuracy": 0.9}\n')
  with pytest.raises(errors.UserError, match="'tiny' has no validation accuracy"):
    compare.compare(tmp_path / "a", tmp_path / "a", "validation")
