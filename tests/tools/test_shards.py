"""Sweeps over many machines: shards from flags and schedulers, and submission by submitit."""

import contextlib
import itertools
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from flax_cifar import errors
from flax_cifar.tools import jobs as jobs_lib
from flax_cifar.tools import shards

ARRAY = {
  "SLURM_ARRAY_TASK_ID": "14",
  "SLURM_ARRAY_TASK_MIN": "10",
  "SLURM_ARRAY_TASK_STEP": "2",
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


SUBMIT = """
import pathlib, sys
from flax_cifar.tools import jobs, shards
codes = {"good": "open('done', 'w')", "bad": "raise SystemExit(3)"}
made = [jobs.Job(name, [sys.executable, "-c", code]) for name, code in codes.items()]
shards.submit(made, pathlib.Path("jobs"), "local", {"timeout_min": 5})
"""


def test_submitted_tasks_run_and_a_failure_names_its_log(tmp_path):
  pytest.importorskip("submitit")
  command, root = [sys.executable, "-c", SUBMIT], str(pathlib.Path(__file__).parents[2])
  environment = os.environ | {"PYTHONPATH": root}
  ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert (tmp_path / "done").exists()
  assert "submitted good as job" in ended.stdout
  assert re.search(r"JobFailed: run bad .*\.err says why", ended.stderr)


@pytest.mark.parametrize(
  ("engine", "parameters"), [("slurm", {}), ("local", {"no_such_parameter": 1})]
)
def test_what_cannot_be_submitted_is_one_line(tmp_path, engine, parameters):
  pytest.importorskip("submitit")
  with pytest.raises(errors.UserError, match=f"--engine='{engine}' cannot submit"):
    shards.submit([create_job("a", "")], tmp_path / "jobs", engine, parameters)


def test_a_task_that_is_preempted_saves_and_asks_for_another_machine(tmp_path):
  submitit = pytest.importorskip("submitit")
  saved = tmp_path / "saved"
  code = (
    "import signal, time, pathlib\n"
    f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(saved)!r}).touch() or exit(143))\n"
    f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
    "time.sleep(60)\n"
  )
  task = shards.Task(create_job("a", code))
  thread = threading.Thread(target=run_quietly, args=[task])
  thread.start()
  while not (tmp_path / "ready").exists():
    time.sleep(0.02)
  again = task.checkpoint()
  thread.join()
  assert saved.exists()
  assert isinstance(again, submitit.helpers.DelayedSubmission)


def run_quietly(task):
  with contextlib.suppress(jobs_lib.JobFailed):
    task()
