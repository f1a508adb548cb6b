"""The sweep: its runs, the mistakes it refuses, and its comparison of the runs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import matplotlib.axes
import numpy as np
import pytest

from flax_cifar import environment, errors, optim
from flax_cifar.configs import common, variants
from flax_cifar.data import dataset, feeds
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import config as config_lib
from flax_cifar.run import finished
from flax_cifar.tools import compare as compare_lib
from flax_cifar.tools import sweep
from tests import tiny as tiny_lib

ROOT = pathlib.Path(__file__).parents[2]
CORRECT = "correct that and start again"
CONFIG = "--config=configs/quickstart.py"
ACCURACIES = {  # run -> train, validation of each epoch, test
  "norm=batch,seed=0": ([0.5, 0.7], [0.6, 0.5], 0.55),
  "norm=batch,seed=1": ([0.4, 0.8], [0.5, 0.7], 0.65),
  "norm=batch,seed=2": ([0.6, 0.9], [0.7, 0.8], 0.75),
  "norm=layer,seed=0": ([0.3, 0.4], [0.2, 0.3], 0.25),
  "norm=layer,seed=1": ([0.2, 0.5], [0.4, 0.1], 0.15),
  "norm=layer,seed=2": ([0.3, 0.3], [0.3, 0.3], 0.35),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def create_record(epoch, train, validation):
  return {
    "epoch": epoch,
    "train_loss": 1 - train,
    "train_accuracy": train,
    "validation_loss": 1 - validation,
    "validation_accuracy": validation,
  }


def create_run(name, train, validation, test, **changes):
  settings = dict(part.split("=") for part in name.split(",") if part)
  epochs = range(1, len(train) + 1)
  records = [create_record(*values) for values in zip(epochs, train, validation, strict=True)]
  result = {"test_accuracy": test, "parameters": 1234, "protocol": "honest", "train_seconds": 60.0}
  return settings, finished.Run({**result, "epochs": len(records), **changes}, records)


def create_runs():
  return [create_run(name, *values) for name, values in ACCURACIES.items()]


def write_own_run(spec, name, *values):
  """Writes a run as that of a `spec`'s settings `name` would."""
  settings = dict(part.split("=") for part in name.split(","))
  config = sweep.load_config(spec, settings).to_dict()
  write_run(spec.workdir, *create_run(name, *values, config=config, num_seeds=1))


def write_run(workdir, settings, run):
  folder = workdir / variants.format_settings(settings)
  folder.mkdir(parents=True)
  (folder / "result.json").write_text(json.dumps(run.result))
  lines = "".join(json.dumps(record) + "\n" for record in run.records)
  (folder / "metrics.jsonl").write_text(lines)


def test_every_flag_has_a_help_text():
  assert not [action.dest for action in sweep.create_parser()._actions if not action.help]


def test_the_runs_are_all_combinations_and_their_commands_are_those_of_main(tmp_path):
  flags = ["--over=norm=layer,group", "--over=seed=1,2", f"--workdir={tmp_path}"]
  parsed = sweep.parse([CONFIG, *flags, "--config.total_epochs=2"])
  names = ["norm=layer,seed=1", "norm=layer,seed=2", "norm=group,seed=1", "norm=group,seed=2"]
  commands = [sweep.get_command(parsed, s) for s in sweep.get_combinations(parsed.over)]
  assert [command[3:] for command in commands] == [
    [
      f"{CONFIG}:{name}",
      "--config.total_epochs=2",
      f"--workdir={tmp_path / name}",
      "--cluster=none",
    ]
    for name in names
  ]
  assert commands[0][:3] == [sys.executable, "-m", "flax_cifar"]


def test_a_variant_of_the_file_stays_before_the_swept_ones():
  parsed = sweep.parse(["--config=configs/s9.py:study", "--over=norm=layer"])
  assert "--config=configs/s9.py:study,norm=layer" in sweep.get_command(parsed, {"norm": "layer"})


def test_more_values_keep_the_folder_of_a_sweep_and_other_overrides_change_it():
  few = sweep.parse([CONFIG, "--over=seed=0,1"])
  more = sweep.parse([CONFIG, "--over=seed=0,1,2"])
  other = sweep.parse([CONFIG, "--over=seed=0,1", "--config.batch_size=64"])
  assert few.workdir == more.workdir != other.workdir
  assert str(few.workdir).startswith("runs/quickstart-sweep-seed-")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--over=norm=batch"], "--config is missing"),
    (
      ["--config=configs/nope.py", "--over=norm=batch"],
      "--config='nope' is unknown; choose one of five_convs",
    ),
    ([CONFIG], "--over is missing"),
    ([CONFIG, "--over"], "expected one argument"),
    (["--config=quickstart:smok", "--over=seed=0"], "variant 'smok' is unknown"),
    (["--config=quickstart:seed=3", "--over=seed=0,1"], "without 'seed=3', as --over has seed"),
    ([CONFIG, "--over=seed=0", "--config.batchsize=2"], "'batchsize' is unknown.*'batch_size'"),
    ([CONFIG, "--over=lr=0.1,0.10"], "repeats a value"),
    ([CONFIG, "--over=nrm=batch"], "--over='nrm' is unknown; choose one of norm, .*'norm'"),
    ([CONFIG, "--over=norm"], "--over=norm lacks a value"),
    ([CONFIG, "--over=norm="], "--over=norm lacks a value"),
    ([CONFIG, "--over=seed=1,,2"], "--over=seed lacks a value"),
    ([CONFIG, "--over=norm=batch,layer,batch"], "repeats a value"),
    ([CONFIG, "--over=seed=1", "--over=seed=2"], "--over=seed is given twice"),
    ([CONFIG, "--over=norm=batch,gruop"], "--over=norm='gruop' is unknown.*'group'"),
    ([CONFIG, "--over=seed=0,one"], "--over=seed='one' is not valid"),
    ([CONFIG, "--over=seed=1,01"], "--over=seed='01' is not valid"),
    ([CONFIG, "--over=lr=0.1,big"], "--over=lr='big' is not valid.*a positive number"),
    ([CONFIG, "--over=lr=-1"], "--over=lr='-1' is not valid"),
    ([CONFIG, "--over=lr=0.1,1e39"], r"--over=lr='1e39' is not valid.*1e\+38 at most"),
    ([CONFIG, "--over=epochs=1,0"], "--over=epochs='0' is not valid.*from 1 to"),
    ([CONFIG, "--over=seed=0,4294967296"], "'4294967296' is not valid.*from 0 to 4294967295"),
    ([CONFIG, f"--over=seed={'9' * 5000}"], "is not valid.*a whole number"),
    ([CONFIG, "--over=seed=1", "--config.seed=3"], "would hold for every run"),
    ([CONFIG, "--over=norm=batch", "--config.model.norm=layer"], "would hold for every run"),
    ([CONFIG, "--over=seed=1", "--config.num_seeds=2"], "would hold for every run"),
    ([CONFIG, "--over=norm=batch", "--wrokdir=x"], "'--wrokdir=x' is unknown"),
    ([CONFIG, "--over=norm=batch", "--config.seed", "3"], "'3' is unknown"),
    ([CONFIG, "--over=norm=batch", "--jobs=two"], "--jobs: invalid int value: 'two'"),
    ([CONFIG, "--over=norm=batch", "--jobs=0"], "--jobs=0 is not valid.*from 1 to"),
    ([CONFIG, "--over=norm=batch", "--jobs=4097"], "--jobs=4097 is not valid.*the cores"),
  ],
)
def test_a_mistake_is_named_before_anything_runs(arguments, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.parse(arguments)


def start_run(seed=0, epochs=1, lr=0.1):
  """Makes the checks of a run that concern the swept keys."""
  split = dataset.Split(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32))
  config = common.get_config()
  config.update_from_flattened_dict({"seed": seed, "batch_size": 4})
  arguments = config_lib.get_feed_arguments(config)
  feeds.create_feed(split, mean=(0.5,) * 3, mesh=mesh_lib.create_mesh(1), **arguments)
  schedule = optim.create_schedule(steps_per_epoch=1, total_epochs=epochs, **config.schedule)
  optim.create_optimizer(schedule, **{**config.optimizer, "learning_rate": lr})


@pytest.mark.parametrize("key", sweep.RANGES)
def test_the_ranges_are_those_of_the_runs(key):
  low, high = sweep.RANGES[key]
  start_run(**{key: high})
  for outside in (low - 1, 10 * high + 1):
    with pytest.raises(errors.UserError):
      start_run(**{key: outside})


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--slurm=timeout_min=60"], "--slurm=.*given with --engine=slurm"),
    (["--engine=slurm", "--jobs=2"], "--jobs=2 .*for --engine=here alone"),
  ],
)
def test_flags_that_would_have_no_effect_are_refused(flags, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.parse([CONFIG, "--over=norm=batch", *flags])


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch, capsys):
  flags = [CONFIG, "--over=seed=0", f"--workdir={tmp_path}", "--collect", "--config.total_epochs=1"]
  write_own_run(sweep.parse(flags), "seed=0", [0.5], [0.5], 0.5)
  (tmp_path / "table.json").mkdir()
  monkeypatch.setattr(sys, "argv", ["sweep", *flags])
  with pytest.raises(SystemExit) as end:
    sweep.main()
  assert end.value.code == 2
  assert "cannot be written to" in capsys.readouterr().err


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path):
  runs = create_runs()
  for record in runs[0][1].records:
    record["train_loss"] = None
  assert compare_lib.save_curves(tmp_path / "curves.png", compare_lib.group_runs(runs))


def test_keys_that_are_not_swept_can_be_overridden():
  parsed = sweep.parse([CONFIG, "--over=norm=batch", "--config.seed=3", "--config.num_seeds=2"])
  assert parsed.overrides == ["--config.seed=3", "--config.num_seeds=2"]


def test_the_table_has_means_and_sample_deviations_over_the_seeds(tmp_path):
  for settings, run in create_runs():
    write_run(tmp_path, settings, run)
  over = {"norm": ["batch", "layer"], "seed": ["0", "1", "2"]}
  spec = sweep.Sweep("configs/quickstart.py", over, ["--config.total_epochs=2"], tmp_path)
  runs = [
    (settings, finished.read_run(sweep.get_workdir(spec, settings)))
    for settings in sweep.get_combinations(over)
  ]
  assert runs == create_runs()
  rows = [
    compare_lib.summarize(name, group) for name, group in compare_lib.group_runs(runs).items()
  ]
  assert [row["combination"] for row in rows] == ["norm=batch", "norm=layer"]
  for row in rows:
    values = [v for name, v in ACCURACIES.items() if name.startswith(row["combination"])]
    expected = {
      "train_accuracy": [train[-1] for train, _, _ in values],
      "validation_accuracy": [validation[-1] for _, validation, _ in values],
      "best_validation_accuracy": [max(validation) for _, validation, _ in values],
      "test_accuracy": [test for _, _, test in values],
    }
    for name, numbers in expected.items():
      assert row[name]["mean"] == pytest.approx(np.mean(numbers))
      assert row[name]["sd"] == pytest.approx(np.std(numbers, ddof=1))
      assert row[name]["n"] == 3
  sweep.write_table(spec, rows, compare_lib.format_table(rows))
  assert json.loads((tmp_path / "table.json").read_text())["rows"] == rows
  lines = (tmp_path / "table.md").read_text().splitlines()
  assert lines[0].endswith(
    "sweep --config=configs/quickstart.py --over=norm=batch,layer --over=seed=0,1,2 "
    "--config.total_epochs=2"
  )
  assert lines[4] == (
    "| norm=batch | 1,234 | 66.67 ± 15.28 (n = 3) | 70.00 ± 10.00 (n = 3) "
    "| 65.00 ± 10.00 (n = 3) | 80.00 ± 10.00 (n = 3) | 60 |"
  )
  assert "published" not in "".join(lines)


@pytest.mark.parametrize("content", [None, b'{"epoch": 1', b"\xff\xfe"])
def test_missing_or_damaged_records_are_named_with_a_remedy(tmp_path, content):
  settings, run = create_runs()[0]
  write_run(tmp_path, settings, run)
  folder = tmp_path / variants.format_settings(settings)
  path = folder / "metrics.jsonl"
  path.unlink() if content is None else path.write_bytes(content)
  with pytest.raises(errors.UserError, match=r"metrics.jsonl' cannot be read .*delete result.json"):
    finished.read_run(folder)


def test_one_run_has_no_deviation_and_no_validation_is_a_dash():
  settings, run = create_run("seed=4", [0.5], [0.6], 0.55, protocol="published")
  for name in ("validation_accuracy", "validation_loss"):
    run.records[0].pop(name)
  ((name, group),) = compare_lib.group_runs([(settings, run)]).items()
  row = compare_lib.summarize(name, group)
  text = compare_lib.format_table([row])
  assert "| all seeds | 1,234 | – | – | 55.00 (n = 1) | 50.00 (n = 1) | 60 |" in text
  assert "validation is on the test split" in text


def test_a_trial_has_no_test_accuracy():
  _, run = create_run("lr=0.1", [0.5], [0.6], None, protocol="trial")
  del run.result["test_accuracy"]
  text = compare_lib.format_table([compare_lib.summarize("lr=0.1", [run])])
  assert "| lr=0.1 | 1,234 | 60.00 (n = 1) | 60.00 (n = 1) | – | 50.00 (n = 1) | 60 |" in text
  assert "the test split was not looked at" in text


def test_seeds_trained_at_once_count_as_seeds():
  _, run = create_run("norm=batch", [0.4, 0.5], [0.5, 0.5], 0.6)
  run.result["test_accuracy_per_seed"] = [0.5, 0.7]
  for record, values in zip(run.records, ([0.3, 0.7], [0.6, 0.4]), strict=True):
    record["validation_accuracy_per_seed"] = values
  scores = compare_lib.get_scores(run.result, run.records)
  assert scores["test_accuracy"] == [0.5, 0.7]
  assert scores["validation_accuracy"] == [0.6, 0.4]
  assert scores["best_validation_accuracy"] == [0.6, 0.7]
  assert scores["train_accuracy"] == [0.5]


def test_runs_of_different_length_are_not_averaged():
  runs = [create_run("seed=0", [0.1], [0.1], 0.1), create_run("seed=1", [0.1] * 2, [0.1] * 2, 0.1)]
  with pytest.raises(errors.UserError, match=r"\[1, 2\] epochs"):
    compare_lib.group_runs(runs)


def test_curves_are_means_over_seeds_with_a_band(tmp_path, monkeypatch):
  lines, bands = [], []

  def remember(seen, name):
    original = getattr(matplotlib.axes.Axes, name)

    def call(self, *arrays, **options):
      if len(arrays[0]):
        seen.append((np.asarray(arrays[1:]), options["color"], options.get("linestyle")))
      return original(self, *arrays, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, name, call)

  remember(lines, "plot")
  remember(bands, "fill_between")
  compare_lib.save_curves(tmp_path / "curves.png", compare_lib.group_runs(create_runs()))
  assert [(color, style) for _, color, style in lines] == [
    (color, style) for _ in range(2) for color in ("C0", "C1") for style in ("--", "-")
  ]
  assert len(bands) == 8
  validation = 100 * np.array([[0.6, 0.5], [0.5, 0.7], [0.7, 0.8]])
  mean, sd = validation.mean(0), validation.std(0, ddof=1)
  np.testing.assert_allclose(lines[5][0][0], mean)
  np.testing.assert_allclose(bands[5][0], [mean - sd, mean + sd])
  np.testing.assert_allclose(lines[0][0][0], [0.5, 0.2])
  assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_each_of_many_combinations_has_its_own_color(tmp_path):
  runs = [create_run(f"epochs={number}", [0.5], [0.5], 0.5) for number in range(12)]
  compare_lib.save_curves(tmp_path / "curves.png", compare_lib.group_runs(runs))
  assert len(set(compare_lib._get_colors(12))) == 12


def test_values_that_do_not_fit_together_are_refused_before_the_first_run(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep, "make_runs", lambda *args: pytest.fail("a run began"))
  flags = ["--over=epochs=60,5", "--config.schedule.name=cosine"]
  flags += ["--config.schedule.cosine.warmup=10.0", f"--workdir={tmp_path / 'sweep'}"]
  with pytest.raises(errors.UserError, match=r"schedule\.cosine\.warmup=10"):
    sweep.run_sweep(sweep.parse([CONFIG, *flags]))
  assert not (tmp_path / "sweep").exists()


def fail_main(monkeypatch, workdir, over, create_command):
  """Calls the program, whose runs are those of `create_command`; returns its status."""
  monkeypatch.setattr(sweep, "get_command", create_command)
  monkeypatch.setattr(sys, "argv", ["sweep", CONFIG, f"--over={over}", f"--workdir={workdir}"])
  with pytest.raises(SystemExit) as stop:
    sweep.main()
  return stop.value.code


def test_a_run_that_fails_stops_the_sweep(tmp_path, monkeypatch, capsys):
  def create_command(spec, settings):
    name = settings["norm"]
    code = f"open({str(spec.workdir / name)!r}, 'w'); raise SystemExit({3 * (name == 'layer')})"
    return [sys.executable, "-c", code]

  assert fail_main(monkeypatch, tmp_path, "norm=batch,layer,group", create_command) == 3
  assert {path.name for path in tmp_path.iterdir()} == {"batch", "layer"}
  stderr = capsys.readouterr().err
  assert (
    stderr == "error: run norm=layer ended with status 3; the same command goes on from there\n"
  )


@pytest.mark.parametrize("diverging", [["seed=1"], ["seed=0", "seed=1"]])
def test_a_run_that_diverges_leaves_the_others(tmp_path, monkeypatch, capsys, diverging):
  def create_command(spec, settings):
    name = variants.format_settings(settings)
    if name not in diverging:
      write_own_run(spec, name, *[[0.5] * 3] * 2, 0.5)
    return [sys.executable, "-c", f"raise SystemExit({2 * (name in diverging)})"]

  assert fail_main(monkeypatch, tmp_path, "seed=0,1", create_command) == 2
  out, err = capsys.readouterr()
  assert "run 2/2: seed=1" in out
  assert "run seed=1 ended with status 2; the others go on\n" in out
  assert err.endswith(f"error: run {diverging[0]} ended with status 2; {CORRECT}\n")
  assert (tmp_path / "table.md").exists() == (diverging == ["seed=1"])
  assert ("not finished and left out: seed=1" in err) == (diverging == ["seed=1"])


def test_jax_is_not_needed_to_refuse_arguments():
  code = "import sys; from flax_cifar.tools import sweep; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def call(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "flax_cifar.tools.sweep", *arguments],
    env=os.environ | {"XLA_FLAGS": ""},  # with one device, as users have
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


def test_runs_at_once_print_to_files_and_change_no_command(tmp_path):
  flags = [CONFIG, "--over=seed=0,1", f"--workdir={tmp_path}"]
  alone, together = sweep.parse(flags), dataclasses.replace(sweep.parse(flags), num_jobs=2)
  one, two = (sweep.create_job(spec, {"seed": "1"}) for spec in (alone, together))
  assert one.command == two.command
  assert (one.log, two.log) == (None, tmp_path / "seed=1.log")


def test_a_log_folder_that_cannot_be_created_is_named(tmp_path):
  (tmp_path / "file").touch()
  spec = sweep.Sweep("configs/quickstart.py", {"seed": ["0"]}, [], tmp_path / "file" / "sweep", 2)
  with pytest.raises(errors.UserError, match="sweep' cannot be written to"):
    sweep.run_sweep(spec)


def test_shards_make_their_runs_and_collect_compares_what_has_finished(tmp_path, capsys):
  flags = [CONFIG, "--over=seed=0,1,2", f"--workdir={tmp_path}", "--config.total_epochs=1"]
  made = []

  def run_jobs(jobs, shares):
    made.extend(job.name for job in jobs)
    for job in jobs:
      write_own_run(sweep.parse(flags), job.name, [0.5], [0.5], 0.5)
    return []

  with mock.patch.object(sweep.jobs_lib, "run_jobs", run_jobs):
    with pytest.raises(errors.UserError, match="has finished; start them first"):
      sweep.run_sweep(sweep.parse([*flags, "--collect"]))
    sweep.run_sweep(sweep.parse([*flags, "--shard=0/2"]))
  assert made == ["seed=0", "seed=2"]
  out = capsys.readouterr().out
  assert f"--config.total_epochs=1 --workdir={tmp_path} --collect" in out
  assert not (tmp_path / "table.md").exists()
  sweep.run_sweep(sweep.parse([*flags, "--collect"]))
  assert "not finished and left out: seed=1" in capsys.readouterr().err
  (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
  assert row["test_accuracy"]["n"] == 2


@pytest.mark.parametrize(
  ("flag", "reason"),
  [
    ("--config.batch_size=64", "has another config: batch_size is 32 there and 64 here"),
    ("--config.total_epochs=2", "has another config: epochs are 1 there and 2 here"),
  ],
)
def test_runs_of_another_config_are_left_out(tmp_path, capsys, flag, reason):
  flags = [CONFIG, "--over=seed=0,1", f"--workdir={tmp_path}", "--config.total_epochs=1"]
  write_own_run(sweep.parse(flags), "seed=0", [0.5], [0.5], 0.5)
  changed = sweep.parse([*flags, "--collect", flag])
  write_own_run(changed, "seed=1", *([[0.5] * (1 + ("epochs" in flag))] * 2), 0.6)
  sweep.run_sweep(changed)
  assert reason in capsys.readouterr().err
  (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
  assert row["test_accuracy"] == {"mean": 0.6, "sd": None, "n": 1}


def test_a_sweep_trains_runs_in_parallel(tmp_path):
  flags = [CONFIG, "--over=seed=0,1", f"--workdir={tmp_path / 'sweep'}"]
  flags += tiny_lib.write_quick_run(tmp_path, total_epochs=1)
  num_jobs = min(environment.count_cores(), 2)
  status, stdout, stderr = call(*flags, f"--jobs={num_jobs}")
  assert (status, stderr) == (0, "")
  logs = sorted((tmp_path / "sweep").glob("*.log"))
  assert [log.name for log in logs] == ["seed=0.log", "seed=1.log"] * (num_jobs > 1)
  folders = [tmp_path / "sweep" / name for name in ("seed=0", "seed=1")]
  results = [json.loads((path / "result.json").read_text()) for path in folders]
  (row,) = json.loads((tmp_path / "sweep" / "table.json").read_text())["rows"]
  assert row["test_accuracy"]["mean"] == pytest.approx(
    np.mean([r["test_accuracy"] for r in results])
  )
  assert f"| all seeds | {results[0]['parameters']:,} |" in stdout
  assert (tmp_path / "sweep" / "curves.png").exists()
