"""The results page: every published row, means over hand-made runs, and the runs it refuses."""

import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accuracy import published, results
from flax_cifar import errors
from flax_cifar.configs import common
from flax_cifar.models import norms
from flax_cifar.run import config as config_lib

PARAMETERS = {
  "A": [192_672] * 2,
  "B1": [192_672] * 3,
  "B2": [48_656] * 4,
  "C0": [1_172_410],
  "C1": [None],
  "C2": [None],
  "D": [657_146],
  "E1": [48_552, 48_552],
  "E2": [48_552],
  "E3": [48_072],
  "E4": [167_424],
}
REPORTED = {  # test or validation accuracy in percent
  "A": [87.31] * 2,
  "B1": [None] * 3,
  "B2": [77.01, 77.01, 71.76, 70.41],
  "C0": [None],
  "C1": [None],
  "C2": [85.48],
  "D": [82.96],
  "E1": [80.66, 80.66],
  "E2": [77.84],
  "E3": [77.64],
  "E4": [85.75],
}
COMMIT = "0123456789" * 4


def create_content(name="pyramid", seed=0, tests=(0.85,), validations=(0.8, 0.9, 0.85), **changes):
  """The contents of result.json, and the records; several `tests` are those of several seeds."""
  config = common.get_config().to_dict() | {"name": name, "seed": seed, "num_seeds": len(tests)}
  config["model"]["name"] = {"s9": "dilated"}.get(name.split("-")[0], name.split("-")[0])
  content = {
    "test_loss": 0.5,
    "test_accuracy": float(np.mean(tests)),
    "protocol": "published" if "published" in name or "study" in name else "honest",
    "epochs": len(validations),
    "train_seconds": 90.0,
    "seed": seed,
    "num_seeds": len(tests),
    "config": json.loads(json.dumps(config)),
    "versions": {"jax": "0.12.0.1"},
    "command": f"python main.py --config=configs/x.py:seed={seed} --workdir=/tmp/runs/x",
    "commit": COMMIT,
    "date": "2026-11-21T11:10:11+00:00",
    "parameters": 48_656,
    "hardware": "1 x cpu (Intel(R) Xeon(R) Processor, 2 cores)",
  }
  if len(tests) > 1:
    content["test_accuracy_per_seed"] = list(tests)
  records = [
    {"epoch": epoch, "train_accuracy": value - 0.1, "validation_accuracy": value}
    for epoch, value in enumerate(validations, 1)
  ]
  return content | changes, records


def write_folder(path, content, records):
  path.mkdir()
  (path / "result.json").write_text(json.dumps(content))
  (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


@pytest.fixture
def add(tmp_path):
  """Adds a made-up run to tmp_path/results."""

  def call(*, force=False, **arguments):
    folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    write_folder(folder, *create_content(**arguments))
    return results.add([folder], tmp_path, force=force)

  return call


def read_cells(tmp_path, system, text=""):
  """The cells of the first row of `system` whose second cell contains `text`."""
  page = results.write_page(tmp_path).read_text()
  rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
  return next(row for row in rows if row[0] == system and text in row[1])


# ---- The published rows


def test_every_published_result_has_a_row():
  assert list(dict.fromkeys(row.id for row in published.ROWS)) == list(PARAMETERS)
  for system, parameters in PARAMETERS.items():
    rows = [row for row in published.ROWS if row.id == system]
    assert [row.parameters for row in rows] == parameters
    assert [row.reported_accuracy for row in rows] == REPORTED[system]
    for row in rows:
      assert row.reported_accuracy is None or f"{row.reported_accuracy:.2f}" in row.reported


@pytest.mark.parametrize(
  "row", [row for row in published.ROWS if row.parameters], ids=lambda row: row.ours
)
def test_the_parameter_count_is_that_of_our_network(row):
  model = create_model_of(load(row.ours))
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images.shape), False))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == row.parameters


def create_model_of(config):
  return config_lib.create_model(config, num_classes=10)


def load(name):
  """The config called `name`: its file and its variants, joined by dashes."""
  file, *parts = re.sub(r"norm-(\w+)", r"norm=\1", name).split("-")
  config = importlib.import_module(f"flax_cifar.configs.{file}").get_config(",".join(parts))
  assert config.name == name
  return config


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: row.replay)
def test_the_configs_of_a_row_have_its_network_norm_and_protocol(row):
  replay, ours = load(row.replay), load(row.ours)
  assert (replay.protocol, ours.protocol) == ("published", "honest")
  (norm,) = [
    name for name in norms.NORMS if f"{name} norm" in row.what or f"{name[:2]} norm" in row.what
  ]
  for config in (replay, ours):
    assert (config.model.name, config.model.norm) == (row.network, norm)
  assert row.epochs in (replay.total_epochs, None)
  assert row.target_epochs is None or ours.total_epochs <= row.target_epochs


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: row.replay)
def test_the_commands_run_the_configs_of_a_row(row):
  for name in (row.replay, row.ours):
    command = results.get_run_command(name)
    path, arg = re.fullmatch(r"python main.py --config=configs/(\w+)\.py:?(.*)", command).groups()
    config = importlib.import_module(f"flax_cifar.configs.{path}").get_config(arg)
    assert config.name == name


def test_missing_runs_are_listed(tmp_path, add):
  before = results.list_missing(results.load_runs(tmp_path))
  assert (
    len(before)
    == len(set(before))
    == len({row.ours for row in published.ROWS} | {r.replay for r in published.ROWS})
  )
  add(name="pyramid-norm-group")
  after = results.list_missing(results.load_runs(tmp_path))
  assert set(before) - set(after) == {"python main.py --config=configs/pyramid.py:norm=group"}


# ---- The page


def test_a_row_without_runs_reads_not_run(tmp_path):
  page = results.write_page(tmp_path).read_text()
  assert page.count("| not run | not run |") == len(published.ROWS) == 18
  assert "88.50 in 15 epochs: not run" in page
  assert "over 77.84: not run" in page
  assert "None yet." in page


def test_the_page_in_the_repository_is_up_to_date():
  page = (results.DOCS / "results.md").read_text()
  assert page == results.format_page(results.load_runs(results.DOCS))


def test_our_result_is_the_mean_over_seeds_with_the_sample_deviation(tmp_path, add):
  tests = [0.8312, 0.8467, 0.8501, 0.844]
  for seed in (0, 1):
    add(name=f"pyramid-seed-{seed}", seed=seed, tests=tests[seed : seed + 1])
  add(name="pyramid-seed-2", seed=2, tests=tests[2:])  # two at once
  mean, sd = 100 * np.mean(tests), 100 * np.std(tests, ddof=1)
  cells = read_cells(tmp_path, "B2", "batch")
  assert cells[2:] == [
    "48,656",
    "77.01, 21 epochs",
    "not run",
    f"{mean:.2f} ± {sd:.2f} (n = 4), 3 epochs",
    "not run",
    "84.00: reached",
  ]


def test_a_single_run_has_no_deviation(tmp_path, add):
  add(name="five_convs", tests=[0.8899], parameters=436_480)
  cells = read_cells(tmp_path, "C2")
  assert cells[2] == "436,480"
  assert cells[5:] == ["88.99 (n = 1), 3 epochs", "not run", "89.00: missed"]


def test_a_run_on_the_whole_training_split_has_its_own_cell_and_decides_the_target(tmp_path, add):
  add(name="skip-norm-group", tests=[0.77])
  add(name="skip-full-norm-group", tests=[0.78])
  cells = read_cells(tmp_path, "E2")
  assert cells[5:7] == ["77.00 (n = 1), 3 epochs", "78.00 (n = 1), 3 epochs"]
  assert cells[7] == "over 77.84: reached"


@pytest.mark.parametrize(
  ("target", "target_epochs", "test", "verdict"),
  [
    (88.5, None, 0.885, "88.50: reached"),
    (88.5, None, 0.8849, "88.50: missed"),
    (88.5, 3, 0.9, "88.50 in 3 epochs: reached"),
    (88.5, 2, 0.9, "88.50 in 2 epochs: missed"),
    (None, None, 0.8731, "over 87.31: missed"),
    (None, None, 0.8732, "over 87.31: reached"),
  ],
)
def test_the_target_is_the_rows_own_or_the_reported_accuracy(target, target_epochs, test, verdict):
  row = published.Row("A", "dilated", 1, "", 51, "87.31", 87.31, None, "s9", target, target_epochs)
  content, records = create_content("s9", tests=[test])
  run = results.create_run(content | {"metrics": records})
  assert results.check_target(row, [run]) == verdict


def test_a_replay_shows_its_best_epoch_on_test_and_the_last(tmp_path, add):
  add(name="s9-published", tests=[0.85])
  assert read_cells(tmp_path, "A")[4:6] == [
    "best on test 90.00 (n = 1) @ epoch 2; last epoch 85.00 (n = 1)",
    "not run",
  ]


def test_each_of_several_seeds_has_its_own_best_epoch():
  curves = np.array([[0.1, 0.3, 0.2], [0.4, 0.3, 0.4]])
  records = [
    {"epoch": 1 + i, "validation_accuracy": c.mean(), "validation_accuracy_per_seed": c.tolist()}
    for i, c in enumerate(curves.T)
  ]
  assert results.find_best_epochs(records) == [2, 1]


def test_a_run_with_another_protocol_does_not_count(tmp_path, add):
  add(name="pyramid", protocol="published")
  add(name="pyramid-published", protocol="honest")
  assert read_cells(tmp_path, "B2", "batch")[4:6] == ["not run", "not run"]


def test_a_run_of_another_network_does_not_count(tmp_path, add):
  (path,) = add(name="pyramid")
  content = json.loads(path.read_text())
  content["config"]["model"]["name"] = "skip"
  path.write_text(json.dumps(content))
  assert read_cells(tmp_path, "B2", "batch")[5] == "not run"


@pytest.mark.parametrize(
  "flags",
  ["num_seeds=2", "compute_dtype=bfloat16", "data.dir=x", "log.pictures=False", "name=x seed=1"],
)
def test_an_override_that_keeps_or_renames_the_recipe_is_accepted(add, flags):
  words = " ".join(f"--config.{flag}" for flag in flags.split())
  (path,) = add(command=f"python main.py --config=configs/x.py {words}")
  assert json.loads(path.read_text())["command"].endswith(words)


def test_the_table_of_runs_shows_how_to_repeat_each(tmp_path, add):
  add(name="pyramid-published-seed-3", seed=3)
  add(name="pyramid", command="", commit=COMMIT + "+", force=True)
  assert read_cells(tmp_path, "pyramid-published") == [
    *("pyramid-published", "3", "`python main.py --config=configs/x.py:seed=3`", "float32", "3"),
    *("85.00 (n = 1)", "85.00 (n = 1) on test", "75.00 (n = 1)", "1.5"),
    *("1 x cpu (Intel(R) Xeon(R) Processor, 2 cores)", "2026-11-21", "0123456", "0.12.0.1"),
  ]
  cells = read_cells(tmp_path, "pyramid")
  assert (cells[2], cells[6], cells[-2]) == ("", "85.00 (n = 1)", "0123456+")
  add(name="skip", earlier_commits=["abcdefgh"])
  assert read_cells(tmp_path, "skip")[-2] == "abcdefg, 0123456"


def test_runs_with_different_configs_are_not_averaged(tmp_path, add):
  add(name="pyramid", seed=0)
  (path,) = add(name="pyramid", seed=1)
  path.write_text(path.read_text().replace('"batch_size": 128', '"batch_size": 64'))
  with pytest.raises(
    errors.UserError, match="0 and 1 of pyramid are no repetition: batch_size is 128"
  ):
    results.write_page(tmp_path)


def test_a_seed_that_occurs_twice_is_refused(tmp_path, add):
  add(name="pyramid", seed=0, tests=[0.8, 0.9])
  add(name="pyramid-seed-1", seed=1)
  with pytest.raises(errors.UserError, match="seed 1 of pyramid twice"):
    results.write_page(tmp_path)


# ---- Adding runs


def test_a_file_holds_the_result_and_a_line_for_each_epoch(tmp_path, add):
  (path,) = add(name="s9-seed-3-epochs-7", seed=3)
  assert path == tmp_path / "results" / "s9-epochs-7-seed-3.json"
  content, records = create_content("s9-seed-3-epochs-7", seed=3)
  command = "python main.py --config=configs/x.py:seed=3"  # without its --workdir
  assert json.loads(path.read_text()) == content | {"metrics": records, "command": command}
  lines = path.read_text().splitlines()
  assert [json.loads(line.strip(" ,")) for line in lines[-5:-2]] == records


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"commit": COMMIT + "+"}, "code that was not committed"),
    ({"commit": "unknown"}, "code that was not committed"),
    ({"earlier_commits": [COMMIT + "+"]}, "code that was not committed"),
    ({"command": "python /opt/main.py"}, "command of .* has an absolute path"),
    ({"command": "python main.py --config.model.name=skip"}, "no plain run of .*model.name"),
    ({"config": {"name": "x", "data": {"name": "npz:/home/x.npz"}}}, r"data\.name of"),
    ({"hardware": r"C:\x"}, "hardware of"),
    ({"epochs": 4}, "result\\.json is of"),
    ({"epochs": 2}, "result\\.json is of"),
  ],
)
def test_a_run_that_cannot_be_repeated_is_refused(tmp_path, add, changes, message):
  with pytest.raises(errors.UserError, match=message):
    add(**changes)
  assert not (tmp_path / "results").exists()


def test_a_run_that_was_extended_is_refused(tmp_path):
  content, records = create_content()
  records[0]["total_epochs"] = 1
  folder = write_folder(tmp_path / "run", content, records)
  with pytest.raises(errors.UserError, match="was extended from 1 epochs"):
    results.add([folder], tmp_path, force=False)


def test_force_accepts_any_commit_but_no_absolute_path(add):
  add(commit=COMMIT + "+", force=True)
  with pytest.raises(errors.UserError, match="absolute path"):
    add(seed=1, command="/x", force=True)


def test_a_trial_is_refused(add):
  with pytest.raises(errors.UserError, match="is a trial: it has no test accuracy"):
    add(protocol="trial", force=True)


def test_a_file_is_replaced_only_by_force(add):
  add(tests=[0.8])
  with pytest.raises(errors.UserError, match=r"pyramid-seed-0\.json is there already"):
    add(tests=[0.9])
  (path,) = add(tests=[0.9], force=True)
  assert json.loads(path.read_text())["test_accuracy"] == 0.9


def test_an_unfinished_run_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match=r"no result\.json"):
    results.add([tmp_path], tmp_path, force=True)
  (tmp_path / "result.json").write_text('{"epochs": 1}')
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl' cannot be read"):
    results.add([tmp_path], tmp_path, force=True)


def test_all_runs_are_added_or_none(tmp_path):
  good = write_folder(tmp_path / "good", *create_content())
  with pytest.raises(errors.UserError, match=r"no result\.json"):
    results.add([good, tmp_path / "nothing"], tmp_path, force=False)
  assert not (tmp_path / "results").exists()


def test_the_command_line_adds_and_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(results, "DOCS", tmp_path)
  folder = write_folder(tmp_path / "run", *create_content())
  for arguments in (["add", str(folder)], []):
    monkeypatch.setattr("sys.argv", ["results", *arguments])
    results.main()
  shown = capsys.readouterr().out
  assert "results/pyramid-seed-0.json" in shown
  assert "84.00: reached" in (tmp_path / "results.md").read_text()
  monkeypatch.setattr("sys.argv", ["results", "add", str(folder)])
  with pytest.raises(SystemExit, match="2"):
    results.main()
  assert capsys.readouterr().err.startswith("error: ")
