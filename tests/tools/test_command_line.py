"""The programs as a user calls them, each in its own process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
QUICK = "--config=configs/quickstart.py"


def call(*arguments, **environment):
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--config is missing"),
    (("--config=configs/nope.py",), "configs/nope.py"),
    ((f"{QUICK}:smoky",), "'smoky' is unknown; choose from ours, smoke"),
    ((QUICK, "--config.optimzer.name=sgd"), "'optimzer' Did you mean \"optimizer\""),
    ((QUICK, "--config.optimizer.learning_rat=1"), 'Did you mean "learning_rate"'),
    ((QUICK, "--config.batch_size=many"), "--config.batch_size=many"),
    ((QUICK, "--cofnig=3"), "'cofnig'"),
    ((QUICK, "extra"), "'extra' is not a flag"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
  status, _, stderr = call("main.py", *arguments)
  assert status == 2
  assert message in stderr
  assert stderr.startswith("error: ")
  assert stderr.count("\n") == 1


def test_an_unknown_choice_is_one_line_and_writes_nothing(tmp_path):
  workdir = tmp_path / "run"
  status, _, stderr = call("main.py", QUICK, "--config.model.norm=bach", f"--workdir={workdir}")
  assert (status, stderr.count("\n")) == (2, 1)
  assert "model.norm='bach' is unknown; choose one of batch, ghost" in stderr
  assert not workdir.exists()


def test_summary_prints_the_table():
  status, stdout, _ = call("-m", "flax_cifar.tools.summary", "--config=configs/s9.py")
  assert status == 0
  assert stdout.splitlines()[-1].split() == ["total", "192,672", "154,845,568", "99"]


def tiny_run(tmp_path, **changes):
  data = tiny.write_data(tmp_path / "tiny.npz", train=400, size=32)
  overrides = {
    "data.name": data,
    "data.validation_size": 80,
    "batch_size": 16,
    "num_devices": 1,
    "total_epochs": 5,  # long enough that a slow machine still interrupts it
    "log.pictures": False,
  } | changes
  flags = [f"--config.{key}={value}" for key, value in overrides.items()]
  return ["main.py", QUICK, f"--workdir={tmp_path / 'run'}", *flags]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, signum):
  """A real signal to a real process; augmentation in worker processes."""
  arguments = tiny_run(tmp_path, **{"augment.workers": 1, "checkpoint.every": 2})
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 200
  metrics = tmp_path / "run" / "metrics.jsonl"
  while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
    time.sleep(0.05)
  os.killpg(process.pid, signum)  # as terminals and schedulers do: the workers get it too
  _, stderr = process.communicate(timeout=100)
  assert process.returncode == 128 + signum
  assert "stopped and saved at step" in stderr
  saved = int(stderr.split("at step ")[1].split(";")[0].replace(",", ""))
  assert 20 <= saved < 100
  status, stdout, _ = call(*arguments)
  assert status == 0
  assert f"resumed at step {saved}, epoch" in stdout
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
  assert (tmp_path / "run" / "tensorboard").is_dir()
  assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 5
