"""Sweeps over many machines: shards from flags and schedulers, and submission by submitit."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from flax_cifar import errors
from flax_cifar.tools import jobs as jobs_lib
from flax_cifar.tools import shards

ARRAY = {
  "SLURM_ARRAY_TASK_ID": "2",
  "SLURM_ARRAY_TASK_MIN": "0",
  "SLURM_ARRAY_TASK_MAX": "4",
  "SLURM_ARRAY_TASK_STEP": "1",
  "SLURM_ARRAY_TASK_COUNT": "5",
}
TASKS = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
  ("text", "environment", "shard"),
  [
    (None, {}, (0, 1)),
    ("2/5", {}, (2, 5)),
    ("2/5", ARRAY, (2, 5)),
    (None, ARRAY, (2, 5)),
    (None, TASKS, (3, 4)),
    (None, {**TASKS, "SLURM_NTASKS": "1"}, (0, 1)),
    (None, {**TASKS, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),  # an interactive step
    (None, {"SLURM_NTASKS": "4"}, (0, 1)),  # an allocation, not a step of it
    (None, {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "3"}, (1, 3)),
  ],
)
def test_the_shard_is_that_of_the_flag_or_of_the_scheduler(text, environment, shard):
  assert shards.find_shard(text, environment) == shards.Shard(*shard)


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3", "0.5/2"])
def test_a_wrong_shard_is_named(text):
  with pytest.raises(errors.UserError, match=f"--shard={text!r} .* I/N"):
    shards.find_shard(text, {})


@pytest.mark.parametrize(
  "changes",
  [
    {"ID": "3", "MIN": "3", "MAX": "3", "COUNT": "1"},  # --array=3
    {"ID": "4", "COUNT": "3"},  # --array=0,1,4
    {"ID": "2", "STEP": "2", "COUNT": "3"},  # --array=0-4:2
    {"MAX": ""},
  ],
)
def test_a_part_of_an_array_is_refused(changes):
  array = ARRAY | {f"SLURM_ARRAY_TASK_{key}": value for key, value in changes.items()}
  with pytest.raises(errors.UserError, match="which is not --array=0-N; pass --shard=I/N"):
    shards.find_shard(None, array)


def test_an_indexed_job_must_tell_its_size():
  with pytest.raises(errors.UserError, match="set JOB_COMPLETIONS"):
    shards.find_shard(None, {"JOB_COMPLETION_INDEX": "0"})


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_are_a_partition(count):
  items = list(range(5))
  parts = [shards.Shard(index, count).select(items) for index in range(count)]
  assert sorted(itertools.chain(*parts)) == items


def test_parameters_of_submitit_are_numbers_words_or_lists():
  texts = ["timeout_min=60", "slurm_partition=gpu", "slurm_setup=['module load python']"]
  assert shards.parse_parameters(texts) == {
    "timeout_min": 60,
    "slurm_partition": "gpu",
    "slurm_setup": ["module load python"],
  }
  with pytest.raises(errors.UserError, match=r"--slurm='gpu' .* KEY=VALUE"):
    shards.parse_parameters(["gpu"])


def create_job(name, code):
  return jobs_lib.Job(name, [sys.executable, "-c", code])


SBATCH = """#!/bin/sh
cp "$1" {folder}/script
echo Submitted batch job 4711
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Stand-ins for the commands of SLURM, and the folder where `sbatch` keeps the script."""
  pytest.importorskip("submitit")
  folder = tmp_path / "slurm"
  folder.mkdir()
  for name, text in (("sbatch", SBATCH.format(folder=folder)), ("srun", "#!/bin/sh\n")):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
  return folder


def test_slurm_gets_an_array_with_a_task_for_each_run(slurm, tmp_path, capsys):
  jobs = [create_job(name, "") for name in ("a", "b", "c")]
  shards.submit(jobs, tmp_path / "jobs", {"timeout_min": 240, "slurm_partition": "gpu"})
  script = (slurm / "script").read_text()
  for option in ("--array=0-2", "--time=240", "--partition=gpu"):
    assert f"#SBATCH {option}" in script
  shown = capsys.readouterr().out.splitlines()
  assert [line.partition(", log")[0] for line in shown] == [
    f"submitted {name} as job 4711_{number}" for number, name in enumerate("abc")
  ]


def test_an_unknown_parameter_of_slurm_is_one_line(slurm, tmp_path):
  with pytest.raises(errors.UserError, match=r"--engine='slurm' cannot submit .*no_such"):
    shards.submit([create_job("a", "")], tmp_path / "jobs", {"no_such_parameter": 1})


def test_without_slurm_nothing_can_be_submitted(tmp_path):
  pytest.importorskip("submitit")
  with pytest.raises(errors.UserError, match="--engine='slurm' cannot submit"):
    shards.submit([create_job("a", "")], tmp_path / "jobs", {"timeout_min": 1})


@pytest.mark.parametrize("name", ["timeout_min", "slurm_timeout_min", "slurm_time"])
def test_slurm_needs_the_time_of_a_run(name):
  shards.check_parameters({name: 5})
  with pytest.raises(errors.UserError, match=r"needs the minutes .*--slurm=timeout_min=240"):
    shards.check_parameters({"slurm_partition": "gpu"})


RUN = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("saved").touch() or exit(143))
pathlib.Path("ready").touch()
time.sleep(60)
"""
PREEMPT = f"""
import signal, sys
from flax_cifar.tools import jobs, shards
task = shards.Task(jobs.Job("a", [sys.executable, "-c", {RUN!r}]))
signal.signal(signal.SIGUSR1, lambda *_: print(type(task.checkpoint()).__name__, flush=True))
try:
  task()
except jobs.JobFailed as failure:
  print(failure.status)
"""


def test_a_task_that_is_preempted_saves_and_asks_for_another_machine(tmp_path):
  """The signal reaches the thread that waits for the run, as submitit's does."""
  pytest.importorskip("submitit")
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, "-c", PREEMPT]
  process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
  while not (tmp_path / "ready").exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGUSR1)
  output, _ = process.communicate(timeout=30)
  assert output.split() == [b"DelayedSubmission", b"143"]
  assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
  "variables",
  [
    {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
    {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "x"},
    {"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "2"},
  ],
)
def test_variables_that_make_no_part_are_quoted(variables):
  with pytest.raises(errors.UserError, match="is no part of a sweep; pass --shard=I/N"):
    shards.find_shard(None, variables)
